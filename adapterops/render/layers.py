"""Where each module stands in a heat map: rows are layers, columns kinds of module.

`model.layers.3.self_attn.q_proj` is row `model.layers.3`, column `self_attn.q_proj`: names are cut
behind the last index that varies, or behind the first where that gives no compact grid. Names
that fit neither are put down in their natural order, line by line.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapterops.inspection.stems import Family, families, natural

_MOST_ROWS = 160
_MOST_KINDS = 24  # columns with a name
_MOST_COLUMNS = 64
_FILLED = 0.35  # of the cells, at least
_LABEL = 22
_SHARED = 3  # kinds that begin with the same constant index: it says nothing
_SEPARATORS = "._:/"
_NUMBER = re.compile(r"\d{1,9}")
_INDEX = re.compile(rf"[{_SEPARATORS}]\d+[{_SEPARATORS}](?=.)")
_TAIL = re.compile(rf"[{_SEPARATORS}](?=[^\d{_SEPARATORS}])")


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows from top to bottom, columns from left to right.

    `places` are (row, column) of each stem in the order given. `heads` has for each row what it is
    one of (`model.layers`); rows of one head stand together. `columns` are empty where they have
    no names: modules of a layer, or (`ordered`) all modules, in natural order.
    """

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    width: int
    places: tuple[tuple[int, int], ...]
    ordered: bool = False


def arrange(stems: Sequence[str]) -> Grid:
    """The grid of these modules; `stems` are distinct."""
    if not stems:
        return Grid((), (), (), 0, (), ordered=True)
    grouped = families(tuple(stems))
    for cut, most in ((_behind_last, _MOST_KINDS), (_behind_first, _MOST_COLUMNS)):
        pairs = _split(stems, grouped, cut)
        rows, kinds = ({pair[side] for pair in pairs} for side in (0, 1))
        compact = len(stems) >= _FILLED * len(rows) * len(kinds)
        if len(rows) <= _MOST_ROWS and len(kinds) <= most and compact:
            return _grid(pairs)
    return _in_order(stems)


def _split(
    stems: Sequence[str], grouped: Sequence[Family], cut: Callable[[str, str], int]
) -> list[tuple[str, str]]:
    """Each stem as (row, kind). One without an index that varies takes a kind that others have."""
    pairs: dict[str, tuple[str, str]] = {}
    for family in grouped:
        if "*" in family.name:
            for position in family.members:
                stem = stems[position]
                at = cut(family.name, stem)
                pairs[stem] = stem[:at], stem[at:]
    kinds = sorted({kind for _, kind in pairs.values() if kind}, key=lambda kind: -len(kind))
    for stem in stems:
        if stem not in pairs:
            kind = next((kind for kind in kinds if stem.endswith(kind)), stem)
            pairs[stem] = stem.removesuffix(kind), kind
    return [pairs[stem] for stem in stems]


def _behind_last(family: str, stem: str) -> int:
    """Where a stem of this family is cut: what follows the last `*` is the same in all."""
    return len(stem) - len(family.rpartition("*")[2])


def _behind_first(family: str, stem: str) -> int:
    begin = family.index("*")
    number = _NUMBER.match(stem, begin)
    return number.end() if number else begin


def _grid(pairs: Sequence[tuple[str, str]]) -> Grid:
    rows = sorted({row for row, _ in pairs}, key=natural)
    row_of = {row: index for index, row in enumerate(rows)}
    first: dict[str, int] = {}
    for row, kind in pairs:
        first[kind] = min(first.get(kind, row_of[row]), row_of[row])
    labels = _labels(list(first))
    kinds = sorted(first, key=lambda kind: (first[kind], natural(labels[kind]), kind))
    column_of = {kind: index for index, kind in enumerate(kinds)}
    return Grid(
        rows=tuple(rows),
        heads=_heads(rows),
        columns=tuple(labels[kind] for kind in kinds) if len(kinds) <= _MOST_KINDS else (),
        width=len(kinds),
        places=tuple((row_of[row], column_of[kind]) for row, kind in pairs),
    )


def _labels(kinds: Sequence[str]) -> dict[str, str]:
    """Short names of kinds: the longest ends of up to `_LABEL` characters that tell them apart.

    What several begin with, up to an index, is left out: `transformer_blocks.0.attn1.to_q`.
    """
    whole = {kind: kind.lstrip(_SEPARATORS + "0123456789") or kind for kind in kinds}
    begins = Counter(begin for kind in kinds for begin in _begins(whole[kind]))
    ends = {}
    for kind in kinds:
        shared = [begin for begin in _begins(whole[kind]) if begins[begin] >= _SHARED]
        ends[kind] = _ends(whole[kind].removeprefix(shared[-1] if shared else ""))
    short = {
        kind: next((end for end in ends[kind] if len(end) <= _LABEL), ends[kind][-1])
        for kind in kinds
    }
    count = Counter(short.values())
    return {kind: short[kind] if count[short[kind]] == 1 else whole[kind] for kind in kinds}


def _begins(name: str) -> list[str]:
    """What a name begins with up to each index within it."""
    return [name[: found.end()] for found in _INDEX.finditer(name)]


def _ends(name: str) -> list[str]:
    """What is left of a name as more and more of its beginning is cut off."""
    return [name, *(name[found.end() :] for found in _TAIL.finditer(name))]


def _heads(rows: Sequence[str]) -> tuple[str, ...]:
    """What each row is one of: the row that it is part of, else its name without the number."""
    heads: list[str] = []
    open_row = ""  # the last row that is no part of another
    for row in rows:
        inside = open_row and row.startswith(open_row) and row[len(open_row)] in _SEPARATORS
        if not inside:
            open_row = row
        heads.append(open_row if inside else row)
    holds_others = {head for row, head in zip(rows, heads, strict=True) if row != head}
    return tuple(
        head if head in holds_others else head.rstrip("0123456789").rstrip(_SEPARATORS) or head
        for head in heads
    )


def _in_order(stems: Sequence[str]) -> Grid:
    """Line by line, somewhat wider than high; a row is named by the number of its first module."""
    width = math.ceil(math.sqrt(1.5 * len(stems)))
    count = math.ceil(len(stems) / width)
    order = sorted(range(len(stems)), key=lambda index: natural(stems[index]))
    places = {index: divmod(place, width) for place, index in enumerate(order)}
    return Grid(
        rows=tuple(str(row * width + 1) for row in range(count)),
        heads=("modules",) * count,
        columns=(),
        width=width,
        places=tuple(places[index] for index in range(len(stems))),
        ordered=True,
    )


def without_common_start(names: Sequence[str]) -> tuple[str, ...]:
    """Names less the beginning that all of them share, up to a separator."""
    first, last = min(names), max(names)  # what these two share, all of them share
    pairs = enumerate(zip(first, last, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), 0)
    end = max(first.rfind(mark, 0, same) for mark in _SEPARATORS) + 1
    return tuple(name[end:] for name in names)
