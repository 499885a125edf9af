"""Which representatives of a plan an adapter may be near to, from sketches alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.plans.plan import Metric
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.signing.sketch import deviation, smaller
from adapterops.fleet.types import Array, Layout, Signature

_REFINED = 64
_PAIRS = 1024  # compared one by one at once
_BLOCK, _CELLS = 2048, 1 << 24  # adapters at once, and pairs of one with a representative
_ROUNDING = 1e-3  # of distances between sketches of norm about 1 in float16


@dataclass(frozen=True, slots=True)
class Near:
    """A representative and its estimated error ‖C − D‖/‖D‖."""

    estimate: float
    id: str


@dataclass(frozen=True, slots=True)
class Searched:
    """Sketches of a plan (`Sketched`) and the squares of their own norms (K,)."""

    part: Sketched
    squares: Array


def searched(part: Sketched) -> Searched:
    """The part, ready to be asked often: its sketches are read once for their norms."""
    return Searched(part, np.einsum("kd,kd->k", part.sketches, part.sketches))


def reach(metric: Metric, bound: float) -> float:
    """How far off in ΔW representatives are to be looked for where the bound is in this metric.

    What is far in weights may be near in another metric: then the nearest are tried, however far.
    """
    return bound if metric == "frobenius" else math.inf


def nearest(
    among: Searched, found: Signature, limit: float, usable: Callable[[str], bool]
) -> list[Near]:
    """Representatives whose error for an adapter may be at most `limit`, nearest first.

    With sketches s and ν = ‖C‖/‖D‖, error² is about ‖s_D − ν·s_C‖²; modules that the adapter alone
    has count in full. Who is over the limit by three standard deviations is left out
    (`sketch.deviation`, of that very difference by module). At most 64 are given, all with `usable`
    ids, ties by id; none where a module has another shape.
    """
    part = among.part
    if not part.ids or found.layout is None or not found.norm > 0:
        return []
    side = min(part.layout.side, found.layout.side)
    blocks = smaller(found.sketch.astype(np.float32), side).reshape(1, -1)
    own = Layout(found.layout.stems, found.layout.shapes, side)
    placed = _placed(part.layout, own, blocks)
    if placed is None:
        return []
    rows, outside = placed
    among = _at(among, side)
    ratios = part.norms / found.norm
    squares = _coarse(rows, outside, among, ratios[None], limit)[0]
    (here,) = np.nonzero(squares <= _cut(limit, _worst(side)))
    promising = here[np.argsort(squares[here], kind="stable")]
    order = np.fromiter(islice((i for i in promising if usable(part.ids[i])), _REFINED), np.int64)
    estimates, kept = _refined(
        np.zeros(len(order), np.int64), order, rows, outside, among, ratios[order], limit
    )
    hits = [Near(float(estimates[k]), part.ids[order[k]]) for k in np.flatnonzero(kept)]
    return sorted(hits, key=lambda near: (near.estimate, near.id))


def nearest_of_all(
    among: Searched, own: Layout, vectors: Vectors, limits: Array, usable: Array
) -> Iterator[list[Near]]:
    """`nearest` of many adapters at once, in their order.

    The rows of `vectors` are over the modules of `own`, `limits` are (N,) and `usable` (K,) bool.
    """
    part = among.part
    side = min(part.layout.side, own.side)
    usable = usable & (part.norms > 0)
    if not usable.any():
        yield from ([] for _ in vectors.norms)
        return
    ids = np.array(part.ids, dtype=object)[usable]
    layout = Layout(own.stems, own.shapes, side)
    union = _at(_chosen(among, usable), side)
    count = max(1, min(_BLOCK, _CELLS // len(ids)))
    for start in range(0, len(vectors.norms), count):
        at = slice(start, start + count)
        blocks = vectors.sketches[at].astype(np.float32)
        blocks = smaller(blocks.reshape(len(blocks), -1, own.side, own.side), side)
        placed = _placed(part.layout, layout, blocks.reshape(len(blocks), -1))
        norms, bounds = vectors.norms[at], limits[at]
        if placed is None:
            yield from ([] for _ in norms)
            continue
        rows, outside = placed
        with np.errstate(divide="ignore"):
            ratios = union.part.norms / norms[:, None]
        squares = _coarse(rows, outside, union, ratios, bounds[:, None])
        few = min(_REFINED, len(ids))
        best = np.argpartition(squares, few - 1, axis=1)[:, :few]
        close = np.take_along_axis(squares, best, 1) <= _cut(bounds, _worst(side))[:, None]
        who, column = np.nonzero(close)
        reps = best[who, column]
        estimates, kept = _refined(who, reps, rows, outside, union, ratios[who, reps], bounds[who])
        hits: list[list[Near]] = [[] for _ in norms]
        for k in np.flatnonzero(kept):
            hits[who[k]].append(Near(float(estimates[k]), ids[reps[k]]))
        for one in hits:
            yield sorted(one, key=lambda near: (near.estimate, near.id))


def _coarse(
    rows: Array, outside: Array, among: Searched, ratios: Array, limits: Array | float
) -> Array:
    """Estimates of error² (n, K) by one product; infinite where norms alone are too far apart."""
    with np.errstate(invalid="ignore", over="ignore"):
        squares = ratios * ratios * among.squares - 2 * ratios * (rows @ among.part.sketches.T)
    squares += (np.einsum("nd,nd->n", rows, rows) + outside.sum(1))[:, None]
    squares[~(np.abs(1 - ratios) <= limits + _ROUNDING)] = math.inf
    return np.asarray(squares)


def _refined(
    who: Array,
    reps: Array,
    rows: Array,
    outside: Array,
    among: Searched,
    ratios: Array,
    limits: Array | float,
) -> tuple[Array, Array]:
    """Estimates of pairs (adapter, representative) by differences, and whether they may do."""
    side, count = among.part.layout.side, len(among.part.layout.stems)
    estimates, sigmas = np.empty(len(who)), np.empty(len(who))
    for start in range(0, len(who), _PAIRS):
        at = slice(start, start + _PAIRS)
        apart = rows[who[at]]
        apart -= ratios[at, None].astype(np.float32) * among.part.sketches[reps[at]]
        inside = (apart**2).reshape(len(apart), count, side * side).sum(-1)
        energies = np.concatenate([inside, outside[who[at]]], 1)
        estimates[at] = energies.sum(-1, dtype=np.float64)
        sigmas[at] = deviation(energies, side)
    return np.sqrt(estimates), estimates <= _cut(limits, sigmas)


def _cut(limit: float | Array, sigma: Array) -> Array:
    """The largest estimated error² of what may be within the limit."""
    return np.asarray((limit + _ROUNDING) ** 2 * (1 + 3 * sigma))


def _worst(side: int) -> Array:
    """σ of a difference that is in one module alone."""
    return deviation(np.ones(1), side)


def _placed(union: Layout, own: Layout, rows: Array) -> tuple[Array, Array] | None:
    """Sketches (n, L'·p²) of modules `own` over those of `union` (n, L·p²), energies of the rest.

    None where a module of both has two shapes.
    """
    blocks = rows.reshape(len(rows), len(own.stems), own.side**2)
    places = {stem: index for index, stem in enumerate(union.stems)}
    both = [(i, places[stem]) for i, stem in enumerate(own.stems) if stem in places]
    if any(own.shapes[i] != union.shapes[j] for i, j in both):
        return None
    found = np.zeros((len(rows), len(union.stems), own.side**2), np.float32)
    found[:, [j for _, j in both]] = blocks[:, [i for i, _ in both]]
    rest = [i for i, stem in enumerate(own.stems) if stem not in places]
    return found.reshape(len(rows), -1), np.asarray((blocks[:, rest] ** 2).sum(-1))


def _chosen(among: Searched, usable: Array) -> Searched:
    """Those representatives alone."""
    if usable.all():
        return among
    part = among.part
    ids = tuple(id for id, yes in zip(part.ids, usable, strict=True) if yes)
    fewer = replace(part, ids=ids, norms=part.norms[usable], sketches=part.sketches[usable])
    return Searched(fewer, among.squares[usable])


def _at(among: Searched, side: int) -> Searched:
    """The sketches at a side no larger than theirs."""
    part, p = among.part, among.part.layout.side
    if side == p:
        return among
    rows = smaller(part.sketches.reshape(len(part.ids), -1, p, p), side)
    layout = replace(part.layout, side=side)
    return searched(replace(part, layout=layout, sketches=rows.reshape(len(part.ids), -1)))
