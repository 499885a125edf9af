"""From the figures of modules to those of whole adapters and pairs of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from adapterops import linalg, ranks
from adapterops.analysis.kernel import Angles, Figures
from adapterops.analysis.relations import Facts, relation
from adapterops.analysis.report import Extreme, ModuleAnalysis, Needed, Overlap, PairAnalysis
from adapterops.analysis.signs import conflict
from adapterops.certificate import RankHint, ratio
from adapterops.difference.tiles import Tile
from adapterops.geometry import Matrix, cosine_of

LIMITS = (0.01, 0.05, 0.1)  # relative errors of the weighted sum


@dataclass(frozen=True, slots=True)
class Whole:
    """T adapters over modules and full deltas, and their weighted sum.

    `inner` and `distance` are (T, T), `norms` and `floors` (T,). `norm` and `floor` are of the sum,
    `fixed` is the norm of what no rank cuts: its full deltas.
    """

    inner: Matrix
    distance: Matrix
    norms: Matrix
    floors: Matrix
    norm: float
    floor: float
    fixed: float

    @property
    def zero(self) -> list[bool]:
        """Which adapters are nothing but rounding noise."""
        return [bool(x) for x in self.norms <= self.floors]


def whole(modules: Sequence[Figures], deltas: Sequence[Tile], count: int) -> Whole:
    """Totals of `count` adapters; the last member of each delta's tile is the weighted sum."""
    own = slice(0, count)
    inner, squares = np.zeros((2, count, count))
    floors = np.zeros(count)
    for one in modules:
        inner += one.inner
        squares += one.distance**2
        floors += one.floors**2
    for tile in deltas:
        inner += tile.inner[own, own]
        squares += tile.distance[own, own] ** 2
        floors += (linalg.EPSILON * tile.norms[own]) ** 2
    members = [one.norms for one in modules] + [tile.norms for tile in deltas]
    norms = [math.hypot(*(float(x[i]) for x in members)) for i in range(count)]
    fixed = math.hypot(*(float(tile.norms[-1]) for tile in deltas))
    return Whole(
        inner=inner,
        distance=np.sqrt(squares),
        norms=np.array(norms),
        floors=np.sqrt(floors),
        norm=math.hypot(fixed, *(one.spectrum.norm for one in modules)),
        floor=math.hypot(*(one.spectrum.floor for one in modules)),
        fixed=fixed,
    )


def pairs(modules: Sequence[Figures], total: Whole, names: Sequence[str]) -> list[PairAnalysis]:
    """Every pair of adapters."""
    numbers = enumerate(combinations(range(len(names)), 2))
    return [_pair(modules, total, names, place, i, j) for place, (i, j) in numbers]


def _pair(
    modules: Sequence[Figures], total: Whole, names: Sequence[str], place: int, i: int, j: int
) -> PairAnalysis:
    norms, zero = total.norms, total.zero
    dead = zero[i] or zero[j]
    cosine = 0.0 if dead else cosine_of(float(total.inner[i, j]), float(norms[i]), float(norms[j]))
    distance = ratio(float(total.distance[i, j]), float(max(norms[i], norms[j])))
    factor = None if dead else float(total.inner[i, j] / norms[i] / norms[i])
    by_module = [
        Extreme(
            one.stem, cosine_of(float(one.inner[i, j]), float(one.norms[i]), float(one.norms[j]))
        )
        for one in modules
        if not _dead(one, i, j)
    ]
    starts = [one.starts[place] for one in modules if not _dead(one, i, j)]
    known = [x for x in starts if x is not None]
    start = math.fsum(known) / len(known) if known else None
    rows = [one.rows[place] for one in modules]
    facts = Facts(
        names=(names[i], names[j]),
        zero=(zero[i], zero[j]),
        cosine=cosine,
        distance=distance if distance is not None else 0.0,
        floor=ratio(float(total.floors[i] + total.floors[j]), float(max(norms[i], norms[j])))
        or 0.0,
        factor=factor or 0.0,
        rows=_beyond_chance(rows),
        start=start,
    )
    kind, text = relation(facts)
    return PairAnalysis(
        first=i,
        second=j,
        cosine=cosine,
        distance=distance,
        factor=factor,
        lowest=min(by_module, key=lambda x: x.value, default=None),
        highest=max(by_module, key=lambda x: x.value, default=None),
        columns=_overlap(one.columns[place] for one in modules),
        rows=_overlap(rows),
        conflict=conflict([one.signs for one in modules], place),
        start=start,
        relation=kind,
        text=text,
    )


def _dead(one: Figures, i: int, j: int) -> bool:
    """Whether an adapter is zero in this module."""
    return bool(one.norms[i] <= one.floors[i] or one.norms[j] <= one.floors[j])


def _overlap(angles: Iterable[Angles | None]) -> Overlap | None:
    found = [one for one in angles if one is not None]
    if not found:
        return None
    count = sum(min(one.ranks) for one in found)
    return Overlap(
        overlap=math.fsum(one.squares for one in found) / count,
        expected=math.fsum(math.prod(one.ranks) / one.dimension for one in found) / count,
        mean=math.fsum(one.cosines for one in found) / count,
        largest=max(one.largest for one in found),
    )


def _beyond_chance(angles: Iterable[Angles | None]) -> float:
    """The share of one space inside the other, the smaller of both, chance deducted; the mean.

    What `geometry.share_inside` gives of orthonormal bases.
    """
    shares = []
    for one in angles:
        if one is not None:
            small, large = sorted(one.ranks)
            chance = small / one.dimension  # of a vector of the larger space
            inside = one.squares / large
            shares.append((inside - chance) / (1 - chance) if chance < 1 else 0.0)
    return math.fsum(shares) / len(shares) if shares else 0.0


def module(one: Figures, weights: Matrix) -> ModuleAnalysis:
    """One module as it is reported."""
    sizes = np.abs(weights) * np.where(one.norms > one.floors, one.norms, 0.0)
    count = len(weights)
    signs = conflict([one.signs], -1)
    tail = ranks.tails([one.spectrum])
    return ModuleAnalysis(
        shape=one.shape,
        ranks=one.ranks,
        norms=tuple(map(float, one.norms)),
        shares=tuple(ratio(float(size), float(sizes.sum())) for size in sizes),
        cosines=tuple(
            0.0
            if _dead(one, i, j)
            else cosine_of(float(one.inner[i, j]), float(one.norms[i]), float(one.norms[j]))
            for i, j in combinations(range(count), 2)
        ),
        columns=tuple(_shared(x) for x in one.columns),
        rows=tuple(_shared(x) for x in one.rows),
        conflict=signs.count if signs else None,
        norm=one.spectrum.norm,
        rank=ranks.smallest(tail, LIMITS[0] * one.spectrum.norm) if one.spectrum.rank else 0,
    )


def _shared(angles: Angles | None) -> float | None:
    return None if angles is None else angles.squares / min(angles.ranks)


def rank_errors(
    modules: Sequence[Figures], total: Whole, largest: int
) -> tuple[tuple[RankHint, ...], tuple[Needed, ...], int]:
    """Errors of the sum at standard ranks, the ranks for LIMITS, and the rank that loses nothing.

    `largest` is the largest rank among the adapters. Empty where the sum is zero.
    """
    spectra = [one.spectrum for one in modules]
    full = ranks.lossless(spectra)
    if total.norm <= total.floor or not spectra:
        return (), (), full
    tail = ranks.tails(spectra)
    chosen = sorted({r for r in (*ranks.STANDARD, largest) if 0 < r < full})
    hints = tuple(RankHint(r, float(tail[r]) / total.norm) for r in chosen)
    needed = []
    for limit in LIMITS:
        rank = ranks.smallest(tail, limit * total.norm)
        needed.append(Needed(limit, rank, float(tail[rank]) / total.norm))
    return hints, tuple(needed), full
