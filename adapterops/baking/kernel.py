"""One block of rows: read, add the change, round once, and measure what became of it.

Everything here is element by element or a product with few columns, so it runs in tiles that stay
in a processor's cache. Each is read and written once; the figures come from the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.targets import Target
from adapterops.casts import format_name
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref
from adapterops.rounding.compensated import round_compensated
from adapterops.rounding.exact import Counts, codes, narrowed, round_exactly
from adapterops.rounding.grid import ulp
from adapterops.rounding.stochastic import round_stochastically

Round = Literal["exact", "nearest", "stochastic", "compensated"]

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_TILE = 1 << 18  # elements
_SAMPLED = 64  # every so many rows are counted in units of the last place
_TINY = 1e-30  # a sum of squares as small as this may lack some that underflowed
_NORMAL = 0x0400  # the code of float16's smallest normal number


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
    delta: Delta, start: int, stop: int, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor, Found]:
    """Rows [start, stop) of a band before and after, W and W′, and what became of their change.

    Raises NumericsError, naming the tensor, for NaN or infinities in W and for what the type
    cannot hold.
    """
    target = delta.target
    before = read_rows(target.ref, target.matrix, start, stop)
    after = torch.empty(before.shape, dtype=TORCH[rounding.dtype], device="cpu")
    if not before.numel():
        return before, after, Found(Drift(), Counts())
    step = max(1, _TILE // max(1, target.matrix[1]))
    if rounding.mode == "compensated":  # goes column by column: few rows are slow
        step = stop - start
    drift, counts, along = Drift(), Counts(), None
    for first in range(start, stop, max(1, step)):
        last = min(first + step, stop)
        here = slice(first - start, last - start)
        W = before[here].to(delta.device)
        single = delta.single(first, last)
        with np.errstate(invalid="ignore"):  # infinities in W, which are found below
            rounded, more, clipped = _rounded(W, delta, first, last, single, rounding)
        # What float32 loses is no larger than its own rounding of D: only float64 tells it.
        D = (
            delta.double(first, last).to(delta.device)
            if rounding.dtype in ("F32", "F64")
            else single
        )
        tile, part = measured(W, rounded, D, delta, first, last)
        if not np.isfinite(tile.error):
            raise _overflow(W, rounded, delta, rounding)
        drift += replace(tile, clipped=clipped)
        counts += more
        if part is not None:
            along = part if along is None else along + part
        after[here] = rounded.cpu()
    return before, after, Found(drift, counts, along)


def _rounded(
    W: torch.Tensor, delta: Delta, start: int, stop: int, single: torch.Tensor, how: Rounding
) -> tuple[torch.Tensor, Counts, int]:
    """W + D in the type asked for, who decided it, and how many elements could not be moved."""
    dtype = TORCH[how.dtype]
    if how.mode == "nearest" and delta.is_exact and torch.float64 not in (dtype, W.dtype):
        return torch.add(W.float(), single).to(dtype), Counts(single=W.numel()), 0
    if how.mode == "stochastic":
        rounded, counts = round_stochastically(
            W,
            delta,
            start,
            stop,
            seed=how.seed,
            name=delta.target.name,
            single=single,
            dtype=dtype,
        )
        return rounded, counts, 0
    basis = delta.basis() if how.mode == "compensated" else None
    if basis is None:
        return (*round_exactly(W, delta, start, stop, single, dtype), 0)
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


def measured(
    W: torch.Tensor,
    rounded: torch.Tensor,
    D: torch.Tensor,
    delta: Delta,
    start: int,
    stop: int,
) -> tuple[Drift, torch.Tensor | None]:
    """The figures of a tile, in D's type, float32 or float64; W, `rounded` and D are (rows, n)."""
    moved = torch.sub(rounded.to(D.dtype), W.to(D.dtype))
    realised, delta2 = _dot(moved, D), _dot(D, D)
    error = moved.sub_(D)
    squares = _dot(error, error)
    basis = delta.basis()
    inside, along = squares, None
    if basis is not None:
        basis = basis.to(D.dtype)
    if basis is not None and delta.target.inputs == "columns":
        seen = error @ basis
        inside = _dot(seen, seen)
    elif basis is not None:
        first = delta.band.start
        inside, along = 0.0, (basis[start - first : stop - first].T @ error).double()
    elements = delta.elements(start, stop)
    changed = _count_changed(W, rounded)
    sample = slice(0, None, _SAMPLED)
    larger = torch.maximum(W[sample].abs(), rounded[sample].abs())
    ulps = error[sample].abs() / ulp(larger.to(D.dtype), rounded.dtype)
    drift = Drift(
        elements=elements,
        delta=delta2,
        realised=realised,
        error=squares,
        inside=inside,
        bias=float(error.sum()),
        changed=changed,
        swallowed=max(0, elements - changed),
        subnormal=_new_subnormals(W, rounded),
        ulp_max=float(ulps.max()),
        ulp_sum=float(ulps.sum()),
        ulp_count=ulps.numel(),
    )
    return drift, along


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """Σ xy; of float32, again in float64 where squares may have left its range."""
    x, y = x.reshape(-1), y.reshape(-1)
    found = float(torch.dot(x, y))
    if not _TINY < abs(found) < np.inf:
        found = float(torch.dot(x.double(), y.double()))
    return found


def _count_changed(W: torch.Tensor, rounded: torch.Tensor) -> int:
    """How many elements have another value."""
    if W.dtype != rounded.dtype:
        return int(torch.count_nonzero(W.double() != rounded.double()))
    if W.device.type != "cpu":
        return int((codes(W) != codes(rounded)).sum())
    return int(np.count_nonzero(codes(W).numpy() != codes(rounded).numpy()))


def _new_subnormals(W: torch.Tensor, rounded: torch.Tensor) -> int:
    """How many elements of float16 left the normal range, or rose from zero into what is below it.

    bfloat16 and float32 reach 10⁻³⁸; no model's weights do.
    """
    if rounded.dtype != torch.float16 or W.dtype != torch.float16:
        return 0
    now, was = ((codes(x).cpu().numpy() & 0x7FFF) for x in (rounded, W))
    small = now < _NORMAL
    small &= (was >= _NORMAL) | (was == 0)
    small &= now != 0
    return int(np.count_nonzero(small))


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
