"""Candidates for copies that are no byte copies: the same ΔW to 10⁻³ by norm and sketch.

Factors of another basis, type or rounding give the same ΔW in other bytes. Nothing here reads the
adapters again, so nothing is proved: `cluster` verifies what it merges.

‖ΔW₁ − ΔW₂‖ is at least the difference of the exact norms. So adapters of one layout are gone
through by norm, a block at a time, and compared with those before them in a window of that width:
first by a few numbers of their sketches, whose distance is at most that of all, then by all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.signing.sketch import deviation
from adapterops.fleet.types import Array, Record

TOLERANCE = 1e-3  # of the norm of ΔW
_HALF = 2.0**-11  # what float16 may add to the distance of two sketches of norm 1
_BLOCK = 512  # adapters whose sketches are in memory, and as many that others are compared with
_FEW = 64  # numbers of a sketch looked at first


def near_duplicates(fleet: Fleet) -> list[tuple[str, ...]]:
    """Groups of tenants whose ΔW may be the same, with the byte duplicates of each, by name.

    Each member is near the quietest one of its group. Groups of one content are left out. Memory is
    that of two blocks of sketches. Raises FileError where the index has been rewritten since.
    """
    copies: defaultdict[str, list[str]] = defaultdict(list)
    layouts: defaultdict[int, list[Record]] = defaultdict(list)
    for record in fleet.records:
        if record.status == "ok":
            if record.content not in copies:
                layouts[record.layout].append(record)
            copies[record.content].append(record.tenant.name)
    return [
        tuple(sorted(name for record in group for name in copies[record.content]))
        for records in layouts.values()
        for group in _near(fleet, sorted(records, key=lambda r: (r.norm, r.tenant.name)))
    ]


def _near(fleet: Fleet, records: Sequence[Record]) -> Iterator[list[Record]]:
    """Groups among records of one layout, sorted by norm: all that are near the first."""
    side = fleet.layouts[records[0].layout].side
    # The sketch of a difference within one module, three standard deviations too long.
    limit = TOLERANCE * math.sqrt(1 + 3 * float(deviation(np.ones(1), side))) + _HALF
    norms = np.array([record.norm for record in records])
    leaders = np.zeros(0, np.int64)
    sketches = np.zeros((0, 0), np.float32)  # of the leaders
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for first in range(0, len(records), _BLOCK):
        own = np.arange(first, min(first + _BLOCK, len(records)))
        mine = fleet.sketches(records[first : first + _BLOCK])
        kept = norms[leaders] >= norms[first] * (1 - TOLERANCE)
        kept[:-_BLOCK] = False
        places = np.concatenate([leaders[kept], own])
        rows = np.concatenate([sketches[kept], mine]) if kept.any() else mine
        leader = _assigned(rows, norms[places], len(mine), limit)
        for place in np.flatnonzero(leader >= 0).tolist():
            groups[int(places[leader[place]])].append(int(places[place]))
        leaders, sketches = places[leader < 0], rows[leader < 0]
    for number, members in groups.items():
        yield [records[i] for i in (number, *members)]


def _assigned(rows: Array, norms: Array, count: int, limit: float) -> Array:
    """The leader of each row, -1 for leaders: all but the last `count` rows, which may get one."""
    before = len(rows) - count
    leader = np.full(len(rows), -1, np.int64)
    few = rows[:, :: max(1, rows.shape[1] // _FEW)][:, :_FEW]
    squares = (few * few).sum(1)
    apart = squares[:, None] + squares[before:] - 2 * (few @ few[before:].T)
    near = apart <= limit * limit + 1e-6  # what float32 may lose
    near &= norms[before:] * (1 - TOLERANCE) <= norms[:, None]
    near &= np.arange(len(rows))[:, None] < np.arange(before, len(rows))
    for place in np.flatnonzero(near.any(1)).tolist():
        if leader[place] >= 0:
            continue
        others = np.flatnonzero(near[place]) + before
        others = others[leader[others] < 0]
        distances = np.square(rows[others] - rows[place]).sum(1)
        leader[others[distances <= limit * limit]] = place
    return leader
