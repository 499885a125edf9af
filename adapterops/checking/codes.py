"""What the numbers of a tensor are, counted on integer codes.

The sign bit cleared, the codes of IEEE formats are ordered like the magnitudes they stand for, so
that finiteness, range, subnormals and zeros are comparisons of integers, at memory speed and with
nothing decoded. Only a sample of each tensor becomes floats, for an estimate of its norm. A sum of
its 8-byte words tells tensors apart: equal bytes have equal sums, and what has equal sums is
compared byte by byte before anybody is told.
"""

from __future__ import annotations

import math
import struct
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adapterops import casts
from adapterops.formats import Ref

FLOAT16_OVERFLOW = casts.FORMATS["F16"].overflow
_BLOCK = 1 << 16  # values at a time: they stay in the processor's cache
_SAMPLE = 2048
_PROBES = 16
_WORDS = (1 << 64) - 1

Codes = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Form:
    """Codes without their sign: the first of infinity, of normal numbers, beyond float16."""

    codes: str
    mask: int
    infinity: int
    normal: int
    beyond: int | None


_FORMS = {
    "F16": _Form("<u2", 0x7FFF, 0x7C00, 0x0400, None),
    "BF16": _Form("<u2", 0x7FFF, 0x7F80, 0x0080, 0x4780),
    "F32": _Form("<u4", 0x7FFFFFFF, 0x7F800000, 0x00800000, 0x477FF000),
    "F64": _Form("<u8", (1 << 63) - 1, 0x7FF << 52, 1 << 52, 0x40EFFE0000000000),
}
_SMALL = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Figures:
    """What the numbers of one tensor are.

    `subnormal` are non-zero values below the format's normal range, `beyond` finite ones that
    float16 cannot hold. `largest` is the largest finite magnitude, `square` Σx² estimated from a
    sample (exact up to 2,048 values; infinite where a value is). `checksum` is the sum of the
    8-byte words. `constant`: all values equal. `suspect`: some rows (or columns, along the shorter
    side) agree in a sample. All zero for tensors that are no floats, except the checksum.
    """

    count: int = 0
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    subnormal: int = 0
    beyond: int = 0
    largest: float = 0.0
    square: float = 0.0
    checksum: int = 0
    constant: bool = False
    suspect: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether every value is zero."""
        return self.zeros == self.count

    @property
    def norm(self) -> float:
        """‖x‖_F, estimated; at least the largest magnitude."""
        return max(math.sqrt(self.square), self.largest)


_LOCAL = threading.local()


def scratch(name: str, size: int) -> np.ndarray[Any, Any]:
    """A buffer of this thread of `size` bytes, kept and used again by the next caller."""
    buffer: np.ndarray[Any, Any] | None = getattr(_LOCAL, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size, np.uint8)
        setattr(_LOCAL, name, buffer)
    return buffer[:size]


def scan(raw: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...]) -> Figures:
    """Figures of the bytes of a tensor; `shape` () for a stretch of one."""
    if dtype in _SMALL:
        return _scan_table(raw, dtype)
    form = _FORMS.get(dtype)
    if form is None or not len(raw):
        return Figures(checksum=_checksum(raw))
    codes = raw.view(form.codes)
    counts = _scan(codes, form)
    matrix = codes.reshape(shape[0], -1) if len(shape) > 1 else codes.reshape(1, -1)
    return Figures(
        count=len(codes),
        zeros=counts.zeros,
        nan=counts.nan,
        infinite=counts.infinite,
        subnormal=counts.subnormal,
        beyond=counts.beyond,
        largest=_value(counts.largest, dtype),
        square=math.inf if counts.nan or counts.infinite else _square(matrix, dtype),
        checksum=_checksum(raw),
        constant=bool(codes[0] == codes[-1] and (codes == codes[0]).all()),
        suspect=_suspect(matrix, len(codes) - counts.zeros),
    )


class _Counts(NamedTuple):
    """Counts of a tensor; `largest` is the code of the largest finite magnitude."""

    zeros: int
    nan: int
    infinite: int
    subnormal: int
    beyond: int
    largest: int


def _scan(codes: Codes, form: _Form) -> _Counts:
    zeros = nan = infinite = subnormal = beyond = largest = 0
    space = scratch("codes", 8 * _BLOCK).view(codes.dtype)
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        plain = np.bitwise_and(block, form.mask, out=space[: len(block)])
        top, low = int(plain.max()), int(plain.min())
        if low < form.normal:
            none = 0 if low else len(block) - int(np.count_nonzero(plain))
            zeros += none
            subnormal += int(np.count_nonzero(plain < form.normal)) - none
        if top >= form.infinity:
            infinite += int(np.count_nonzero(plain == form.infinity))
            nan += int(np.count_nonzero(plain > form.infinity))
            top = int(plain[plain < form.infinity].max(initial=0))
        if form.beyond is not None and top >= form.beyond:
            over = int(np.count_nonzero(plain >= form.beyond))
            beyond += over - int(np.count_nonzero(plain >= form.infinity))
        largest = max(largest, top)
    return _Counts(zeros, nan, infinite, subnormal, beyond, largest)


def _scan_table(raw: np.ndarray[Any, Any], dtype: str) -> Figures:
    """The same for 8-bit floats, of which there are 256."""
    counts = np.bincount(raw, minlength=256)
    values = np.abs(casts.decode(np.arange(256, dtype=np.uint8), dtype, (256,)))
    finite = np.isfinite(values)
    smallest = 2.0 ** (-6 if dtype == "F8_E4M3" else -14)
    below = (values > 0) & (values < smallest)
    here = values[finite & (counts > 0)]
    return Figures(
        count=len(raw),
        zeros=int(counts[values == 0].sum()),
        nan=int(counts[np.isnan(values)].sum()),
        infinite=int(counts[np.isinf(values)].sum()),
        subnormal=int(counts[below].sum()),
        largest=float(here.max(initial=0.0)),
        square=float((counts[finite] * values[finite] ** 2).sum()),
        checksum=_checksum(raw),
        constant=int(np.count_nonzero(counts)) == 1,
    )


def _checksum(raw: np.ndarray[Any, Any]) -> int:
    words = len(raw) // 8 * 8
    tail = int.from_bytes(raw[words:].tobytes(), "little")
    return (int(raw[:words].view("<u8").sum(dtype=np.uint64)) + tail) & _WORDS


def _value(code: int, dtype: str) -> float:
    """The magnitude that a code without sign stands for."""
    if dtype == "BF16":
        code, dtype = code << 16, "F32"
    size, letter = {"F16": (2, "<e"), "F32": (4, "<f"), "F64": (8, "<d")}[dtype]
    value: float = struct.unpack(letter, code.to_bytes(size, "little"))[0]
    return value


def _square(matrix: Codes, dtype: str) -> float:
    """Σx² from every n-th value; n shares no divisor with the width, so that all columns count."""
    codes = matrix.reshape(-1)
    step = -(-len(codes) // _SAMPLE)
    while step > 1 and math.gcd(step, matrix.shape[1]) > 1:
        step += 1
    chosen = np.ascontiguousarray(codes[step // 2 :: step])
    values = casts.decode(chosen.view(np.uint8), dtype, chosen.shape)
    with np.errstate(over="ignore") if dtype == "F64" else nullcontext():
        total = float(np.dot(values, values))
    return total * len(codes) / len(chosen)


def _suspect(matrix: Codes, nonzero: int) -> bool:
    """Whether some of the lines along the longer side agree at 16 places, zero lines aside."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    lines, length = matrix.shape
    if lines < 2 or length < 2 * lines:
        return False
    probes = matrix[:, :: -(-length // _PROBES)]
    width = probes.itemsize * probes.shape[1]
    data = probes.tobytes()
    seen = [data[at : at + width] for at in range(0, len(data), width)]
    blank = bytes(width)
    filled = [line for line in seen if line != blank]
    hidden = len(filled) < lines - 1 and nonzero > len(filled) * length
    return len(set(filled)) < len(filled) or hidden


def equal_lines(ref: Ref) -> tuple[int, int, bool]:
    """(lines that repeat another one, lines in all, whether they are rows) of a factor, read whole.

    Lines run along the longer side: rows of A, columns of B. Zero lines do not count.
    """
    form = _FORMS[ref.dtype]
    codes = ref.raw().view(form.codes).reshape(ref.stored_shape[0], -1)
    rows = codes.shape[0] <= codes.shape[1]
    lines = np.ascontiguousarray(codes if rows else codes.T)
    filled = lines[(lines & form.mask).any(axis=1)]
    distinct = {line.tobytes() for line in filled}
    return len(filled) - len(distinct), len(lines), rows


def joined(a: Figures, b: Figures) -> Figures:
    """Figures of two stretches of one tensor."""
    return Figures(
        a.count + b.count,
        a.zeros + b.zeros,
        a.nan + b.nan,
        a.infinite + b.infinite,
        a.subnormal + b.subnormal,
        a.beyond + b.beyond,
        max(a.largest, b.largest),
        a.square + b.square,
        (a.checksum + b.checksum) & _WORDS,
        a.constant and b.constant and a.largest == b.largest,
    )
