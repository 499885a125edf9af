"""The undo record of a baked folder: its files as they were before baking.

A safetensors file in the baked folder. Weights that changed have an undo file of their own each;
configs, indexes and tokenizers that changed are kept whole, compressed; the others are the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

import adapterops
from adapterops.errors import FormatError, UnsafeFileError
from adapterops.files.appending import AppendWriter, reserve
from adapterops.files.header import Header
from adapterops.files.source import LocalFile, read_bytes, read_header

NAME = "adapterops.undo"
_KEY = "adapterops"
LARGEST = 256 << 20  # bytes of a config, an index or a tokenizer
_PIECE = 1 << 20


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the source folder, by its path in it with `/`, and where its bytes come from.

    `same`: the baked folder's file of that name; `undo`: that file and NAME.undo beside it; `kept`:
    the record.
    """

    name: str
    size: int
    sha256: str
    how: Literal["same", "undo", "kept"]


class _Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal["adapterops.undo-record/1"]
    version: str
    files: tuple[FileRecord, ...]


def write_record(path: Path, files: Sequence[FileRecord], kept: Mapping[str, bytes]) -> None:
    """Write the record; `kept` are the bytes of the files that it is to hold, by name."""
    if set(kept) != {file.name for file in files if file.how == "kept"}:
        raise ValueError("the files kept are not those listed as kept")
    listing = _Listing("adapterops.undo-record/1", adapterops.__version__, tuple(files))
    metadata = {_KEY: msgspec.json.encode(listing).decode()}
    writer = AppendWriter(path, reserve({f"file.{name}": () for name in kept}, metadata))
    try:
        for name, data in kept.items():
            writer.extend(f"file.{name}", zlib.compress(data))
        writer.finish(metadata)
    finally:
        writer.close()


@dataclass(frozen=True)
class Record:
    """An undo record that was read."""

    file: LocalFile
    header: Header
    files: tuple[FileRecord, ...]

    def kept(self, name: str) -> Iterator[bytes]:
        """The bytes of a file that the record holds, in pieces of at most 1 MiB.

        Raises FormatError as soon as they are more than were listed, or what is packed is damaged.
        """
        entry = self.header.tensors.get(f"file.{name}")
        wanted = next(file for file in self.files if file.name == name)
        if entry is None or entry.dtype != "U8":
            raise FormatError(f"does not hold {name!r}: it is damaged", path=self.file.path)
        start = self.header.data_start
        return self._unpacked(start + entry.start, start + entry.end, wanted)

    def _unpacked(self, first: int, last: int, wanted: FileRecord) -> Iterator[bytes]:
        engine, size = zlib.decompressobj(), 0
        for at in range(first, last, _PIECE):
            packed = bytes(read_bytes(self.file, at, min(_PIECE, last - at)))
            while packed or engine.unconsumed_tail:
                piece = self._inflated(engine, packed or engine.unconsumed_tail)
                packed, size = b"", size + len(piece)
                if size > wanted.size:
                    raise self._other(wanted, "more")
                yield piece
                if not piece:
                    break
        if not engine.eof or size != wanted.size:
            raise self._other(wanted, "other")

    def _other(self, wanted: FileRecord, what: str) -> FormatError:
        return FormatError(
            f"{wanted.name!r} decompresses to {what} than {wanted.size} bytes: it is damaged",
            path=self.file.path,
        )

    def _inflated(self, engine: Any, packed: bytes) -> bytes:
        try:
            return bytes(engine.decompress(packed, _PIECE))
        except zlib.error as error:
            raise FormatError(
                f"cannot be decompressed ({error}): it is damaged", path=self.file.path
            ) from None


def read_record(path: str | Path) -> Record:
    """The record at `path`.

    Raises FileError; FormatError for what is no record; UnsafeFileError where a name leads out of
    the folder.
    """
    file = LocalFile(path)
    header = read_header(file)
    try:
        listing = msgspec.json.decode(header.metadata[_KEY], type=_Listing)
    except (LookupError, msgspec.DecodeError) as error:
        raise FormatError(
            f"is no undo record that this version reads ({error})",
            path=path,
            hint="name the folder that `adapterops bake --reversible` wrote",
        ) from None
    names = [each.name for each in listing.files]
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    twice = [name for name in names if names.count(name) > 1 or name in folders]
    if twice:
        raise FormatError(f"names {twice[0][:80]!r} twice: it is damaged", path=path)
    for each in listing.files:
        steps = each.name.split("/")
        if "\\" in each.name or "\0" in each.name or {"", ".", ".."} & set(steps):
            raise UnsafeFileError(f"names {each.name[:80]!r}, outside of its folder", path=path)
        if not 0 <= each.size <= (LARGEST if each.how == "kept" else 1 << 62):
            raise FormatError(f"{each.name!r} cannot have {each.size} bytes", path=path)
    return Record(file, header, listing.files)
