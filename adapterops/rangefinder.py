"""Nearly the best rank-k factors of what is too large to stack, or was never in factors.

With thousands of columns a sum outgrows the dense matrix; the difference of two checkpoints is one.
`krylov` finds directions X and the error of M·X·Xᵀ, an identity that resolves errors down to
√u·‖M‖; `measure` takes the figures of a certificate from M − B·A itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adapterops.arrays import Array, double, host, like, namespace, put
from adapterops.krylov import MOST_BLOCKS, OVERSAMPLING, captured
from adapterops.linalg import Spectrum, Truncation, rank_floor
from adapterops.plan import Module
from adapterops.sums import BLOCK_NUMBERS, CHUNK_COLUMNS, Sum, held, is_dense, squares, stack

__all__ = ["LARGE", "Sum", "applies", "is_dense", "measure", "peak", "spectrum", "truncate"]

LARGE = 1024
_SETTLED = 3e-5
_SEEN = 3e-4  # enough to choose ranks by
_DIRECT = 1e-6
_RESOLVED = 1e-4


@dataclass(frozen=True, slots=True)
class Measured:
    """A certificate's figures of one module, from rows of M in float64.

    `cut` is ‖ΔW − B·A‖ of the factors before rounding, `total` that of the stored ones. `sizes` are
    ‖cᵢDᵢ‖ and `inner` ⟨stored, cᵢDᵢ⟩ by part. `noise` is what rounding to the format of the inputs
    puts into ΔW, `changed` how many of its numbers are not zero.
    """

    norm: float
    cut: float
    total: float
    sizes: tuple[float, ...]
    inner: tuple[float, ...]
    noise: float
    changed: int


def applies(module: Module, rank: int) -> bool:
    """Whether a module has so many columns for so small a rank that streaming pays."""
    return module.columns > LARGE and 4 * rank <= module.columns


def peak(module: Module, rank: int) -> int:
    """Bytes that `truncate`, `spectrum` and `measure` need at most."""
    m, n = module.shape
    numbers = m * n if held(module) else 0
    bases = 3 * MOST_BLOCKS * (rank + OVERSAMPLING) * (m + n)
    if is_dense(module):
        return 4 * numbers + 8 * 5 * BLOCK_NUMBERS + 8 * bases
    return 8 * (numbers + 2 * BLOCK_NUMBERS + 4 * CHUNK_COLUMNS * (m + n) + bases)


def truncate(total: Sum, rank: int) -> Truncation:
    """Nearly the best rank-k factors of a sum, with their exact error."""
    m, n = total.shape
    found = captured(total, rank, _SETTLED)
    bound, norm = total.beta, found.norm
    keep = min(rank, int((found.values > rank_floor(m, n, bound)).sum()))
    left, right = np.zeros((2, len(found.V), rank))
    root = np.sqrt(found.values[:keep])
    left[:, :keep], right[:, :keep] = found.V[:, :keep] / root, found.V[:, :keep] * root
    B = double(found.images) @ like(left, found.images)
    A = (double(found.basis) @ like(right, found.basis)).mT
    tail = found.tail
    if not total.is_dense and tail <= _DIRECT * norm:
        tail = _distance(total, B, A)
    if total.transposed:
        B, A = A.mT, B.mT
    return Truncation(B, A, found.values[:keep], tail, norm, bound, "range")


def spectrum(total: Sum, cap: int | None = None) -> Spectrum:
    """Singular values of a sum, descending.

    Of a dense change the first `cap`, and the norm of the rest; of a sum of factors, or where `cap`
    is no small part of them, all, from the dense matrix.
    """
    m, n = total.shape
    rest = 0.0
    if not total.is_dense or cap is None or 3 * (cap + OVERSAMPLING) > min(m, n):
        bound = total.beta  # raises where a dense part is not finite
        values = np.linalg.svd(host(total.rows(0, m)), compute_uv=False)
        size = float(np.sqrt(values @ values))
        if total.is_dense and cap is not None:
            rest = float(np.linalg.norm(values[cap:]))
            values = values[:cap]
    else:
        found = captured(total, cap, _SEEN)
        values, rest, size = found.values[:cap], found.tail, found.norm
        bound = total.beta  # of the norm that was found on the way
    floor = rank_floor(m, n, bound)
    rank = int((values > floor).sum())
    columns = total.module.columns
    return Spectrum(values, size, bound, floor, rank, columns, "range", rest)


def measure(total: Sum, result: Truncation, B: Array, A: Array) -> Measured:
    """The figures of stored factors B (m, r), A (r, n) and of `result` before they were rounded.

    One pass over the rows of a sum with dense parts, in float64. The error before rounding is
    measured where the identity cannot resolve it. Raises NumericsError where an input holds NaN.
    """
    exact_b, exact_a = result.B, result.A
    if total.transposed:
        exact_b, exact_a, B, A = exact_a.mT, exact_b.mT, A.mT, B.mT
    seen = result.tail > _RESOLVED * result.norm
    parts = len(total.module.parts)
    sizes, inner = [0.0] * parts, [0.0] * parts
    norm = cut = lost = noise = 0.0
    changed = 0
    for start, stop in total.blocks():
        written = B[start:stop] @ A
        pieces = [(i, put(block, total.device)) for i, block in total.dense_rows(start, stop)]
        for index, block in pieces:
            size = squares(block)
            sizes[index] += size
            inner[index] += _dot(block, written)
        block = pieces[0][1]
        low = [left[start:stop] @ right for left, right in total.chunks()]
        for other in [*low, *(block for _, block in pieces[1:])]:
            block = block + other
        norm += size if block is pieces[-1][1] else squares(block)
        changed += int(namespace(block).count_nonzero(block != 0))  # of booleans: much faster
        written -= block
        lost += squares(written)
        if not seen:
            cut += squares(block - exact_b[start:stop] @ exact_a)
        noise += sum(c * c * operator.noise(start, stop) for _, c, operator in total.operators)
    for index, size, product in total.factored(B, A):
        sizes[index], inner[index] = size * size, product
    return Measured(
        norm=math.sqrt(norm),
        cut=result.tail if seen else math.sqrt(cut),
        total=math.sqrt(lost),
        sizes=tuple(math.sqrt(size) for size in sizes),
        inner=tuple(inner),
        noise=math.sqrt(noise),
        changed=changed,
    )


def _dot(one: Array, other: Array) -> float:
    return float(one.reshape(-1) @ other.reshape(-1))


def _distance(total: Sum, B: Array, A: Array) -> float:
    """‖M − B·A‖_F measured on dense rows."""
    blocks = (total.rows(i, j) - B[i:j] @ A for i, j in total.blocks())
    return math.sqrt(math.fsum(squares(block) for block in blocks))


def inner_with_sum(total: Sum, B: Array, A: Array) -> float:
    """⟨ΔW, B·A⟩ of a sum of factor pairs."""
    return float((total.rmatmul(B).mT * A).sum())


def inner(total: Sum, B: Array, A: Array) -> tuple[float, ...]:
    """⟨B·A, cᵢDᵢ⟩ of every factor pair."""
    result = []
    for part in total.module.parts:
        left, right = stack([part], total.device)
        result.append(float(((B.mT @ left) * (A @ right.mT)).sum()))
    return tuple(result)
