"""Dense changes of one module that are never required in factors, read a block of rows at a time.

A site of such a kind keeps the tensors that its change is computed from in `parts`, wherever the
files have them. Rows are read in the order in which they are stored: a weight kept as (in, out), or
an embedding, is its own transpose, and a block of its rows is a block of columns of ΔW.

- difference: ΔW = tuned − base, two checkpoints' tensors of one name.
- dora, residual: an adapter's change relative to its base's weights (`rebased.dora`).
- elementwise: what a merge method makes of several adapters' entries (`derived`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from adapterops import casts
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref, Site
from adapterops.rebased.dora import Dora, Residual

Block = np.ndarray[Any, Any]

_BITS = {"BF16": (0x7F80, 16, 0), "F16": (0x7C00, 13, 112 << 23)}
_HALF_EXPONENT = 0x0400  # of the smallest normal float16, which subnormals share
_HALF_INFINITY = 0x7C00


class Operator(Protocol):
    """A matrix M that is read by rows. ΔW is M, or Mᵀ where it is `transposed`."""

    shape: tuple[int, int]
    transposed: bool

    def rows(self, start: int, stop: int) -> Block:
        """Rows [start, stop) of M in float64, exact up to its own rounding."""

    def single(self, start: int, stop: int) -> Block:
        """The same rows in float32, each number wrong by about one rounding."""

    def noise(self, start: int, stop: int) -> float:
        """Σ ulp²/12 over these rows of the format that M was rounded to, 0 if it was to none."""

    def beta(self, norm: float) -> float:
        """The size of what went in, against which rounding noise is judged, given ‖M‖."""

    def check(self) -> None:
        """Raise NumericsError, naming the tensor, where an input holds NaN or infinities."""


class Difference:
    """tuned − base. Numbers within a factor of two of each other subtract without rounding."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._tuned, self._base = site.parts["tuned"], site.parts["base"]
        self.transposed = self._tuned.transposed
        self.shape = site.shape[::-1] if self.transposed else site.shape
        pair = (self._tuned, self._base)
        self._coarser = min(pair, key=lambda ref: casts.mantissa(ref.dtype))

    def rows(self, start: int, stop: int) -> Block:
        """Rows of tuned − base in float64."""
        difference = _decoded(self._tuned, start, stop)
        with np.errstate(invalid="ignore"):  # NaN is found, and named, later
            difference -= _decoded(self._base, start, stop)
        return difference

    def single(self, start: int, stop: int) -> Block:
        """Rows of tuned − base in float32, rounded once where they are not exact."""
        if not {self._tuned.dtype, self._base.dtype} <= {*_BITS, "F32"}:
            return self.rows(start, stop).astype(np.float32)
        difference = _single(self._tuned, start, stop)
        with np.errstate(invalid="ignore"):
            difference -= _single(self._base, start, stop)
        return difference

    def noise(self, start: int, stop: int) -> float:
        """Σ ulp²/12: what rounding the coarser of the two tensors does to it."""
        ref = self._coarser
        powers = _powers(_raw(ref, start, stop), ref.dtype)
        relative = 2.0 ** -casts.mantissa(ref.dtype)
        with np.errstate(over="ignore"):
            squares = float(np.dot(powers, powers))
        if not math.isfinite(squares):  # numbers whose squares are beyond float32
            wide = powers.astype(np.float64)
            squares = float(np.dot(wide, wide))
        return squares * relative * relative / 12

    def beta(self, norm: float) -> float:
        """‖ΔW‖: each number is rounded once, relative to itself."""
        return norm

    def check(self) -> None:
        """Raise NumericsError where a tensor holds NaN or infinities."""
        for ref in (self._tuned, self._base):
            check_finite(ref, self.shape[0], self._site.stem)


def _made(site: Site) -> Operator:
    found: Operator | None = site.made.operator() if site.made else None
    assert found is not None
    return found


KINDS: Mapping[str, Callable[[Site], Operator]] = {
    "elementwise": _made,
    "difference": Difference,
    "dora": Dora,
    "residual": Residual,
}


def check_finite(ref: Ref, rows: int, module: str) -> None:
    """Raise NumericsError where a tensor of so many rows holds NaN or infinities."""
    step = max(1, (1 << 20) * rows // max(1, math.prod(ref.shape)))
    wrong = sum(
        casts.count_nonfinite(_decoded(ref, start, min(start + step, rows), rows))
        for start in range(0, rows, step)
    )
    if wrong:
        raise NumericsError(
            f"{wrong} of {math.prod(ref.shape)} values of {ref.name} are NaN or infinite",
            path=ref.source.path,
            module=module,
            hint="the training diverged or the file is damaged; leave the module out with "
            "--modules",
        )


def _raw(ref: Ref, start: int, stop: int, rows: int | None = None) -> Block:
    """The bytes of rows [start, stop) of a stored matrix."""
    each = ref.nbytes // (rows or ref.stored_shape[0])
    buffer = np.empty((stop - start) * each, np.uint8)
    ref.source.pread_into(ref.offset + start * each, buffer.data)
    return buffer


def _decoded(ref: Ref, start: int, stop: int, rows: int | None = None) -> Block:
    """Rows of a stored matrix as float64, exactly."""
    raw = _raw(ref, start, stop, rows)
    with np.errstate(invalid="ignore"):
        values: Block = casts.decode(raw, ref.dtype, (-1,)).reshape(stop - start, -1)
    return values


def _single(ref: Ref, start: int, stop: int) -> Block:
    """Rows of a 16- or 32-bit tensor as float32, exactly.

    numpy widens float16 one number at a time. Here exponent and mantissa are moved in place, and a
    product with 2¹¹² puts the exponent right, of subnormals too.
    """
    raw = _raw(ref, start, stop)
    if ref.dtype == "F32":
        return raw.view("<f4").reshape(stop - start, -1)
    codes = raw.view("<u2")
    wide = codes.astype(np.uint32)
    if ref.dtype == "BF16":
        wide <<= 16
        values = wide.view(np.float32)
    elif (codes & 0x7FFF).max(initial=0) >= _HALF_INFINITY:
        values = codes.view("<f2").astype(np.float32)
    else:
        signs = wide & 0x8000
        wide &= 0x7FFF
        wide <<= 13
        values = wide.view(np.float32)
        values *= np.float32(2.0**112)
        wide |= signs << 16
    result: Block = values.reshape(stop - start, -1)
    return result


def _powers(raw: Block, dtype: str) -> Block:
    """2^⌊log2|x|⌋ of every number, at least the smallest normal where the format makes it matter.

    float16's subnormals are common, those of bfloat16 and float32 are nothing beside any weight.
    """
    if dtype in _BITS:
        mask, shift, bias = _BITS[dtype]
        codes = raw.view("<u2") & mask
        if dtype == "F16":
            np.maximum(codes, _HALF_EXPONENT, out=codes)
        wide = codes.astype(np.uint32)
        wide <<= shift
        wide += bias
        return wide.view(np.float32)
    if dtype == "F32":
        return (raw.view("<u4") & 0x7F800000).view(np.float32)
    exponents = np.frexp(casts.decode(raw, dtype, (-1,)))[1] - 1
    lowest = {"F8_E4M3": -6, "F8_E5M2": -14}.get(dtype, -126)
    powers: Block = np.ldexp(np.float32(1.0), np.maximum(exponents, lowest))
    return powers
