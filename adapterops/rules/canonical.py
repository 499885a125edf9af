"""One form for all factors of one adapter, and one basis for elementwise rules in small spaces.

(B, A) and (BG, G⁻¹A) are the same adapter, and a rule that looks at entries of a core gives another
result in every basis. So bases are made that depend on the deltas alone: singular vectors, with
what is free in them fixed by the outputs' own coordinates.

- Singular values closer than 10⁻⁸σ₁ are one cluster. In it the vectors are rotated to those that
  the pivoted QR of the rows of U gives (Cholesky of the projector UUᵀ, rows with the most left
  first), which the subspace alone decides.
- The largest entry of every vector is positive.

Ties, of pivots and of largest entries, go to the first within 10⁻⁶. The vectors of two singular
values apart by a gap are decided to about 2⁻⁵³·σ₁/gap. Results are float64 on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops import linalg
from adapterops.arrays import Array, host
from adapterops.factors import Factors
from adapterops.rules.cuts import clusters
from adapterops.rules.orthonormal import orthonormal

_TIE = 1e-6
_LEAST_SIZE = 512


def balanced(factors: Factors) -> Factors:
    """The canonical U√Σ (m, k) and √ΣVᵀ (k, n), k the numerical rank."""
    U, values, V = _svd(factors)
    U, V = _fixed(U, values, V)
    root = np.sqrt(values)
    return Factors(U * root, root[:, None] * V.T)


def core_bases(members: Sequence[Factors]) -> tuple[Array, Array, Array]:
    """Canonical Q_B (m, k), Q_A (n, k') and the cores Q_BᵀDᵢQ_A (T, k, k') of some adapters.

    The bases are the left singular vectors of [B₁ … B_T] and of [A₁ᵀ … A_Tᵀ] (Panariello et al.
    2025, Core space, arXiv 2509.17786, section 4), of the balanced factors: with any others they
    would depend on the gauge. k and k' are the numerical ranks of the stacks.
    """
    whole = [balanced(member) for member in members]
    left = _basis(np.concatenate([one.B for one in whole], axis=1))
    right = _basis(np.concatenate([one.A.T for one in whole], axis=1))
    return left, right, np.stack([(left.T @ one.B) @ (one.A @ right) for one in whole])


def knots(members: Sequence[Factors]) -> tuple[Array, Array]:
    """Canonical U (m, k) of [D₁ | … | D_T] = UΣVᵀ and the blocks UᵀDᵢ = ΣVᵢᵀ (T, k, n).

    Stoica et al. 2025, Model merging with SVD to tie the KnOTS, arXiv 2410.19735, section 4; from
    QR of the factors. k is the numerical rank.
    """
    whole = [balanced(member) for member in members]
    # The rows of a balanced A are orthogonal: [B₁‖a₁‖ …] has the left singular vectors of [D₁ …].
    sizes = [np.linalg.norm(one.A, axis=1) for one in whole]
    stack = [one.B * size for one, size in zip(whole, sizes, strict=True)]
    U = _basis(np.concatenate(stack, axis=1))
    return U, np.stack([(U.T @ one.B) @ one.A for one in whole])


def _svd(factors: Factors) -> tuple[Array, Array, Array]:
    """U (m, k), σ (k,) and V (n, k) of a delta, pairs of columns and rows scaled alike before."""
    B, A = host(factors.B), host(factors.A)
    if 0 in (*B.shape, *A.shape):
        return np.zeros((B.shape[0], 0)), np.zeros(0), np.zeros((A.shape[1], 0))
    core = linalg.cores(B[None], A[None])[0]
    left, upper_b = orthonormal(B * core.scale)
    right, upper_a = orthonormal((A / core.scale[:, None]).T)
    U, values, Vh = linalg.svd(upper_b @ upper_a.T)
    kept = int((values > linalg.rank_floor(*_sizes(factors), core.beta)).sum())
    return left @ U[:, :kept], values[:kept], right @ Vh[:kept].T


def _sizes(factors: Factors) -> tuple[int, int]:
    """(m, n), no less than a size at which the floor of the rank is well above what QR errs."""
    m, n = factors.shape
    return max(m, _LEAST_SIZE), n


def _basis(columns: Array) -> Array:
    """The canonical left singular vectors of `columns` (m, R), as far as above rounding."""
    if 0 in columns.shape:
        return np.zeros((columns.shape[0], 0))
    left, upper = orthonormal(columns)
    U, values, _ = linalg.svd(upper)
    size = float(np.linalg.norm(columns, axis=0).sum())
    kept = int((values > linalg.rank_floor(max(columns.shape[0], _LEAST_SIZE), 1, size)).sum())
    return _fixed(left @ U[:, :kept], values[:kept])[0]


def _fixed(U: Array, values: Array, V: Array | None = None) -> tuple[Array, Array]:
    """U (m, k) with its clusters and signs fixed, and V (n, k) turned along with it."""
    U = U.copy()
    V = np.zeros((0, len(values))) if V is None else V.copy()
    for run in clusters(values):
        if run.stop - run.start > 1:
            turn = _turn(U[:, run])
            U[:, run], V[:, run] = U[:, run] @ turn, V[:, run] @ turn
    for k in range(len(values)):
        size = np.abs(U[:, k])
        if U[np.argmax(size >= (1 - _TIE) * size.max()), k] < 0:
            U[:, k], V[:, k] = -U[:, k], -V[:, k]
    return U, V


def _turn(columns: Array) -> Array:
    """The rotation (k, k) of orthonormal columns (m, k) to the ones their pivoted rows give."""
    rest = columns.copy()
    turn = np.zeros((columns.shape[1], 0))
    for _ in range(columns.shape[1]):
        sizes = (rest * rest).sum(axis=1)
        row = rest[np.argmax(sizes >= (1 - _TIE) * sizes.max())]
        row = row - turn @ (turn.T @ row)
        turn = np.column_stack([turn, row / np.linalg.norm(row)])
        rest = columns - (columns @ turn) @ turn.T
    return turn
