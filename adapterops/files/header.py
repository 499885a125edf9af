"""The safetensors header, read strictly and written exactly. Standard library only.

Layout of a file: 8 bytes little-endian length N, N bytes of JSON, then the tensors without gaps.
The reference parser accepts duplicate names, control characters, path fragments and a header that
does not start with ``{``; this one does not, because each has been used to make two readers of one
file see different tensors.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adapterops.errors import FormatError, UnsafeFileError

HEADER_LIMIT = 100_000_000
_DIMENSION_LIMIT = 1 << 40
_ELEMENT_LIMIT = 1 << 56  # the reference reader counts bits in 64 bits, before a zero extent too

# In the order in which safetensors sorts tensors of different type, last first.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_DTYPE_ORDER = {name: -position for position, name in enumerate(DTYPE_BITS)}
_PATH_STEP = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:[/\\]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header describes it; offsets count from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: what the file holds and where its data begin."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape, sub-byte types packed."""
    count = 1
    for extent in shape:
        count *= extent
    return (count * DTYPE_BITS[dtype] + 7) // 8


def header_length(prefix: bytes, file_size: int, path: str) -> int:
    """The checked header length from the first eight bytes of a file of `file_size` bytes."""
    if file_size < 10 or len(prefix) < 8:
        raise FormatError(
            f"too short for a safetensors file ({file_size} bytes); is it truncated?", path=path
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > HEADER_LIMIT:
        raise UnsafeFileError(
            f"the header claims {length} bytes, at most {HEADER_LIMIT} are allowed; "
            "is this a safetensors file?",
            path=path,
        )
    if length < 2:
        raise FormatError(f"the header claims {length} bytes", path=path)
    if 8 + length > file_size:
        raise FormatError(
            f"the header needs {8 + length} bytes, the file has {file_size}; is it truncated?",
            path=path,
        )
    return length


def parse_header(raw: bytes, file_size: int, path: str) -> Header:
    """Check the JSON bytes of a header (without the length) against the file's size.

    Raises FormatError, or UnsafeFileError where only an attack would look like this.
    """
    if not raw.startswith(b"{"):
        raise FormatError("the header does not start with '{'", path=path)
    if not raw.rstrip(b" ").endswith(b"}"):
        raise FormatError("the header is not a JSON object padded with spaces", path=path)
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, path),
            parse_constant=lambda text: _refuse(f"the header holds {text}", path),
            parse_int=lambda text: _count(text, path),
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not UTF-8 ({error.reason})", path=path) from None
    except RecursionError:
        raise UnsafeFileError("the header is nested too deeply", path=path) from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"the header is not valid JSON ({error})", path=path) from None

    metadata = _metadata(document.pop("__metadata__", {}), path)
    tensors = {name: _entry(name, value, path) for name, value in document.items()}
    _check_cover(tensors, file_size - 8 - len(raw), path)
    return Header(tensors, metadata, 8 + len(raw))


def _unique(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnsafeFileError(f"the header names {_short(twice)} twice", path=path)
    return result


def _refuse(message: str, path: str) -> NoReturn:
    raise FormatError(message, path=path)


def _count(text: str, path: str) -> int:
    """An integer of the header; -0 is none for the reference reader, and none needs 20 digits."""
    if text == "-0" or len(text) > 20:
        _refuse(f"the header holds the impossible number {text[:40]}", path)
    return int(text)


def _short(value: Any) -> str:
    """A value from the file as a message shows it, not all of a megabyte."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}… ({len(text)} characters)"


def _metadata(value: Any, path: str) -> dict[str, str]:
    if value is None:  # MLX writes null
        return {}
    if not isinstance(value, dict):
        raise FormatError("__metadata__ is not a JSON object", path=path)
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(f"__metadata__[{_short(key)}] is not a string", path=path)
        for part in (key, text):
            if not part.isascii() and any(unicodedata.category(c) == "Cs" for c in part):
                raise FormatError(
                    f"__metadata__[{_short(key)}] holds half a surrogate pair", path=path
                )
    return value


def _entry(name: str, value: Any, path: str) -> Entry:
    _check_name(name, path)
    shown = _short(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {shown} needs exactly dtype, shape and data_offsets", path=path)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"tensor {shown} has the unknown dtype {_short(dtype)}", path=path)
    if not _is_shape(shape):
        raise FormatError(f"tensor {shown} has the impossible shape {_short(shape)}", path=path)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(x, 1 << 62) for x in offsets)
    ):
        raise FormatError(f"tensor {shown} has impossible offsets {_short(offsets)}", path=path)
    start, end = offsets
    expected = tensor_bytes(dtype, tuple(shape))
    if end - start != expected:
        raise FormatError(
            f"tensor {shown}: {dtype} of shape {_short(shape)} takes {expected} bytes, "
            f"its offsets span {end - start}",
            path=path,
        )
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        raise FormatError(
            f"tensor {shown}: {dtype} of shape {_short(shape)} is no whole number of bytes",
            path=path,
        )
    return Entry(dtype, tuple(shape), start, end)


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or not all(_is_count(x, _DIMENSION_LIMIT) for x in value):
        return False
    count = 1
    for extent in value:
        count *= max(extent, 1)
        if count > _ELEMENT_LIMIT:
            return False
    return True


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _check_name(name: str, path: str) -> None:
    if not name:
        raise FormatError("a tensor has an empty name", path=path)
    if not (name.isascii() and name.isprintable()) and any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name
    ):
        raise UnsafeFileError(f"the tensor name {_short(name)} holds control characters", path=path)
    if _PATH_STEP.search(name):
        raise UnsafeFileError(f"the tensor name {_short(name)} looks like a file path", path=path)


def _check_cover(tensors: Mapping[str, Entry], data_size: int, path: str) -> None:
    """The tensors must cover the data without hole or overlap (no bytes for another reader)."""
    position, before = 0, "the start"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise UnsafeFileError(f"tensor {_short(name)} {kind} {before}", path=path)
        position, before = entry.end, _short(name)
    if position > data_size:
        raise FormatError(
            f"the tensors need {position} bytes of data, the file has {data_size}; "
            "is it truncated?",
            path=path,
        )
    if position < data_size:
        raise UnsafeFileError(f"{data_size - position} bytes follow the last tensor", path=path)


def layout(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Place tensors (name -> dtype, shape) in the order of the reference writer.

    Widest type first, then by name: kohya's `sshs_model_hash` depends on that order.
    """
    entries: dict[str, Entry] = {}
    position = 0
    for name in sorted(shapes, key=lambda key: (_DTYPE_ORDER[shapes[key][0]], key)):
        dtype, shape = shapes[name]
        size = tensor_bytes(dtype, shape)
        entries[name] = Entry(dtype, shape, position, position + size)
        position += size
    return entries


def encode_header(
    tensors: Mapping[str, Entry], metadata: Mapping[str, str], size: int | None = None
) -> bytes:
    """Length and JSON of a header, padded with spaces to a multiple of 8 or to `size` bytes."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in tensors.items():
        document[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    padded = -(-len(body) // 8) * 8 if size is None else size - 8
    if len(body) > padded:
        raise ValueError(f"a header of {len(body)} bytes does not fit the {padded} reserved")
    return padded.to_bytes(8, "little") + body.ljust(padded)
