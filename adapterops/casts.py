"""Every change of number format: bytes of a file to float64, and the one rounding back.

torch casts float64 to a 16-bit type through float32 and so rounds twice. Here a float64 is first
rounded to a float32 *to odd* (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded
sums: proved algorithms using rounding to odd", theorem 3), from which the cast to 16 bits is the
correctly rounded one. Range is checked before the cast: casts may saturate or overflow silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.arrays import Array, host, namespace
from adapterops.errors import NumericsError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Format:
    """A storage type: stored bits of mantissa, smallest normal, first magnitude that overflows."""

    name: str
    bits: int
    mantissa: int
    smallest_normal: float
    overflow: float


FORMATS: Mapping[str, Format] = {
    "F16": Format("float16", 16, 10, 2.0**-14, 65520.0),
    "BF16": Format("bfloat16", 16, 7, 2.0**-126, 2.0**128 - 2.0**119),
    "F32": Format("float32", 32, 23, 2.0**-126, 2.0**128 - 2.0**103),
    "F64": Format("float64", 64, 52, 2.0**-1022, np.inf),
}

DTYPE_NAMES: Mapping[str, str] = {
    "float32": "F32",
    "fp32": "F32",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float16": "F16",
    "fp16": "F16",
}

_INTEGERS = {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}
_NUMPY_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def _float8_table(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray[Any, Any]:
    """All 256 values of an 8-bit float; e4m3 is the finite variant (OCP OFP8, table 2)."""
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = np.where(exponent > 0, 1.0, 0.0) + mantissa / (1 << mantissa_bits)
    values = fraction * 2.0 ** (np.maximum(exponent, 1) - bias)
    top = (1 << exponent_bits) - 1
    if exponent_bits == 5:
        values = np.where(exponent == top, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values = np.where((exponent == top) & (mantissa == 7), np.nan, values)
    return np.where(codes >= 128, -values, values)


_TABLES = {"F8_E4M3": _float8_table(4, 3, 7), "F8_E5M2": _float8_table(5, 2, 15)}


READABLE = (*FORMATS, *_TABLES)
_EIGHT_BITS = {"F8_E4M3": 3, "F8_E5M2": 2}  # of mantissa


def mantissa(dtype: str) -> int:
    """Bits of mantissa that a readable type stores: rounding to it errs by 2⁻⁽ᵇⁱᵗˢ⁺¹⁾ at most."""
    return FORMATS[dtype].mantissa if dtype in FORMATS else _EIGHT_BITS[dtype]


def number(raw: np.ndarray[Any, Any], dtype: str) -> float:
    """The single number that a tensor's bytes hold; trainers store alpha as an integer too."""
    if dtype in _INTEGERS:
        return float(raw.view(_INTEGERS[dtype])[0])
    return float(decode(raw, dtype, (1,))[0])


def decode(raw: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    """Little-endian bytes (uint8, numpy or torch) of a float tensor as float64, exactly.

    Raises UnsupportedError for a type that is no float of 8 to 64 bits.
    """
    if dtype not in FORMATS and dtype not in _TABLES:
        raise UnsupportedError(f"tensors of type {dtype} are not supported as factors")
    if not isinstance(raw, np.ndarray):
        return _torch_view(raw, dtype).double().reshape(shape)
    if dtype == "BF16":
        return widen(raw.view("<u2"), dtype).reshape(shape)
    if dtype in _TABLES:
        return _TABLES[dtype][raw].reshape(shape)
    return raw.view(_NUMPY_TYPES[dtype]).astype(np.float64).reshape(shape)


def decode_into(raw: np.ndarray[Any, Any], dtype: str, out: np.ndarray[Any, Any]) -> None:
    """`decode` on the host into float64 `out`, whatever its strides, in one pass."""
    if dtype in _NUMPY_TYPES:
        out[...] = raw.view(_NUMPY_TYPES[dtype]).reshape(out.shape)
    else:
        out[...] = decode(raw, dtype, out.shape)


def store(x: Array, dtype: str) -> Array:
    """float64 `x` rounded once to `dtype`, to nearest, ties to even, in its stored form.

    numpy has no bfloat16: there the stored form is the uint16 codes. `widen` reads either back.
    """
    if not isinstance(x, np.ndarray):
        narrow = x if dtype == "F64" else x.float() if dtype == "F32" else _round_to_odd(x)
        return {"F16": narrow.half, "BF16": narrow.bfloat16}.get(dtype, lambda: narrow)()
    if dtype == "BF16":
        bits = _round_to_odd(x).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return x.astype(_NUMPY_TYPES[dtype])  # numpy rounds float64 to float16 once (torch does not)


def widen(stored: Array, dtype: str) -> Array:
    """The float64 values of a stored form, exactly."""
    if not isinstance(stored, np.ndarray):
        return stored.double()
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def round_to(x: Array, dtype: str) -> Array:
    """float64 `x` rounded once to `dtype` (nearest, ties to even), as float64."""
    return widen(store(x, dtype), dtype)


def stored_bytes(stored: Array) -> memoryview:
    """The little-endian bytes of a stored form, on the host."""
    if not isinstance(stored, np.ndarray):
        import torch

        stored = host(stored.contiguous().reshape(-1).view(torch.uint8))
    view: memoryview = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
    return view


def check_range(x: Array, dtype: str, module: str) -> None:
    """Raise NumericsError where a value of `x` would round to infinity in `dtype`."""
    largest = max(float(x.max()), -float(x.min())) if 0 not in x.shape else 0.0
    if not largest < FORMATS[dtype].overflow:
        raise NumericsError(
            f"the result reaches {largest:.6g}, beyond {FORMATS[dtype].name}",
            module=module,
            hint="--dtype float32 or bfloat16 holds it",
        )


def format_name(dtype: str) -> str:
    """A storage type as users write it: float16 for F16."""
    return FORMATS[dtype].name if dtype in FORMATS else dtype


def count_nonfinite(x: Array) -> int:
    """How many values are NaN or infinite."""
    xp = namespace(x)
    return int((~xp.isfinite(x)).sum())


def count_subnormal(x: Array, stored: Array, dtype: str) -> int:
    """How many non-zero values of `x` lost precision by falling below the normal range."""
    form = FORMATS[dtype]
    if isinstance(stored, np.ndarray):  # a pass over the narrow codes is the cheapest
        codes = stored.view(f"<u{form.bits // 8}")
        below = (codes & ((1 << (form.bits - 1)) - 1)) < (1 << form.mantissa)
    else:
        below = stored.abs() < form.smallest_normal
    return int((widen(stored[below], dtype) != x[below]).sum())


def _single(x: Array) -> Array:
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def _round_to_odd(x: Array) -> Array:
    """float32 nearest to `x`, moved to its odd neighbour towards `x` where inexact and even."""
    xp = namespace(x)
    y = _single(x)
    error = x - y
    even = (y.view(xp.int32) & 1) == 0
    infinity = xp.full_like(y, xp.inf)
    towards = xp.where(error > 0, infinity, -infinity)
    return xp.where((error != 0) & even, xp.nextafter(y, towards), y)


def _torch_view(raw: Array, dtype: str) -> Array:
    import torch

    eight = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    return raw.view(eight.get(dtype) or getattr(torch, FORMATS[dtype].name))
