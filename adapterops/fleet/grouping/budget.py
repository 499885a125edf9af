"""The least bound at which so many adapters suffice, every pair of it verified.

Sketches say where to look, but estimate: of the pairs that they promise at a bound about half are a
little above it. So the search begins at the bound that they promise, goes on from there until one
bound suffices and one does not, and bisects by what verification leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from adapterops.errors import BudgetError
from adapterops.fleet.consent.policy import NEAR_EXACT
from adapterops.fleet.grouping.cover import for_budget
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.groups import Compare, Grouped
from adapterops.fleet.grouping.outlook import GRID
from adapterops.fleet.grouping.sets import Sets
from adapterops.fleet.verifying.exact import Result

Group = Callable[[Sets, Candidates, float], Grouped]
_NEAR = 1e-3  # of the bound: how near to the least it is
_SLACK = 1.1  # so far above a bound are estimates looked at: 3σ̂ of a difference spread over modules
_STRIDE = 1.05  # the first step from one bound to the next; each is twice the one before


def least_bound(
    sets: Sequence[Sets], graphs: Sequence[Candidates], adapters: int, apart: int, grouped: Group
) -> tuple[float, list[Grouped]]:
    """The bound, and the verified groups of each set at it.

    `graphs` hold the permitted edges of each set up to the widest bound, `apart` counts adapters
    besides. Never less than NEAR_EXACT, up to which another's adapter is a tenant's own. Raises
    BudgetError where even the widest bound leaves more than `adapters`.
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

    low, high, best = 0.0, GRID[-1], None
    bound = _promised(graphs, adapters - apart)
    stride = _STRIDE
    while best is None or high - low > _NEAR * high:
        found = verified(bound)
        if count(found) <= adapters:
            best, high = found, bound
            if bound <= NEAR_EXACT:
                break
        elif bound >= GRID[-1]:
            raise BudgetError(
                f"--max-adapters {adapters}: {count(found)} are needed even where each tenant may "
                f"be off by {bound:g}",
                hint=f"give --max-adapters {count(found)} or more",
            )
        else:
            low = bound
        if best is None:
            bound = min(bound * stride, GRID[-1])
        elif low > 0:
            bound = (low + high) / 2
        else:
            bound = max(bound / stride, NEAR_EXACT)
        stride *= stride
    return high, best


def _promised(graphs: Sequence[Candidates], adapters: int) -> float:
    """The bound at which sketches say that so many suffice, the widest where none does."""
    try:
        found = for_budget(graphs, adapters).max_error if graphs else 0.0
    except BudgetError:
        return GRID[-1]
    return min(max(found, NEAR_EXACT), GRID[-1])


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
