"""Inner products, distances and angles of low-rank matrices, from their factors, in float64.

A distance is the norm of the difference's own factors [B, −B′]·[A; A′]. Those go through Gram
matrices only while the result is no smaller than 10⁻²β (`linalg`), else through Householder QR: the
same three numbers as ‖X‖² + ‖Y‖² − 2⟨X, Y⟩, without a guard, would read 10⁻⁸ where the truth is 0.

Everything else is computed in coordinates: with QR of the stacked columns, [B, B′] = Q·[X, X′], and
of the rows, the members become B = Q·X with X of a few rows. Norms, inner products and angles stay
what they were, to γ·β (Higham 2002, theorem 19.4, column by column), and cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from adapterops import linalg
from adapterops.factors import Factors

Matrix = np.ndarray[Any, Any]
_CACHED_ROWS = 512


def inner(a: Factors, b: Factors) -> float:
    """⟨ΔW, ΔW′⟩, wrong by at most about u·β·β′."""
    return a.inner(b)


def distance(a: Factors, b: Factors) -> float:
    """‖ΔW − ΔW′‖_F, exact down to u·(β + β′)."""
    return (a - b).norm()


def cosine_of(product: float, norm: float, other: float) -> float:
    """⟨ΔW, ΔW′⟩ / ‖ΔW‖‖ΔW′‖ of known figures, within [−1, 1]; 0 where one of them is zero."""
    if norm <= 0.0 or other <= 0.0:
        return 0.0
    return min(1.0, max(-1.0, product / norm / other))


def cosine(a: Factors, b: Factors) -> float:
    """The cosine of two deltas; 0 where one of them is zero."""
    return cosine_of(inner(a, b), a.norm(), b.norm())


def beta(factors: Factors) -> float:
    """β = Σ_j ‖b_j‖‖a_j‖: what rounding errors are proportional to."""
    sizes: float = np.linalg.norm(factors.B, axis=0) @ np.linalg.norm(factors.A, axis=1)
    return float(sizes)


def in_common_bases(B: Matrix, A: Matrix, widths: Sequence[int]) -> list[Factors]:
    """Members of a stack in the coordinates of orthonormal bases that all of them share.

    B (m, R) and A (R, n) hold the members' columns and rows side by side, `widths` of them each.
    A result has B (min(m, R), r) and A (r, min(R, n)); what it returns for `norm`, `inner` and
    `principal_angles` holds for the original. NaN and infinities pass through.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        left, right = _upper(B), _upper(A.T)
    return [
        Factors(left[:, start:stop], right[:, start:stop].T)
        for start, stop in pairwise(accumulate(widths, initial=0))
    ]


def _upper(columns: Matrix) -> Matrix:
    """R of the Householder QR of `columns`.

    Long columns are factored in stretches of rows that fit a processor's cache, then the R's of
    these: as stable, in half the time (Demmel, Grigori, Hoemmen & Langou 2012, TSQR). It also lets
    threads run side by side: numpy holds its lock through a single QR, not through a batch.
    """
    m, n = columns.shape
    if 0 in (m, n):
        return np.zeros((min(m, n), n))
    stretch = max(_CACHED_ROWS, 4 * n)
    count = m // stretch
    if count > 1:
        batch = columns[: count * stretch].reshape(count, stretch, n)
        uppers = np.asarray(np.linalg.qr(batch, mode="r")).reshape(-1, n)
        columns = np.vstack([uppers, columns[count * stretch :]])
    return np.asarray(np.linalg.qr(columns, mode="r"))


@dataclass(frozen=True, slots=True)
class Spaces:
    """Orthonormal bases of ΔW's columns (m, k) and rows (n, k), k its numerical rank.

    `values` are the singular values above the floor. A direction may be off by `uncertainty`
    (radians): the floor over the smallest of them (Wedin 1972).
    """

    columns: Matrix
    rows: Matrix
    values: Matrix
    uncertainty: float


def spaces(factors: Factors, floor: float) -> Spaces:
    """The spaces of a delta that its singular values above `floor` span."""
    if 0 in (*factors.B.shape, *factors.A.shape):
        m, n = factors.shape
        return Spaces(np.zeros((m, 0)), np.zeros((n, 0)), np.zeros(0), 0.0)
    left, upper_b = np.linalg.qr(factors.B)
    right, upper_a = np.linalg.qr(factors.A.T)
    U, values, Vh = linalg.svd(upper_b @ upper_a.T)
    rank = int((values > floor).sum())
    uncertainty = min(floor / float(values[rank - 1]), math.pi / 2) if rank else 0.0
    return Spaces(left @ U[:, :rank], right @ Vh[:rank].T, values[:rank], uncertainty)


def principal_angles(first: Matrix, second: Matrix) -> Matrix:
    """Principal angles, ascending, in radians, of the spans of two orthonormal bases (m, k).

    Cosines are the singular values of Q₁ᵀQ₂; below 45° they hardly change, so small angles are
    taken from their sines, the singular values of Q₂ − Q₁(Q₁ᵀQ₂) (Björck & Golub 1973, Numerical
    methods for computing angles between linear subspaces, section 3). There are min(k₁, k₂).
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if not second.shape[1]:
        return np.zeros(0)
    shared = first.T @ second
    angles = np.arccos(np.minimum(linalg.svd(shared)[1], 1.0))
    small = angles < math.pi / 4
    if small.any():
        sines = np.minimum(linalg.svd(second - first @ shared)[1][::-1], 1.0)
        angles[small] = np.arcsin(sines[small])
    return angles


def share_inside(vectors: Matrix, basis: Matrix, dimension: int) -> float:
    """How much of the energy of `vectors` (p, r) lies in the span of a basis (p, k), beyond chance.

    A random vector of the `dimension` that the coordinates stand for has k/dimension of its energy
    there; that reads 0, all of it 1. Where the span is everything there is nothing to tell: 0.
    """
    chance = basis.shape[1] / dimension if dimension else 1.0
    energy = float(np.sum(vectors * vectors))
    if energy == 0.0 or chance >= 1.0:
        return 0.0
    inside = basis.T @ vectors
    return (float(np.sum(inside * inside)) / energy - chance) / (1.0 - chance)


@dataclass(frozen=True)
class Stack:
    """Factors of several members side by side: B (m, R), A (R, n), `widths` columns each."""

    B: Matrix
    A: Matrix
    widths: tuple[int, ...]

    @cached_property
    def members(self) -> list[slice]:
        """Each member's columns of B and rows of A."""
        return [slice(*ends) for ends in pairwise(accumulate(self.widths, initial=0))]

    @cached_property
    def owners(self) -> Matrix:
        """(R, N): 1 where a column belongs to a member."""
        return np.repeat(np.eye(len(self.widths)), self.widths, axis=0)

    @cached_property
    def betas(self) -> Matrix:
        """β of each member, (N,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            sizes = np.linalg.norm(self.B, axis=0) * np.linalg.norm(self.A, axis=1)
            return np.asarray(sizes @ self.owners)

    @cached_property
    def norms(self) -> Matrix:
        """‖ΔW‖_F of each member, (N,)."""
        return np.array([linalg.norm(self.B[:, own], self.A[own]) for own in self.members])


def gram(first: Stack, second: Stack) -> tuple[Matrix, Matrix]:
    """⟨ΔWᵢ, ΔWⱼ⟩ and ‖ΔWᵢ − ΔWⱼ‖_F, both (N, N′), of the members of two stacks of one module.

    The Gram matrices of a difference are blocks of those of the stacks, so all pairs cost one
    product a side; pairs that cancel go through QR one by one.
    """
    products = (first.B.T @ second.B) * (first.A @ second.A.T)
    inners = first.owners.T @ products @ second.owners
    squares = first.norms[:, None] ** 2 + second.norms**2 - 2 * inners
    distances = np.sqrt(np.maximum(squares, 0.0))
    bounds = first.betas[:, None] + second.betas
    for i, j in np.argwhere(distances < linalg.GRAM_NORM * bounds):
        if first is second and i >= j:
            distances[i, j] = distances[j, i] if i > j else 0.0
            inners[i, j] = inners[j, i] if i > j else first.norms[i] ** 2
            continue
        own, other = first.members[i], second.members[j]
        columns = np.vstack([first.B.T[own], second.B.T[other]]).T
        rows = np.vstack([first.A[own], second.A[other]])
        x, y = in_common_bases(columns, rows, (first.widths[i], second.widths[j]))
        distances[i, j] = np.linalg.norm(x.dense() - y.dense())
        inners[i, j] = np.sum(x.dense() * y.dense())
    return inners, distances
