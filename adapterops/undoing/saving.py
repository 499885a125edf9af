"""Writes the undo file of a baked file of weights, from that file and its source.

A pass of its own over what changed, when the baked file is complete: whatever rounding wrote it,
what is stored is what restoring it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import read_rows
from adapterops.baking.shards import Copy, Shard
from adapterops.changes.targets import Target
from adapterops.files.header import DTYPE_BITS
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.formats.model import Ref
from adapterops.provenance import Origin
from adapterops.rounding.grid import TORCH
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute, Job, run
from adapterops.undoing import residual
from adapterops.undoing.restore import PIECE, codes, likely, predicted, tensors_of
from adapterops.undoing.undo import FileId, Saved, UndoWriter, how


def saved(shard: Shard) -> list[Saved]:
    """The tensors of a shard's source that its result lacks, in the result's order."""
    source = read_header(LocalFile(shard.source)).tensors
    found = []
    for piece in shard.pieces:
        if isinstance(piece, Copy):
            continue
        name = piece.name.removeprefix(shard.prefix)
        if name not in source or not source[name].nbytes:
            continue
        old, new = source[name], shard.entries[name]
        if isinstance(piece, Target) and old.shape == new.shape:
            way = how(piece, old.dtype, new.dtype)
            found.append(Saved(name, way, piece if way == "rounding" else None))
        else:
            same = (old.dtype, old.shape) == (new.dtype, new.shape)
            found.append(Saved(name, "difference" if same else "whole"))
    return found


def write_undo(
    path: Path,
    source: str | Path,
    baked: str | Path,
    entries: Sequence[Saved],
    inputs: Sequence[Origin],
    ids: tuple[FileId, FileId],
    on: Compute,
) -> None:
    """Write the undo file at `path`, which must not exist; `ids` are of source and baked file.

    Tensors that are not in `entries` must be the same in both files. Raises what reading raises.
    """
    old, new = LocalFile(source), LocalFile(baked)
    head = bytes(read_bytes(old, 0, read_header(old).data_start))
    jobs = _jobs(entries, tensors_of(old), tensors_of(new))
    writer = UndoWriter(path, head, entries, inputs)
    try:
        with exact_arithmetic(), closing(run(jobs, on)) as made:
            for name, frames in made:
                writer.extend(name, frames)
        old.check_unchanged()
        writer.finish(*ids)
    finally:
        writer.close()
        old.close()
        new.close()


def _jobs(
    entries: Sequence[Saved], before: Mapping[str, Ref], after: Mapping[str, Ref]
) -> Iterator[Job[tuple[str, bytes]]]:
    for entry in entries:
        one = before[entry.name]
        other = None if entry.how == "whole" else after[entry.name]
        if entry.how == "rounding" and entry.target and other:
            yield from _rounded(entry.name, entry.target, one, other)
            continue
        width = max(1, DTYPE_BITS[one.dtype] // 8)
        for start in range(0, one.nbytes, PIECE * width):
            size = min(PIECE * width, one.nbytes - start)
            kernel = partial(_plain, entry.name, one, other, start, size, width)
            yield Job(entry.name, kernel, (), 6 * size)


def _rounded(
    name: str, target: Target, before: Ref, after: Ref
) -> Iterator[Job[tuple[str, bytes]]]:
    columns = target.matrix[1]
    step = max(1, PIECE // max(1, columns))
    for band in bands(target):
        minus = Delta(target, band, -1.0)
        for start in range(band.start, band.stop, step):
            stop = min(start + step, band.stop)
            kernel = partial(_rows, name, minus, before, after, start, stop)
            yield Job(name, kernel, (), 40 * (stop - start) * columns + minus.peak)


def _rows(
    name: str, minus: Delta, before: Ref, after: Ref, start: int, stop: int
) -> tuple[str, bytes]:
    matrix = minus.target.matrix
    true = codes(read_rows(before, matrix, start, stop))
    baked = read_rows(after, matrix, start, stop)
    dtype = TORCH[before.dtype]
    guess = predicted(minus, baked, start, stop, dtype)
    minus.done(stop - start)
    return name, residual.encode(true, guess, likely(guess, baked, dtype))


def _plain(
    name: str, before: Ref, after: Ref | None, start: int, size: int, width: int
) -> tuple[str, bytes]:
    """Frames against the bits of the baked tensor, or against zeros."""
    true = _codes(before, start, size, width)
    other = np.zeros_like(true) if after is None else _codes(after, start, size, width)
    return name, residual.encode(true, other)


def _codes(ref: Ref, start: int, size: int, width: int) -> residual.Array:
    return np.frombuffer(read_bytes(ref.source, ref.offset + start, size), f"<u{width}")
