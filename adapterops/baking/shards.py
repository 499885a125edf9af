"""The files of a baked model: which bytes of each are copied, and which are computed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapterops.basemodel import BaseModel
from adapterops.casts import FORMATS
from adapterops.changes.targets import Changes, Target, Values, as_matrix
from adapterops.files.header import Entry, encode_header, layout
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.formats.model import Ref


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes [start, stop) of a source file as they are."""

    ref: Ref
    start: int
    stop: int


Piece = Copy | Target | Values


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result: its header, then `pieces` back to back; `size` bytes in all.

    `name` is its path in the output's folder. `source` is the file that it is made from;
    `same_layout` says that every tensor is where it is there, `untouched` that every byte is.
    `prefix` is what tensors' names have in front of those in the file, a pipeline's folder. A
    target that nothing changes is only cast.
    """

    name: str
    source: str
    header: bytes
    entries: Mapping[str, Entry]
    pieces: tuple[Piece, ...]
    size: int
    same_layout: bool
    prefix: str = ""

    @property
    def untouched(self) -> bool:
        """Whether it is its source, byte by byte."""
        return self.same_layout and all(isinstance(piece, Copy) for piece in self.pieces)


def plan_shards(base: BaseModel, changes: Changes, dtype: str | None) -> list[Shard]:
    """The files of the result, in the base's order; `dtype` is a type for all floats, or None.

    A tensor that the base lacks goes where the one is that it starts as, or into the last file of
    its part of the model.
    """
    owned: dict[str, dict[str, Ref]] = {os.fspath(file): {} for file in base.files}
    for name, ref in base.tensors.items():
        owned[ref.source.path][name] = ref
    added = _added(base, changes)
    return [_shard(base, path, refs, added[path], changes, dtype) for path, refs in owned.items()]


def _added(base: BaseModel, changes: Changes) -> dict[str, list[str]]:
    """file -> names of the tensors that it gains."""
    found: dict[str, list[str]] = defaultdict(list)
    new = [name for name in _all_names(changes) if name not in base.tensors]
    for name in new:
        ref = _starts_as(name, changes)
        inside = ref is not None and ref.source.path in base.files
        found[ref.source.path if ref and inside else _last_file(base, name)].append(name)
    return found


def _all_names(changes: Changes) -> list[str]:
    return [*changes.targets, *changes.values, *changes.copies]


def _starts_as(name: str, changes: Changes) -> Ref | None:
    """What a tensor that changes is made from, in the base or an adapter's file."""
    if name in changes.targets:
        return changes.targets[name].ref
    if name in changes.copies:
        return changes.copies[name]
    return changes.values[name].ref if name in changes.values else None


def _last_file(base: BaseModel, name: str) -> str:
    part = base.part(name)
    return [ref.source.path for n, ref in base.tensors.items() if base.part(n) == part][-1]


def _shard(
    base: BaseModel,
    path: str,
    refs: Mapping[str, Ref],
    added: list[str],
    changes: Changes,
    dtype: str | None,
) -> Shard:
    """One file of the result."""
    source = next(iter(refs.values())).source if refs else LocalFile(path)
    header = read_header(source)
    prefix = f"{base.part(next(iter(refs), ''))}." if base.is_pipeline else ""
    full = {name.removeprefix(prefix): name for name in (*refs, *added)}
    shapes = {short: _form(name, refs, changes, dtype) for short, name in full.items()}
    entries = dict(header.tensors)
    same = shapes == {short: (entry.dtype, entry.shape) for short, entry in entries.items()}
    if same:
        raw = bytes(read_bytes(source, 0, header.data_start))
    else:
        entries = layout(shapes)
        raw = encode_header(entries, header.metadata)
    order = sorted(entries, key=lambda short: (entries[short].start, entries[short].end))
    pieces = [_piece(full[short], refs, changes, entries[short], base) for short in order]
    size = len(raw) + max((entry.end for entry in entries.values()), default=0)
    name = _relative(base, path)
    return Shard(name, path, raw, entries, _joined(pieces), size, same, prefix)


def _form(
    name: str, refs: Mapping[str, Ref], changes: Changes, dtype: str | None
) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor of the result."""
    if name in changes.values:
        values = changes.values[name]
        own, shape = values.dtype, values.shape
    else:
        ref = _starts_as(name, changes) or refs[name]
        own, shape = refs.get(name, ref).dtype, ref.shape
    return (dtype if dtype and own in FORMATS else own), shape


def _piece(
    name: str, refs: Mapping[str, Ref], changes: Changes, entry: Entry, base: BaseModel
) -> Piece:
    if name in changes.targets:
        return changes.targets[name]
    if name in changes.values:
        return replace(changes.values[name], dtype=entry.dtype)
    ref = refs[name] if name in refs else changes.copies[name]
    if ref.dtype != entry.dtype:
        return Target(name, ref, as_matrix(ref.shape))
    return Copy(ref, ref.offset, ref.offset + ref.nbytes)


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Copies that follow each other in the source as one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            isinstance(piece, Copy)
            and isinstance(last, Copy)
            and last.ref.source is piece.ref.source
            and last.stop == piece.start
        ):
            result[-1] = replace(last, stop=piece.stop)
        else:
            result.append(piece)
    return tuple(result)


def entry_of(shard: Shard, piece: Target | Values) -> Entry:
    """Where a tensor that is computed lies in a file of the result, and in which type."""
    return shard.entries[piece.name.removeprefix(shard.prefix)]


def copied_bytes(shard: Shard) -> int:
    """Bytes of a file that are copied without being looked at."""
    copies = (piece for piece in shard.pieces if isinstance(piece, Copy))
    return len(shard.header) + sum(piece.stop - piece.start for piece in copies)


def _relative(base: BaseModel, path: str) -> str:
    """Where a file is within the base's folder; its name, for a single file."""
    given = Path(base.path)
    folder = given if given.is_dir() else given.parent
    return os.path.relpath(path, folder)
