"""One module of two adapters, C against D, measured in orthonormal bases of C.

With C = U·K·Vᵀ (Householder QR of both factors) and D = B·A,

    X = UᵀB, Y = AV, B⊥ = B − UX, A⊥ = A − YVᵀ,
    D = U(XY)Vᵀ + U(XA⊥) + (B⊥Y)Vᵀ + B⊥A⊥:  four terms that are orthogonal to each other,
    ‖C − gD‖² = ‖K − g·XY‖² + g²·outside,   ⟨C, D⟩ = ⟨K, XY⟩,
    outside = ‖XA⊥‖² + ‖B⊥Y‖² + ‖B⊥A⊥‖² = ‖D‖² − ‖XY‖².

The last difference, with ‖D‖² from Gram matrices, is wrong by up to about 8R·u·β²: it is used where
that is below 10⁻⁸ of the result. Elsewhere nothing is squared before it has been subtracted, and a
distance is exact down to about u·β, where ‖C‖² + ‖D‖² − 2⟨C, D⟩ would end at √u·β. Only ‖B⊥A⊥‖,
which no small matrix has, is taken from Gram matrices then, under a guard and else by QR
(`linalg.norm`). All of it is products of a batch of modules of one shape; C's part is done once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapterops import linalg
from adapterops.fleet.types import Array

_TOLERATED = 1e-8
_UNIT = 2.0**-53


@dataclass(frozen=True, slots=True)
class Frame:
    """k modules of C of one shape: U (k, m, q), K (k, q, s), V (k, n, s), β of each (k,)."""

    U: Array
    K: Array
    V: Array
    betas: Array

    def take(self, which: list[int]) -> Frame:
        """Some of the modules, in this order."""
        if which == list(range(len(self.U))):
            return self
        return Frame(self.U[which], self.K[which], self.V[which], self.betas[which])


@dataclass(frozen=True, slots=True)
class Figures:
    """What certifies a module, arrays (k,): squares of norms, ⟨C, D⟩, and floors.

    `residual` is ‖C − gD‖² at the module's own best `ratio` g; `floor` and `own_floor` are what of
    the distance and of ‖D‖ may be rounding noise.
    """

    c: Array
    d: Array
    inner: Array
    distance: Array
    residual: Array
    ratio: Array
    floor: Array
    own_floor: Array


def frame(B: Array, A: Array) -> Frame:
    """The bases of k modules; B (k, m, r), A (k, r, n)."""
    U, upper = np.linalg.qr(B)
    V, lower = np.linalg.qr(A.mT)
    return Frame(U, upper @ lower.mT, V, _betas(B, A))


def no_frame(count: int, shape: tuple[int, int]) -> Frame:
    """Modules that C leaves alone."""
    m, n = shape
    empty = np.zeros((count, 0, 0))
    return Frame(np.zeros((count, m, 0)), empty, np.zeros((count, n, 0)), np.zeros(count))


def figures(of: Frame, B: Array, A: Array) -> Figures:
    """C against D: B (k, m, r), A (k, r, n)."""
    X, Y = of.U.mT @ B, A @ of.V
    inside = X @ Y
    within = _squares(inside)
    d, betas = _product(B, A)
    outside = np.maximum(d - within, 0.0)
    inner = np.sum(of.K * inside, axis=(1, 2))
    floor = linalg.rank_floor(B.shape[1], A.shape[2], 1.0) * np.array([betas + of.betas, betas])
    doubt = _doubt(B.shape[2] + X.shape[1], betas)
    doubtful = np.flatnonzero(doubt > _TOLERATED * _residual(of.K, inside, inner, outside)[0])
    if len(doubtful):
        part = of.take(doubtful.tolist())
        outside[doubtful] = _outside(
            part, B[doubtful], A[doubtful], X[doubtful], Y[doubtful], floor[0, doubtful]
        )
    residual, ratio = _residual(of.K, inside, inner, outside)
    return Figures(
        c=_squares(of.K),
        d=within + outside,
        inner=inner,
        distance=_squares(of.K - inside) + outside,
        residual=residual,
        ratio=ratio,
        floor=floor[0],
        own_floor=floor[1],
    )


def absent(of: Frame, shape: tuple[int, int]) -> Figures:
    """Modules that D leaves alone."""
    zero, c = np.zeros(len(of.K)), _squares(of.K)
    floor = linalg.rank_floor(*shape, 1.0) * of.betas
    return Figures(c, zero, zero, c, c, zero, floor, zero)


def _residual(K: Array, inside: Array, inner: Array, outside: Array) -> tuple[Array, Array]:
    """‖C − gD‖² and g = ⟨C, D⟩/‖D‖², 0 where D is."""
    d = _squares(inside) + outside
    ratio = np.divide(inner, d, out=np.zeros_like(d), where=d > 0)
    return _squares(K - ratio[:, None, None] * inside) + ratio**2 * outside, ratio


def _outside(of: Frame, B: Array, A: Array, X: Array, Y: Array, floor: Array) -> Array:
    """‖D‖² less what lies in both of C's spaces, from its three terms."""
    rest_b, rest_a = B - of.U @ X, A - Y @ of.V.mT
    known = _squares(X @ rest_a) + _squares(rest_b @ Y)
    outer, betas = _product(rest_b, rest_a)
    doubt = _doubt(B.shape[2], betas)
    least = np.maximum(_squares(of.K - X @ Y) + known + outer, floor**2)
    for index in np.flatnonzero(doubt > _TOLERATED * least):
        outer[index] = linalg.norm(rest_b[index], rest_a[index]) ** 2
    return np.asarray(known + outer)


def _product(B: Array, A: Array) -> tuple[Array, Array]:
    """‖B·A‖² by Gram matrices, wrong by up to `_doubt`, and β = Σ‖b_j‖‖a_j‖."""
    gram_b, gram_a = B.mT @ B, A @ A.mT
    sizes = (np.diagonal(gram, axis1=1, axis2=2) for gram in (gram_b, gram_a))
    betas = np.sum(np.sqrt(np.prod(list(sizes), axis=0)), axis=1)
    return np.maximum(np.sum(gram_b * gram_a, axis=(1, 2)), 0.0), betas


def _doubt(rank: int, betas: Array) -> Array:
    return 8 * max(rank, 1) * _UNIT * betas**2


def _betas(B: Array, A: Array) -> Array:
    columns = np.einsum("kmr,kmr->kr", B, B)
    rows = np.einsum("krn,krn->kr", A, A)
    return np.asarray(np.sum(np.sqrt(columns * rows), axis=1))


def _squares(matrices: Array) -> Array:
    return np.asarray(np.einsum("kij,kij->k", matrices, matrices))
