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
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from adapterops.errors import FormatError, UnsafeFileError

HEADER_LIMIT = 100_000_000
_DIMENSION_LIMIT = 1 << 40
_LARGEST_OFFSET = 1 << 62
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
_KEPT = 1 << 18  # bytes of the largest header that is remembered
_FIELDS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
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
    try:
        return _parse_kept(raw, file_size) if len(raw) <= _KEPT else _parse(raw, file_size)
    except FormatError as error:
        error.path = path
        raise


@lru_cache(maxsize=8)
def _parse_kept(raw: bytes, file_size: int) -> Header:
    """The headers of a fleet's adapters are the same bytes, as often as not."""
    return _parse(raw, file_size)


def _parse(raw: bytes, file_size: int) -> Header:
    if not raw.startswith(b"{"):
        raise FormatError("the header does not start with '{'")
    if not raw.rstrip(b" ").endswith(b"}"):
        raise FormatError("the header is not a JSON object padded with spaces")
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=lambda text: _refuse(f"the header holds {text}"),
            # A call for every number is slow, and only one kind is lost by reading it: -0.
            parse_int=_count if b"-0" in raw else None,
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not UTF-8 ({error.reason})") from None
    except RecursionError:
        raise UnsafeFileError("the header is nested too deeply") from None
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(f"the header is not valid JSON ({error})") from None
    except ValueError:  # thousands of digits, which Python does not convert
        digits = re.search(rb"\d{1000}", raw)
        number = digits[0][:40].decode() + "…" if digits else "?"
        raise FormatError(f"the header holds the impossible number {number}") from None

    metadata = _metadata(document.pop("__metadata__", {}))
    tensors = {name: _entry(name, value) for name, value in document.items()}
    _check_cover(tensors, file_size - 8 - len(raw))
    return Header(tensors, metadata, 8 + len(raw))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnsafeFileError(f"the header names {_short(twice)} twice")
    return result


def _refuse(message: str) -> NoReturn:
    raise FormatError(message)


def _count(text: str) -> int:
    """An integer of the header; -0 is none for the reference reader."""
    if text == "-0":
        _refuse("the header holds the impossible number -0")
    return int(text)


def _short(value: Any) -> str:
    """A value from the file as a message shows it, not all of a megabyte."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}… ({len(text)} characters)"


def _metadata(value: Any) -> dict[str, str]:
    if value is None:  # MLX writes null
        return {}
    if not isinstance(value, dict):
        raise FormatError("__metadata__ is not a JSON object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(f"__metadata__[{_short(key)}] is not a string")
        for part in (key, text):
            if not part.isascii() and any(unicodedata.category(c) == "Cs" for c in part):
                raise FormatError(f"__metadata__[{_short(key)}] holds half a surrogate pair")
    return value


def _entry(name: str, value: Any) -> Entry:
    _check_name(name)
    if type(value) is not dict or value.keys() != _FIELDS:
        _refuse_tensor(name, "needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _refuse_tensor(name, f"has the unknown dtype {_short(dtype)}")
    if not _is_shape(shape):
        _refuse_tensor(name, f"has the impossible shape {_short(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_offset, offsets)):
        _refuse_tensor(name, f"has impossible offsets {_short(offsets)}")
    start, end = offsets
    size = math.prod(shape) * bits
    if end - start != (size + 7) // 8:
        takes = f"{dtype} of shape {_short(shape)} takes {(size + 7) // 8} bytes"
        _refuse_tensor(name, f"is wrong: {takes}, its offsets span {end - start}")
    if size % 8:
        what = f"{dtype} of shape {_short(shape)} is no whole number of bytes"
        _refuse_tensor(name, f"is wrong: {what}")
    return Entry(dtype, tuple(shape), start, end)


def _refuse_tensor(name: str, message: str) -> NoReturn:
    raise FormatError(f"tensor {_short(name)} {message}")


def _is_shape(value: Any) -> bool:
    """A list of whole numbers; by `type`, for True is an instance of int and no extent."""
    if type(value) is not list:
        return False
    count = 1
    for extent in value:
        if type(extent) is not int or not 0 <= extent <= _DIMENSION_LIMIT:
            return False
        count *= extent or 1
        if count > _ELEMENT_LIMIT:  # at once: the product of a long list would take for ever
            return False
    return True


def _is_offset(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_OFFSET


def _check_name(name: str) -> None:
    if not name:
        raise FormatError("a tensor has an empty name")
    if not name.isprintable() and any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name
    ):
        raise UnsafeFileError(f"the tensor name {_short(name)} holds control characters")
    if ("/" in name or "\\" in name or name == "..") and _PATH_STEP.search(name):
        raise UnsafeFileError(f"the tensor name {_short(name)} looks like a file path")


def _check_cover(tensors: Mapping[str, Entry], data_size: int) -> None:
    """The tensors must cover the data without hole or overlap (no bytes for another reader)."""
    position, before = 0, ""
    spans = [(entry.start, entry.end, name) for name, entry in tensors.items()]
    for start, end, name in sorted(spans):
        if start != position:
            kind = "overlaps" if start < position else "leaves a hole after"
            other = _short(before) if before else "the start"
            raise UnsafeFileError(f"tensor {_short(name)} {kind} {other}")
        position, before = end, name
    if position > data_size:
        raise FormatError(
            f"the tensors need {position} bytes of data, the file has {data_size}; "
            "is it truncated?",
        )
    if position < data_size:
        raise UnsafeFileError(f"{data_size - position} bytes follow the last tensor")


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
