"""The numbers a storage type can hold, as a grid: neighbours of a number, spacing, and order.

A format with p stored bits of mantissa has the values k·2^(max(⌊log₂|x|⌋, e) − p), k an integer
and e the exponent of its smallest normal (IEEE 754-2019, 3.3). All of it is exact: powers of two,
integer parts and comparisons in float64, which holds every value of a 16- or 32-bit type.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapterops.casts import FORMATS, Format

# torch's types by safetensors' names, and the other way round.
TORCH: Mapping[str, torch.dtype] = {n: getattr(torch, form.name) for n, form in FORMATS.items()}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}

_EXPONENTS = {  # the bits of the exponent, in the integers of the same width
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
_INTEGERS = {2: torch.int16, 4: torch.int32}


def rounding_limit(dtype: torch.dtype) -> float:
    """The smallest magnitude that rounds to infinity, to nearest: 65520 for float16."""
    return FORMATS[NAMES[dtype]].overflow


def ulp(x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The spacing 2^(max(⌊log₂|x|⌋, e) − p) of `dtype` at x, in x's type: float32 or float64.

    x beyond the largest finite value has the spacing below that; x is finite.
    """
    form = FORMATS[NAMES[dtype]]
    integers, exponents = _EXPONENTS[x.dtype]
    power = torch.empty_like(x) if out is None else out
    torch.bitwise_and(x.view(integers), exponents, out=power.view(integers))
    return power.clamp_(form.smallest_normal, _top(form)).mul_(2.0**-form.mantissa)


def multiples(
    T: Tensor, dtype: torch.dtype, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """float64 T rounded down and up to multiples of its spacing in `dtype`, as float64.

    These are its neighbours as long as |T| is at most the largest finite value. `out` has room for
    the spacing and both results.
    """
    step, lower, upper = out or (torch.empty_like(T), torch.empty_like(T), torch.empty_like(T))
    torch.div(T, ulp(T, dtype, step), out=upper)
    torch.floor(upper, out=lower).mul_(step)
    return lower, upper.ceil_().mul_(step)


def neighbours(T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lower, upper) of `dtype` with lower ≤ T ≤ upper, the nearest such, equal where T is on it.

    T is float32 or float64 of any shape. The largest finite value and infinity are neighbours.
    Zeros have T's sign; NaN has NaN for neighbours.
    """
    T = T.double()
    lower, upper = multiples(T, dtype)
    largest = torch.finfo(dtype).max
    beyond = T.isfinite() & (T.abs() > largest)
    if bool(beyond.any()):
        end = torch.full_like(T, largest).copysign_(T)
        infinity = torch.full_like(T, torch.inf).copysign_(T)
        lower = torch.where(beyond, torch.minimum(end, infinity), lower)
        upper = torch.where(beyond, torch.maximum(end, infinity), upper)
    return lower.to(dtype), upper.to(dtype)  # exact: both are values of the type


def ordinal(codes: Tensor) -> Tensor:
    """The place of each code among all of its type as int32: one step per value, ±0 at 0.

    a < b as numbers exactly if ordinal(a) < ordinal(b); infinity follows the largest finite value.
    """
    integers = _INTEGERS[codes.element_size()]
    bits = codes.view(integers).int()
    return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)


def from_ordinal(ordinals: Tensor, dtype: torch.dtype) -> Tensor:
    """The code at each place: the inverse of `ordinal`, save that 0 gives +0."""
    integers = _INTEGERS[dtype.itemsize]
    bits = torch.where(ordinals < 0, torch.iinfo(integers).min - ordinals, ordinals)
    return bits.to(integers).view(dtype)


def _top(form: Format) -> float:
    """The largest power of two of a format."""
    return 2.0 ** ((1 << (form.bits - form.mantissa - 2)) - 1)
