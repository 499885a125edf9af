"""One module's ΔW = Σ cᵢDᵢ as an operator: multiplied with and read by rows, never stacked.

Its parts are factor pairs, or dense changes that are read from files by rows (`operators`). With
dense parts the matrix is M = ΔWᵀ where the files hold the weight so; products of these are in
float32 unless the other factor is float64, and rows are exact. Sums of factor pairs alone are
computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from adapterops import linalg
from adapterops.arrays import Array, host, namespace, put
from adapterops.operators import KINDS, Block, Operator
from adapterops.plan import Module, Part

CHUNK_COLUMNS = 128
BLOCK_NUMBERS = 1 << 20
DENSE_BLOCK_NUMBERS = 1 << 18  # a few of them fit into a cache
HELD = 512 << 20
HELD_SINGLE = 64 << 20
_FAR = 2.0**40


def is_dense(module: Module) -> bool:
    """Whether some part of a module is a dense change, which only the range finder can factor."""
    return any(part.site.kind in KINDS for part in module.parts)


def held(module: Module) -> bool:
    """Whether a module's dense sum is small enough to keep.

    Dense changes are cheap to read again; two large ones held at a time would be most of a
    process's memory.
    """
    numbers = math.prod(module.shape)
    return 4 * numbers <= HELD_SINGLE if is_dense(module) else 8 * numbers <= HELD


class Sum:
    """ΔW of one module, or its transpose, as M. The shape alone decides whether it is held."""

    def __init__(self, module: Module, device: str) -> None:
        self.module = module
        self.device = device
        self.operators: list[tuple[int, float, Operator]] = []
        self._factored: list[tuple[int, Part]] = []
        for index, part in enumerate(module.parts):
            if part.site.kind in KINDS:
                operator = KINDS[part.site.kind](part.site)
                self.operators.append((index, part.coefficient, operator))
            else:
                self._factored.append((index, part))
        self.is_dense = bool(self.operators)
        # What is computed in float32 anyway: where it is held, rows are not computed again.
        kinds = [(part.site.kind, part.coefficient) for part in module.parts]
        self._is_single = kinds == [("elementwise", 1.0)]
        self.transposed = any(operator.transposed for _, _, operator in self.operators)
        self.shape = module.shape[::-1] if self.transposed else module.shape
        self.dtype = np.float32 if self.is_dense else np.float64
        self._dense: Array = None
        if held(module):
            self._dense = self._accumulated()

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """(B, A) of a few factor pairs of M at a time, coefficients folded into A."""
        gathered: list[Part] = []
        for _, part in self._factored:
            gathered.append(part)
            if sum(p.site.rank for p in gathered) >= CHUNK_COLUMNS:
                yield self._stack(gathered)
                gathered = []
        if gathered:
            yield self._stack(gathered)

    def _stack(self, parts: list[Part]) -> tuple[Array, Array]:
        B, A = stack(parts, self.device)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of M whose dense blocks hold at most a million numbers."""
        m, n = self.shape
        step = max(1, (DENSE_BLOCK_NUMBERS if self.is_dense else BLOCK_NUMBERS) // max(n, 1))
        return ((start, min(start + step, m)) for start in range(0, m, step))

    def _accumulated(self) -> Array:
        """M, built in place: no second matrix of its size ever exists."""
        dense = put(np.zeros(self.shape, self.dtype), self.device)
        if self.is_dense:
            for start, stop in self.blocks():
                dense[start:stop] = self._single(start, stop)
            return dense
        for B, A in self.chunks():
            for start, stop in self.blocks():
                dense[start:stop] += B[start:stop] @ A
        return dense

    def matmul(self, x: Array) -> Array:
        """M·x for x (n, k) in the precision of x."""
        if self._serves(x):
            return self._dense @ x
        if not self.is_dense:
            return sum(B @ (A @ x) for B, A in self.chunks())
        return namespace(x).concat([self._block(x, *bounds) @ x for bounds in self.blocks()], 0)

    def rmatmul(self, y: Array) -> Array:
        """Mᵀ·y for y (m, k) in the precision of y."""
        if self._serves(y):
            return self._dense.mT @ y
        if not self.is_dense:
            return sum(A.mT @ (B.mT @ y) for B, A in self.chunks())
        return sum(self._block(y, i, j).mT @ y[i:j] for i, j in self.blocks())

    def both(self, x: Array) -> tuple[Array, Array, float]:
        """M·x, s·Mᵀ·(M·x) and s for x (n, k) in float32 in one reading of the rows, which gives the
        norm too. Only of sums with dense parts.

        s is a power of two with which squares of M fit float32: about 1/‖M‖, or, while that is not
        known, one over the first of its entries. Where those were no guide it is read again.
        """
        if self._serves(x):
            y, scale = self._dense @ x, _inverse(self.norm)
            return y, self._dense.mT @ (y * scale), scale
        scale = _inverse(self.norm) if "norm" in self.__dict__ else 0.0
        images, back, squared = [], 0.0, []
        for start, stop in self.blocks():
            block = self._single(start, stop)
            if not scale and block.any():
                scale = _inverse(float(abs(block).max()))
            images.append(block @ x)
            back += block.mT @ (images[-1] * (scale or 1.0))
            if "norm" not in self.__dict__:
                squared.append(squares(block))
        if squared:
            self.norm = self._root(squared)
            if self.norm * scale > _FAR:
                return self.both(x)
        return namespace(x).concat(images, 0), back, scale or 1.0

    def _serves(self, x: Array) -> bool:
        """Whether the matrix is held in the precision of `x`."""
        return self._dense is not None and self._dense.dtype == x.dtype

    def _block(self, x: Array, start: int, stop: int) -> Array:
        is_single = x.dtype == namespace(x).float32
        return self._single(start, stop) if is_single else self.rows(start, stop)

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of M in float64."""
        if self._dense is not None and not self.is_dense:
            return self._dense[start:stop]
        low = [B[start:stop] @ A for B, A in self.chunks()]
        return sum(low + [put(block, self.device) for _, block in self.dense_rows(start, stop)])

    def dense_rows(self, start: int, stop: int) -> Iterator[tuple[int, Block]]:
        """(index of the part, cᵢ times its rows of M) for every dense part, on the host."""
        if self._is_single and self._dense is not None:
            yield 0, host(self._dense[start:stop]).astype(np.float64)
            return
        for index, coefficient, operator in self.operators:
            block = operator.rows(start, stop)
            if coefficient != 1.0:
                block *= coefficient
            yield index, block

    def _single(self, start: int, stop: int) -> Array:
        """Rows of M in float32."""
        if len(self.module.parts) == 1:
            _, coefficient, operator = self.operators[0]
            block = operator.single(start, stop)
            if coefficient != 1.0:
                block *= np.float32(coefficient)
            return put(block, self.device)
        rows = self.rows(start, stop)
        return rows.astype(np.float32) if isinstance(rows, np.ndarray) else rows.float()

    @cached_property
    def norm(self) -> float:
        """‖M‖_F from its dense rows, block by block; with dense parts from rows in float32.

        Raises NumericsError where a dense part holds NaN or infinities.
        """
        if not self.is_dense:
            return self.exact_norm
        held = self._dense
        blocks = (self._single(i, j) if held is None else held[i:j] for i, j in self.blocks())
        return self._root(map(squares, blocks))

    @cached_property
    def exact_norm(self) -> float:
        """`norm` from rows in float64."""
        return self._root(squares(self.rows(*bounds)) for bounds in self.blocks())

    def _root(self, squared: Iterable[float]) -> float:
        """√Σ of the squares in blocks of rows."""
        total = math.fsum(squared)
        if not math.isfinite(total):
            for _, _, operator in self.operators:
                operator.check()
        return math.sqrt(total)

    @cached_property
    def beta(self) -> float:
        """β of all columns, and what dense parts say of themselves."""
        dense = [
            abs(c) * operator.beta(size / abs(c))
            for (_, c, operator), size in zip(self.operators, self._dense_norms(), strict=True)
        ]
        return math.fsum([*(beta for beta, _ in self._each), *dense])

    def _dense_norms(self) -> list[float]:
        """‖cᵢDᵢ‖ of every dense part."""
        if len(self.module.parts) == 1:
            return [self.norm] * len(self.operators)
        found = [0.0] * len(self.operators)
        for bounds in self.blocks():
            for place, (_, block) in enumerate(self.dense_rows(*bounds)):
                found[place] += squares(block)
        return [math.sqrt(each) for each in found]

    def factored(self, B: Array, A: Array) -> Iterator[tuple[int, float, float]]:
        """(index of the part, ‖cᵢDᵢ‖, ⟨B·A, cᵢDᵢ⟩) for every factor pair; B (m, r), A (r, n)."""
        for index, part in self._factored:
            left, right = self._stack([part])
            inner = float(((B.mT @ left) * (A @ right.mT)).sum())
            yield index, linalg.norm(left, right), inner

    @property
    def part_norms(self) -> tuple[float, ...]:
        """‖cᵢDᵢ‖ of every part; only of sums of factor pairs."""
        return tuple(norm for _, norm in self._each)

    @cached_property
    def _each(self) -> list[tuple[float, float]]:
        """(β, norm) of every factor pair, in one reading."""
        stacks = (stack([part], self.device) for _, part in self._factored)
        return [(linalg.cores(B[None], A[None])[0].beta, linalg.norm(B, A)) for B, A in stacks]


def _inverse(size: float) -> float:
    """A power of two near 1/size, which float32 holds; 1 of 0 and of what is not finite."""
    if not 0 < size < math.inf:
        return 1.0
    return 2.0 ** -max(-120, min(120, math.frexp(size)[1]))


def squares(block: Array) -> float:
    """Σx² in float64."""
    if isinstance(block, np.ndarray):
        flat = block.reshape(-1).astype(np.float64, copy=False)
        return float(flat @ flat)
    wide = block.double()
    return float((wide * wide).sum())


def stack(parts: list[Part], device: str) -> tuple[Array, Array]:
    """(B, A) of factor pairs side by side, coefficients folded into A."""
    pairs = [part.site.factors(device) for part in parts]
    xp = namespace(pairs[0][0])
    return xp.concat([B for B, _ in pairs], -1), xp.concat(
        [A * part.coefficient for (_, A), part in zip(pairs, parts, strict=True)], 0
    )
