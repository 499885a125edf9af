"""Tenants sorted by norm, and the pairs of them that norms and short projections allow.

The two cheap tests of `candidates`, block by block: a window of norms, exact, then a product of
sketches projected to k numbers by random signs (the square of a length deviates by √(2/k);
Achlioptas 2003), kept at five deviations and the largest σ that there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.signing import sketch
from adapterops.fleet.types import Array

BLOCK = 2048  # tenants compared with as many at once
HALF = 2.0**-11  # of a sketch's norm: rounding of its numbers to float16
SINGLE = 1e-5  # of the norms squared: rounding of float32 products
_WIDTHS = (256, 512, 1024)
_SEED = 0x6164617074657273


@dataclass(frozen=True, slots=True)
class Sorted:
    """Tenants sorted by norm: sketches as given, what was projected of them, norms by module.

    `order` finds the rows of `sketches`; everything else is sorted: `norms` and `radii` (N,),
    `modules` (N, L) float32 and `short` (N, k) float32, both of adapters of norm 1, `cut` the
    factor of ε² up to which a pair stays after the projection. `serves` (N,) bool are those that
    may be centres.
    """

    sketches: Array
    order: Array
    norms: Array
    radii: Array
    modules: Array
    short: Array
    side: int
    cut: float
    serves: Array

    @property
    def starts(self) -> range:
        """Where blocks of tenants begin. Zero is near nothing but itself: it is in none."""
        return range(int(np.searchsorted(self.norms, 0.0, "right")), len(self.norms), BLOCK)


def sorted_by_norm(vectors: Vectors, radii: Array) -> Sorted:
    """Everybody, each to be served within its own of `radii` (N,) and free to serve others."""
    norms = np.asarray(vectors.norms, np.float64)
    order = np.argsort(norms, kind="stable")
    width, cut = _width(vectors.sketches.shape[1], float(radii.max(initial=0.0)), vectors.side)
    return Sorted(
        vectors.sketches,
        order,
        norms[order],
        radii[order],
        np.sqrt(np.asarray(vectors.energies, np.float32))[order],
        _projected(vectors.sketches, order, width),
        vectors.side,
        cut,
        np.ones(len(norms), bool),
    )


def within(fleet: Sorted, radius: float) -> Sorted:
    """The same tenants, to be compared at one bound for all."""
    width, cut = _width(fleet.sketches.shape[1], radius, fleet.side)
    short = fleet.short
    if short.shape[1] != width:
        short = _projected(fleet.sketches, fleet.order, width)
    return replace(fleet, radii=np.full(len(fleet.norms), radius), short=short, cut=cut)


def _width(columns: int, radius: float, side: int) -> tuple[int, float]:
    """How many numbers of a projection keep unrelated adapters, √2 apart, out; and the cut."""
    widest = 1 + 3 * float(sketch.deviation(np.ones((1, 1)), side)[0])
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
    for start in range(0, count, BLOCK):
        rows = sketches[order[start : start + BLOCK]].astype(np.float32)
        short[start : start + BLOCK] = rows @ signs if width < columns else rows
    return short


def blocks(fleet: Sorted, start: int) -> Iterator[tuple[int, Array]]:
    """The first column of blocks of pairs, and where norms and projections allow them; each once.

    Rows are the tenants from `start`, columns those of no smaller norm.
    """
    stop = min(start + BLOCK, len(fleet.norms))
    widest = float(fleet.radii.max()) + HALF
    unit = fleet.norms[stop - 1]
    largest = unit / (1 - widest) if widest < 1 else math.inf
    end = int(np.searchsorted(fleet.norms, largest, "right"))
    left = _augmented(fleet, slice(start, stop), unit, 0.0)[0]
    for first in range(start, end, BLOCK):
        last = min(first + BLOCK, end)
        right = _augmented(fleet, slice(first, last), unit, fleet.cut * (widest + HALF) ** 2)[1]
        near = left @ right.T >= 0
        yield first, np.triu(near, 1) if first == start else near


def _augmented(fleet: Sorted, own: slice, unit: float, allowed: float) -> tuple[Array, Array]:
    """Rows and columns whose product is (allowed·‖D_j‖² − d̂²)/2, j that of the column."""
    sizes = (fleet.norms[own] / unit).astype(np.float32)[:, None]
    short = fleet.short[own] * sizes
    halves = (0.5 - SINGLE) * np.sum(short * short, axis=1, keepdims=True)
    one = np.ones_like(sizes)
    limits = np.float32(0.5 * allowed) * sizes**2 - halves
    return np.hstack([short, -halves, one]), np.hstack([short, one, limits])
