"""The bytes of one file of the result, in order, and what became of every change on the way."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

import torch

from adapterops import casts
from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.kernel import Found, Rounding, bake_rows, cast, read_rows
from adapterops.baking.shards import Copy, Shard, entry_of
from adapterops.changes.given import given_rows
from adapterops.changes.targets import Target, Values, as_matrix
from adapterops.errors import NumericsError
from adapterops.files.direct import aligned
from adapterops.files.source import Source
from adapterops.rounding.exact import Counts
from adapterops.stream import Compute, Job, run

_CHUNK = 3 << 20  # bytes of the result that a job makes
_FEEDBACK = 2  # times as many rows, where rounding goes column by column
_TILES = 16 << 20  # bytes of temporaries in a job


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes of the file from `offset` on, and what became of a change there.

    `name` is the tensor's, "" for bytes that are copied.
    """

    offset: int
    data: memoryview
    name: str = ""
    delta: Delta | None = None
    found: Found | None = None


@dataclass(slots=True)
class Tally:
    """What became of the change of one target, added up over its blocks, band by band."""

    drift: Drift = field(default_factory=Drift)
    counts: Counts = field(default_factory=Counts)
    _bands: dict[int, tuple[float, Drift, torch.Tensor | None]] = field(default_factory=dict)

    def add(self, delta: Delta, found: Found) -> None:
        """Count a block in."""
        _, drift, along = self._bands.get(delta.band.start, (0.0, Drift(), None))
        if found.along is not None:
            along = found.along if along is None else along + found.along
        # The delta itself is not kept: it holds the factors of its module.
        self._bands[delta.band.start] = (delta.noise, drift + found.drift, along)
        self.counts += found.counts

    def close(self) -> None:
        """No more blocks come: a change that is no more than its own rounding counts as none."""
        for noise, drift, along in self._bands.values():
            if along is not None:
                drift = replace(drift, inside=drift.inside + float((along * along).sum()))
            if drift.delta <= noise:
                drift = Drift(changed=drift.changed, bias=drift.bias, error=drift.error)
            self.drift += drift
        self._bands.clear()


def make(
    shard: Shard, rounding: Rounding, on: Compute, *, copies: bool = True, size: int = _CHUNK
) -> Generator[Made, None, None]:
    """The file's bytes after its header, in order, in pieces of about `size`.

    `rounding.dtype` is replaced by each tensor's own. Without `copies` what is copied is left out.
    Runs inside `exact_arithmetic`.
    """
    return run(_jobs(shard, rounding, on, copies, size), on)


def _jobs(
    shard: Shard, rounding: Rounding, on: Compute, copies: bool, size: int
) -> Generator[Job[Made], None, None]:
    position = len(shard.header)
    for piece in shard.pieces:
        if isinstance(piece, Copy):
            if copies:
                yield from _copies(piece, position, size)
        elif isinstance(piece, Values):
            yield from _values(piece, position, size)
        else:
            how = replace(rounding, dtype=entry_of(shard, piece).dtype)
            yield from _bakes(piece, position, how, on, size)
        if isinstance(piece, Copy):
            position += piece.stop - piece.start
        else:
            position += entry_of(shard, piece).nbytes


def _copies(copy: Copy, position: int, size: int) -> Iterator[Job[Made]]:
    for first in range(copy.start, copy.stop, size):
        length = min(size, copy.stop - first)
        args = (position + first - copy.start, copy.ref.source, first, length)
        yield Job("copy", _copy, args, length)


def _values(values: Values, position: int, size: int) -> Iterator[Job[Made]]:
    matrix = as_matrix(values.shape)
    row_bytes = matrix[1] * _width(values.dtype)
    for start, stop in _chunks(0, matrix[0], row_bytes, size):
        args = (position + start * row_bytes, values, start, stop)
        yield Job(values.name, _given, args, 40 * (stop - start) * matrix[1])


def _bakes(
    target: Target, position: int, rounding: Rounding, on: Compute, size: int
) -> Iterator[Job[Made]]:
    columns, width = target.matrix[1], _width(rounding.dtype)
    row_bytes = columns * width
    for band in bands(target):
        delta = Delta(target, band, device=on.device)
        feedback = rounding.mode == "compensated" and band.is_changed
        whole = feedback and target.inputs == "rows"
        chunks = _chunks(band.start, band.stop, row_bytes, size * (_FEEDBACK if feedback else 1))
        for start, stop in [(band.start, band.stop)] if whole else chunks:
            numbers = (stop - start) * columns
            peak = _TILES + 2 * numbers * width + delta.peak
            peak += 40 * numbers if feedback or band.dense or not band.is_changed else 0
            args = (position + start * row_bytes, delta, start, stop, rounding)
            yield Job(target.name, _bake, args, peak)


def _chunks(first: int, last: int, row_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Row ranges whose results take about `size` bytes."""
    step = max(1, size // max(1, row_bytes))
    return ((start, min(start + step, last)) for start in range(first, last, step))


def _width(dtype: str) -> int:
    return casts.FORMATS[dtype].bits // 8 if dtype in casts.FORMATS else 8


def _copy(offset: int, source: Source, start: int, length: int) -> Made:
    data = aligned(length, offset).data
    source.pread_into(start, data)
    return Made(offset, data)


def _bake(offset: int, delta: Delta, start: int, stop: int, rounding: Rounding) -> Made:
    target, found = delta.target, None
    if delta.band.is_changed:
        into = aligned((stop - start) * target.matrix[1] * _width(rounding.dtype), offset)
        _, after, found = bake_rows(delta, start, stop, rounding, into)
        delta.done(stop - start)
    else:
        after = cast(read_rows(target.ref, target.matrix, start, stop), rounding.dtype, target)
    return Made(offset, as_bytes(after), target.name, delta, found)


def _given(offset: int, values: Values, start: int, stop: int) -> Made:
    """Rows of a tensor that is given values, rounded once to its type."""
    wide = given_rows(values, start, stop)
    if casts.count_nonfinite(wide):
        raise NumericsError(
            f"values of {values.name!r} are NaN or infinite",
            path=values.extra.refs[0].source.path,
            hint="the training diverged or the file is damaged; leave this adapter out",
        )
    if values.dtype in casts.FORMATS:
        casts.check_range(wide, values.dtype, values.name)
    stored = casts.stored_bytes(casts.store(wide, values.dtype))
    return Made(offset, stored, values.name)


def as_bytes(x: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    view: memoryview = x.contiguous().view(-1).view(torch.uint8).numpy().data
    return view
