"""What spectral methods share: which directions count, and the nearest isometry of those that do.

A method that replaces singular values is discontinuous where one of them goes to zero: the rounding
noise of a file would become a direction like any other. So only σ_k > cut counts, with

    cut = max(τσ₁, 4·√Σ(wᵢνᵢ)², rounding),   νᵢ ≈ ‖Dᵢ − what was meant‖₂ from storage,

independent of each other.

Where a number of directions is asked for, those of one singular value to 10⁻⁸σ₁ come together:
which one of them is first depends on rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adapterops import linalg
from adapterops.rules.registry import Array, Parameter

SAME = 1e-8  # of σ₁: singular values closer than this are one
_NOISES = 4.0
_UNCLEAR = 0.5  # σ_{k+1}/σ_k above which a cut below the noise is no clear one
_ARBITRARY = 1 - 1e-4  # where a number of them was asked for: equal up to storage

CUT = Parameter(
    "cut", "number", 1e-3, "directions below this share of the largest are left out", 0.0, 1.0
)


@dataclass(frozen=True, slots=True)
class Directions:
    """The leading singular triplets of a core: U (R, k), values (k,), V (R, k)."""

    U: Array
    values: Array
    V: Array
    gap: float  # σ_{k+1}/σ_k, 0 where nothing was left out
    notes: tuple[str, ...] = ()


def members(M: Array, w: Array) -> Array:
    """Indices of the adapters that count: neither norm nor weight is 0."""
    return np.flatnonzero((np.abs(M).max(axis=(1, 2), initial=0.0) > 0) & (w != 0))


def norms(M: Array) -> Array:
    """‖Mᵢ‖_F of cores (T, R, R'), as (T,)."""
    return np.asarray(np.sqrt((M * M).sum(axis=(1, 2))))


def mean_norm(M: Array, w: Array) -> float:
    """Σ|wᵢ|‖Dᵢ‖ / Σ|wᵢ| over the adapters that count; 0 without any."""
    own = members(M, w)
    if not len(own):
        return 0.0
    sizes = np.abs(w[own])
    return float(sizes @ norms(M[own]) / sizes.sum())


def limit(largest: float, M: Array, w: Array, noise: Array, cut: float) -> float:
    """The singular value at or below which nothing counts, of a sum of wᵢMᵢ with this σ₁."""
    sizes = np.abs(w)
    rounding = _NOISES * max(M.shape[1:], default=0) * linalg.EPSILON * float(sizes @ norms(M))
    return max(cut * largest, _NOISES * float(np.linalg.norm(sizes * noise)), rounding)


def clusters(values: Array) -> list[slice]:
    """Runs of descending values of which each is the next one to 10⁻⁸ of the largest."""
    if not len(values):
        return []
    ends = np.flatnonzero(values[:-1] - values[1:] > SAME * values[0]) + 1
    return [slice(*ends) for ends in pairwise([0, *ends.tolist(), len(values)])]


def above(values: Array, cut: float, most: int = 0) -> int:
    """How many leading values lie above `cut`; of these `most` (0: all), equal ones together."""
    live = values[: int((values > cut).sum())]
    if not most or most >= len(live):
        return len(live)
    return next(int(run.stop) for run in clusters(live) if run.stop >= most)


def gap(values: Array, kept: int) -> float:
    """σ_{k+1}/σ_k."""
    inside = 0 < kept < len(values) and values[kept - 1] > 0
    return float(values[kept] / values[kept - 1]) if inside else 0.0


def directions(core: Array, cut: float, most: int = 0) -> Directions:
    """The singular triplets of `core` above `cut`, at most `most` of them (0: all)."""
    U, values, Vh = linalg.svd(core)
    kept = above(values, cut, most)
    found = gap(values, kept)
    asked = kept < len(values) and values[kept] > cut
    return Directions(
        U[:, :kept], values[:kept], Vh[:kept].T, found, remarks(found, asked=bool(asked))
    )


def joined(parts: Sequence[Directions], rows: int, columns: int) -> Directions:
    """Triplets side by side, with the largest of the gaps; `rows` and `columns` are the core's."""
    return Directions(
        np.concatenate([np.zeros((rows, 0)), *(part.U for part in parts)], axis=1),
        np.concatenate([np.zeros(0), *(part.values for part in parts)]),
        np.concatenate([np.zeros((columns, 0)), *(part.V for part in parts)], axis=1),
        max((part.gap for part in parts), default=0.0),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


@dataclass(frozen=True, slots=True)
class Isometry:
    """A partial isometry (R, p), its rank, and the gap where the rank was decided."""

    matrix: Array
    rank: int
    gap: float


def isometry(vectors: Array, values: Array, cut: float) -> Isometry:
    """The partial isometry nearest to unit columns (R, p) of strengths `values` (p,).

    Combinations of columns that, at their strengths, amount to no more than `cut` are what two
    adapters that agree differ by. They are taken out of the row space: Z = S(I − P) = UΛQᵀ, and
    UQᵀ is the polar factor (Higham 1986, Computing the polar decomposition, section 2). Judged at
    their strengths, not as unit vectors: the noise of a direction of strength σ is ν/σ.
    """
    if not len(values):
        return Isometry(vectors, 0, 0.0)
    strengths, Qh = np.linalg.svd(vectors * values, full_matrices=True)[1:]
    kept = above(strengths, cut)
    lost = np.linalg.qr(values[:, None] * Qh[kept:].T)[0]
    U, _, Vh = linalg.svd(vectors - (vectors @ lost) @ lost.T)
    return Isometry(U[:, :kept] @ Vh[:kept], kept, gap(strengths, kept))


def remarks(found: float, *, asked: bool = False) -> tuple[str, ...]:
    """A warning where the cut fell between two directions of about one size.

    `asked`: a number of directions was asked for; then only near-equal ones are worth a warning.
    """
    if found <= (_ARBITRARY if asked else _UNCLEAR):
        return ()
    return (f"directions were left out with σ at {found:.2f} of the last one kept",)
