"""Which representatives of a plan a new adapter may be near to, from sketches alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.signing.sketch import deviation, smaller
from adapterops.fleet.types import Array, Layout, Signature

_REFINED = 64
_ROUNDING = 1e-3  # of distances between sketches of norm 1 in float16


@dataclass(frozen=True, slots=True)
class Near:
    """A representative and its estimated error ‖C − D‖/‖D‖."""

    estimate: float
    id: str


@dataclass(frozen=True, slots=True)
class Searched:
    """Sketches of a plan and their own norms (K,), which float16 and chance leave near 1 only."""

    part: Sketched
    sizes: Array


def searched(part: Sketched) -> Searched:
    """The part, ready to be asked often: its sketches are read once for their norms."""
    return Searched(part, _sizes(part.sketches))


def _sizes(rows: Array) -> Array:
    sizes = np.sqrt(np.einsum("kd,kd->k", rows, rows))
    return np.where(sizes > 0, sizes, 1)


def nearest(
    among: Searched, found: Signature, limit: float, usable: Callable[[str], bool]
) -> list[Near]:
    """Representatives whose error for an adapter may be at most `limit`, nearest first.

    With s the sketches over their norms and ν = ‖C‖/‖D‖, error² is about ‖s_D − ν·s_C‖²; modules
    that the adapter alone has count in full. Who is over the limit by three standard deviations is
    left out (`sketch.deviation`, of that very difference by module). At most 64 are given, all with
    `usable` ids, ties by id; none where a module has another shape.
    """
    part = among.part
    if not part.ids or found.layout is None or not found.norm > 0:
        return []
    placed = _placed(part.layout, found.layout, found.sketch)
    if placed is None:
        return []
    vector, outside, side = placed
    sketches, sizes = _at(among, side)
    ratios = part.norms / found.norm
    squares = 1 + ratios**2 - 2 * ratios * ((sketches @ vector) / sizes)
    squares[np.abs(1 - ratios) > limit + _ROUNDING] = math.inf
    (here,) = np.nonzero(squares <= _cut(limit, _worst(side)))
    promising = here[np.argsort(squares[here], kind="stable")]
    order = np.fromiter(islice((i for i in promising if usable(part.ids[i])), _REFINED), np.int64)
    scale = (ratios[order] / sizes[order]).astype(np.float32)
    differences = vector - scale[:, None] * sketches[order]
    blocks = (differences**2).reshape(len(order), len(part.layout.stems), side * side).sum(-1)
    energies = np.concatenate([blocks, np.broadcast_to(outside, (len(order), len(outside)))], 1)
    exact = energies.sum(-1, dtype=np.float64)
    cut = _cut(limit, deviation(energies, side))
    kept = [
        Near(math.sqrt(exact[k]), part.ids[i]) for k, i in enumerate(order) if exact[k] <= cut[k]
    ]
    return sorted(kept, key=lambda near: (near.estimate, near.id))


def _cut(limit: float, sigma: Array) -> Array:
    """The largest estimated error² of what may be within the limit."""
    return np.asarray((limit + _ROUNDING) ** 2 * (1 + 3 * sigma))


def _worst(side: int) -> Array:
    """σ of a difference that is in one module alone."""
    return deviation(np.ones(1), side)


def _placed(union: Layout, own: Layout, sketch: Array) -> tuple[Array, Array, int] | None:
    """A sketch over the modules of `union` (L·p²,), the energies of its other modules, and p.

    Both together have norm 1. None where a module of both has two shapes.
    """
    side = min(union.side, own.side)
    blocks = smaller(sketch.astype(np.float32), side)
    whole = float(np.sqrt(np.sum(blocks**2, dtype=np.float64)))
    if whole == 0.0:
        return None
    blocks = blocks / np.float32(whole)
    places = {stem: index for index, stem in enumerate(union.stems)}
    vector = np.zeros((len(union.stems), side, side), np.float32)
    outside = []
    for stem, shape, block in zip(own.stems, own.shapes, blocks, strict=True):
        if stem not in places:
            outside.append(float(np.sum(block**2)))
        elif union.shapes[places[stem]] != shape:
            return None
        else:
            vector[places[stem]] = block
    return vector.ravel(), np.array(outside), side


def _at(among: Searched, side: int) -> tuple[Array, Array]:
    """The sketches at a side no larger than theirs, and their norms."""
    part, p = among.part, among.part.layout.side
    if side == p:
        return part.sketches, among.sizes
    cut = part.sketches.reshape(len(part.ids), -1, p, p)[:, :, :side, :side]
    rows = cut.reshape(len(part.ids), -1)
    return rows, _sizes(rows)
