"""The least bound at which so many adapters suffice, every pair of it verified.

Sketches say where to look, but estimate: of the pairs that they promise at a bound about half are a
little above it. So bounds are bisected by what verification leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from adapterops.errors import BudgetError
from adapterops.fleet.grouping.cover import for_budget
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.groups import Compare, Grouped
from adapterops.fleet.grouping.outlook import GRID
from adapterops.fleet.grouping.sets import Sets
from adapterops.fleet.verifying.exact import Result

Group = Callable[[Sets, Candidates, float], Grouped]
_STEPS = 10  # bisections: a thousandth of what there is between
_SLACK = 1.1  # a pair's estimate may be so much above its distance


def least_bound(
    sets: Sequence[Sets], graphs: Sequence[Candidates], adapters: int, apart: int, grouped: Group
) -> tuple[float, list[Grouped]]:
    """The bound, and the verified groups of each set at it.

    `graphs` hold the permitted edges of each set up to the widest bound, `apart` counts adapters
    besides. Raises BudgetError where even that bound leaves more than `adapters`.
    """
    fewest = apart + len(sets)
    if adapters < fewest:
        raise BudgetError(
            f"--max-adapters {adapters}: {fewest} are the fewest, as {apart} tenants cannot share "
            f"and the others are {len(sets)} kinds that cannot be compared",
            hint=f"give --max-adapters {fewest} or more",
        )

    def verified(bound: float) -> list[Grouped]:
        return [
            grouped(each, graph.within(_SLACK * each.bounds(bound)), bound)
            for each, graph in zip(sets, graphs, strict=True)
        ]

    def count(found: Sequence[Grouped]) -> int:
        return apart + sum(len(each.groups) for each in found)

    high = GRID[-1]
    best = verified(high)
    if count(best) > adapters:
        raise BudgetError(
            f"--max-adapters {adapters}: {count(best)} are needed even where each tenant may be "
            f"off by {high:g}",
            hint=f"give --max-adapters {count(best)} or more",
        )
    low = min(for_budget(graphs, adapters - apart).max_error, high) if graphs else 0.0
    low /= _SLACK
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = verified(middle)
        if count(found) <= adapters:
            best, high = found, middle
        else:
            low = middle
    return high, best


def remembered(compare: Compare) -> Compare:
    """`compare` that does not open the files of a pair again."""
    known: dict[tuple[str, str], Result] = {}

    def compared(groups: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[Result]]:
        new = [(own, [m for m in members if (own, m) not in known]) for own, members in groups]
        asked: Iterable[tuple[str, list[str]]] = [(own, left) for own, left in new if left]
        for (own, left), results in zip(asked, compare(list(asked)), strict=True):
            known.update({(own, m): result for m, result in zip(left, results, strict=True)})
        for own, members in groups:
            yield [known[own, member] for member in members]

    return compared
