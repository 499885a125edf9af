"""One streamed pass over the tensors of a file, in the order in which they lie there."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from adapterops.checking.codes import Figures, joined, scan, scratch
from adapterops.files.source import LocalFile, Source
from adapterops.formats import Ref
from adapterops.stream import Compute, Job, run

_READ = 4 << 20  # bytes that one read should have at least
_SPLIT = 32 << 20  # tensors above this are read in pieces
_WINDOW = 64 << 20  # bytes that the kernel is told of at a time


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor, or a stretch of one (its shape is () then)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def measure(tensors: Mapping[str, Ref], on: Compute) -> dict[str, Figures]:
    """Figures of every tensor of one file, each read once, in the order of the file.

    Raises FileError where the file cannot be read or shrinks meanwhile.
    """
    groups = list(_groups(sorted(tensors.values(), key=lambda ref: ref.offset)))
    if not groups:
        return {}
    source = next(iter(tensors.values())).source
    results: dict[str, Figures] = {}
    with closing(_announced(source, groups)) as coming:
        if len(groups) == 1 or on.threads == 1:
            _collect((_measure(source, group) for group in coming), results)
            return results
        jobs = (Job("", _measure, (source, group), _bytes(group)) for group in coming)
        with closing(run(jobs, on)) as found:
            _collect(found, results)
    return results


def _announced(source: Source, groups: list[list[_Piece]]) -> Generator[list[_Piece], None, None]:
    """The groups, the kernel being told of each some time before it is read.

    Then it reads in large pieces, and while numbers are scanned. Left to itself it goes by the
    small read of the header before: a third more time for a file that is not cached, and four times
    the system time.
    """
    if not isinstance(source, LocalFile) or not hasattr(os, "posix_fadvise"):
        yield from groups
        return
    descriptor = source.open()
    try:
        told = groups[0][0].offset
        for group in groups:
            if group[-1].offset + _WINDOW // 2 > told:
                os.posix_fadvise(descriptor, told, _WINDOW, os.POSIX_FADV_WILLNEED)
                told += _WINDOW
            yield group
    finally:
        os.close(descriptor)


def _collect(parts: Iterable[list[tuple[str, Figures]]], results: dict[str, Figures]) -> None:
    for part in parts:
        for name, figures in part:
            results[name] = joined(results[name], figures) if name in results else figures


def _groups(refs: Iterable[Ref]) -> Iterator[list[_Piece]]:
    """Neighbouring tensors of some megabytes together; a large one in several groups."""
    group: list[_Piece] = []
    for ref in refs:
        shape = ref.shape if ref.nbytes <= _SPLIT else ()
        for start in range(0, ref.nbytes, _SPLIT) or (0,):
            size = min(_SPLIT, ref.nbytes - start)
            group.append(_Piece(ref.name, ref.dtype, shape, ref.offset + start, size))
            if _bytes(group) >= _READ:
                yield group
                group = []
    if group:
        yield group


def _bytes(group: list[_Piece]) -> int:
    return group[-1].offset + group[-1].nbytes - group[0].offset


def _measure(source: Source, group: list[_Piece]) -> list[tuple[str, Figures]]:
    """Read a group in one piece and scan its tensors."""
    first, size = group[0].offset, _bytes(group)
    buffer = scratch("data", max(size, _READ))[:size]
    source.pread_into(first, buffer.data)
    found = []
    for piece in group:
        raw = buffer[piece.offset - first :][: piece.nbytes]
        found.append((piece.name, scan(raw, piece.dtype, piece.shape)))
    return found
