"""One block of rows: read, add the change, round once, and measure what became of it.

Everything here is element by element or a product with few columns, so it runs in tiles that stay
in a processor's cache. Each is read and written once; the figures come from the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.measuring import measured, tiles
from adapterops.casts import format_name
from adapterops.changes.targets import Target
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref
from adapterops.rounding.compensated import round_compensated
from adapterops.rounding.exact import Counts, narrowed, round_exactly
from adapterops.rounding.grid import TORCH
from adapterops.rounding.stochastic import round_stochastically

Round = Literal["exact", "nearest", "stochastic", "compensated"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How sums are rounded, to which type; the seed of the random ones."""

    mode: Round
    dtype: str
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What became of D in some rows; blocks add up.

    `along` is Qᵀ·E of these rows where the adapter's inputs run along rows.
    """

    drift: Drift
    counts: Counts
    along: torch.Tensor | None = None


def read_rows(ref: Ref, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor seen as a matrix, in its own type."""
    rows = torch.empty((stop - start, matrix[1]), dtype=TORCH[ref.dtype], device="cpu")
    width = matrix[1] * rows.element_size()
    raw: memoryview = rows.view(-1).view(torch.uint8).numpy().data
    ref.source.pread_into(ref.offset + start * width, raw)
    return rows


def bake_rows(
    delta: Delta,
    start: int,
    stop: int,
    rounding: Rounding,
    into: np.ndarray[Any, np.dtype[np.uint8]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Found]:
    """Rows [start, stop) of a band before and after, W and W′, and what became of their change.

    W′ is made in the bytes `into`, if any are given.
    Raises NumericsError, naming the tensor, for NaN or infinities in W and for what the type
    cannot hold.
    """
    target = delta.target
    before = read_rows(target.ref, target.matrix, start, stop)
    dtype = TORCH[rounding.dtype]
    if into is None:
        into = np.empty(before.numel() * dtype.itemsize, np.uint8)
    if not before.numel():
        return before, torch.empty_like(before, dtype=dtype), Found(Drift(), Counts())
    after = torch.from_numpy(into).view(dtype).view(before.shape)
    W = before.to(delta.device)
    rounded = after if W.device == after.device else torch.empty_like(W, dtype=dtype)
    counts, clipped = Counts(), 0
    # Rounding with feedback goes column by column: few rows are slow.
    whole = rounding.mode == "compensated"
    with np.errstate(invalid="ignore"):  # infinities in W, which are found below
        for first, last in [(start, stop)] if whole else tiles(start, stop, target.matrix[1]):
            here = slice(first - start, last - start)
            rounded[here], more, fixed = _rounded(W[here], delta, first, last, rounding)
            counts, clipped = counts + more, clipped + fixed
        drift, along = measured(W, rounded, delta, start, stop)
    if not np.isfinite(drift.error):
        raise _overflow(W, rounded, delta, rounding)
    if rounded is not after:
        after.copy_(rounded)
    return before, after, Found(replace(drift, clipped=clipped), counts, along)


def _rounded(
    W: torch.Tensor, delta: Delta, start: int, stop: int, how: Rounding
) -> tuple[torch.Tensor, Counts, int]:
    """W + D in the type asked for, who decided it, and how many elements could not be moved."""
    dtype = TORCH[how.dtype]
    if how.mode == "nearest" and delta.is_exact and torch.float64 not in (dtype, W.dtype):
        return (
            delta.onto(W, start, stop).to(dtype),
            Counts(single=W.numel()),
            0,
        )
    if how.mode == "stochastic":
        rounded, counts = round_stochastically(
            W, delta, start, stop, seed=how.seed, name=delta.target.name, dtype=dtype
        )
        return rounded, counts, 0
    basis = delta.basis() if how.mode == "compensated" else None
    if basis is None:
        return (*round_exactly(W, delta, start, stop, dtype), 0)
    if not bool(torch.isfinite(W).all()):
        raise _overflow(W, W, delta, how)
    before = W.cpu().double()
    T = before + delta.double(start, stop)
    zero = T == 0
    T[zero] = torch.copysign(T[zero], before[zero])
    turned = delta.target.inputs == "rows"
    T, P = (T.T if turned else T), basis.cpu().double()
    rounded, clipped = round_compensated(T, P, dtype, module=delta.target.name)
    rounded = (rounded.T.contiguous() if turned else rounded).to(W.device)
    return rounded, Counts(double=W.numel()), clipped


def _overflow(W: torch.Tensor, rounded: torch.Tensor, delta: Delta, how: Rounding) -> NumericsError:
    """The error for a tile that holds values which are not finite."""
    target = delta.target
    wrong = int((~torch.isfinite(W)).sum())
    if wrong:
        return NumericsError(
            f"{wrong} values of {target.name!r} are NaN or infinite before anything is added",
            path=target.ref.source.path,
            hint="the base is damaged; fetch it again",
        )
    count = int((~torch.isfinite(rounded)).sum())
    return NumericsError(
        f"{count} values of {target.name!r} are beyond {format_name(how.dtype)} with the adapters "
        "added",
        hint="--dtype float32 or bfloat16 holds them; are the weights of the adapters right?",
    )


def cast(W: torch.Tensor, dtype: str, target: Target) -> torch.Tensor:
    """Rows of a tensor that nothing changes in another type, rounded once.

    Raises NumericsError for finite values that the type cannot hold.
    """
    if W.dtype == TORCH[dtype]:
        return W
    result = narrowed(W.double(), TORCH[dtype])
    lost = int((torch.isfinite(W) & ~torch.isfinite(result)).sum())
    if lost:
        raise NumericsError(
            f"{lost} values of {target.name!r} are beyond {format_name(dtype)}",
            path=target.ref.source.path,
            hint="--dtype float32 or bfloat16 holds them",
        )
    return result
