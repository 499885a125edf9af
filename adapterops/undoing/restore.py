"""The bytes of a source file from the baked one and its undo file, in pieces of bounded memory.

`predicted` is what baking and unbaking both subtract: a function of W′ and the factors alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import read_rows
from adapterops.casts import stored_bytes
from adapterops.changes.targets import Target
from adapterops.errors import FormatError, NumericsError
from adapterops.files.header import DTYPE_BITS, Entry
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.formats.model import Ref
from adapterops.rounding.exact import narrowed, round_exactly
from adapterops.rounding.grid import TORCH
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute, Job, run
from adapterops.undoing.residual import FRAME, Residuals
from adapterops.undoing.undo import Undo

Array = np.ndarray[Any, Any]
# Codes that are predicted and coded together, in whole rows: a part of the file's format.
PIECE = 4 * FRAME
_EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
_Jobs = Iterator[Job[bytes]]


def codes(x: torch.Tensor) -> Array:
    """The bits of a tensor as unsigned integers of its width, flat."""
    return np.frombuffer(stored_bytes(x), f"<u{x.element_size()}")


def predicted(
    minus: Delta, after: torch.Tensor, start: int, stop: int, dtype: torch.dtype
) -> Array:
    """Codes of RN(W′ − D) in the source's `dtype`, flat; rows [start, stop) of a band.

    `minus` is the band's Delta of sign −1, `after` those rows of W′ as stored. Where nothing was
    added W′ itself is the prediction. To be called inside `exact_arithmetic`.
    """
    if minus.band.is_changed:
        return codes(round_exactly(after, minus, start, stop, dtype=dtype)[0])
    return codes(after if after.dtype == dtype else narrowed(after.double(), dtype))


def likely(guess: Array, after: torch.Tensor, dtype: torch.dtype) -> Array | None:
    """Where a prediction may be wrong: where W′ has wider spacing. None for two different types."""
    mask = _EXPONENTS.get(dtype)
    if mask is None or after.dtype != dtype:
        return None
    bits = guess.dtype.type(mask)
    return np.asarray((codes(after) & bits) > (guess & bits))


def tensors_of(file: LocalFile) -> dict[str, Ref]:
    """The tensors of a file by their names in it."""
    header = read_header(file)
    return {
        name: Ref(file, name, e.dtype, e.shape, header.data_start + e.start, e.nbytes)
        for name, e in header.tensors.items()
    }


def restored(undo: Undo, baked: Mapping[str, Ref], on: Compute) -> Generator[bytes, None, None]:
    """The whole source file in order, given the baked tensors by their names in the file.

    Raises FormatError where the baked file lacks a tensor or has it in another type or shape, and
    NumericsError at the end if what came out is not the source: nothing may be kept of it then.
    """
    digest = hashlib.sha256()
    size = 0
    with exact_arithmetic(), closing(run(_jobs(undo, baked), on)) as made:
        for data in made:
            digest.update(data)
            size += len(data)
            yield data
    if digest.hexdigest() != undo.source.sha256 or size != undo.source.size:
        raise NumericsError(
            f"what was restored is not the file that was baked: sha256 {digest.hexdigest()} of "
            f"{size} bytes, not {undo.source.sha256} of {undo.source.size}",
            path=undo.file.path,
            hint=f"the undo file is damaged, or {undo.baked.name} is not as it was baked, sha256 "
            f"{undo.baked.sha256}; restore from other copies, or fetch the base again",
        )


def _jobs(undo: Undo, baked: Mapping[str, Ref]) -> _Jobs:
    yield Job("head", bytes, (undo.head,), len(undo.head))
    entries = undo.tensors.tensors
    for name in sorted(entries, key=lambda name: (entries[name].start, entries[name].end)):
        yield from _tensor(undo, name, entries[name], baked.get(name))


def _tensor(undo: Undo, name: str, entry: Entry, ref: Ref | None) -> _Jobs:
    if not entry.nbytes:
        return
    how = undo.saved.get(name)
    if ref is None and how != "whole":
        raise _unlike(undo, name, "lacks it")
    if how == "rounding" and ref is not None:
        yield from _rounded(undo, name, entry, ref)
        return
    origin = None if how == "whole" else ref
    if origin and (origin.dtype, origin.nbytes) != (entry.dtype, entry.nbytes):
        raise _unlike(undo, name, f"has {origin.dtype} of {origin.nbytes} bytes")
    width = max(1, DTYPE_BITS[entry.dtype] // 8)
    rest = undo.residuals(name) if how else None
    for start in range(0, entry.nbytes, PIECE * width):
        nbytes = min(PIECE * width, entry.nbytes - start)
        yield Job(name, _plain, (origin, start, nbytes, width, rest), 4 * nbytes)


def _plain(ref: Ref | None, start: int, nbytes: int, width: int, rest: Residuals | None) -> bytes:
    """Bytes as baked, or zeros, with their residual."""
    raw = bytearray(nbytes)
    if ref is not None:
        raw = read_bytes(ref.source, ref.offset + start, nbytes)
    if rest is None:
        return bytes(raw)
    return rest.restore(start // width, np.frombuffer(raw, f"<u{width}")).tobytes()


def _rounded(undo: Undo, name: str, entry: Entry, ref: Ref) -> _Jobs:
    target = undo.target(name, ref)
    rows, columns = target.matrix
    for side, has in ((entry, "took"), (ref, "has")):
        fits = rows * columns * DTYPE_BITS[side.dtype] == 8 * side.nbytes
        if side.dtype not in TORCH or not fits:
            raise _unlike(undo, name, f"{has} {side.dtype} of {side.nbytes} bytes for its matrix")
    rest = undo.residuals(name)
    step = max(1, PIECE // max(1, columns))
    for band in bands(target):
        minus = Delta(target, band, -1.0)
        for start in range(band.start, band.stop, step):
            stop = min(start + step, band.stop)
            peak = 40 * (stop - start) * columns + minus.peak
            yield Job(name, _rows, (target, minus, start, stop, TORCH[entry.dtype], rest), peak)


def _rows(
    target: Target, minus: Delta, start: int, stop: int, dtype: torch.dtype, rest: Residuals
) -> bytes:
    after = read_rows(target.ref, target.matrix, start, stop)
    guess = predicted(minus, after, start, stop, dtype)
    minus.done(stop - start)
    mask = likely(guess, after, dtype)
    return rest.restore(start * target.matrix[1], guess, mask).tobytes()


def _unlike(undo: Undo, name: str, what: str) -> FormatError:
    return FormatError(
        f"{name!r} cannot be restored: {undo.baked.name} {what}",
        path=undo.file.path,
        hint="restore from the file as it was baked, with its own undo file",
    )
