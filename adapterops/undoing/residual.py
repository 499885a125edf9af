"""What a prediction of a tensor's bits lacks, compressed without loss.

The residual is (true code − predicted code) mod 2ʷ, a code being the w bits of one number. Where
the prediction is a correct rounding of W′ − D nearly all residuals are 0 and nearly all others ±1,
so each takes two bits (0, +1, −1, or an escape), which DEFLATE without string matching brings to
within a fifth of their entropy; escapes follow as planes of bytes. Frames of at most 2¹⁸ codes are
each decoded alone: memory does not depend on the tensor.

Whoever predicts may also say where a wrong prediction is likely: those residuals are coded apart.
The exact rounding of W + D moves W′ − D by at most half a spacing at W′, which is mostly W's own
spacing or less; where it is more, and hardly anywhere else, the prediction can be wrong.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from typing import Any, NamedTuple, Protocol

import numpy as np

from adapterops.errors import FormatError

FRAME = 1 << 18  # codes
_HEAD = struct.Struct("<8I")  # codes, likely ones, and twice: escapes, bytes of symbols and escapes
_ESCAPE = 2
_SLACK = 1 << 11
_LITTLE = 0.04  # share of codes that are wrong, below which runs of zeros decide the size

Array = np.ndarray[Any, Any]


def _table() -> Array:
    """What each byte of four symbols means, as four int8; −128 stands for an escape."""
    meaning = np.array([0, 1, -128, -1], np.int8)
    every = np.arange(256)
    return np.stack([meaning[(every >> shift) & 3] for shift in (0, 2, 4, 6)], axis=1)


_MEANING = np.ascontiguousarray(_table()).view("<u4").reshape(256)


class Bytes(Protocol):
    """A source of bytes at positions; `files.source.Source` is one."""

    path: str

    def pread_into(self, offset: int, buffer: memoryview) -> None: ...


def encode(true: Array, predicted: Array, likely: Array | None = None) -> bytes:
    """The frames that `Residuals` restores `true` from, given `predicted` and `likely`.

    Both are arrays of one shape and unsigned type (uint8, 16, 32, 64), the bits of the numbers;
    `likely` is a mask of as many elements. What several calls give for consecutive parts of a
    tensor is joined by writing it in that order.
    """
    one, other = true.reshape(-1), predicted.reshape(-1)
    if one.dtype != other.dtype or len(one) != len(other) or one.dtype.kind != "u":
        raise ValueError(f"codes {true.dtype}{true.shape} against {predicted.dtype}")
    mask = None if likely is None else likely.reshape(-1)
    frames = []
    for at in range(0, len(one), FRAME):
        part = slice(at, at + FRAME)
        frames.append(_frame(one[part], other[part], None if mask is None else mask[part]))
    return b"".join(frames)


def _frame(true: Array, predicted: Array, likely: Array | None) -> bytes:
    if np.array_equal(true, predicted):
        return _HEAD.pack(len(true), 0, *[0] * 6)
    rest = true - predicted
    chosen = np.flatnonzero(likely) if likely is not None else np.empty(0, np.int64)
    first = _coded(rest[chosen])
    rest[chosen] = 0
    second = _coded(rest)
    sizes = [(escapes, len(one), len(two)) for escapes, one, two in (first, second)]
    head = _HEAD.pack(len(true), len(chosen), *sizes[0], *sizes[1])
    return b"".join([head, *first[1:], *second[1:]])


def _coded(rest: Array) -> tuple[int, bytes, bytes]:
    """How many escapes there are, symbols and escapes; nothing where all residuals are 0."""
    wrong = int(np.count_nonzero(rest))
    if not wrong:
        return 0, b"", b""
    escaped = (rest + rest.dtype.type(1)) > 2
    padded = np.zeros(-(-len(rest) // 4) * 4, np.uint8)
    symbols = padded[: len(rest)]
    np.bitwise_and(rest, 3, out=symbols, casting="unsafe")
    at = np.flatnonzero(escaped)
    symbols[at] = _ESCAPE
    four = padded.view("<u4")
    packed = (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)
    few = wrong < _LITTLE * len(rest)
    first = _deflate(packed.data, zlib.Z_RLE if few else zlib.Z_HUFFMAN_ONLY)
    second = _deflate(_planes(rest[at]).data, zlib.Z_HUFFMAN_ONLY) if len(at) else b""
    return len(at), first, second


def _planes(rest: Array) -> Array:
    """Residuals as zigzag numbers (0, −1, 1, −2 …), all lowest bytes first, highest last."""
    top = 8 * rest.itemsize - 1
    zigzag = (rest << 1) ^ (0 - (rest >> top))
    return np.ascontiguousarray(zigzag.view(np.uint8).reshape(len(rest), -1).T)


def _from_planes(raw: bytes, kind: np.dtype[Any]) -> Array:
    planes = np.frombuffer(raw, np.uint8).reshape(kind.itemsize, -1)
    zigzag = np.ascontiguousarray(planes.T).view(kind).reshape(-1)
    return (zigzag >> 1) ^ (0 - (zigzag & 1))


def _deflate(data: memoryview, strategy: int) -> bytes:
    engine = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
    return engine.compress(data) + engine.flush()


class _Part(NamedTuple):
    """Residuals of some codes: how many escapes, and the bytes of symbols and of escapes."""

    escapes: int
    symbols: int
    rest: int


class _Frame(NamedTuple):
    """Where a frame's body is, its codes, how many of them are coded apart, and both parts."""

    offset: int
    size: int
    chosen: int
    apart: _Part
    main: _Part

    @property
    def nbytes(self) -> int:
        return self.apart.symbols + self.apart.rest + self.main.symbols + self.main.rest


class Residuals:
    """The frames of one tensor of `count` codes of `width` bytes, read when they are needed.

    They are bytes [offset, offset + nbytes) of `source`. Only their heads are kept. Raises
    FormatError where they are not what `encode` writes.
    """

    def __init__(self, source: Bytes, offset: int, nbytes: int, count: int, width: int) -> None:
        self._source = source
        self._kind = np.dtype(f"<u{width}")
        self._starts: list[int] = []
        self._frames: list[_Frame] = []
        self._count = count
        at, codes = 0, 0
        while at < nbytes:
            if at + _HEAD.size > nbytes:
                raise self._broken("ends within a head")
            size, chosen, *parts = _HEAD.unpack(self._read(offset + at, _HEAD.size))
            body = offset + at + _HEAD.size
            frame = _Frame(body, size, chosen, _Part(*parts[:3]), _Part(*parts[3:]))
            most = 2 * (width + 1) * size + _SLACK  # DEFLATE stores what it cannot shorten
            if not 0 < size <= FRAME or chosen > size or frame.nbytes > most:
                raise self._broken(f"claims {frame.nbytes} bytes for {size} codes")
            self._starts.append(codes)
            self._frames.append(frame)
            at, codes = at + _HEAD.size + frame.nbytes, codes + size
        if at != nbytes or codes != count:
            raise self._broken(f"has {codes} codes in {at} bytes, not {count} in {nbytes}")

    def restore(self, start: int, predicted: Array, likely: Array | None = None) -> Array:
        """The true codes from the `start`-th on, as many as `predicted` has, in its shape.

        `likely` is the mask that `encode` had; where it had one, frames must be asked for whole.
        """
        flat = np.array(predicted, self._kind).reshape(-1)
        mask = None if likely is None else likely.reshape(-1)
        stop = start + len(flat)
        if start < 0 or stop > self._count:
            raise ValueError(f"codes {start} to {stop} of {self._count}")
        at = start
        while at < stop:
            index = bisect_right(self._starts, at) - 1
            first, frame = self._starts[index], self._frames[index]
            end = min(stop, first + frame.size)
            chosen = None
            if frame.chosen:
                if mask is None or at > first or end < first + frame.size:
                    raise self._broken(
                        f"codes {frame.chosen} of {frame.size} numbers apart, by a prediction of "
                        "all of them at once, and this is none"
                    )
                chosen = np.flatnonzero(mask[at - start : end - start])
            rest = self._rest(frame, chosen)
            if rest is not None:
                flat[at - start : end - start] += rest[at - first : end - first]
            at = end
        return flat.reshape(predicted.shape)

    def _rest(self, frame: _Frame, chosen: Array | None) -> Array | None:
        """The residuals of a frame, None where all are 0."""
        if not frame.nbytes:
            return None
        raw = self._read(frame.offset, frame.nbytes)
        cut = frame.apart.symbols + frame.apart.rest
        rest = self._decoded(raw[cut:], frame.size, frame.main)
        if chosen is not None:
            if len(chosen) != frame.chosen:
                raise self._broken(f"is of {frame.chosen} codes that may be wrong, not of these")
            rest[chosen] += self._decoded(raw[:cut], frame.chosen, frame.apart)
        return rest

    def _decoded(self, raw: bytes, size: int, part: _Part) -> Array:
        if not part.symbols:
            if part.escapes or part.rest:
                raise self._broken("has escapes without symbols")
            return np.zeros(size, self._kind)
        packed = self._inflate(raw[: part.symbols], -(-size // 4))
        symbols = _MEANING[np.frombuffer(packed, np.uint8)].view(np.int8)[:size]
        rest = symbols.astype(np.dtype(f"<i{self._kind.itemsize}")).view(self._kind)
        at = np.flatnonzero(symbols == -128) if part.escapes else np.empty(0, np.int64)
        if len(at) != part.escapes:
            raise self._broken(f"has {len(at)} escapes of {part.escapes}")
        if part.escapes:
            planes = self._inflate(raw[part.symbols :], part.escapes * self._kind.itemsize)
            rest[at] = _from_planes(planes, self._kind)
        return rest

    def _inflate(self, data: bytes, size: int) -> bytes:
        """DEFLATE undone; never more than `size` bytes, whatever a damaged file claims."""
        engine = zlib.decompressobj(-15)
        try:
            result = engine.decompress(data, size + 1)
        except zlib.error as error:
            raise self._broken(f"cannot be decompressed: {error}") from None
        if len(result) != size or not engine.eof or engine.unused_data:
            raise self._broken(f"holds {len(result)} bytes where {size} were written")
        return result

    def _read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._source.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def _broken(self, what: str) -> FormatError:
        return FormatError(
            f"a residual {what}: the undo file or the baked one is damaged",
            path=self._source.path,
            hint="restore from other copies of both, or fetch the base model again",
        )
