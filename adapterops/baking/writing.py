"""One file of the result written: cloned and patched, or streamed from front to back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

from adapterops.baking.kernel import Rounding
from adapterops.baking.run import Made, Tally, make
from adapterops.baking.shards import Shard
from adapterops.errors import FileError
from adapterops.files.clone import duplicate, reflink
from adapterops.files.direct import PatchWriter, SequentialWriter
from adapterops.files.header import Header
from adapterops.files.source import LocalFile, Source, file_header
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute

Tick = Callable[[int], None]


def write_shard(
    shard: Shard, path: Path, rounding: Rounding, on: Compute, *, link: bool, tick: Tick
) -> dict[str, Tally]:
    """Write one file at `path`, flushed to disk, and return what became of each changed tensor.

    A file without changes is linked (`link`), cloned or copied by the kernel. Where the file system
    shares blocks, a file of the same layout is a clone with its changed tensors patched. `tick`
    is told how many bytes are done. Raises FileError, NumericsError, and ChangedError for a source
    that is not what it was when the file was planned; what was written is removed then.
    """
    source = LocalFile(os.path.realpath(shard.source))
    try:
        if shard.untouched:
            duplicate(Path(shard.source), path, link=link)
            tallies = {}
            tick(shard.size)
        else:
            with exact_arithmetic():
                tallies = _written(shard, path, rounding, on, source, tick)
        for each in (source, *_sources(shard)):
            each.check_unchanged()
        _check(shard, path)
        return tallies
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    finally:
        source.close()


def _sources(shard: Shard) -> Iterator[Source]:
    """The files that tensors of the shard start as, as they were when it was planned."""
    refs = (piece.ref for piece in shard.pieces if piece.ref is not None)
    return iter({id(ref.source): ref.source for ref in refs}.values())


def _written(
    shard: Shard, path: Path, rounding: Rounding, on: Compute, source: LocalFile, tick: Tick
) -> dict[str, Tally]:
    if shard.same_layout and _cloned(source, path):
        with PatchWriter(path) as patch, closing(make(shard, rounding, on, copies=False)) as run:
            tallies = _tallied(run, lambda made: patch.write(made.offset, made.data), tick)
            patch.finish()
        return tallies
    with SequentialWriter(path, shard.size) as writer:
        writer.append(shard.header)
        with closing(make(shard, rounding, on)) as run:
            tallies = _tallied(run, lambda made: writer.give(made.data), tick)
        writer.finish()
    return tallies


def _tallied(run: Iterator[Made], write: Callable[[Made], None], tick: Tick) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for made in run:
        write(made)
        tick(len(made.data))
        if made.found is not None and made.delta is not None:
            tallies.setdefault(made.name, Tally()).add(made.delta, made.found)
    for tally in tallies.values():
        tally.close()
    return tallies


def _cloned(source: LocalFile, path: Path) -> bool:
    """A new file that shares all blocks of the source, where the file system has that."""
    mine = source.open()
    copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        done = reflink(mine, copy)
    finally:
        os.close(copy)
        os.close(mine)
    if not done:
        path.unlink()
    return done


def _check(shard: Shard, path: Path) -> None:
    """Read the header back: what is on disk must be what was planned."""
    written: Header = file_header(path)
    mine: Mapping[str, object] = dict(shard.entries)
    if dict(written.tensors) != mine or written.data_start != len(shard.header):
        raise FileError("the header read back differs from what was written", path=path)
