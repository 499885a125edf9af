"""Which tenants may share, from sketches: all pairs whose distance may be within the bound.

The squared distance of two sketches estimates that of the adapters with a relative deviation σ̂ that
depends on how the difference is spread over modules: the pair stays if

    d̂² ≤ ε²·‖D_i‖²·(1 + 3σ̂),   σ̂ from the difference's own energies by module.

Nobody else is promised to be found, everyone found is verified. Before that come cheaper tests,
none of which loses more than these three deviations do:

1. norms: ‖D_i − D_j‖ ≥ |‖D_i‖ − ‖D_j‖|, exact; tenants are sorted by norm and compared in blocks;
2. a product of blocks of sketches, projected to k numbers by random signs (the square of a length
   deviates by √(2/k); Achlioptas 2003), kept at five deviations and the largest σ that there is;
3. norms by module: ‖D_i − D_j‖² ≥ Σ_l (‖D_il‖ − ‖D_jl‖)², exact.

Blocks are cut by the number of tenants alone and each is one BLAS call on one thread: the result
does not depend on threads or memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from adapterops.errors import MemoryLimitError
from adapterops.fleet.grouping.graph import Candidates, graph
from adapterops.fleet.signing import sketch
from adapterops.fleet.types import Array
from adapterops.stream import Compute, Job, run

_BLOCK = 2048
_PAIRS = 1024  # compared one by one at once
_DENSE = 512  # rows and columns of a block compared by module at once
_DENSER = 30  # times cheaper is a pair in a block of all pairs than one by itself
_WIDTHS = (256, 512, 1024)
_SINGLE = 1e-5  # of the norms squared: rounding of float32 products
_HALF = 2.0**-11  # of a sketch's norm: rounding of its numbers to float16
_SEED = 0x6164617074657273
_EDGE = 24  # bytes

Progress = Callable[[str, int, int], None]
Found = tuple[Array, Array, Array]  # centres, members, distances


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Tenants sorted by norm: sketches as given, what was projected of them, norms by module.

    `order` finds the rows of `sketches`; everything else is sorted: `norms` and `radii` (N,),
    `modules` (N, L) float32 and `short` (N, k) float32, both of adapters of norm 1, `cut` the
    factor of ε² up to which a pair stays after the projection.
    """

    sketches: Array
    order: Array
    norms: Array
    radii: Array
    modules: Array
    short: Array
    side: int
    cut: float


def edges(
    sketches: Array,
    norms: Array,
    energies: Array,
    side: int,
    radius: float | Array,
    on: Compute | None = None,
    progress: Progress | None = None,
) -> Candidates:
    """The graph of who may serve whom within `radius`.

    `sketches` (N, L·side²) of float16 or float32 are of adapters divided by their `norms` (N,),
    module by module; `energies` (N, L) are the modules' shares of ‖D‖². `radius` is one bound or
    (N,) each tenant's own. Distances in the graph are estimates, up to radius·√(1 + 3σ̂) and a
    little more where float16 cannot tell. Raises MemoryLimitError where there are so many edges
    that `on.memory` cannot hold them.
    """
    on = on or Compute()
    count = len(norms)
    fleet = _sorted(sketches, norms, energies, side, np.broadcast_to(radius, (count,)))
    first = int(np.searchsorted(fleet.norms, 0.0, "right"))  # zero is near nothing but itself
    blocks = range(first, count, _BLOCK)
    peak = 4 * (4 * _BLOCK**2 + 4 * _PAIRS * sketches.shape[1])
    jobs = [Job(f"block {start}", _row, (fleet, start), peak) for start in blocks]
    found: list[Found] = []
    total = 0
    with closing(run(jobs, on)) as results:
        for done, part in enumerate(results, 1):
            found.append(part)
            total += len(part[0])
            if total * _EDGE > on.memory:
                raise MemoryLimitError(
                    f"{count} tenants have more than {total} candidate pairs, for which "
                    f"{on.memory / 1e6:.0f} MB are too little",
                    hint="give more --memory or a smaller --max-error",
                )
            if progress:
                progress("comparing sketches", done, len(jobs))
    centers, members, distances = (
        np.concatenate([part[place] for part in found]) if found else np.zeros(0)
        for place in range(3)
    )
    return graph(count, centers, members, distances)


def _sorted(sketches: Array, norms: Array, energies: Array, side: int, radii: Array) -> _Fleet:
    norms = np.asarray(norms, np.float64)
    order = np.argsort(norms, kind="stable")
    widest = 1 + 3 * float(sketch.deviation(np.ones((1, 1)), side)[0])
    width, cut = _width(sketches.shape[1], float(radii.max(initial=0.0)), widest)
    return _Fleet(
        sketches,
        order,
        norms[order],
        np.asarray(radii, np.float64)[order],
        np.sqrt(np.asarray(energies, np.float32))[order],
        _projected(sketches, order, width),
        side,
        cut,
    )


def _width(columns: int, radius: float, widest: float) -> tuple[int, float]:
    """How many numbers of a projection keep unrelated adapters, √2 apart, out; and the cut."""
    for width in _WIDTHS:
        deviation = math.sqrt(2 / width)
        cut = widest * (1 + 5 * deviation)
        if 2 * width <= columns and cut * radius**2 <= 2 * (1 - 4 * deviation):
            return width, cut
    return columns, widest


def _projected(sketches: Array, order: Array, width: int) -> Array:
    count, columns = sketches.shape
    short = np.empty((count, width), np.float32)
    if width < columns:
        words = np.random.Philox(key=_SEED).random_raw(math.ceil(columns * width / 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=columns * width)
        signs = (bits.reshape(columns, width).astype(np.float32) * 2 - 1) / math.sqrt(width)
    for start in range(0, count, _BLOCK):
        rows = sketches[order[start : start + _BLOCK]].astype(np.float32)
        short[start : start + _BLOCK] = rows @ signs if width < columns else rows
    return short


def _row(fleet: _Fleet, start: int) -> Found:
    """The edges between a block of tenants and those of no smaller norm."""
    found: list[Found] = []
    for rows, columns in _near(fleet, start):
        if not len(rows):
            continue
        small, large = fleet.norms[rows], fleet.norms[columns]
        reach = np.maximum(fleet.radii[rows] * small, fleet.radii[columns] * large)
        keep = _least(fleet, rows, columns) <= reach + _HALF * np.hypot(small, large)
        rows, columns = rows[keep], columns[keep]
        found += _compared(fleet, rows, columns)
    return _joined(found)


def _joined(found: list[Found]) -> Found:
    if not found:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    one, two, three = (np.concatenate([part[place] for part in found]) for place in range(3))
    return one, two, three


def _near(fleet: _Fleet, start: int) -> Iterator[tuple[Array, Array]]:
    """Pairs that norms and projections allow: places of the smaller and of the larger one."""
    stop = min(start + _BLOCK, len(fleet.norms))
    widest = float(fleet.radii.max()) + _HALF
    largest = fleet.norms[stop - 1] / (1 - widest) if widest < 1 else math.inf
    end = int(np.searchsorted(fleet.norms, largest, "right"))
    unit = fleet.norms[stop - 1]
    for first in range(start, end, _BLOCK):
        last = min(first + _BLOCK, end)
        left = _augmented(fleet, slice(start, stop), unit, 0.0)[0]
        right = _augmented(fleet, slice(first, last), unit, fleet.cut * (widest + _HALF) ** 2)[1]
        hits = np.flatnonzero((left @ right.T >= 0).reshape(-1))
        rows, columns = np.divmod(hits, last - first)
        rows, columns = rows + start, columns + first
        later = columns > rows
        yield rows[later], columns[later]


def _augmented(fleet: _Fleet, own: slice, unit: float, allowed: float) -> tuple[Array, Array]:
    """Rows and columns whose product is (allowed·‖D_j‖² − d̂²)/2, j that of the column."""
    sizes = (fleet.norms[own] / unit).astype(np.float32)[:, None]
    short = fleet.short[own] * sizes
    halves = (0.5 - _SINGLE) * np.sum(short * short, axis=1, keepdims=True)
    one = np.ones_like(sizes)
    limits = np.float32(0.5 * allowed) * sizes**2 - halves
    return np.hstack([short, -halves, one]), np.hstack([short, one, limits])


def _least(fleet: _Fleet, rows: Array, columns: Array) -> Array:
    """√Σ_l (‖D_il‖ − ‖D_jl‖)², which no distance is below."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), 16 * _PAIRS):
        part = slice(start, start + 16 * _PAIRS)
        i, j = rows[part], columns[part]
        ratio = (fleet.norms[j] / fleet.norms[i]).astype(np.float32)[:, None]
        apart = fleet.modules[i] - ratio * fleet.modules[j]
        result[part] = np.sqrt(np.einsum("pl,pl->p", apart, apart)) * fleet.norms[i]
    return result


def _compared(fleet: _Fleet, rows: Array, columns: Array) -> list[Found]:
    """The edges among pairs, by whichever way of comparing is cheaper for so many."""
    own, others = np.unique(rows), np.unique(columns)
    if len(own) * len(others) >= _DENSER * len(rows):
        return [
            _pairs(fleet, rows[at : at + _PAIRS], columns[at : at + _PAIRS])
            for at in range(0, len(rows), _PAIRS)
        ]
    found = []
    for start in range(0, len(own), _DENSE):
        mine = own[start : start + _DENSE]
        for first in range(0, len(others), _DENSE):
            theirs = others[first : first + _DENSE]
            found += _dense(fleet, mine, theirs)
    return found


def _pairs(fleet: _Fleet, rows: Array, columns: Array) -> Found:
    """The edges among pairs, from the differences of their sketches."""
    ratio = (fleet.norms[columns] / fleet.norms[rows]).astype(np.float32)[:, None]
    apart = fleet.sketches[fleet.order[rows]].astype(np.float32)
    apart -= ratio * fleet.sketches[fleet.order[columns]].astype(np.float32)
    apart = apart.reshape(len(rows), -1, fleet.side**2)
    energies = np.einsum("pld,pld->pl", apart, apart).astype(np.float64)
    return _decided(fleet, rows, columns, energies.sum(1), sketch.deviation(energies, fleet.side))


def _dense(fleet: _Fleet, rows: Array, columns: Array) -> list[Found]:
    """The edges of all these against all those, by a product for each module.

    What is so small that float32 products cannot tell it is compared again, one by one.
    """
    unit = fleet.norms[columns[-1]]
    left, right = (_scaled(fleet, places, unit) for places in (rows, columns))
    energies_a, energies_b = (np.einsum("lnd,lnd->ln", part, part) for part in (left, right))
    total = np.zeros((len(rows), len(columns)), np.float32)
    squares = np.zeros_like(total)
    for x, y, own, other in zip(left, right, energies_a, energies_b, strict=True):
        part = np.maximum(own[:, None] + other - 2 * (x @ y.T), 0.0)
        total += part
        squares += part * part
    single = float(sketch.deviation(np.ones((1, 1)), fleet.side)[0])
    deviation = single * np.sqrt(squares) / np.where(total > 0, total, 1.0)
    low, high = fleet.norms[rows][:, None] / unit, fleet.norms[columns] / unit
    bounds = fleet.radii[rows][:, None] * low, fleet.radii[columns] * high
    noise = _SINGLE * (low**2 + high**2)
    reach = np.maximum(*bounds) * np.sqrt(1 + 3 * deviation) + _HALF * (low + high)
    later = columns > rows[:, None]
    inside = later & (total + noise <= np.minimum(*bounds) ** 2)
    unsure = later & ~inside & (total <= reach**2 + noise) & (total <= 100 * noise)
    sure = later & ~unsure & (total <= reach**2)
    i, j = np.nonzero(sure)
    relative = (unit / fleet.norms[rows[i]]) ** 2
    found = [_decided(fleet, rows[i], columns[j], total[sure] * relative, deviation[sure])]
    i, j = np.nonzero(unsure)
    for start in range(0, len(i), _PAIRS):
        part_i, part_j = i[start : start + _PAIRS], j[start : start + _PAIRS]
        found.append(_pairs(fleet, rows[part_i], columns[part_j]))
    return found


def _scaled(fleet: _Fleet, places: Array, unit: float) -> Array:
    """(L, n, side²): sketches of these tenants themselves, in a unit of norm."""
    sizes = (fleet.norms[places] / unit).astype(np.float32)[:, None]
    rows = fleet.sketches[fleet.order[places]].astype(np.float32) * sizes
    return np.ascontiguousarray(rows.reshape(len(places), -1, fleet.side**2).swapaxes(0, 1))


def _decided(fleet: _Fleet, rows: Array, columns: Array, squares: Array, deviation: Array) -> Found:
    """Both directions of each pair, where the estimate allows it; `squares` are over ‖D_row‖²."""
    i, j = fleet.order[rows], fleet.order[columns]
    small, large = fleet.norms[rows], fleet.norms[columns]
    distance = np.sqrt(squares) * small
    rounding = _HALF * np.hypot(small, large)
    least = _least(fleet, rows, columns)
    reach = np.sqrt(1 + 3 * deviation)
    found = []
    for center, member, norm, radius in (
        (j, i, small, fleet.radii[rows]),
        (i, j, large, fleet.radii[columns]),
    ):
        keep = (distance <= radius * norm * reach + rounding) & (least <= radius * norm + rounding)
        relative = (distance[keep] / norm[keep]).astype(np.float32)
        found.append((center[keep].astype(np.int32), member[keep].astype(np.int32), relative))
    return _joined(found)
