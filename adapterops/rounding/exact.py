"""Correct rounding of W + D, D = Σ cᵢBᵢAᵢ: to nearest, ties to even, decided in three steps.

float32 with an error bound decides nearly all elements, float64 with the same bound nearly all of
the rest, and exact summation what remains: ties and their neighbours. The result is a function of
the inputs alone, so that it is the same on any device, for any number of threads and block size.
An exact zero has the sign of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch

from adapterops import casts
from adapterops.rounding.grid import NAMES

Array = np.ndarray[Any, Any]

_CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_DOUBT = 0.05  # beyond this share of a block it is cheaper to begin in float64
_SLACK = 2.0**-22  # two roundings of T and two of what is added to it, relative to |T|
_DOUBLE_SLACK = 2.0**-51
_SPLIT = 2.0**27 + 1  # Veltkamp's constant for float64


class Change(Protocol):
    """What `baking.delta.Delta` has: a change by blocks, with bounds and by single elements."""

    @property
    def is_exact(self) -> bool: ...
    def onto(self, W: torch.Tensor, start: int, stop: int) -> torch.Tensor: ...
    def double(self, start: int, stop: int) -> torch.Tensor: ...
    def bounds(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]: ...
    def double_bounds(self, start: int, stop: int) -> tuple[Array, Array]: ...
    def at(self, rows: Array, columns: Array) -> Any: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """How many elements each step decided; `plain` are those of a dense change, in float64."""

    single: int = 0
    double: int = 0
    exact: int = 0
    plain: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def round_exactly(
    W: torch.Tensor,
    change: Change,
    start: int,
    stop: int,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Counts]:
    """RN(W + D) of rows [start, stop) in `dtype`, W's (stop − start, n) by default.

    Values out of range come back as infinities. A dense change is computed in float64 and rounded
    once.
    """
    dtype = dtype or W.dtype
    if not change.is_exact or torch.float64 in (W.dtype, dtype):
        total = W.cpu().double() + change.double(start, stop)
        rounded = narrowed(total, dtype).to(W.device)
        zero = np.flatnonzero((total == 0).numpy())
        _put(rounded, zero, _zeros(W, zero, dtype))
        return rounded, Counts(plain=W.numel())
    narrow = dtype in (torch.float16, torch.bfloat16)
    found = _by_single(W, change, start, stop, dtype) if narrow else None
    rounded, doubt = found or (None, None)
    if rounded is None or doubt is None:
        rounded, doubt, exact = _by_double(W, change, start, stop, dtype)
        counts = Counts(double=W.numel() - exact, exact=exact)
    else:
        exact = _settle(W, change, start, rounded, doubt) if len(doubt) else 0
        counts = Counts(W.numel() - len(doubt), len(doubt) - exact, exact)
    return rounded, counts


def _by_single(
    W: torch.Tensor,
    change: Change,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Array] | None:
    """What float32 rounds to, and flat indices of those it leaves in doubt; None if too many."""
    T = change.onto(W, start, stop)
    u, v = change.bounds(start, stop)
    reach = torch.addr(T.abs(), u, v, beta=_SLACK)
    low = (T - reach).to(dtype)
    rounded = T.add_(reach).to(dtype)
    doubt = different(low, rounded)
    return None if len(doubt) > _MOST_DOUBT * W.numel() else (rounded, doubt)


def _by_double(
    W: torch.Tensor, change: Change, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, Array, int]:
    """A whole block in float64, and how many elements needed exact summation."""
    T = W.cpu().double() + change.double(start, stop)
    u, v = change.double_bounds(start, stop)
    reach = T.abs() * _DOUBLE_SLACK + torch.from_numpy(np.multiply.outer(u, v))
    low, rounded = narrowed(T - reach, dtype), narrowed(T + reach, dtype)
    doubt = different(low, rounded)
    rounded = rounded.to(W.device)
    exact = len(doubt)
    zero = np.flatnonzero((T == 0).numpy())  # where it is no more than that, it is in doubt
    _put(rounded, zero, _zeros(W, zero, dtype))
    if exact:
        _put(rounded, doubt, _exactly(W, change, start, doubt, dtype))
    return rounded, doubt, exact


def _settle(W: torch.Tensor, change: Change, start: int, rounded: torch.Tensor, flat: Array) -> int:
    """Decide single elements in float64, and exactly where that is not enough; how many those are.

    Writes into `rounded`.
    """
    rows, columns = np.divmod(flat, W.shape[1])
    base = _taken(W, flat).double().numpy()
    sums = np.empty(len(flat))
    for chunk, left, c, right in change.at(rows + start, columns):
        sums[chunk] = np.einsum("er,r,er->e", left, c, right, optimize=False)
    u, v = change.double_bounds(start, start + W.shape[0])
    T = base + sums
    reach = np.abs(T) * _DOUBLE_SLACK + u[rows] * v[columns]
    low = narrowed(torch.from_numpy(T - reach), rounded.dtype)
    high = narrowed(torch.from_numpy(T + reach), rounded.dtype)
    rest = flat[different(low, high)]
    zero = T == 0  # where that is in doubt it is among the rest
    high[torch.from_numpy(zero)] = narrowed(
        torch.from_numpy(np.copysign(0.0, base[zero])), rounded.dtype
    )
    _put(rounded, flat, high)
    if len(rest):
        _put(rounded, rest, _exactly(W, change, start, rest, rounded.dtype))
    return len(rest)


def _exactly(
    W: torch.Tensor, change: Change, start: int, flat: Array, dtype: torch.dtype
) -> torch.Tensor:
    """RN of single elements, by exact summation."""
    rows, columns = np.divmod(flat, W.shape[1])
    base = _taken(W, flat).double().numpy()
    odd = np.empty(len(flat))
    for chunk, left, c, right in change.at(rows + start, columns):
        odd[chunk] = sum_to_odd(base[chunk], left, c, right)
    zero = odd == 0
    odd[zero] = np.copysign(0.0, base[zero])
    return narrowed(torch.from_numpy(odd), dtype)


def sum_to_odd(base: Array, left: Array, c: Array, right: Array) -> Array:
    """base + Σₖ leftₖ·cₖ·rightₖ of each row, exact, then rounded to float64 *to odd*.

    base (elements,), left and right (elements, R), c (R,). From the result the cast to any narrower
    type is the correctly rounded one (Boldo & Melquiond 2008, theorem 3). Where all products are
    multiples of one power of two and their sum stays below 2⁵³ of it, plain float64 is exact;
    elsewhere error-free products (Dekker 1971) are added by `math.fsum`, which is exact.
    """
    p, e = _product(left, right)
    q, f = _product(np.broadcast_to(c, p.shape), p)
    terms = np.concatenate([base[:, None], q, f], axis=1)
    if e.any():
        g, h = _product(np.broadcast_to(c, e.shape), e)
        terms = np.concatenate([terms, g, h], axis=1)
    sums: Array = terms.sum(axis=1)
    plain = _adds_exactly(terms)
    for index in np.flatnonzero(~plain):
        sums[index] = _to_odd(terms[index].tolist())
    return sums


def _to_odd(terms: list[float]) -> float:
    total = math.fsum(terms)
    if not math.isfinite(total):
        return total
    rest = math.fsum([*terms, -total])
    mantissa = int(np.float64(total).view(np.int64))
    if rest == 0 or mantissa & 1:
        return total
    return math.nextafter(total, math.copysign(math.inf, rest))


def _adds_exactly(terms: Array) -> Array:
    """Whether float64 adds each row's terms without any rounding, in whatever order."""
    mantissa, exponent = np.frexp(terms)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = np.log2(
        (whole & -whole).astype(np.float64), where=whole != 0, out=np.full(terms.shape, np.inf)
    )
    step = (lowest + exponent - 53).min(axis=1)
    size = np.abs(terms).sum(axis=1)
    with np.errstate(divide="ignore"):
        return np.asarray((step == np.inf) | (np.log2(size) < step + 52.5))


def _product(x: Array, y: Array) -> tuple[Array, Array]:
    """x·y and what float64 loses of it (Dekker 1971); exact unless a part under- or overflows."""
    p = x * y
    x1, x2 = _split(x)
    y1, y2 = _split(y)
    return p, x2 * y2 - (((p - x1 * y1) - x2 * y1) - x1 * y2)


def _split(x: Array) -> tuple[Array, Array]:
    scaled = _SPLIT * x
    high = scaled - (scaled - x)
    return high, x - high


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded once to `dtype`, to nearest, ties to even; too large values to infinity."""
    stored: torch.Tensor = casts.store(x, NAMES[dtype])
    return stored


def codes(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers."""
    return x.view(_CODES[x.element_size()])


def different(one: torch.Tensor, other: torch.Tensor) -> Array:
    """Flat indices, on the host, of the elements whose bits differ."""
    found: Array
    if one.device.type == "cpu":  # numpy is the faster one
        found = np.flatnonzero(codes(one).numpy() != codes(other).numpy())
    else:
        found = (codes(one) != codes(other)).view(-1).nonzero().view(-1).cpu().numpy()
    return found


def _zeros(W: torch.Tensor, flat: Array, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the signs of W's elements."""
    signs = _taken(W, flat).to(dtype)
    return torch.copysign(torch.zeros_like(signs), signs)


def _taken(W: torch.Tensor, flat: Array) -> torch.Tensor:
    """Single elements, on the host."""
    return W.reshape(-1)[torch.from_numpy(flat).to(W.device)].cpu()


def _put(rounded: torch.Tensor, flat: Array, values: torch.Tensor) -> None:
    index = torch.from_numpy(flat).to(rounded.device)
    rounded.view(-1)[index] = values.to(rounded.device)
