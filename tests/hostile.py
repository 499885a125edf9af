"""Malformed and hostile safetensors headers, each with the error it must give.

`CASES` maps a name to (bytes of the file, error class, words that the message must hold).
"""

from __future__ import annotations

import json
import struct
from typing import Any

from adapterops.errors import AdapterOpsError, FormatError, UnsafeFileError

Case = tuple[bytes, type[AdapterOpsError], tuple[str, ...]]


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    """One tensor as a header describes it."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def framed(raw: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Length, header and data; `length` lies about the header."""
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def file(document: Any, data: bytes = b"") -> bytes:
    """A file with this header document."""
    return framed(json.dumps(document).encode(), data)


GOOD = {
    "a.weight": entry([2, 3], [0, 24]),
    "b.weight": entry([4], [24, 32], "BF16"),
}
GOOD_DATA = bytes(range(32))
VALID = file({"__metadata__": {"format": "pt"}, **GOOD}, GOOD_DATA)
_ZERO = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_FOUR = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def _one(shape: list[Any], offsets: list[Any], dtype: Any = "F32", data: bytes = b"") -> bytes:
    return file({"w": entry(shape, offsets, dtype)}, data)


def _named(name: str) -> bytes:
    return file({name: entry([1], [0, 4])}, b"data")


def _without(field: str) -> bytes:
    return file({"w": {key: x for key, x in entry([1], [0, 4]).items() if key != field}}, b"data")


CASES: dict[str, Case] = {}

# The first eight bytes.
for _count in range(8):
    CASES[f"{_count} bytes"] = (VALID[:_count], FormatError, (f"{_count} bytes", "truncated"))
CASES |= {
    "length only": (struct.pack("<Q", 0), FormatError, ("8 bytes",)),
    "length 0": (framed(b"{}  ", length=0), FormatError, ("claims 0 bytes",)),
    "length 1": (framed(b"{}  ", length=1), FormatError, ("claims 1 bytes",)),
    "length 2^63": (framed(b"{}", length=1 << 63), UnsafeFileError, (str(1 << 63), "100000000")),
    "length 2^64-1": (
        framed(b"{}", length=(1 << 64) - 1),
        UnsafeFileError,
        (str((1 << 64) - 1), "100000000"),
    ),
    "length 100000001": (
        framed(b"{}", length=100_000_001),
        UnsafeFileError,
        ("100000001", "100000000"),
    ),
    "length 100000000 of 10": (
        framed(b"{}", length=100_000_000),
        FormatError,
        ("100000008", "10", "truncated"),
    ),
    "length larger than file": (framed(b"{}", length=3), FormatError, ("11", "10", "truncated")),
    "cut in the header": (VALID[:40], FormatError, ("40", "truncated")),
    "cut in the data": (VALID[:-1], FormatError, ("32", "31", "truncated")),
    "a pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00a" + b"\0" * 64, FormatError, ("pickle",)),
    "a framed pickle": (
        b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00}" + b"\0" * 64,
        FormatError,
        ("pickle",),
    ),
    "a zip": (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 64, FormatError, ("pickle", "--allow")),
    "a cut zip": (b"PK\x03\x04\x00\x00\x00\x00\x00\x00", FormatError, ("pickle", "--allow")),
}

# The JSON text.
CASES |= {
    "BOM": (framed(b"\xef\xbb\xbf{}"), FormatError, ("start with '{'",)),
    "leading space": (framed(b" {}"), FormatError, ("start with '{'",)),
    "leading NUL": (framed(b"\0{}"), FormatError, ("start with '{'",)),
    "NUL padding": (framed(b"{}\0\0"), FormatError, ("padded with spaces",)),
    "newline padding": (framed(b"{}\n"), FormatError, ("padded with spaces",)),
    "a list": (framed(b"[]"), FormatError, ("start with '{'",)),
    "a string": (framed(b'"{}"'), FormatError, ("start with '{'",)),
    "two objects": (framed(b"{}{}"), FormatError, ("not valid JSON",)),
    "a comment": (framed(b"{/**/}"), FormatError, ("not valid JSON",)),
    "a trailing comma": (framed(b'{"w":' + _ZERO + b",}"), FormatError, ("not valid JSON",)),
    "single quotes": (framed(b"{'w':" + _ZERO + b"}"), FormatError, ("not valid JSON",)),
    "a raw newline": (framed(b'{"w\n":' + _ZERO + b"}"), FormatError, ("not valid JSON",)),
    "a form feed": (framed(b'{"w":\x0c' + _ZERO + b"}"), FormatError, ("not valid JSON",)),
    "not UTF-8": (framed(b'{"\xff":' + _ZERO + b"}"), FormatError, ("UTF-8",)),
    "UTF-16": (framed('{"w":0}'.encode("utf-16-be")), FormatError, ("start with '{'",)),
    "overlong UTF-8": (framed(b'{"\xc0\xaf":' + _ZERO + b"}"), FormatError, ("UTF-8",)),
    "raw surrogate": (framed(b'{"\xed\xa0\x80":' + _ZERO + b"}"), FormatError, ("UTF-8",)),
    "NaN": (framed(b'{"w":NaN}'), FormatError, ("NaN",)),
    "Infinity in a shape": (
        framed(b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,0]}}'),
        FormatError,
        ("Infinity",),
    ),
    "200,000 lists deep": (
        framed(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        UnsafeFileError,
        ("nested",),
    ),
    "200,000 objects deep": (
        framed(b'{"w":' * 200_000 + b"{}" + b"}" * 200_000),
        UnsafeFileError,
        ("nested",),
    ),
    "100 deep": (framed(b'{"w":' + b"[" * 99 + b"]" * 99 + b"}"), FormatError, ("'w'",)),
}

# Names.
CASES |= {
    "duplicate name, equal extent": (
        framed(b'{"w":' + _FOUR + b',"w":' + _FOUR + b"}", b"data"),
        UnsafeFileError,
        ("'w'", "twice"),
    ),
    "duplicate name, other extent": (
        framed(b'{"w":' + _ZERO + b',"w":' + _FOUR + b"}", b"data"),
        UnsafeFileError,
        ("'w'", "twice"),
    ),
    "duplicate name, escaped": (
        framed(b'{"w":' + _FOUR + b',"\\u0077":' + _FOUR + b"}", b"data"),
        UnsafeFileError,
        ("'w'", "twice"),
    ),
    "duplicate field": (
        framed(b'{"w":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        UnsafeFileError,
        ("'dtype'", "twice"),
    ),
    "duplicate metadata": (
        framed(b'{"__metadata__":{},"__metadata__":{}}'),
        UnsafeFileError,
        ("'__metadata__'", "twice"),
    ),
    "duplicate metadata key": (
        framed(b'{"__metadata__":{"ss_network_dim":"4","ss_network_dim":"8"}}'),
        UnsafeFileError,
        ("'ss_network_dim'", "twice"),
    ),
    "empty name": (_named(""), FormatError, ("empty name",)),
    "NUL in a name": (_named("a\0b"), UnsafeFileError, (r"'a\x00b'", "control")),
    "escape sequence in a name": (_named("\x1b[31mw"), UnsafeFileError, (r"\x1b", "control")),
    "newline in a name": (_named("a\nb"), UnsafeFileError, (r"'a\nb'", "control")),
    "DEL in a name": (_named("a\x7f"), UnsafeFileError, (r"\x7f", "control")),
    "C1 control in a name": (_named("a\x9bm"), UnsafeFileError, (r"\x9b", "control")),
    "bidi override in a name": (_named("a\u202eb"), UnsafeFileError, (r"\u202e", "control")),
    "zero width space in a name": (_named("a\u200bb"), UnsafeFileError, (r"\u200b", "control")),
    "line separator in a name": (_named("a\u2028b"), UnsafeFileError, (r"\u2028", "control")),
    "lone surrogate in a name": (_named("a\ud800"), UnsafeFileError, (r"\ud800", "control")),
    "../ in a name": (_named("../w"), UnsafeFileError, ("'../w'", "path")),
    "/../ in a name": (_named("a/../w"), UnsafeFileError, ("'a/../w'", "path")),
    "..\\ in a name": (_named("a\\..\\w"), UnsafeFileError, ("path",)),
    "name ends in /..": (_named("a/.."), UnsafeFileError, ("'a/..'", "path")),
    "absolute name": (_named("/etc/passwd"), UnsafeFileError, ("'/etc/passwd'", "path")),
    "drive in a name": (_named("C:\\w"), UnsafeFileError, ("path",)),
    "UNC name": (_named("\\\\host\\w"), UnsafeFileError, ("path",)),
    "a name of 1 MB": (_named("\x01" + "n" * 1_000_000), UnsafeFileError, ("control",)),
}

# Fields of a tensor.
for _field in ("dtype", "shape", "data_offsets"):
    CASES[f"no {_field}"] = (_without(_field), FormatError, ("'w'", _field))
CASES |= {
    "a field too many": (
        file({"w": {**entry([1], [0, 4]), "x": 1}}, b"data"),
        FormatError,
        ("'w'", "exactly"),
    ),
    "a tensor that is null": (file({"w": None}), FormatError, ("'w'", "exactly")),
    "a tensor that is a list": (file({"w": ["F32", [0], [0, 0]]}), FormatError, ("'w'",)),
    "unknown dtype": (_one([1], [0, 4], "F31", b"data"), FormatError, ("'w'", "'F31'")),
    "lower case dtype": (_one([1], [0, 4], "f32", b"data"), FormatError, ("'w'", "'f32'")),
    "dtype null": (_one([1], [0, 4], None, b"data"), FormatError, ("'w'", "None")),
    "dtype a list": (_one([1], [0, 4], ["F32"], b"data"), FormatError, ("'w'",)),
    "dtype a surrogate": (_one([1], [0, 4], "\ud800", b"data"), FormatError, (r"\ud800",)),
    "shape a number": (file({"w": entry(1, [0, 4])}, b"data"), FormatError, ("'w'", "shape 1")),
    "shape null": (file({"w": entry(None, [0, 4])}, b"data"), FormatError, ("'w'", "None")),
    "negative extent": (_one([-1], [0, 4], data=b"data"), FormatError, ("-1",)),
    "two negative extents": (_one([-1, -1], [0, 4], data=b"data"), FormatError, ("-1",)),
    "minus zero": (
        framed(b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        FormatError,
        ("-0",),
    ),
    "minus zero offset": (
        framed(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}'),
        FormatError,
        ("-0",),
    ),
    "float extent": (_one([1.0], [0, 4], data=b"data"), FormatError, ("'w'", "[1.0]")),
    "exponent extent": (
        framed(b'{"w":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', b"data"),
        FormatError,
        ("'w'", "1.0"),
    ),
    "bool extent": (_one([True], [0, 4], data=b"data"), FormatError, ("'w'", "True")),
    "string extent": (_one(["1"], [0, 4], data=b"data"), FormatError, ("'w'", "'1'")),
    "extent 2^62": (_one([1 << 62], [0, 4], data=b"data"), FormatError, ("'w'", str(1 << 62))),
    "extent of 5,000 digits": (
        framed(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
        FormatError,
        ("99999",),
    ),
    "0 x 2^62": (_one([0, 1 << 62], [0, 0]), FormatError, ("'w'", str(1 << 62))),
    "2^40 x 2^40 x 0": (_one([1 << 40, 1 << 40, 0], [0, 0]), FormatError, ("'w'", "shape")),
    "2^40 x 2^40": (_one([1 << 40, 1 << 40], [0, 4], data=b"data"), FormatError, ("'w'",)),
    "2^40, 400 times": (_one([1 << 40] * 400, [0, 0]), FormatError, ("'w'", "shape")),
    "2^40, 200,000 times": (_one([1 << 40] * 200_000, [0, 0]), FormatError, ("'w'", "shape")),
    "size mod 2^64 fits": (_one([1 << 32, 1 << 32], [0, 0]), FormatError, ("'w'",)),
    "half a byte": (_one([1], [0, 1], "F4", b"x"), FormatError, ("'w'", "F4")),
    "six bits": (_one([1], [0, 1], "F6_E2M3", b"x"), FormatError, ("'w'", "F6_E2M3")),
    "one offset": (file({"w": entry([1], [0])}, b"data"), FormatError, ("'w'", "[0]")),
    "three offsets": (_one([1], [0, 4, 8], data=b"data"), FormatError, ("'w'", "[0, 4, 8]")),
    "offsets null": (file({"w": entry([1], None)}, b"data"), FormatError, ("'w'", "None")),
    "reversed offsets": (_one([1], [4, 0], data=b"data"), FormatError, ("'w'", "4", "-4")),
    "negative offset": (_one([1], [-4, 0], data=b"data"), FormatError, ("-4",)),
    "float offset": (_one([1], [0, 4.0], data=b"data"), FormatError, ("'w'", "4.0")),
    "offset 2^63": (_one([1], [0, 1 << 63], data=b"data"), FormatError, ("'w'", str(1 << 63))),
    "span too small": (_one([3], [0, 8], data=b"8 bytes."), FormatError, ("'w'", "12", "8")),
    "span too large": (_one([1], [0, 8], data=b"8 bytes."), FormatError, ("'w'", "4", "8")),
    "past the end": (_one([4], [0, 16], data=b"8 bytes."), FormatError, ("16", "8", "truncated")),
}

# Cover of the data, metadata.
CASES |= {
    "overlap": (
        file({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"12 bytes...."),
        UnsafeFileError,
        ("'b'", "overlaps", "'a'"),
    ),
    "the same bytes twice": (
        file({"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, b"8 bytes."),
        UnsafeFileError,
        ("'b'", "overlaps", "'a'"),
    ),
    "an empty tensor inside another": (
        file({"a": entry([2], [0, 8]), "b": entry([0], [4, 4])}, b"8 bytes."),
        UnsafeFileError,
        ("'b'", "overlaps", "'a'"),
    ),
    "hole": (
        file({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, b"12 bytes...."),
        UnsafeFileError,
        ("'b'", "hole", "'a'"),
    ),
    "hole at the start": (
        _one([1], [4, 8], data=b"8 bytes."),
        UnsafeFileError,
        ("'w'", "hole", "the start"),
    ),
    "trailing bytes": (VALID + b"12345", UnsafeFileError, ("5 bytes", "last tensor")),
    "data without tensors": (file({}, b"data"), UnsafeFileError, ("4 bytes",)),
    "metadata a list": (file({"__metadata__": []}), FormatError, ("__metadata__",)),
    "metadata a string": (file({"__metadata__": "x"}), FormatError, ("__metadata__",)),
    "metadata with a number": (
        file({"__metadata__": {"ss_network_alpha": 8}}),
        FormatError,
        ("ss_network_alpha", "string"),
    ),
    "metadata with null": (file({"__metadata__": {"k": None}}), FormatError, ("'k'", "string")),
    "metadata with an object": (file({"__metadata__": {"k": {}}}), FormatError, ("'k'", "string")),
    "lone surrogate in metadata": (
        file({"__metadata__": {"k": "\udc00"}}),
        FormatError,
        ("'k'", "surrogate"),
    ),
    "lone surrogate in a metadata key": (
        file({"__metadata__": {"\ud83d": "v"}}),
        FormatError,
        ("surrogate",),
    ),
}
