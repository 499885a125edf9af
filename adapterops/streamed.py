"""Sums of very many columns: never stacked, but multiplied with, a few adapters at a time.

With thousands of columns the stack outgrows the dense matrix. A randomised range finder with
subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) needs products with ΔW and ΔWᵀ
only. Its error is no estimate: for an orthonormal Q,
‖ΔW − [QQᵀΔW]_r‖² = ‖ΔW‖² − Σ_{k≤r} σ_k(QᵀΔW)², an identity. What is not known is how far that is
from the optimum; iteration goes on until the error stops falling.

‖ΔW‖ needs the dense sum anyway. Up to `_HELD` bytes it is kept for all products; beyond, each
product reads the inputs anew and the norm is taken block by block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from adapterops import linalg
from adapterops.arrays import Array, host, like, namespace, put
from adapterops.linalg import Matrix, Spectrum, Truncation, rank_floor, svd
from adapterops.plan import Module, Part

LARGE = 1024
_CHUNK_COLUMNS = 128
_BLOCK_NUMBERS = 1 << 20
_OVERSAMPLING = 48
_SETTLED = 1e-4
_MOST_PASSES = 10
_DIRECT = 1e-6
_HELD = 512 << 20


def applies(module: Module, rank: int) -> bool:
    """Whether a module has so many columns for so small a rank that streaming pays."""
    return module.columns > LARGE and 4 * rank <= module.columns


class Sum:
    """ΔW of one module as an operator. The shape alone decides whether it is held densely."""

    def __init__(self, module: Module, device: str) -> None:
        self.module = module
        self.device = device
        self.shape = module.shape
        self._dense = self._accumulated() if held(module) else None

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """(B, A) of a few inputs at a time, coefficients folded into A."""
        gathered: list[Part] = []
        for part in self.module.parts:
            gathered.append(part)
            if sum(p.site.rank for p in gathered) >= _CHUNK_COLUMNS:
                yield _stack(gathered, self.device)
                gathered = []
        if gathered:
            yield _stack(gathered, self.device)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row ranges whose dense blocks hold at most a million numbers."""
        m, n = self.shape
        step = max(1, _BLOCK_NUMBERS // max(n, 1))
        return ((start, min(start + step, m)) for start in range(0, m, step))

    def _accumulated(self) -> Array:
        """The dense sum, built in place: no second matrix of its size ever exists."""
        dense: Array = None
        for B, A in self.chunks():
            if dense is None:
                xp = namespace(B)
                dense = xp.zeros(self.shape, dtype=B.dtype, **_where(B))
            for start, stop in self.blocks():
                dense[start:stop] += B[start:stop] @ A
        return dense

    def matmul(self, x: Array) -> Array:
        """ΔW·x for x (n, k)."""
        if self._dense is not None:
            return self._dense @ x
        return sum(B @ (A @ x) for B, A in self.chunks())

    def rmatmul(self, y: Array) -> Array:
        """ΔWᵀ·y for y (m, k)."""
        if self._dense is not None:
            return self._dense.mT @ y
        return sum(A.mT @ (B.mT @ y) for B, A in self.chunks())

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of ΔW, dense."""
        if self._dense is not None:
            return self._dense[start:stop]
        return sum(B[start:stop] @ A for B, A in self.chunks())

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F from its dense rows, block by block."""
        return math.sqrt(math.fsum(_squares(self.rows(*bounds)) for bounds in self.blocks()))

    @property
    def beta(self) -> float:
        """β of all columns."""
        return math.fsum(beta for beta, _ in self._each)

    @property
    def part_norms(self) -> tuple[float, ...]:
        """‖cᵢDᵢ‖ of every part."""
        return tuple(norm for _, norm in self._each)

    @cached_property
    def _each(self) -> list[tuple[float, float]]:
        """(β, norm) of every part, in one reading."""
        stacks = (_stack([part], self.device) for part in self.module.parts)
        return [(linalg.cores(B[None], A[None])[0].beta, linalg.norm(B, A)) for B, A in stacks]


def held(module: Module) -> bool:
    """Whether a module's dense sum is small enough to keep."""
    return 8 * math.prod(module.shape) <= _HELD


def peak(module: Module, rank: int) -> int:
    """Bytes that `truncate` needs at most."""
    m, n = module.shape
    chunk = 4 * _CHUNK_COLUMNS * (m + n)
    dense = m * n if held(module) else 0
    return 8 * (dense + 2 * _BLOCK_NUMBERS + chunk + 8 * (rank + _OVERSAMPLING) * (m + n))


def _squares(block: Array) -> float:
    return float((block * block).sum())


def _where(array: Array) -> dict[str, Any]:
    return {} if isinstance(array, np.ndarray) else {"device": array.device}


def _stack(parts: list[Part], device: str) -> tuple[Array, Array]:
    pairs = [part.site.factors(device) for part in parts]
    xp = namespace(pairs[0][0])
    return xp.concat([B for B, _ in pairs], -1), xp.concat(
        [A * part.coefficient for (_, A), part in zip(pairs, parts, strict=True)], 0
    )


def truncate(total: Sum, rank: int) -> Truncation:
    """Nearly the best rank-k factors of a sum, with their exact error."""
    m, n = total.shape
    width = min(rank + _OVERSAMPLING, m, n)
    start = _signs(total.module.stem, n, width)
    sample = total.matmul(put(start, total.device))
    xp = namespace(sample)
    basis = xp.linalg.qr(sample)[0]
    norm, before = total.norm, math.inf
    for done in range(1, _MOST_PASSES + 1):
        image = total.rmatmul(basis)
        right, triangle = xp.linalg.qr(image)
        U, values, Vh = svd(host(triangle).T)
        kept = float(values[:rank] @ values[:rank])
        tail = math.sqrt(max(norm * norm - kept, 0.0))
        settled = abs(before - tail) <= _SETTLED * tail or tail <= _DIRECT * norm
        if done == _MOST_PASSES or width == min(m, n) or (done > 2 and settled):
            break
        before = tail
        basis = xp.linalg.qr(total.matmul(right))[0]
    bound = total.beta
    keep = min(rank, int((values > rank_floor(m, n, bound)).sum()))
    root = np.sqrt(values[:keep])
    left, lower = np.zeros((len(U), rank)), np.zeros((rank, Vh.shape[1]))
    left[:, :keep], lower[:keep] = U[:, :keep] * root, root[:, None] * Vh[:keep]
    B, A = basis @ like(left, basis), like(lower, basis) @ right.mT
    if tail <= _DIRECT * norm:
        tail = _distance(total, B, A)
    return Truncation(B, A, values[:keep], tail, norm, bound, "range")


def _distance(total: Sum, B: Array, A: Array) -> float:
    """‖ΔW − B·A‖_F measured on dense rows."""
    squares = []
    for start, stop in total.blocks():
        block = total.rows(start, stop) - B[start:stop] @ A
        squares.append(_squares(block))
    return math.sqrt(math.fsum(squares))


def spectrum(total: Sum) -> Spectrum:
    """All singular values, from the dense matrix: with this many columns it is the smaller form."""
    m, n = total.shape
    values = np.linalg.svd(host(total.rows(0, m)), compute_uv=False)
    bound = total.beta
    floor = rank_floor(m, n, bound)
    rank = int((values > floor).sum())
    size = float(np.sqrt(values @ values))
    return Spectrum(values, size, bound, floor, rank, total.module.columns, "range")


def _signs(stem: str, rows: int, columns: int) -> Matrix:
    """A ±1 test matrix from raw Philox bits keyed by the module's name."""
    key = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw((rows * columns + 63) // 64)
    bits = np.unpackbits(words.view(np.uint8), count=rows * columns)
    signs: Matrix = (2.0 * bits - 1.0).reshape(rows, columns)
    return signs


def inner_with_sum(total: Sum, B: Array, A: Array) -> float:
    """⟨ΔW, B·A⟩."""
    return float((total.rmatmul(B).mT * A).sum())


def inner(total: Sum, B: Array, A: Array) -> tuple[float, ...]:
    """⟨B·A, cᵢDᵢ⟩ of every part."""
    result = []
    for part in total.module.parts:
        left, right = _stack([part], total.device)
        result.append(float(((B.mT @ left) * (A @ right.mT)).sum()))
    return tuple(result)
