"""What became of a change in some rows, the figures of `Drift`: by projection, or by elements.

D's rows lie in the span of the orthonormal Q, so that ⟨M, D⟩ = ⟨M·Q, D·Q⟩ for M = W′ − W, and
‖E‖² = ‖M‖² − 2⟨M, D⟩ + ‖D‖² for E = M − D: one product with few columns gives what otherwise takes
the dense D and four more passes over memory. Where E is small beside D that difference cancels, and
the elements themselves are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.rounding.exact import codes
from adapterops.rounding.grid import ulp

_TILE = 1 << 18  # elements
_SAMPLED = 64  # every so many rows are counted in units of the last place
_TINY = 1e-30  # a sum of squares as small as this may lack some that underflowed
_CANCELLED = 2.0**-9  # times ‖D‖²/√(rows·k): float32 gets 10⁻³ of an ‖E‖² like that wrong
_NORMAL = 0x0400  # the code of float16's smallest normal number


def tiles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of so many elements that temporaries stay in a processor's cache."""
    step = max(1, _TILE // max(1, columns))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def measured(
    W: torch.Tensor, rounded: torch.Tensor, delta: Delta, start: int, stop: int
) -> tuple[Drift, torch.Tensor | None]:
    """The figures of rows [start, stop), and Qᵀ·E of them where inputs run along rows.

    W and `rounded` are (stop − start, n). Where one is not finite, neither is `error`.
    """
    wide = rounded.dtype in (torch.float32, torch.float64)
    found = None if wide else _projected(W, rounded, delta, start, stop)
    if found is not None:
        return found, None
    total, along = Drift(), None
    for first, last in tiles(start, stop, W.shape[1]):
        here = slice(first - start, last - start)
        # What float32 loses is no larger than its own rounding of D: only float64 tells it.
        D = delta.double(first, last).to(W.device) if wide else delta.single(first, last)
        drift, part = compared(W[here], rounded[here], D, delta, first, last)
        total += drift
        if part is not None:
            along = part if along is None else along + part
    return total, along


def _projected(
    W: torch.Tensor, rounded: torch.Tensor, delta: Delta, start: int, stop: int
) -> Drift | None:
    """The figures by projection, in float32; None where it cannot tell them."""
    basis, expected = delta.basis(), delta.projected(start, stop)
    if basis is None or expected is None:
        return None
    given, total = expected
    seen = torch.empty_like(given)
    squares = bias = 0.0
    for first, last in tiles(0, len(W), W.shape[1]):
        moved = rounded[first:last].float().sub_(W[first:last].float())
        torch.mm(moved, basis, out=seen[first:last])
        # Row by row: a dot of 10⁵ products in float32 is off by 10⁻⁶.
        squares += float(torch.linalg.vecdot(moved, moved).double().sum())
        bias += float(moved.sum())
    seen, given = seen.double(), given.double()
    realised, delta2 = _dot(seen, given), _dot(given, given)
    error = squares - 2 * realised + delta2
    least = _CANCELLED * delta2 / math.sqrt(max(1, seen.numel()))
    if not (error > least and delta2 > _TINY and _TINY < squares < np.inf):
        return None
    inside = seen.sub_(given)
    drift = Drift(
        elements=delta.elements(start, stop),
        delta=delta2,
        realised=realised,
        error=error,
        inside=_dot(inside, inside),
        bias=bias - total,
    )
    sample = rounded[::_SAMPLED].float() - W[::_SAMPLED].float()
    return _counted(drift, W, rounded, sample - delta.single(start, stop, _SAMPLED))


def compared(
    W: torch.Tensor,
    rounded: torch.Tensor,
    D: torch.Tensor,
    delta: Delta,
    start: int,
    stop: int,
) -> tuple[Drift, torch.Tensor | None]:
    """As `measured`, element by element, in D's type, float32 or float64; D is (rows, n)."""
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
    drift = Drift(
        elements=delta.elements(start, stop),
        delta=delta2,
        realised=realised,
        error=squares,
        inside=inside,
        bias=float(error.sum()),
    )
    return _counted(drift, W, rounded, error[::_SAMPLED]), along


def _counted(drift: Drift, W: torch.Tensor, rounded: torch.Tensor, error: torch.Tensor) -> Drift:
    """The figures with what is counted among elements; `error` is E of a sample of the rows."""
    changed = _count_changed(W, rounded)
    larger = torch.maximum(W[::_SAMPLED].abs(), rounded[::_SAMPLED].abs())
    ulps = error.abs() / ulp(larger.to(error.dtype), rounded.dtype)
    return replace(
        drift,
        changed=changed,
        swallowed=max(0, drift.elements - changed),
        subnormal=_new_subnormals(W, rounded),
        ulp_max=float(ulps.max()),
        ulp_sum=float(ulps.sum()),
        ulp_count=ulps.numel(),
    )


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
    now, was = (codes(x).cpu().numpy().view(np.uint16).ravel() for x in (rounded, W))
    few = np.flatnonzero((now << 1) < 2 * _NORMAL)  # the sign is shifted out
    small, before = now[few] << 1, was[few] << 1
    return int(np.count_nonzero((small != 0) & ((before >= 2 * _NORMAL) | (before == 0))))
