"""Leading singular directions of a sum from products with M and Mᵀ only: a block Krylov method.

P spans Ω, MᵀMΩ, (MᵀM)²Ω, … for a random Ω, and M·P has singular values as near to the leading ones
of M as any polynomial of that degree brings them (Golub, Luk & Overton 1981, A block Lanczos
method; Musco & Musco 2015, algorithm 2). Subspace iteration, which keeps the last of these blocks
alone, takes twice as many products for the same error. For X, P times the leading right singular
vectors of M·P, ‖M − MXXᵀ‖² = ‖M‖² − Σ_{k≤r} σ_k(MP)², an identity. What is not known is how far
that is from the optimum: P grows until the best A for the B = MX that was found, which is half a
step of subspace iteration, would not lower the error either.

float32 resolves errors to a few hundredths of ‖M‖. Down to there M·P and Mᵀ·(M·P) are computed in
one reading of the rows of M, which may come from files or from a rule. What is smaller is gone on
with in float64, as are sums of factors, and there M·P is made orthonormal before it is multiplied
by Mᵀ: MᵀM has the square of M's condition.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from adapterops.arrays import Array, double, host, like, namespace, put
from adapterops.linalg import Matrix, svd
from adapterops.sums import Sum

__all__ = ["MOST_BLOCKS", "OVERSAMPLING", "Captured", "captured"]

OVERSAMPLING = 32
MOST_BLOCKS = 4  # of P; then it is cut to the best two
_MOST_PASSES = 10
_SINGLE = 3e-2
_NOISE = 1e-4  # of σ₁: float32 knows nothing of Mᵀ·(M·P) along smaller directions
_NOTHING = 1e-13  # of ‖M‖: what float64 does not see beyond P
_TINY = 1e-12  # squares so far below the largest are made 1 in a second turn


@dataclass(frozen=True, slots=True)
class Captured:
    """P (n, w) with orthonormal columns, M·P (m, w), and on the host σ and V of M·P = U·σ·Vᵀ.

    `tail` is the error of projecting on the leading directions, as many as were asked for.
    """

    basis: Array
    images: Array
    values: Matrix
    V: Matrix
    norm: float
    tail: float


def captured(total: Sum, rank: int, enough: float) -> Captured:
    """Leading directions until half a step more would lower the error at this rank by no more than
    the share `enough`. Raises NumericsError where an input holds NaN or infinities.
    """
    n, width = total.shape[1], rank + OVERSAMPLING
    if 4 * width >= 3 * min(total.shape):
        return _whole(total, rank)
    single = total.is_dense
    start = _signs(total.module.stem, n, width).astype(np.float32 if single else np.float64)
    block = _orthonormal(put(start, total.device))
    basis: Array = None
    images: Array = None
    for done in range(1, _MOST_PASSES + 1):
        image, back, scale = _products(total, block)
        norm = total.norm if single else total.exact_norm
        basis, images = _beside(basis, block), _beside(images, image)
        values, V = _spectrum(images)
        tail = math.sqrt(max(norm * norm - float(values[:rank] @ values[:rank]), 0.0))
        beyond = back - basis @ (basis.mT @ back)
        gain = _gain(beyond, scale @ V[-len(scale) :, :rank], values[:rank])
        settled = gain <= (_NOTHING * norm) ** 2 or (done > 1 and gain <= 2 * enough * tail * tail)
        narrow = single and done > 1 and tail <= _SINGLE * norm
        room = n - basis.shape[1]
        if done == _MOST_PASSES or (not narrow and (settled or room <= 0)):
            break
        if narrow:
            single = False
            block = _orthonormal(double(basis) @ like(V[:, :width], basis))
            basis = images = None
            continue
        if basis.shape[1] >= MOST_BLOCKS * width:
            turn = _cast(V[:, : 2 * width], basis)
            basis, images = basis @ turn, images @ turn
        block = _orthonormal(_leading(beyond, room))
        block = _orthonormal(block - basis @ (basis.mT @ block))
    return Captured(basis, images, values, V, norm, tail)


def _products(total: Sum, block: Array) -> tuple[Array, Array, Matrix]:
    """M·X of a block X, and Z and a small S with Z·S = Mᵀ·(M·X)."""
    if _is_single(block):
        with np.errstate(over="ignore", invalid="ignore"):  # found, and named, by the norm
            image, back, scale = total.both(block)
            return image, back, np.eye(block.shape[1]) / scale
    image = total.matmul(block)
    basis, triangle = namespace(image).linalg.qr(image)
    return image, total.rmatmul(basis), host(triangle)


def _spectrum(images: Array) -> tuple[Matrix, Matrix]:
    """σ, descending, and V. float32 data are not outresolved by their Gram matrix in float64."""
    if _is_single(images):
        wide = double(images)
        squares, V = np.linalg.eigh(host(wide.mT @ wide))
        return np.sqrt(np.maximum(squares[::-1], 0.0)), V[:, ::-1]
    found = namespace(images).linalg.qr(images, mode="r")
    _, values, Vh = svd(host(found if isinstance(found, np.ndarray) else found.R))
    return values, Vh.T


def _gain(beyond: Array, last: Matrix, values: Matrix) -> float:
    """Σ(‖Mᵀuᵢ‖² − σᵢ²) over the left singular vectors uᵢ of M·P.

    Mᵀuᵢ = σᵢxᵢ + what lies outside P, and only the last block of P is not mapped into it:
    `beyond` (n, w) is what MᵀM makes of that block outside P, `last` (w, r) the share of it in xᵢ.
    """
    size = float(np.abs(last).max(initial=0.0)) or 1.0  # float32 need not hold the product
    outside = host(beyond @ _cast(last / size, beyond)).astype(np.float64) * size
    squares = np.einsum("nr,nr->r", outside, outside)
    known = values > (_NOISE if _is_single(beyond) else 0.0) * values[:1]
    return float((squares[known] / values[known] ** 2).sum())


def _orthonormal(block: Array) -> Array:
    """An orthonormal basis of the columns of (n, w); of float32 ones zeros may be among it.

    float32 ones by the eigenvectors of their Gram matrix in float64 (Stathopoulos & Wu 2002, A
    block orthogonalization procedure, SVQB): called again it leaves none but zeros short of 1.
    """
    if not _is_single(block):
        return namespace(block).linalg.qr(block)[0]
    wide = double(block)
    squares, V = np.linalg.eigh(host(wide.mT @ wide))
    least = max(_TINY * float(squares[-1]), np.finfo(float).tiny)
    turn = V[:, ::-1] / np.sqrt(np.maximum(squares[::-1], least))
    return block @ _cast(turn, block)


def _leading(block: Array, most: int) -> Array:
    """Combinations of the columns of (n, w), no more than `most`, that hold most of them."""
    if block.shape[1] <= most:
        return block
    wide = double(block)
    V = np.linalg.eigh(host(wide.mT @ wide))[1]
    return block @ _cast(V[:, ::-1][:, :most], block)


def _whole(total: Sum, rank: int) -> Captured:
    """All directions, where so few rows or columns leave nothing to chance."""
    norm = total.exact_norm  # raises where the rows are not finite
    U, values, Vh = svd(host(total.rows(0, total.shape[0])))
    tail = float(np.linalg.norm(values[rank:]))
    images, basis = put(U * values, total.device), put(np.ascontiguousarray(Vh.T), total.device)
    return Captured(basis, images, values, np.eye(len(values)), norm, tail)


def _beside(one: Array, other: Array) -> Array:
    return other if one is None else namespace(other).concat([one, other], 1)


def _cast(small: Matrix, array: Array) -> Array:
    """A host matrix where `array` is, in its precision."""
    return like(small.astype(np.float32 if _is_single(array) else np.float64), array)


def _is_single(array: Array) -> bool:
    return bool(array.dtype == namespace(array).float32)


def _signs(stem: str, rows: int, columns: int) -> Matrix:
    """A ±1 test matrix from raw Philox bits keyed by the module's name."""
    key = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw((rows * columns + 63) // 64)
    bits = np.unpackbits(words.view(np.uint8), count=rows * columns)
    signs: Matrix = (2.0 * bits - 1.0).reshape(rows, columns)
    return signs
