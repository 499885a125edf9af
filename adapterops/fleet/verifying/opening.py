"""Adapters opened by the thousand: parsed once for all that have one header and one config.

The tenants of a fleet were mostly trained by one script, so their files differ in numbers alone.
What a header and a config mean is kept, by the bytes of both and by those of every tensor that is
no plain factor (alphas, extras), and a further file costs two small reads. Files up to `_WHOLE`
bytes are read in one piece.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adapterops import casts
from adapterops.errors import AdapterOpsError, NumericsError
from adapterops.files.source import LocalFile, read_bytes
from adapterops.fleet.types import Array
from adapterops.formats import open_adapter_file
from adapterops.formats.kinds import split
from adapterops.formats.locate import locate, read_text
from adapterops.formats.model import AdapterFile, Read, Ref, Site
from adapterops.kernels import once

_WHOLE = 8 << 20
_KEPT = 64
_LENGTH = 8

Key = tuple[int, bytes, bytes, bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """One ΔW of an adapter as a matrix (m, n) of at most `rank`: a module, a full delta or a bias.

    `site` is None for a full delta; a bias is a matrix of one column. `refs` are the tensors of B
    and A where the file holds just these.
    """

    stem: str
    shape: tuple[int, int]
    rank: int
    scale: float = 1.0
    site: Site | None = None
    ref: Ref | None = None
    refs: tuple[Ref, Ref] | None = None

    @property
    def layer(self) -> tuple[str, tuple[int, ...]]:
        """What two modules of one name must agree in: the kind of layer, a kernel above 1 x 1."""
        if self.site is None:
            return "linear", ()
        wide = any(size != 1 for size in self.site.kernel)
        kind = "embedding" if self.site.layer == "embedding" else "linear"
        return kind, self.site.kernel if wide else ()


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All that files with one header and one config have in common.

    `rest` are the places of tensors that are no plain factor and `fixed` what they hold, or None
    where files that look the same must each be parsed.
    """

    file: AdapterFile
    pieces: Mapping[str, Piece]
    rest: tuple[tuple[int, int], ...]
    fixed: bytes | None


class Opened:
    """One adapter whose numbers can be read; `data` is its file where that was read whole."""

    __slots__ = ("_data", "_file", "blueprint", "path", "read")

    def __init__(
        self, path: str, blueprint: Blueprint, file: LocalFile | None, data: Array | None
    ) -> None:
        self.path, self.blueprint = path, blueprint
        self._file, self._data = file, data
        self.read: Read = once(self._raw)

    def _raw(self, ref: Ref) -> Array:
        if self._file is None:
            return ref.raw()
        if self._data is not None:
            return np.asarray(self._data[ref.offset : ref.offset + ref.nbytes])
        buffer = np.empty(ref.nbytes, np.uint8)
        self._file.pread_into(ref.offset, buffer.data)
        return buffer

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """stem -> its change of weights; biases as `<stem>.diff_b`."""
        return self.blueprint.pieces

    def stacks(self, stems: Sequence[str]) -> tuple[Array, Array]:
        """B (k, m, r) and A (k, r, n), float64, scale folded into A, of pieces of equal shape.

        Raises NumericsError, naming the tensor, for NaN or infinities.
        """
        pieces = [self.pieces[stem] for stem in stems]
        pairs = [piece.refs for piece in pieces if piece.refs]
        if len(pairs) == len(pieces) and len({(b.dtype, a.dtype) for b, a in pairs}) == 1:
            B, A = self._decoded([b for b, _ in pairs]), self._decoded([a for _, a in pairs])
            A *= np.array([piece.scale for piece in pieces])[:, None, None]
        else:
            both = [self._factors(piece) for piece in pieces]
            B, A = np.stack([one for one, _ in both]), np.stack([other for _, other in both])
        if not (math.isfinite(B.sum()) and math.isfinite(A.sum())):
            for piece in pieces:
                self._factors(piece)
            raise NumericsError("its factors times their scale overflow float64", path=self.path)
        return B, A

    def _decoded(self, refs: Sequence[Ref]) -> Array:
        raw = self._evenly(refs)
        if raw is None:
            raw = np.concatenate([self._raw(ref) for ref in refs])
        shape = refs[0].shape[0], math.prod(refs[0].shape[1:])
        return np.asarray(casts.decode(raw, refs[0].dtype, (len(refs), *shape)))

    def _evenly(self, refs: Sequence[Ref]) -> Array | None:
        """The bytes of tensors that lie at equal distances in a file that was read whole."""
        starts = [ref.offset for ref in refs]
        steps = {second - first for first, second in pairwise(starts)}
        step = min(steps, default=0)
        if self._data is None or len(steps) > 1 or step < 0:
            return None
        shape, strides = (len(refs), refs[0].nbytes), (step, 1)
        return np.lib.stride_tricks.as_strided(self._data[starts[0] :], shape, strides).reshape(-1)

    def _factors(self, piece: Piece) -> tuple[Array, Array]:
        try:
            if piece.site is not None and piece.ref is None:
                B, A = piece.site.factors("cpu", self.read)
                return B, A * piece.scale
            ref = piece.ref
            assert ref is not None
            values = ref.read("cpu", self.read).reshape(piece.shape)
            if casts.count_nonfinite(values):
                raise NumericsError(f"{ref.name} holds NaN or infinities", module=piece.stem)
            B, A = split(values)
            return B, A * piece.scale
        except AdapterOpsError as error:
            error.path = self.path  # the blueprint's is another's
            raise

    def check_unchanged(self) -> None:
        """Raise ChangedError if its file is another than when it was opened."""
        (self._file or self.blueprint.file.source).check_unchanged()

    def close(self) -> None:
        """Give back its descriptor."""
        (self._file or self.blueprint.file.source).close()


class Opener:
    """Opens adapters and keeps the last blueprints; threads may share one."""

    def __init__(self, *, allow_pickle: bool = False) -> None:
        self.allow_pickle = allow_pickle
        self._known: OrderedDict[Key, Blueprint] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str, name: str | None = None) -> Opened:
        """The adapter at a local `path`, which errors call `name`.

        Raises what `open_adapter_file` raises.
        """
        try:
            return self._open(path, name or path)
        except AdapterOpsError as error:
            if name not in (None, path):
                error.path = name
            raise

    def _open(self, path: str, name: str) -> Opened:
        place = locate(path)
        if place.is_pickle:
            return Opened(name, self._parsed(path), None, None)
        config = read_text(place.config) if place.config else b""
        file = LocalFile(place.weights)
        try:
            data, head = _start(file)
            key = file.size(), head, config, place.shared_config
            with self._lock:
                known = self._known.get(key)
                if known is not None:
                    self._known.move_to_end(key)
            if known is None or known.fixed is None or known.fixed != _rest(file, known.rest, data):
                known = self._parsed(path)
                if any(ref.source is not known.file.source for ref in known.file.tensors.values()):
                    file.close()
                    return Opened(name, known, None, None)
                known.file.source.close()
                with self._lock:
                    self._known[key] = known
                    while len(self._known) > _KEPT:
                        self._known.popitem(last=False)
        except BaseException:
            file.close()
            raise
        return Opened(name, known, file, data)

    def _parsed(self, path: str) -> Blueprint:
        file = open_adapter_file(path, allow_pickle=self.allow_pickle)
        pieces = _pieces(file)
        plain = {ref.name for piece in pieces.values() if piece.refs for ref in piece.refs}
        others = [ref for name, ref in sorted(file.tensors.items()) if name not in plain]
        rest = tuple((ref.offset, ref.nbytes) for ref in others)
        fixed = None
        if sum(size for _, size in rest) <= _WHOLE and len(file.sources) == 1:
            fixed = b"".join(ref.raw().tobytes() for ref in others)
        return Blueprint(file, pieces, rest, fixed)


def _start(file: LocalFile) -> tuple[Array | None, bytes]:
    """A small file whole, or nothing, and the bytes of its header."""
    size = file.size()
    data = None
    if size <= _WHOLE:
        data = np.empty(size, np.uint8)
        file.pread_into(0, data.data)
    first = bytes(data[:_LENGTH]) if data is not None else bytes(read_bytes(file, 0, _LENGTH))
    length = min(int.from_bytes(first, "little"), size - len(first), _WHOLE)
    if data is not None:
        return data, bytes(data[: _LENGTH + length])
    return None, first + bytes(read_bytes(file, _LENGTH, length))


def _rest(file: LocalFile, places: Sequence[tuple[int, int]], data: Array | None) -> bytes:
    if data is not None:
        return b"".join(data[start : start + size].tobytes() for start, size in places)
    return b"".join(bytes(read_bytes(file, start, size)) for start, size in places)


def _pieces(file: AdapterFile) -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for stem, site in file.sites.items():
        parts = site.parts
        plain = site.kind == "lora" and all(parts[role].is_plain for role in "BA" if role in parts)
        refs = (parts["B"], parts["A"]) if plain and {"A", "B"} <= parts.keys() else None
        if refs and not (
            _is(refs[0], site.shape[0], site.rank) and _is(refs[1], site.rank, site.shape[1])
        ):
            refs = None
        found[stem] = Piece(stem, site.shape, site.rank, site.scale, site, None, refs)
        if "bias" in parts:
            name, shape = f"{stem}.diff_b", (site.shape[0], 1)
            found[name] = Piece(name, shape, 1, site.scale, site, parts["bias"])
    for name, ref in file.deltas.items():
        rows = ref.shape[0] if ref.shape else 1
        matrix = len(ref.shape) > 1 and name.endswith(".diff")
        columns = _size(ref) // max(rows, 1)
        stem = name.removesuffix(".diff") if matrix else name
        found[stem] = Piece(stem, (rows, columns), min(rows, columns), 1.0, None, ref)
    return dict(sorted(found.items()))


def _is(ref: Ref, rows: int, columns: int) -> bool:
    return ref.shape[0] == rows and _size(ref) == rows * columns


def _size(ref: Ref) -> int:
    return math.prod(ref.shape)
