"""Which tensor of a merged model is which of its base, where a tool has renamed them.

Savers add and drop leading words (`model.`, `language_model.`) and shard anew. One new head for
each head of the base, the words before a path's first number, chosen by how many names and shapes
then agree: never tensor by tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from adapterops.basemodel.heads import Head
from adapterops.basemodel.names import split
from adapterops.basemodel.prefixes import changed
from adapterops.formats.model import Ref

_Place = tuple[Head, tuple[str, str]]


def match(wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, Ref]) -> dict[str, str]:
    """name in the base -> name in the merged model, for those that have one.

    `wanted` are shapes. Equal names belong together, whatever their shapes; what is left is matched
    by heads, and what is in none of them (`model.scale`) by what changed in front of these.
    """
    found = {name: name for name in wanted if name in there}
    groups: dict[Head, dict[tuple[str, str], str]] = defaultdict(dict)
    for name in wanted:
        if name not in found:
            head, tail = _place(name)
            groups[head][tail] = name
    others: dict[Head, dict[tuple[str, str], str]] = defaultdict(dict)
    for name in there:
        if name not in found:
            head, tail = _place(name)
            others[head][tail] = name
    for head, tails in sorted(groups.items(), key=lambda item: -len(item[1])):
        best = _best(head, tails, others, wanted, there)
        for tail, name in tails.items() if best is not None else ():
            if best is not None and tail in others[best]:
                found[name] = others[best].pop(tail)
    return found | _beside(found, wanted, there)


def _beside(
    found: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, Ref]
) -> dict[str, str]:
    """name -> name in the merged model, of what no head has, by the changes in front of heads."""
    heads = {(_place(name)[0], _place(other)[0]) for name, other in found.items() if name != other}
    fronts = sorted({changed(pair) for pair in heads}, key=lambda pair: (-len(pair[0]), pair))
    taken = set(found.values())
    more: dict[str, str] = {}
    for name in wanted:
        words = tuple(name.split("."))
        if name in found:
            continue
        for own, new in fronts:
            other = ".".join((*new, *words[len(own) :]))
            fits = other in there and there[other].shape == wanted[name]
            if words[: len(own)] == own and fits and other not in taken:
                more[name] = other
                taken.add(other)
                break
    return more


def _best(
    head: Head,
    tails: Mapping[tuple[str, str], str],
    others: Mapping[Head, Mapping[tuple[str, str], str]],
    wanted: Mapping[str, tuple[int, ...]],
    there: Mapping[str, Ref],
) -> Head | None:
    """The head with most tails in common, of equal shapes; then the one most alike, if only one."""

    def rank(other: Head) -> tuple[int, int]:
        both = tails.keys() & others[other].keys()
        hits = sum(wanted[tails[t]] == there[others[other][t]].shape for t in both)
        return hits, _common(head, other)

    ranked = sorted(others, key=rank, reverse=True)
    if not ranked or not rank(ranked[0])[0]:
        return None
    if len(ranked) > 1 and rank(ranked[0]) == rank(ranked[1]):
        return None
    return ranked[0]


def _common(one: Head, other: Head) -> int:
    """How many words two heads share at their ends."""
    count = 0
    for x, y in zip(reversed(one), reversed(other), strict=False):
        if x != y:
            break
        count += 1
    return count


def _place(name: str) -> _Place:
    stem, _, leaf = name.rpartition(".")
    head, tail = split(stem)
    return head, (tail, leaf)
