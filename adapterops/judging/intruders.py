"""Intruder dimensions: directions that a change puts among the first of a weight, strange to it.

Shuttleworth, Andreas, Torralba & Sharma, "LoRA vs full fine-tuning: an illusion of equivalence"
(arXiv 2410.21228, algorithm 1): a left singular vector yⱼ of W + D, j ≤ k, is an intruder if
maxᵢ |⟨yⱼ, xᵢ⟩| < ε over *all* left singular vectors xᵢ of W. They go with forgetting, and shrinking
them in W + D (section 6 there) gives some of it back.

The first yⱼ, and some of the first xᵢ, come from Lanczos iteration (ARPACK), W + B·A applied and
never formed. A yⱼ near one of those xᵢ is none. Where yⱼ is near none of them, what is left of it,
z = yⱼ − Σ⟨yⱼ, xᵢ⟩xᵢ, decides if it is short; else s steps of Lanczos iteration on W·Wᵀ from z do:
with pᵢ the polynomials orthonormal in z's spectral measure, the share of ‖z‖² that an eigenvector
holds is at most maxₜ 1/Σ_{i<s} pᵢ(t)² (Christoffel's function; Szegő, Orthogonal polynomials,
theorem 3.41.1), which falls like 1/s unless one holds much. What even that leaves open takes all
xᵢ, by an eigendecomposition of the smaller of W·Wᵀ and Wᵀ·W; `cost` says whether it was needed.

All matrices are float64, (out, in): of a weight stored as (in, out), hand over the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackError, LinearOperator, aslinearoperator, svds

from adapterops.errors import NumericsError, UsageError

Matrix = np.ndarray[Any, Any]
Cost = Literal["svd", "lanczos", "eigh"]

_SMALL = 192  # below this all singular vectors cost no more than the first
_LEADING = 2  # times k: how many xᵢ are looked at first
_TOLERANCE = 1e-6  # of singular values; their vectors are as good as the gaps allow
_STEPS = 48
_EVERY = 8  # steps between two looks at the bound
_POINTS = 16  # between two nodes, where the bound is evaluated, ...
_MARGIN = 0.9  # ... and what its largest value there may fall short by
_RESOLVED = 1e-5  # of the largest singular value: squares show vectors down to here


@dataclass(frozen=True, slots=True)
class Intruder:
    """The `index`-th singular direction of W + D, from 0, with its singular value.

    `similarity` is the largest |⟨y, xᵢ⟩| that was seen, `at_most` what no other can exceed; they
    are equal where the largest is known.
    """

    index: int
    sigma: float
    similarity: float
    at_most: float


@dataclass(frozen=True, slots=True, eq=False)
class Intruders:
    """The intruders among the first `looked_at` singular directions, in their order.

    `cost` is "lanczos" where products with W were enough, "eigh" where all of its singular vectors
    had to be computed, O(out·in·min(out, in)), "svd" where the matrix is so small that this was
    the cheapest. `left` (out, k′) and `right` (k′, in) are the intruders' u and vᵀ.
    """

    dims: tuple[Intruder, ...]
    looked_at: int
    epsilon: float
    cost: Cost
    left: Matrix
    right: Matrix

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the vectors."""
        return {
            "dims": [
                {name: getattr(each, name) for name in ("index", "sigma", "similarity", "at_most")}
                for each in self.dims
            ],
            "looked_at": self.looked_at,
            "epsilon": self.epsilon,
            "cost": self.cost,
        }


class Weight:
    """A weight (out, in) and its left singular vectors, computed when asked for and kept.

    Raises NumericsError for NaN and infinities.
    """

    def __init__(self, W: Matrix) -> None:
        _check_finite(W)
        self.W = W
        self._first: dict[int, Matrix] = {}

    def first(self, count: int) -> Matrix:
        """(out, count): those of the largest singular values, fewer where these are noise."""
        if count not in self._first:
            self._first[count] = _leading(aslinearoperator(self.W), count)[0]
        return self._first[count]

    @cached_property
    def all(self) -> Matrix:
        """(out, rank): those of all singular values above rounding noise.

        Squaring hides small singular values; the space of those is projected on and solved as is.
        """
        W = self.W
        wide = W.shape[0] <= W.shape[1]
        values, Q = scipy.linalg.eigh(W @ W.T if wide else W.T @ W, overwrite_a=True, driver="evd")
        first = math.sqrt(max(float(values[-1]), 0.0))
        seen = np.sqrt(np.maximum(values, 0.0)) > _RESOLVED * first
        rest = Q[:, ~seen]
        U, sigma, _ = np.linalg.svd(rest.T @ W if wide else W @ rest, full_matrices=False)
        U = U[:, sigma > max(W.shape) * 2.0**-52 * first]
        if wide:
            return np.concatenate([Q[:, seen], rest @ U], 1)
        return np.concatenate([(W @ Q[:, seen]) / np.sqrt(values[seen]), U], 1)


def intruders(
    W: Matrix | Weight, B: Matrix, A: Matrix, *, top: int = 10, epsilon: float = 0.5
) -> Intruders:
    """The intruders of W + B·A, W (out, in), B (out, r), A (r, in), the scale folded in.

    For several changes of one weight make a `Weight` once. Raises NumericsError for NaN and
    infinities, UsageError for `top` < 1 or ε not in (0, 1].
    """
    weight = W if isinstance(W, Weight) else Weight(W)
    _check_finite(B, A)
    if min(weight.W.shape) <= _SMALL:
        return _judged(weight, aslinearoperator(weight.W + B @ A), top, epsilon)
    change = aslinearoperator(B) @ aslinearoperator(A)
    return _judged(weight, aslinearoperator(weight.W) + change, top, epsilon)


def intruders_in(
    W: Matrix | Weight, merged: Matrix, *, top: int = 10, epsilon: float = 0.5
) -> Intruders:
    """The intruders of a weight `merged`, however it came about; as `intruders`."""
    weight = W if isinstance(W, Weight) else Weight(W)
    _check_finite(merged)
    return _judged(weight, aslinearoperator(merged), top, epsilon)


def mitigated(
    B: Matrix, A: Matrix, found: Intruders, strength: float = 0.75
) -> tuple[Matrix, Matrix]:
    """Factors of B·A + (λ − 1)·Σ u·σ·vᵀ over the intruders, exactly: rank r + their number.

    λ = `strength` is what is left of each: 1 changes nothing, 0 removes it from W + B·A. B and A
    are those that `found` was computed from; nothing is truncated. Raises UsageError for λ < 0.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise UsageError(f"strength {strength}: expected 0 or more, and 1 to change nothing")
    sigma = np.array([each.sigma for each in found.dims])
    shrink = (strength - 1.0) * sigma
    return np.concatenate([B, found.left * shrink], 1), np.concatenate([A, found.right], 0)


def _judged(weight: Weight, merged: LinearOperator, top: int, epsilon: float) -> Intruders:
    W = weight.W
    if top < 1 or not 0 < epsilon <= 1:
        raise UsageError(f"top {top}, epsilon {epsilon}: expected at least 1, and 0 < epsilon <= 1")
    if 0 in W.shape:
        empty = np.zeros((W.shape[0], 0)), np.zeros((0, W.shape[1]))
        return Intruders((), 0, epsilon, "svd", *empty)
    Y, sigma, Vh = _leading(merged, top)
    cost: Cost
    if min(W.shape) <= _SMALL:
        cost, seen = "svd", _similarities(weight.all, Y)
        limits = seen
    else:
        cost, X = "lanczos", weight.first(_LEADING * top)
        seen = _similarities(X, Y)
        limits = np.array(
            [_limit(W, X, y, best, epsilon) for y, best in zip(Y.T, seen, strict=True)]
        )
        if bool(((seen < epsilon) & (limits >= epsilon)).any()):
            cost, seen = "eigh", _similarities(weight.all, Y)
            limits = seen
    mine = np.flatnonzero(seen < epsilon)
    return Intruders(
        dims=tuple(
            Intruder(int(j), float(sigma[j]), float(seen[j]), float(limits[j])) for j in mine
        ),
        looked_at=len(sigma),
        epsilon=epsilon,
        cost=cost,
        left=Y[:, mine],
        right=Vh[mine],
    )


def _leading(matrix: LinearOperator, count: int) -> tuple[Matrix, Matrix, Matrix]:
    """U, σ, Vᵀ of the largest singular values, descending, without those that are noise."""
    m, n = matrix.shape
    U, sigma, Vh = _by_lanczos(matrix, count) or np.linalg.svd(matrix @ np.eye(n), False)
    order = np.argsort(-sigma)[:count]
    order = order[sigma[order] > max(m, n) * 2.0**-52 * sigma.max()]
    return U[:, order], sigma[order], Vh[order]


def _by_lanczos(matrix: LinearOperator, count: int) -> tuple[Matrix, Matrix, Matrix] | None:
    """Some largest singular triples, None of a small matrix or where iteration does not end."""
    m, n = matrix.shape
    if min(m, n) <= max(_SMALL, 3 * count):
        return None
    start = np.random.default_rng(0).standard_normal(min(m, n))
    try:
        found: tuple[Matrix, Matrix, Matrix] = svds(
            matrix, k=count, v0=start, tol=_TOLERANCE, solver="arpack"
        )
    except ArpackError:  # many nearly equal singular values, or a matrix of zeros
        return None
    return found


def _similarities(X: Matrix, Y: Matrix) -> Matrix:
    """maxᵢ |⟨y, xᵢ⟩| for each column y."""
    result: Matrix = np.abs(X.T @ Y).max(axis=0, initial=0.0)
    return np.minimum(result, 1.0)


def _limit(W: Matrix, X: Matrix, y: Matrix, best: float, epsilon: float) -> float:
    """What no |⟨y, xᵢ⟩| exceeds, those beyond the leading X included; as tight as needed."""
    z = y - X @ (X.T @ y)
    z -= X @ (X.T @ z)
    size = float(np.linalg.norm(z))
    if best >= epsilon or size < epsilon:
        return max(best, size)
    return max(best, size * math.sqrt(_largest_share(W, z / size, (epsilon / size) ** 2)))


def _largest_share(W: Matrix, z: Matrix, enough: float) -> float:
    """A bound on what one eigenvector of W·Wᵀ holds of unit z, below `enough` if so few steps do.

    Lanczos iteration with full reorthogonalisation.
    """
    basis, diagonal, beside = [z], list[float](), list[float]()
    share = 1.0
    while len(diagonal) < min(_STEPS, len(z)):
        product = W @ (W.T @ basis[-1])
        diagonal.append(float(product @ basis[-1]))
        stack = np.array(basis)
        for _ in range(2):
            product -= stack.T @ (stack @ product)
        norm = float(np.linalg.norm(product))
        beside.append(norm)
        if norm <= 2.0**-40 * max(map(abs, diagonal)):  # z lies in few eigenvectors
            return 1.0
        basis.append(product / norm)
        if len(diagonal) % _EVERY == 0:
            share = _christoffel(diagonal, beside)
            if share < _MARGIN * enough:
                break
    return min(1.0, share / _MARGIN)


def _christoffel(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    """The largest 1/Σ pᵢ(t)² for t ≥ 0, the pᵢ by their three-term recurrence.

    Beyond the nodes, the tridiagonal matrix's eigenvalues, it falls; between them it is smooth.
    """
    nodes = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside[:-1])
    ends = np.concatenate([[0.0], np.maximum(nodes, 0.0), [nodes[-1] + (nodes[-1] - nodes[-2])]])
    inside = np.linspace(0.0, 1.0, _POINTS, endpoint=False)
    t = (ends[:-1, None] + np.diff(ends)[:, None] * inside).reshape(-1)
    before, now = np.zeros_like(t), np.ones_like(t)
    total = np.ones_like(t)
    last = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # it is 0 where the sum overflows
        for a, b in zip(diagonal[:-1], beside[:-1], strict=True):
            before, now = now, ((t - a) * now - last * before) / b
            last = b
            total += now * now
    return 1.0 / float(np.nan_to_num(total, nan=np.inf).min())


def _check_finite(*matrices: Matrix) -> None:
    for matrix in matrices:
        wrong = int(matrix.size - np.isfinite(matrix).sum())
        if wrong:
            raise NumericsError(f"{wrong} of {matrix.size} values are NaN or infinite")
