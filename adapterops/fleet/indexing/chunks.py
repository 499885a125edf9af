"""Chunks of a fleet's index: the arrays of some hundred signatures in one safetensors file.

Signatures whose arrays have the same shapes form a group, stacked along the first axis: `000.norms`
(n, L) float64, `000.sketch` (n, L, p, p), `000.outputs` (n, q) and `000.start` (n, k) float16, then
`001.norms` and so on. A row is counted through the groups in their order. A chunk is written
under a hidden name, flushed, renamed, and never changed afterwards.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterops.errors import FileError, FormatError
from adapterops.files.header import Entry, Header, encode_header, layout
from adapterops.files.output import unwritable
from adapterops.files.publish import sync_directory
from adapterops.files.source import LocalFile, read_header
from adapterops.files.writer import TensorWriter

Array = np.ndarray[Any, Any]
ROWS = 256  # of a chunk, about 2 MB at 8 kB each; what an interruption loses at most
FORMAT = "adapterops.signatures/1"
_ENDING = ".safetensors"


class Arrays(NamedTuple):
    """The arrays of one signature: (L,) float64, then (L, p, p), (q,) and (k,) float16."""

    norms: Array
    sketch: Array
    outputs: Array
    start: Array


_DTYPES = {"norms": "F64", "sketch": "F16", "outputs": "F16", "start": "F16"}
_NUMPY: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F16": np.dtype("<f2")}


def write_chunk(folder: Path, items: Sequence[Arrays], seed: int) -> tuple[str, list[int]]:
    """Write a chunk into `folder`; its name, and the row of each item. FileError if it cannot."""
    order = sorted(range(len(items)), key=lambda i: _shapes(items[i]))
    groups = [list(found) for _, found in groupby(order, key=lambda i: _shapes(items[i]))]
    tensors = {
        f"{number:03d}.{field}": np.ascontiguousarray(
            np.stack([getattr(items[i], field) for i in group]), _NUMPY[dtype]
        )
        for number, group in enumerate(groups)
        for field, dtype in _DTYPES.items()
    }
    rows = [0] * len(items)
    for row, index in enumerate(order):
        rows[index] = row
    name = f"{secrets.token_hex(8)}{_ENDING}"
    try:
        _write(folder, name, tensors, {"format": FORMAT, "seed": str(seed)})
    except FileError:
        raise
    except OSError as error:
        raise unwritable(folder / name, error) from None
    return name, rows


def _shapes(item: Arrays) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in item)


def _write(folder: Path, name: str, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    entries = layout({k: (_DTYPES[k.partition(".")[2]], v.shape) for k, v in tensors.items()})
    size = len(encode_header(entries, metadata))
    hidden = folder / f".{name}"
    writer = TensorWriter(hidden, entries, size)
    try:
        for key, value in tensors.items():
            writer.put(key, memoryview(value.tobytes()))
        writer.finish(metadata)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    os.rename(hidden, folder / name)
    sync_directory(folder)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to read: `starts` are the first rows of its groups, and one more for the end."""

    path: str
    header: Header
    starts: tuple[int, ...]

    def groups(self, rows: Sequence[int] | Array) -> Array:
        """Which group each row is in (n,). Raises FormatError where there is no such row."""
        found = np.asarray(rows, np.int64)
        if len(found) and not 0 <= found.min() <= found.max() < self.starts[-1]:
            raise _damaged(self.path, f"has {self.starts[-1]} rows, row {found.max()} is wanted")
        groups: Array = np.searchsorted(self.starts, found, "right") - 1
        return groups

    def read(self, field: str, rows: Sequence[int] | Array) -> Array:
        """An array (len(rows), …) of the rows, all of one group; rows that touch are read at once.

        Raises FileError if the file is gone or cut, FormatError if it is not what it was.
        """
        group = int(self.groups(rows[:1])[0])
        entry = self.header.tensors[f"{group:03d}.{field}"]
        size = entry.nbytes // entry.shape[0]
        found: Array = np.empty((len(rows), *entry.shape[1:]), _NUMPY[entry.dtype])
        if not size:
            return found
        flat = found.reshape(len(rows), -1).view(np.uint8)
        inside = np.asarray(rows) - self.starts[group]
        cuts = [0, *(np.flatnonzero(np.diff(inside) != 1) + 1).tolist(), len(rows)]
        file = LocalFile(self.path)
        try:
            for first, last in pairwise(cuts):
                offset = self.header.data_start + entry.start + int(inside[first]) * size
                file.pread_into(offset, flat[first:last].reshape(-1).data)
        finally:
            file.close()
        return found

    def arrays(self, row: int) -> Arrays:
        """Everything of one row."""
        return Arrays(*(self.read(field, [row])[0] for field in _DTYPES))


def open_chunk(path: str | os.PathLike[str]) -> Chunk:
    """A chunk by its header. FileError where it cannot be read, FormatError where it is none."""
    file = LocalFile(path)
    try:
        header = read_header(file)
    finally:
        file.close()
    if header.metadata.get("format") != FORMAT:
        raise _damaged(file.path, f"is no {FORMAT}")
    starts = [0]
    for number in range(len(header.tensors) // len(_DTYPES)):
        entries = [header.tensors.get(f"{number:03d}.{field}") for field in _DTYPES]
        if not _agree(entries):
            raise _damaged(file.path, f"its group {number} is incomplete")
        starts.append(starts[-1] + header.tensors[f"{number:03d}.norms"].shape[0])
    return Chunk(file.path, header, tuple(starts))


def _agree(entries: Sequence[Entry | None]) -> bool:
    """Whether these are the four arrays of one group."""
    if any(entry is None for entry in entries):
        return False
    norms, sketch, outputs, start = (entry for entry in entries if entry is not None)
    n = norms.shape[0]
    found = [(entry.dtype, len(entry.shape)) for entry in (norms, sketch, outputs, start)]
    return (
        found == [("F64", 2), ("F16", 4), ("F16", 2), ("F16", 2)]
        and n > 0
        and sketch.shape[:2] == norms.shape
        and sketch.shape[2] == sketch.shape[3]
        and outputs.shape[0] == start.shape[0] == n
    )


def _damaged(path: str, message: str) -> FormatError:
    return FormatError(
        message, path=path, hint="remove it and run the same `adapterops index` again"
    )


def is_chunk(name: str) -> bool:
    """Whether a file in the folder of signatures is one of ours, finished or not."""
    stem = name.removeprefix(".").removesuffix(_ENDING)
    return name.endswith(_ENDING) and len(stem) == 16 and set(stem) <= set("0123456789abcdef")
