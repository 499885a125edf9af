"""Exact order statistics of a matrix that is only seen as blocks of rows, in bounded memory.

Radix selection on the bits of floats, which for sizes ≥ 0 order as the numbers do: a pass over the
blocks counts the leading digit of every entry, the next one the following digit of those that share
the digits found so far. float32 takes two passes (15 and 16 bits), float64 three of 21 bits. Counts
add up, so that the result depends neither on the blocks nor on their order or threads. Small
matrices are gathered and partitioned in one pass, and large ones with a sample of their entries are
selected from a bracket (`brackets.py`), with the same result.

The limit of rank k is the k-th largest size: k entries are at or above it, more where entries tie
with it. For k = 0 it is infinite, for k = all entries it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.arrays import host
from adapterops.errors import NumericsError
from adapterops.rules import brackets
from adapterops.rules.brackets import NEAR, Blocks, Matrix

_RUN = 1 << 10
_SMALL = 1 << 20  # entries of a matrix that is gathered


@dataclass(frozen=True, slots=True)
class _Format:
    """A float type: its codes, the bits below each digit, and NEAR of 2 in units of the second."""

    code: type[np.signedinteger[Any]]
    shifts: tuple[int, ...]
    pad: int
    infinite: int


_FORMATS = {
    "float32": _Format(np.int32, (16, 0), 16, 0x7F800000),
    "float64": _Format(np.int64, (42, 21, 0), 1 << 12, 0x7FF << 52),
}


@dataclass(frozen=True, slots=True)
class Selected:
    """`values` (S, K) are the limits, `near` (S, K) how many entries lie within 2⁻²⁰ relative of
    each, itself included, (large float64 matrices: to 2⁻³¹ of it). Both float64 and int64.
    """

    values: Matrix
    near: Matrix


def peak(count: int, total: int, bits: int, *, sampled: bool) -> int:
    """Bytes that `limits` of so many matrices of `total` floats needs at most, beside blocks."""
    if total <= _SMALL:
        return count * total * (3 * bits // 8 + 8)
    tables = count * 2 * (8 << (16 if bits == 32 else 21))  # for each of two limits
    return max(tables, 2 * brackets.peak(count, total, bits)) if sampled else tables


def share(fraction: float, total: int) -> int:
    """How many entries a fraction of them means: the nearest number, half to even."""
    return min(total, round(fraction * total))


def limits(
    blocks: Blocks, total: int, ranks: Sequence[int], sample: Blocks | None = None
) -> Selected:
    """The limits of `ranks`, each ≤ total, of S matrices of `total` entries, seen in one go.

    `blocks()` starts a pass: it gives arrays (S, rows, columns), float32 or float64, whose absolute
    values are the sizes, the same ones every time. `sample()` gives groups of entries that are
    together like the whole: with it one pass is mostly enough. Raises NumericsError where an entry
    is not finite.
    """
    first = host(next(blocks()))
    values = np.zeros((len(first), len(ranks)))
    near = np.zeros(values.shape, np.int64)
    values[:, [k <= 0 for k in ranks]] = np.inf
    wanted = [at for at, k in enumerate(ranks) if 0 < k < total]
    if wanted:
        search = _gathered if total <= _SMALL else _searched
        picked = [ranks[at] for at in wanted]
        known = None
        if sample is not None and total > _SMALL:
            known = brackets.bracketed(blocks, sample, total, picked)
        if known is None:
            known = search(blocks, len(first), first.dtype.name, picked)
        values[:, wanted], near[:, wanted] = known
    return Selected(values, near)


def _gathered(
    blocks: Blocks, count: int, dtype: str, ranks: Sequence[int]
) -> tuple[Matrix, Matrix]:
    sizes = np.concatenate([np.abs(host(block)).reshape(count, -1) for block in blocks()], axis=1)
    if not np.isfinite(sizes).all():
        raise _not_finite()
    places = [sizes.shape[1] - k for k in ranks]
    values = np.partition(sizes, places, axis=1)[:, places].astype(np.float64)
    near = [
        [int((np.abs(row - value) <= NEAR * value).sum()) for value in each]
        for row, each in zip(sizes.astype(np.float64), values, strict=True)
    ]
    return values, np.array(near)


def _searched(
    blocks: Blocks, count: int, dtype: str, ranks: Sequence[int]
) -> tuple[Matrix, Matrix]:
    kind = _FORMATS[dtype]
    prefixes = np.zeros((count, len(ranks)), np.int64)
    left = np.tile(np.array(ranks), (count, 1))
    near = np.zeros_like(prefixes)
    above = 8 * np.dtype(kind.code).itemsize - 1
    for turn, shift in enumerate(kind.shifts):
        pad = kind.pad if turn == 1 else 0
        tables = _counted(blocks, kind, prefixes, shift, above - shift, pad)
        for (s, at), prefix in np.ndenumerate(prefixes):
            start, table = _start(int(prefix), above - shift, pad), tables[s][int(prefix)]
            if turn == 0 and table[kind.infinite >> shift :].any():
                raise _not_finite()
            low = (int(prefix) << (above - shift)) - start
            inside = table[low : low + (1 << (above - shift))]
            place, above_it = _from_top(inside, int(left[s, at]))
            left[s, at] -= above_it
            found = start + low + place
            prefixes[s, at] = found
            if turn == 1:
                near[s, at] = _near(table, start, found, shift, kind)
        above = shift
    return _numbers(prefixes, kind), near


def _from_top(counts: Matrix, k: int) -> tuple[int, int]:
    """Where the k-th of all entries counted lies, from the last place down, and how many lie above.

    A table of millions is summed in runs, and only one of these counted up.
    """
    width = min(len(counts), _RUN)
    runs = counts.reshape(-1, width).sum(axis=1)[::-1]
    sums = np.cumsum(runs)
    run = int(np.searchsorted(sums, k))
    before = int(sums[run] - runs[run])
    last = len(counts) - run * width
    inside = counts[last - width : last][::-1]
    reached = before + np.cumsum(inside)
    place = int(np.searchsorted(reached, k))
    return last - 1 - place, int(reached[place] - inside[place])


def _start(prefix: int, span: int, pad: int) -> int:
    return max(0, (prefix << span) - pad)


def _counted(
    blocks: Blocks, kind: _Format, prefixes: Matrix, shift: int, span: int, pad: int
) -> list[dict[int, Matrix]]:
    """By matrix and prefix: counts of the codes from `pad` before those of the prefix to `pad`
    after, one for each value of the code without its last `shift` bits.
    """
    length = (1 << span) + 2 * pad
    tables = [{int(p): np.zeros(length, np.int64) for p in np.unique(row)} for row in prefixes]
    for block in blocks():
        for matrix, row in zip(host(block), tables, strict=True):
            codes = np.ascontiguousarray(matrix).reshape(-1).view(kind.code)
            for prefix, table in row.items():
                _count(codes, shift, _start(prefix, span, pad), table)
    return tables


def _count(codes: Matrix, shift: int, start: int, table: Matrix) -> None:
    """Add to table[i] how many codes, without sign and last `shift` bits, are start + i."""
    top = np.iinfo(codes.dtype).max
    low, high = start << shift, min((start + len(table)) << shift, top)
    if low or high < top:
        codes = codes & top
        inside = codes >= low
        inside &= codes < high
        np.add.at(table, (codes[np.flatnonzero(inside)] >> shift) - start, 1)
    else:
        digits = codes >> shift
        digits &= top >> shift
        np.add.at(table, digits, 1)


def _near(table: Matrix, start: int, found: int, shift: int, kind: _Format) -> int:
    """How many entries lie within NEAR of the limit, whose code is `found`."""
    end = min(start + len(table), found + kind.pad + 1, kind.infinite >> shift)
    codes = np.arange(max(start, found - kind.pad), end)
    value = _numbers(np.array([found]) << shift, kind)
    inside = np.abs(_numbers(codes << shift, kind) - value) <= NEAR * value
    return int(table[codes - start][inside].sum())


def _numbers(codes: Matrix, kind: _Format) -> Matrix:
    """The floats that have these codes, in float64."""
    floats = np.float32 if kind.code is np.int32 else np.float64
    return codes.astype(kind.code).view(floats).astype(np.float64)


def _not_finite() -> NumericsError:
    return NumericsError("an entry is infinite or NaN: its matrix has no order statistics")
