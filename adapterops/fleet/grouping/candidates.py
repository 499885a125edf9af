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

Where there are large families of near copies, a few of each may serve (`copies`).

Blocks are cut by the number of tenants alone and each is one BLAS call on one thread: the result
does not depend on threads or memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np

from adapterops.errors import MemoryLimitError
from adapterops.fleet.consent.policy import NEAR_EXACT
from adapterops.fleet.grouping.blocks import (
    BLOCK,
    HALF,
    SINGLE,
    Sorted,
    blocks,
    sorted_by_norm,
    within,
)
from adapterops.fleet.grouping.copies import FAMILY, nearness, servers
from adapterops.fleet.grouping.graph import Candidates, graph
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.signing import sketch
from adapterops.fleet.types import Array
from adapterops.stream import Compute, Job, run

_PAIRS = 1024  # compared one by one at once
_DENSE = 512  # rows and columns of a block compared by module at once
_DENSER = 30  # times cheaper is a pair in a block of all pairs than one by itself
_EDGE = 60  # bytes, while edges are put together and sorted

Found = tuple[Array, Array, Array]  # centres, members, distances


def edges(
    vectors: Vectors,
    radius: float | Array,
    on: Compute | None = None,
    *,
    alike: Array | None = None,
    least: float = math.inf,
) -> Candidates:
    """The graph of who may serve whom within `radius`, one bound or (N,) each tenant's own.

    Distances in the graph are estimates, up to radius·√(1 + 3σ̂) and a little more where float16
    cannot tell. `alike` (N,) numbers the tenants whom all others can do without, of a family of
    near copies with one number, and is below 0 for the others; all are alike if None. `least` is
    the least bound that the graph is asked for, if it is less than `radius`. Raises
    MemoryLimitError where there are so many edges that `on.memory` cannot hold them.
    """
    on = on or Compute()
    count = len(vectors.norms)
    radii = np.broadcast_to(np.asarray(radius, np.float64), (count,))
    fleet = sorted_by_norm(vectors, radii)
    if count > FAMILY:
        near = nearness(float(min(least, radii.min())), NEAR_EXACT)
        numbers = np.zeros(count, np.int64) if alike is None else alike
        fleet = replace(fleet, serves=_servers(fleet, numbers, near, on))
    peak = 4 * (4 * BLOCK**2 + 4 * _PAIRS * vectors.sketches.shape[1])
    jobs = [Job(f"block {start}", _row, (fleet, start), peak) for start in fleet.starts]
    found: list[Found] = []
    total = 0
    with closing(run(jobs, on)) as results:
        for part in results:
            found.append(part)
            total += len(part[0])
            if total * _EDGE > on.memory:
                raise MemoryLimitError(
                    f"{count} tenants have more than {total} candidate pairs, for which "
                    f"{on.memory / 1e6:.0f} MB are too little",
                    hint="give more --memory or a smaller --max-error",
                )
    centers, members, distances = (
        np.concatenate([part[place] for part in found]) if found else np.zeros(0)
        for place in range(3)
    )
    return graph(count, centers, members, distances)


def _servers(fleet: Sorted, alike: Array, near: float, on: Compute) -> Array:
    """Who may be a centre where adapters at most `near` to each other are copies."""
    # `servers` takes distances as they are projected: nothing wider need be counted.
    close = replace(within(fleet, near), cut=1.0)
    jobs = [
        Job(f"block {start}", _neighbours, (close, start), 16 * BLOCK**2) for start in close.starts
    ]
    with closing(run(jobs, on)) as results:
        counts = sum(results, np.zeros(len(fleet.norms), np.int64))
    crowded = counts >= FAMILY
    if not crowded.any():
        return fleet.serves
    return servers(close.short, fleet.norms, fleet.order, alike[fleet.order], crowded, near)


def _row(fleet: Sorted, start: int) -> Found:
    """The edges between a block of tenants and those of no smaller norm."""
    found: list[Found] = []
    for rows, columns in _near(fleet, start):
        if not len(rows):
            continue
        small, large = fleet.norms[rows], fleet.norms[columns]
        reach = np.maximum(fleet.radii[rows] * small, fleet.radii[columns] * large)
        keep = _least(fleet, rows, columns) <= reach + HALF * np.hypot(small, large)
        rows, columns = rows[keep], columns[keep]
        found += _compared(fleet, rows, columns)
    return _joined(found)


def _joined(found: list[Found]) -> Found:
    if not found:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    one, two, three = (np.concatenate([part[place] for part in found]) for place in range(3))
    return one, two, three


def _near(fleet: Sorted, start: int) -> Iterator[tuple[Array, Array]]:
    """Pairs that norms and projections allow: places of the smaller and of the larger one."""
    for first, near in blocks(fleet, start):
        own = fleet.serves[start : start + len(near)]
        near &= own[:, None] | fleet.serves[first : first + near.shape[1]]
        rows, columns = np.divmod(np.flatnonzero(near), near.shape[1])
        yield rows + start, columns + first


def _neighbours(fleet: Sorted, start: int) -> Array:
    """How many others are near to each (N,), of the pairs of one block."""
    counts = np.zeros(len(fleet.norms), np.int64)
    for first, near in blocks(fleet, start):
        counts[start : start + len(near)] += near.sum(1)
        counts[first : first + near.shape[1]] += near.sum(0)
    return counts


def _least(fleet: Sorted, rows: Array, columns: Array) -> Array:
    """√Σ_l (‖D_il‖ − ‖D_jl‖)², which no distance is below."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), 16 * _PAIRS):
        part = slice(start, start + 16 * _PAIRS)
        i, j = rows[part], columns[part]
        ratio = (fleet.norms[j] / fleet.norms[i]).astype(np.float32)[:, None]
        apart = fleet.modules[i] - ratio * fleet.modules[j]
        result[part] = np.sqrt(np.einsum("pl,pl->p", apart, apart)) * fleet.norms[i]
    return result


def _compared(fleet: Sorted, rows: Array, columns: Array) -> list[Found]:
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


def _pairs(fleet: Sorted, rows: Array, columns: Array) -> Found:
    """The edges among pairs, from the differences of their sketches."""
    ratio = (fleet.norms[columns] / fleet.norms[rows]).astype(np.float32)[:, None]
    apart = fleet.sketches[fleet.order[rows]].astype(np.float32)
    apart -= ratio * fleet.sketches[fleet.order[columns]].astype(np.float32)
    apart = apart.reshape(len(rows), -1, fleet.side**2)
    energies = np.einsum("pld,pld->pl", apart, apart).astype(np.float64)
    return _decided(fleet, rows, columns, energies.sum(1), sketch.deviation(energies, fleet.side))


def _dense(fleet: Sorted, rows: Array, columns: Array) -> list[Found]:
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
    noise = SINGLE * (low**2 + high**2)
    reach = np.maximum(*bounds) * np.sqrt(1 + 3 * deviation) + HALF * (low + high)
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


def _scaled(fleet: Sorted, places: Array, unit: float) -> Array:
    """(L, n, side²): sketches of these tenants themselves, in a unit of norm."""
    sizes = (fleet.norms[places] / unit).astype(np.float32)[:, None]
    rows = fleet.sketches[fleet.order[places]].astype(np.float32) * sizes
    return np.ascontiguousarray(rows.reshape(len(places), -1, fleet.side**2).swapaxes(0, 1))


def _decided(fleet: Sorted, rows: Array, columns: Array, squares: Array, deviation: Array) -> Found:
    """Both directions of each pair, where the estimate allows it; `squares` are over ‖D_row‖²."""
    i, j = fleet.order[rows], fleet.order[columns]
    small, large = fleet.norms[rows], fleet.norms[columns]
    distance = np.sqrt(squares) * small
    rounding = HALF * np.hypot(small, large)
    least = _least(fleet, rows, columns)
    reach = np.sqrt(1 + 3 * deviation)
    found = []
    for center, member, serves, norm, radius in (
        (j, i, fleet.serves[columns], small, fleet.radii[rows]),
        (i, j, fleet.serves[rows], large, fleet.radii[columns]),
    ):
        keep = (distance <= radius * norm * reach + rounding) & (least <= radius * norm + rounding)
        keep &= serves
        relative = (distance[keep] / norm[keep]).astype(np.float32)
        found.append((center[keep].astype(np.int32), member[keep].astype(np.int32), relative))
    return _joined(found)
