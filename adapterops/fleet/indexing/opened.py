"""A fleet's index as the verbs read it: records, and their arrays as matrices.

A sketch is linear in ΔW, so rows of `matrix` are compared, added and averaged like the adapters
themselves: ⟨row i, row j⟩ estimates the cosine of ΔW_i and ΔW_j over all modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapterops.errors import FileError, FormatError
from adapterops.fleet.indexing import schema
from adapterops.fleet.indexing.chunks import ROWS, Arrays, Chunk, open_chunk
from adapterops.fleet.types import Layout, Record, Signature

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """The modules that some records have between them, sorted by stem, then shape.

    `side` is the smallest of their layouts', `places` where each layout's modules are here. Two
    shapes of one stem are two modules, which share nothing.
    """

    stems: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    side: int
    places: dict[int, Array]


@dataclass(frozen=True)
class Fleet:
    """An index, read only: what it held when it was opened.

    `records` are sorted by tenant. `removed` were off-boarded, `vanished` were not found in their
    source any more; neither is among the records. `parts` says of each part (source, "i/n") whether
    it was indexed to its end, `sources` the place that each tenant was found in. Arrays are read
    from disk when asked for: FileError where `index` has rewritten them since.
    """

    path: str
    seed: int
    records: tuple[Record, ...]
    layouts: tuple[Layout, ...]
    removed: frozenset[str]
    vanished: frozenset[str]
    parts: dict[tuple[str, str], bool] = field(repr=False)
    sources: dict[str, str] = field(repr=False)
    _files: dict[int, str] = field(repr=False)

    @property
    def unfinished(self) -> tuple[str, ...]:
        """What of the sources is missing: parts begun only, and shards that are not there."""
        return schema.unfinished(self.parts)

    def columns(self, records: Sequence[Record]) -> Columns:
        """The modules of these records."""
        used = sorted({record.layout for record in records if record.layout >= 0})
        pairs = {
            n: list(zip(self.layouts[n].stems, self.layouts[n].shapes, strict=True)) for n in used
        }
        union = sorted({pair for found in pairs.values() for pair in found})
        index = {pair: place for place, pair in enumerate(union)}
        places = {n: np.array([index[pair] for pair in found], int) for n, found in pairs.items()}
        side = min((self.layouts[n].side for n in used), default=1)
        return Columns(
            tuple(stem for stem, _ in union), tuple(shape for _, shape in union), side, places
        )

    def matrix(self, records: Sequence[Record]) -> tuple[Array, Array, tuple[str, ...]]:
        """Sketches (N, L·p²) of ΔW/‖ΔW‖, energies (N, L) = ‖ΔW_l‖²/‖ΔW‖², float32; the L stems.

        L counts the modules of all records together, p is the smallest side: of a larger sketch the
        upper left block, rescaled. The expected squared norm of a row is 1. Rows of records without
        a signature, and modules that a record lacks, are zero.
        """
        columns = self.columns(records)
        return self._sketches(records, columns), self._energies(records, columns), columns.stems

    def outputs(self, records: Sequence[Record]) -> Array:
        """Sketches (N, q) float32 of ΔWΔWᵀ over its norm; rows without a signature are zero."""
        return self._vectors(records, "outputs")

    def starts(self, records: Sequence[Record]) -> Array:
        """Fingerprints (N, k) float32 of what A was initialised as, each of norm 1 or 0."""
        out = self._vectors(records, "start")
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        np.divide(out, norms, out=out, where=norms > 0)
        return out

    def signatures(self, records: Sequence[Record]) -> Iterator[Signature]:
        """What `index` measured of each record, one after the other; some hundred are held."""
        for first in range(0, len(records), ROWS):
            part = records[first : first + ROWS]
            arrays: list[dict[str, Any]] = [{} for _ in part]
            for name in Arrays._fields:
                for rows, _, found in self._found(part, name):
                    for place, array in zip(rows.tolist(), found, strict=True):
                        arrays[place][name] = array
            for record, mine in zip(part, arrays, strict=True):
                known = {name: getattr(record, name) for name in _IN_RECORD}
                layout = self.layouts[record.layout] if mine else None
                yield Signature(**known, layout=layout, **mine)

    def sketches(self, records: Sequence[Record]) -> Array:
        """The first result of `matrix` alone."""
        return self._sketches(records, self.columns(records))

    def _sketches(self, records: Sequence[Record], columns: Columns) -> Array:
        side, count = columns.side, len(columns.stems)
        out = np.zeros((len(records), count, side, side), np.float32)
        for rows, layout, found in self._found(records, "sketch"):
            block = found[:, :, :side, :side].astype(np.float32)
            block *= np.float32(found.shape[2] / side)
            out[_cut(rows, columns.places[layout], count)] = block
        return out.reshape(len(records), count * side * side)

    def _energies(self, records: Sequence[Record], columns: Columns) -> Array:
        count = len(columns.stems)
        out = np.zeros((len(records), count), np.float32)
        for rows, layout, found in self._found(records, "norms"):
            squares = (found / found.max(1, keepdims=True)) ** 2  # no power of a norm overflows
            squares /= squares.sum(1, keepdims=True)
            out[_cut(rows, columns.places[layout], count)] = squares
        return out

    def _vectors(self, records: Sequence[Record], name: str) -> Array:
        """Arrays that are one vector a record, of one length throughout the index."""
        out: Array | None = None
        for rows, _, found in self._found(records, name):
            if out is None:
                out = np.zeros((len(records), found.shape[1]), np.float32)
            out[rows] = found
        return np.zeros((len(records), 0), np.float32) if out is None else out

    def _found(self, records: Sequence[Record], name: str) -> Iterator[tuple[Array, int, Array]]:
        """Pieces of an array: which of `records`, their layout, their rows as they are on disk."""
        rows = np.array([record.row for record in records], np.int64)
        layouts = np.array([record.layout for record in records], np.int64)
        order = np.argsort(rows, kind="stable")
        order = order[rows[order] >= 0]
        chunks = schema.placed(rows[order])[0]
        for mine in np.split(order, np.flatnonzero(np.diff(chunks)) + 1):
            if not len(mine):
                continue
            chunk = self._chunk(int(schema.placed(rows[mine[0]])[0]))
            inside = schema.placed(rows[mine])[1]
            keys = np.stack([chunk.groups(inside), layouts[mine]], 1)
            for key in np.unique(keys, axis=0):
                (chosen,) = np.nonzero((keys == key).all(1))
                found = chunk.read(name, inside[chosen])
                self._check(chunk, int(key[1]), name, found)
                yield mine[chosen], int(key[1]), found

    def _check(self, chunk: Chunk, layout: int, name: str, found: Array) -> None:
        """Raise FormatError for a file of another layout than the record says."""
        modules, side = len(self.layouts[layout].stems), self.layouts[layout].side
        expected = {"norms": (modules,), "sketch": (modules, side, side)}
        if found.shape[1:] != expected.get(name, found.shape[1:]):
            raise FormatError(
                f"{name} has the shape {found.shape[1:]} for {modules} modules of side {side}",
                path=chunk.path,
                hint="remove it and run the same `adapterops index` again",
            )

    def _chunk(self, number: int) -> Chunk:
        if number not in self._opened:
            path = Path(self.path, schema.SIGNATURES, os.path.basename(self._files[number]))
            if not path.is_file():
                raise FileError(
                    "is gone: the index was rewritten since it was opened, or is incomplete",
                    path=path,
                    hint="run again; if it persists, run the same `adapterops index` again",
                )
            self._opened[number] = open_chunk(path)
        return self._opened[number]

    @cached_property
    def _opened(self) -> dict[int, Chunk]:
        """Headers that were read already."""
        return {}


def _cut(rows: Array, places: Array, count: int) -> Any:
    """Where pieces of some modules go; whole rows, the usual case, are copied in one piece."""
    if len(places) < count:
        return np.ix_(rows, places)
    return slice(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows


_IN_RECORD = set(Record.__slots__) & set(Signature.__slots__) - {"layout"}


def open_fleet(path: str | os.PathLike[str]) -> Fleet:
    """The index at `path`, as the last finished batch left it; others may be writing it.

    Raises FileError where there is none, FormatError and IncompatibleError for one that is damaged
    or of another version.
    """
    folder = Path(os.path.realpath(path))
    if not (folder / schema.DATABASE).is_file():
        raise FileError(
            "is no index of a fleet", path=path, hint="`adapterops index PATH -o FLEET` makes one"
        )
    with schema.reported(folder / schema.DATABASE), closing(schema.connect(folder)) as database:
        database.execute("BEGIN")
        meta = schema.meta(database)
        if not meta:
            raise FileError(
                "its creation was cut off", path=path, hint="run the same `adapterops index` again"
            )
        found = schema.snapshot(database)
    return Fleet(
        os.fspath(path),
        int(meta["seed"]),
        tuple(found.records),
        tuple(found.layouts),
        found.removed,
        found.vanished,
        found.parts,
        found.sources,
        found.files,
    )
