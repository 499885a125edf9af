"""Rounding with feedback: what rounding does to the inputs an adapter reads is undone as it arises.

Greedy path following (Lybrand & Saab 2021, "A greedy algorithm for quantizing neural networks",
JMLR 22(156), arXiv 2010.15979, equation 3) with a ridge. Row by row: let e_i be the errors so far,
P an orthonormal basis (n, k) of the adapter's input space with rows p_j, S = Σ_{i<j} e_i·p_i. The
error at column j that leaves the least ‖e·P‖² + λ‖e‖² is e* = −(S·p_j) / (‖p_j‖² + λ); of the two
neighbours on the grid the one whose error is nearer to e* is taken. λ = λ₀·k/n, k/n being the mean
of ‖p_j‖². Unlike GPTQ and LDLQ it does not look ahead to later columns.

The errors of the neighbours are mid ± half; the upper one is nearer where S·p_j is below
−mid·(‖p_j‖² + λ), the limit here. Columns are taken in groups: S is kept up to date between them,
and inside one the limits are, by the products p_i·p_j.

Rows do not touch each other, and the result is a function of T and P alone: what is fed back is
first rounded to multiples of a power of two so large that float64 adds up every sum here without
rounding, in whatever order a BLAS goes. Errors keep about 2⁻²² of the largest spacing of their row,
P about 2⁻²² of 1. T's neighbours, and which of them is nearer, are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adapterops.casts import check_range
from adapterops.rounding.grid import NAMES, multiples, ordinal, ulp

_GROUP = 32  # columns between two passes over S
_ROWS = 1024  # rows at a time on a CPU: few enough for its cache, many enough for a call


def round_compensated(
    T: Tensor, P: Tensor, dtype: torch.dtype, *, module: str = "", ridge: float = 1.0
) -> tuple[Tensor, int]:
    """T rounded to `dtype` with feedback along its columns, and how many elements were clipped.

    T is float64 (m, n) of any strides: for weights stored as (in, out) a transposed view. P is
    (n, k) with orthonormal columns. `ridge` is λ₀; 10 adds less noise and leaves more error in P's
    span. |E| < 1 ulp, T on the grid stays, columns with p_j = 0 are rounded to nearest, ties to
    even; zeros have T's sign. Between the largest finite value and the rounding limit there is
    nothing to choose: such elements are clipped. NumericsError, naming `module`, where T lies
    beyond or is NaN.
    """
    result = torch.empty_like(T, dtype=dtype)
    if not T.numel():
        return result, 0
    basis = _Basis(P.to(T.device, torch.float64), ridge)
    size = _ROWS if T.device.type == "cpu" else len(T)
    clipped = 0
    for start in range(0, len(T), size):
        rows = slice(start, start + size)
        clipped += _round_rows(T[rows], basis, result[rows], module)
    return result, clipped


class _Basis:
    """P in multiples of 2^−`bits`, in groups of rows, and what is the same for all rows of T.

    Errors are multiples of 2^−`bits` spacings. By Cauchy-Schwarz no partial sum of theirs with P
    exceeds √n spacings, and limits add at most 1 + λ₀: all of it is exact below 2^(53 − 2·bits).
    """

    def __init__(self, P: Tensor, ridge: float) -> None:
        n, self.rank = P.shape
        self.bits = (52 - math.ceil(math.log2(math.sqrt(n) + 1 + ridge))) // 2
        P = self._multiples(P)
        weights = P.square().sum(1) + ridge * self.rank / n
        weights = torch.where(weights > 0, weights, 1.0)[:, None]
        self.groups = [
            _Group(p, self._multiples(p @ p.mT).tril_(-1), weight)
            for p, weight in zip(P.split(_GROUP), weights.split(_GROUP), strict=True)
        ]

    def _multiples(self, x: Tensor) -> Tensor:
        return torch.round(x * 2.0**self.bits) * 2.0**-self.bits


class _Group:
    """Rows p_j of P, p_i·p_j for i < j as a matrix and row by row (`before`), and ‖p_j‖² + λ."""

    def __init__(self, p: Tensor, products: Tensor, weights: Tensor) -> None:
        self.p, self.products, self.weights = p, products, weights
        self.before = [row[:j] for j, row in enumerate(products.unbind())]


class _Buffers:
    """Blocks (columns of a group, rows) of float64 that the groups share.

    `columns` are limit, half, and the halves of the columns before it, of each column.
    """

    def __init__(self, like: Tensor) -> None:
        shape = (6, _GROUP, len(like))
        self.blocks = torch.empty(shape, dtype=torch.float64, device=like.device).unbind()
        limit, half = self.blocks[:2]
        before = [half[:j].mT for j in range(_GROUP)]
        self.columns = list(zip(limit.unbind(), half.unbind(), before, strict=True))


def _round_rows(T: Tensor, basis: _Basis, result: Tensor, module: str) -> int:
    """Fill `result` from T, both (rows, n); how many elements were clipped."""
    dtype = result.dtype
    largest = torch.maximum(T.amax(1), -T.amin(1))
    check_range(largest, NAMES[dtype], module)
    finite = torch.finfo(dtype).max
    may_clip = bool((largest > finite).any())
    spacing = ulp(largest, dtype)
    least = spacing * 2.0 ** (-2 * basis.bits)
    # Adding and subtracting these rounds to multiples of 2^−bits spacings, and of `least`.
    coarse, fine = spacing * (1.5 * 2.0 ** (52 - basis.bits)), least * (1.5 * 2.0**52)
    S = T.new_zeros((basis.rank, len(T)))
    buffers = _Buffers(T)
    clipped = start = 0
    for group in basis.groups:
        columns = slice(start, start + len(group.p))
        limit, half, mid, exact, lower, upper = (b[: len(group.p)] for b in buffers.blocks)
        exact.copy_(_contiguous(T[:, columns]).mT)
        multiples(exact, dtype, (mid, lower, upper))
        if may_clip:
            clipped += int((exact.abs() > finite).sum())
            lower.clamp_(min=-finite)
            upper.clamp_(max=finite)
        torch.sub(upper, lower, out=half).mul_(0.5)
        torch.sub(lower, exact, out=mid).add_(half)
        torch.mul(mid, group.weights, out=limit).neg_().add_(fine).sub_(fine)
        if int(torch.count_nonzero(limit)) < limit.numel():
            _settle(limit, mid, upper.to(dtype), least)
        mid.add_(coarse).sub_(coarse)
        half.add_(coarse).sub_(coarse)
        limit.addmm_(group.p, (S + coarse).sub_(coarse), alpha=-1)
        limit.addmm_(group.products, mid, alpha=-1)
        _follow(buffers, group)
        S.addmm_(group.p.mT, mid.add_(half))
        torch.where(limit >= 0, upper, lower, out=lower)
        result[:, columns] = lower.to(dtype).mT.contiguous()
        start += len(group.p)
    return clipped


def _settle(limit: Tensor, mid: Tensor, upper: Tensor, least: Tensor) -> None:
    """Give limits that were rounded to 0 the least value of their sign, ties to the even code."""
    even = (ordinal(upper) & 1) == 0
    signed = torch.where((mid < 0) | ((mid == 0) & even), least, -least)
    limit.copy_(torch.where(limit == 0, signed, limit))


def _follow(buffers: _Buffers, group: _Group) -> None:
    """Choose neighbours column by column: limits lose S·p_j, halves take their signs."""
    for (limit, half, before), products in zip(buffers.columns, group.before, strict=False):
        limit.addmv_(before, products, alpha=-1)
        torch.copysign(half, limit, out=half)


def _contiguous(block: Tensor) -> Tensor:
    """A copy of columns next to each other, from which the transpose is read without long jumps."""
    return block.contiguous() if block.stride(1) == 1 else block
