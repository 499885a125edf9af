"""The undo file of one file of weights: what turns it back into its source, bit for bit.

A safetensors file beside the baked one. `head` is the source's own header, compressed; `rest.NAME`
the residual of a source tensor that is not in the baked file as it was; `factors.K.B` and `.A` what
was added, so that nothing else need be at hand. The header's metadata say how each tensor is
predicted, and the hashes of source, result and adapters.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import msgspec

import adapterops
from adapterops.casts import FORMATS
from adapterops.changes.targets import Target
from adapterops.errors import FormatError
from adapterops.files.appending import AppendWriter, reserve
from adapterops.files.header import DTYPE_BITS, HEADER_LIMIT, Header, header_length, parse_header
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.formats.model import Ref
from adapterops.provenance import Origin
from adapterops.undoing import carried
from adapterops.undoing.residual import Residuals

SUFFIX = ".undo"  # none that a loader of models looks for
SCHEMA: Final = "adapterops.undo/1"
_KEY = "adapterops"
_HASH = "0" * 64
How = Literal["rounding", "difference", "whole"]


class FileId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file by its base name, its bytes and their sha256."""

    name: str
    size: int
    sha256: str


class _Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    sha256: str
    weight: float
    config_sha256: str | None = None


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    how: How
    target: carried.TargetRecord | None = None


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal["adapterops.undo/1"]
    version: str
    source: FileId
    baked: FileId
    adapters: tuple[_Adapter, ...]
    pairs: int
    tensors: dict[str, _Saved]


@dataclass(frozen=True, slots=True)
class Saved:
    """A source tensor whose bytes the baked file lacks, by its name in the file.

    It is predicted by `rounding` W′ − D of `target`; or its residual is taken against the bits of
    W′ (`difference`) or against zeros (`whole`).
    """

    name: str
    how: How
    target: Target | None = None


def how(target: Target, source: str, baked: str | None) -> How:
    """How a tensor of type `source` is predicted from its target, stored as `baked` (None: gone).

    Only rounding of a low-rank change to 16 or 32 bits, or of none, is the same on every machine.
    """
    certified = {"F16", "BF16", "F32"} if target.terms else set(FORMATS)
    if not target.dense and source in certified and baked in certified:
        return "rounding"
    return "difference" if source == baked else "whole"


class UndoWriter:
    """Writes an undo file at `path`: `saved` in any order, but one tensor after the other.

    `head` are the first bytes of the source, its header with the eight bytes before it.
    """

    def __init__(
        self, path: Path, head: bytes, saved: Sequence[Saved], inputs: Sequence[Origin]
    ) -> None:
        targets = [entry.target for entry in saved if entry.how == "rounding" and entry.target]
        sites = carried.sites_of(targets)
        self._tensors = {
            entry.name: _Saved(
                entry.how,
                carried.record(entry.target, sites)
                if entry.how == "rounding" and entry.target
                else None,
            )
            for entry in saved
        }
        self._adapters = tuple(_Adapter(**asdict(origin)) for origin in inputs)
        self._pairs = len(sites)
        longest = FileId("n" * 255, 1 << 60, _HASH)
        self._left = set(self._tensors)
        shapes: dict[str, tuple[int, ...]] = {"head": ()}
        shapes |= {f"rest.{name}": () for name in self._tensors}
        for k, site in enumerate(sites):
            m, n = site.shape
            shapes |= {f"factors.{k}.B": (m, site.rank), f"factors.{k}.A": (site.rank, n)}
        # A name may need more bytes in JSON than it has characters.
        size = reserve(shapes, self._metadata(longest, longest)) + 8 * 255
        self._file = AppendWriter(path, -(-size // 8) * 8)
        for k, site in enumerate(sites):
            for side, values in zip("BA", site.factors(), strict=True):
                dtype, data = carried.narrowest(values)
                self._file.append(f"factors.{k}.{side}", dtype, values.shape, data)
        self._file.extend("head", zlib.compress(head))

    def _metadata(self, source: FileId, baked: FileId) -> Mapping[str, str]:
        manifest = _Manifest(
            SCHEMA,
            adapterops.__version__,
            source,
            baked,
            self._adapters,
            self._pairs,
            self._tensors,
        )
        return {_KEY: msgspec.json.encode(manifest).decode()}

    def extend(self, name: str, frames: bytes) -> None:
        """The next frames, as `residual.encode` makes them, of a tensor of `saved`."""
        self._left.discard(name)
        self._file.extend(f"rest.{name}", frames)

    def finish(self, source: FileId, baked: FileId) -> None:
        """Write the header and flush to disk, when every tensor has its frames."""
        for name in sorted(self._left):  # without elements, hence without frames
            self.extend(name, b"")
        self._file.finish(self._metadata(source, baked))

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()


@dataclass(frozen=True)
class Undo:
    """An undo file that was read: its header, nothing of its residuals yet."""

    file: LocalFile
    header: Header
    manifest: _Manifest
    head: bytes

    @property
    def source(self) -> FileId:
        """What it restores."""
        return self.manifest.source

    @property
    def baked(self) -> FileId:
        """What it restores from."""
        return self.manifest.baked

    @property
    def inputs(self) -> tuple[Origin, ...]:
        """The adapters that were added."""
        return tuple(
            Origin(a.name, a.sha256, a.weight, a.config_sha256) for a in self.manifest.adapters
        )

    @property
    def saved(self) -> Mapping[str, How]:
        """How each source tensor is predicted that the baked file lacks."""
        return {name: entry.how for name, entry in self.manifest.tensors.items()}

    @cached_property
    def tensors(self) -> Header:
        """The source's own header, checked."""
        length = header_length(self.head[:8], self.source.size, self.file.path)
        if length != len(self.head) - 8:
            raise FormatError("has another header than the source had", path=self.file.path)
        return parse_header(self.head[8:], self.source.size, self.file.path)

    @cached_property
    def _pairs(self) -> list[tuple[Ref, Ref]]:
        return [
            (self._ref(f"factors.{k}.B"), self._ref(f"factors.{k}.A"))
            for k in range(self.manifest.pairs)
        ]

    def target(self, name: str, ref: Ref) -> Target:
        """What was added to the source tensor `name`, over the baked tensor `ref`."""
        kept = self.manifest.tensors[name].target
        if kept is None:
            raise FormatError(f"does not say what was added to {name!r}", path=self.file.path)
        return carried.target_of(name, kept, ref, self._pairs)

    def residuals(self, name: str) -> Residuals:
        """The residuals of the source tensor `name`."""
        entry = self.tensors.tensors[name]
        ref = self._ref(f"rest.{name}")
        width = max(1, DTYPE_BITS[entry.dtype] // 8)
        count = entry.nbytes // width
        return Residuals(self.file, ref.offset, ref.nbytes, count, width)

    def _ref(self, name: str) -> Ref:
        entry = self.header.tensors.get(name)
        kinds = ("U8",) if name.startswith("rest.") else tuple(FORMATS)
        if entry is None or entry.dtype not in kinds:
            raise FormatError(f"has no usable tensor {name!r}: it is damaged", path=self.file.path)
        offset = self.header.data_start + entry.start
        return Ref(self.file, name, entry.dtype, entry.shape, offset, entry.nbytes)


def read_undo(path: str | Path) -> Undo:
    """The undo file at `path`; its headers are read and checked.

    Raises FileError, and FormatError for what is damaged or no undo file.
    """
    file = LocalFile(path)
    header = read_header(file)
    try:
        manifest = msgspec.json.decode(header.metadata[_KEY], type=_Manifest)
    except (LookupError, msgspec.DecodeError) as error:
        raise FormatError(
            f"is no undo file that this version reads ({error})",
            path=path,
            hint="name the directory or file that `adapterops bake --reversible` wrote",
        ) from None
    entry = header.tensors.get("head")
    if entry is None:
        raise FormatError("has no header of the source: it is damaged", path=path)
    packed = bytes(read_bytes(file, header.data_start + entry.start, entry.nbytes))
    undo = Undo(file, header, manifest, inflated(packed, HEADER_LIMIT + 8, file.path))
    strange = sorted(manifest.tensors.keys() - undo.tensors.tensors.keys())
    if strange:
        raise FormatError(f"saves {strange[0]!r}, which the source does not have", path=path)
    return undo


def inflated(packed: bytes, limit: int, path: str) -> bytes:
    """zlib undone, of at most `limit` bytes. Raises FormatError for anything else."""
    engine = zlib.decompressobj()
    try:
        result = engine.decompress(packed, limit + 1)
    except zlib.error as error:
        raise FormatError(f"cannot be decompressed ({error}): it is damaged", path=path) from None
    if not engine.eof or len(result) > limit:
        raise FormatError(f"decompresses to more than {limit} bytes: it is damaged", path=path)
    return result
