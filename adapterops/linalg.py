"""Norms, singular values and truncation of ΔW = B·A from its factors, in float64.

The R x R core that is left when the bases of B and A are split off holds everything: its singular
values are those of ΔW, its truncation is the best approximation (Eckart & Young 1936). The bases
come from Gram matrices where that is accurate, from Householder QR where it is not:

    β = Σ_j ‖b_j‖‖a_j‖ over the columns of B and rows of A, each pair scaled to equal norms.
    A singular value from the Gram route is wrong by about R·u·β²/σ (u = 2⁻⁵³), so that route is
    taken only while ‖ΔW‖ ≥ 10⁻²β and no σ or tail in use is below 10⁻⁴β.

Products with m or n rows run where the factors are (numpy, or torch on a device); the cores, a few
hundred rows at most, are always solved by LAPACK on the host. B is (k, m, R) and A is (k, R, n): a
batch of k modules of one shape; on the CPU k is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from adapterops.arrays import Array, host, like, namespace

EPSILON = 2.0**-52
GRAM_NORM = 1e-2
_GRAM_SIGMA = 1e-4
_GRAM_EIGEN = 1e-8
_STACK_CANCELLATION = 4.0

Route = Literal["stack", "gram", "qr", "range", "activation", "copy", "zero"]
Form = Literal["balanced", "svd", "orthonormal-a", "orthonormal-b"]
# The share of σ that goes to B, as an exponent.
_TO_B = {"balanced": 0.5, "svd": 0.5, "orthonormal-a": 1.0, "orthonormal-b": 0.0}
Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Core:
    """Gram matrices of one module on the host, column pairs scaled by exact powers of two.

    `scale` s means b_j·s_j, a_j/s_j; `beta` and `norm` are β and ‖ΔW‖ (up to √u·β), both NaN if
    a factor holds NaN or infinities.
    """

    gram_b: Matrix
    gram_a: Matrix
    scale: Matrix
    beta: float
    norm: float

    @property
    def cancels(self) -> bool:
        """Whether the columns cancel so far that Gram matrices cannot see the result."""
        return self.norm < GRAM_NORM * self.beta


@dataclass(frozen=True, slots=True)
class Truncation:
    """The best rank-k factors of one module, balanced, and what was lost, exactly.

    B is (m, k), A is (k, n), zero-padded where ΔW has a lower rank. `values` are the singular
    values of ΔW as far as the route computes them; `tail` is ‖ΔW − B·A‖_F. Where B is the scaled
    columns times `right` (R, k) and A is `left` (k, R) times the scaled rows, these are given.
    """

    B: Array
    A: Array
    values: Matrix
    tail: float
    norm: float
    beta: float
    route: Route
    right: Matrix | None = None
    left: Matrix | None = None


@dataclass(frozen=True, slots=True)
class _Mix:
    """B·s·right and left·A/s are the truncated factors; columns beyond the rank are zero."""

    right: Matrix
    left: Matrix
    values: Matrix
    tail: float
    route: Route


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of ΔW, descending; its numerical rank and that of its stack of columns.

    `rest` is the norm of what lies beyond the values listed.
    """

    values: Matrix
    norm: float
    beta: float
    floor: float
    rank: int
    columns: int
    route: Route
    rest: float = 0.0

    def times(self, weight: float) -> Spectrum:
        """The spectrum of weight·ΔW."""
        if weight == 1.0:
            return self
        return replace(
            self,
            values=self.values * weight,
            norm=self.norm * weight,
            beta=self.beta * weight,
            floor=self.floor * weight,
            rest=self.rest * weight,
        )


def rank_floor(m: int, n: int, beta: float) -> float:
    """σ at or below this is rounding noise: judged against what went in, not the result."""
    return max(m, n, 1) * EPSILON * beta


def cores(B: Array, A: Array) -> list[Core]:
    """The scaled Gram matrices of each module of the batch, on the host."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found, and named, later
        return _cores(B, A)


def _cores(B: Array, A: Array) -> list[Core]:
    if isinstance(B, np.ndarray):  # numpy multiplies x.T @ x by half the work, but only in 2-D
        return [_core(b.T @ b, a @ a.T) for b, a in zip(B, A, strict=True)]
    return [_core(b, a) for b, a in zip(host(B.mT @ B), host(A @ A.mT), strict=True)]


def _core(gram_b: Matrix, gram_a: Matrix) -> Core:
    if not (np.isfinite(gram_b).all() and np.isfinite(gram_a).all()):
        return Core(gram_b, gram_a, np.ones(len(gram_b)), math.nan, math.nan)
    norm_b, norm_a = np.sqrt(np.diagonal(gram_b)), np.sqrt(np.diagonal(gram_a))
    live = (norm_b > 0) & (norm_a > 0)
    apart = np.log2(np.where(live, norm_a, 1.0)) - np.log2(np.where(live, norm_b, 1.0))
    scale = np.ldexp(1.0, np.rint(apart / 2).astype(int))
    gram_b = gram_b * scale * scale[:, None]
    gram_a = gram_a / scale / scale[:, None]
    squared = max(float(np.sum(gram_b * gram_a)), 0.0)
    return Core(gram_b, gram_a, scale, float(norm_b @ norm_a), math.sqrt(squared))


def norm(B: Array, A: Array) -> float:
    """‖B·A‖_F of one module (B (m, R), A (R, n)): by Gram, or QR where the sum cancels."""
    if 0 in (*B.shape, *A.shape):
        return 0.0
    core = cores(B[None], A[None])[0]
    if core.beta == 0.0 or not core.cancels:
        return core.norm
    triangle = _triangles(B, A, core.scale)
    return float(np.sqrt(np.sum(triangle * triangle)))


def spectrum(B: Array, A: Array, core: Core) -> Spectrum:
    """All singular values of one module's B·A (B (m, R), A (R, n)), accurate to its floor."""
    m, n, columns = B.shape[-2], A.shape[-1], B.shape[-1]
    floor = rank_floor(m, n, core.beta)
    if core.beta == 0.0:
        return Spectrum(np.zeros(min(m, n, columns)), 0.0, 0.0, 0.0, 0, columns, "zero")
    if not core.cancels and columns <= min(m, n):
        left, low_b = _root(core.gram_b)
        right, low_a = _root(core.gram_a)
        if low_b * low_a > floor:  # σ_R(BA) ≥ σ_R(B)·σ_R(A): certainly of full rank
            values = svd(left @ right.T)[1]
            if values[-1] >= _GRAM_SIGMA * core.beta:
                return Spectrum(values, core.norm, core.beta, floor, columns, columns, "gram")
    values = svd(_triangles(B, A, core.scale))[1]
    rank = int((values > floor).sum())
    return Spectrum(values, _size(values), core.beta, floor, rank, columns, "qr")


def truncate(
    B: Array,
    A: Array,
    rank: int,
    known: Sequence[Core] = (),
    form: Form = "balanced",
    *,
    untouched: bool = False,
) -> list[Truncation]:
    """The best approximation of at most this rank of each module: B (k, m, R), A (k, R, n).

    `balanced` has ‖b_j‖ = ‖a_j‖; where all R columns fit, they are kept as they are, for scaling by
    powers of two is exact. The other forms are of the singular value decomposition UΣVᵀ, σ
    descending: `svd` is U√Σ and √ΣVᵀ, `orthonormal-a` UΣ and Vᵀ, `orthonormal-b` U and ΣVᵀ.
    `known` are the modules' cores, if they were computed before. `untouched` leaves the columns as
    they are to the last bit where they all fit.
    """
    found = known or cores(B, A)
    if untouched and B.shape[-1] <= rank:
        return [_padded(B[i], A[i], core, rank) for i, core in enumerate(found)]
    if form != "balanced":
        return [_truncate_qr(B[i], A[i], core, rank, form) for i, core in enumerate(found)]
    m, n = B.shape[-2], A.shape[-1]
    mixes = [_mix(core, rank, m, n) for core in found]
    nothing = _Mix(
        np.zeros((B.shape[-1], rank)), np.zeros((rank, B.shape[-1])), np.zeros(0), 0.0, "zero"
    )
    given = [(mix or nothing, core.scale) for mix, core in zip(mixes, found, strict=True)]
    new_b = B @ like(np.stack([scale[:, None] * mix.right for mix, scale in given]), B)
    new_a = like(np.stack([mix.left / scale for mix, scale in given]), A) @ A
    return [
        Truncation(b, a, mix.values, mix.tail, core.norm, core.beta, mix.route, mix.right, mix.left)
        if mix
        else _truncate_qr(B[i], A[i], core, rank)
        for i, (mix, core, b, a) in enumerate(zip(mixes, found, new_b, new_a, strict=True))
    ]


def _padded(B: Array, A: Array, core: Core, rank: int) -> Truncation:
    """The factors themselves, with columns of zeros up to the rank."""
    columns = len(core.scale)
    right, left = np.zeros((columns, rank)), np.zeros((rank, columns))
    np.fill_diagonal(right, 1 / core.scale)
    np.fill_diagonal(left, core.scale)
    xp = namespace(B)
    more = rank - columns
    new_b = xp.concat([B, like(np.zeros((B.shape[0], more)), B)], 1)
    new_a = xp.concat([A, like(np.zeros((more, A.shape[1])), A)], 0)
    return Truncation(new_b, new_a, np.zeros(0), 0.0, core.norm, core.beta, "stack", right, left)


def _mix(core: Core, rank: int, m: int, n: int) -> _Mix | None:
    """The Gram route's result, or None where QR is needed."""
    columns = len(core.scale)
    right, left = np.zeros((columns, rank)), np.zeros((rank, columns))
    if core.beta == 0.0:
        return _Mix(right, left, np.zeros(0), 0.0, "zero")
    if columns <= rank and core.beta <= _STACK_CANCELLATION * math.sqrt(columns) * core.norm:
        np.fill_diagonal(right, 1.0)
        np.fill_diagonal(left, 1.0)
        return _Mix(right, left, np.zeros(0), 0.0, "stack")
    if core.cancels or columns > min(m, n):
        return None
    root_b, root_a = _factor(core.gram_b), _factor(core.gram_a)
    U, values, Vh = svd(root_b @ root_a.T)
    keep = min(rank, len(values))
    tail = _size(values[keep:])
    low = _GRAM_SIGMA * core.beta
    if values[keep - 1] < low or (keep < len(values) and tail < low):
        return None
    root = np.sqrt(values[:keep])
    right[:, :keep] = root_a.T @ (Vh[:keep].T / root)
    left[:keep] = (U[:, :keep].T / root[:, None]) @ root_b
    return _Mix(right, left, values, tail, "gram")


def _truncate_qr(B: Array, A: Array, core: Core, rank: int, form: Form = "balanced") -> Truncation:
    xp = namespace(B)
    scale = like(core.scale, B)
    basis_b, upper_b = xp.linalg.qr(B * scale)
    basis_a, upper_a = xp.linalg.qr((A / scale[:, None]).mT)
    U, values, Vh = svd(host(upper_b) @ host(upper_a).T)
    floor = rank_floor(B.shape[-2], A.shape[-1], core.beta)
    keep = min(rank, int((values > floor).sum()))
    to_b = values[:keep] ** _TO_B[form]
    to_a = values[:keep] ** (1 - _TO_B[form])
    left, right = np.zeros((len(U), rank)), np.zeros((rank, Vh.shape[1]))
    left[:, :keep] = U[:, :keep] * to_b
    right[:keep] = to_a[:, None] * Vh[:keep]
    new_b, new_a = basis_b @ like(left, B), like(right, A) @ basis_a.mT
    if form == "orthonormal-b":
        new_b = _completed(new_b, keep)
    if form == "orthonormal-a":
        new_a = _completed(new_a.mT, keep).mT
    route: Route = "qr" if core.beta else "zero"
    return Truncation(new_b, new_a, values, _size(values[keep:]), _size(values), core.beta, route)


def _completed(basis: Array, known: int) -> Array:
    """Columns beyond the `known` orthonormal ones, zero so far, made orthonormal to them.

    Their partners in the other factor are zero. Columns beyond the number of rows stay zero.
    """
    rows, columns = basis.shape
    missing = min(columns, rows) - known
    if missing <= 0:
        return basis
    start = np.zeros((rows, missing))
    fixed = host(basis[:, :known])
    start[np.argsort((fixed * fixed).sum(axis=1), kind="stable")[:missing], range(missing)] = 1.0
    added = np.linalg.qr(np.concatenate([fixed, start], axis=1))[0][:, known:]
    whole = np.zeros((rows, columns))
    whole[:, :known], whole[:, known : known + missing] = fixed, added
    return like(whole, basis)


def _triangles(B: Array, A: Array, scale: Matrix) -> Matrix:
    """The core R_B·R_Aᵀ of the QR route: its singular values and norm are those of B·A."""
    xp = namespace(B)
    scales = like(scale, B)
    upper_b = host(xp.linalg.qr(B * scales)[1])
    upper_a = host(xp.linalg.qr((A / scales[:, None]).mT)[1])
    core: Matrix = upper_b @ upper_a.T
    return core


def _factor(gram: Matrix) -> Matrix:
    """L with LᵀL = gram: by Cholesky, or by eigenvalues where rounding made it indefinite."""
    try:
        upper: Matrix = np.linalg.cholesky(gram).T
    except np.linalg.LinAlgError:
        return _root(gram)[0]
    return upper


def _root(gram: Matrix) -> tuple[Matrix, float]:
    """L with LᵀL = gram, and L's smallest singular value, 0 where rounding may have made it."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    trusted = values[0] > _GRAM_EIGEN * values[-1]
    smallest = math.sqrt(float(values[0])) if trusted else 0.0
    return np.sqrt(values)[:, None] * vectors.T, smallest


def svd(core: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Thin SVD on the host. Where divide and conquer fails to converge, QR iteration does not."""
    try:
        U, values, Vh = np.linalg.svd(core, full_matrices=False)
    except np.linalg.LinAlgError:
        import scipy.linalg

        U, values, Vh = scipy.linalg.svd(core, full_matrices=False, lapack_driver="gesvd")
    return U, values, Vh


def _size(values: Matrix) -> float:
    return float(np.sqrt(values @ values))
