"""The strict header: what it refuses and why, and that it never accepts what safetensors would not.

`hostile.py` has the table.
"""

from __future__ import annotations

import json
import math
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, safe_open, serialize
from safetensors.numpy import save

from adapterops.errors import AdapterOpsError, FormatError, UnsafeFileError
from adapterops.files.header import (
    DTYPE_BITS,
    Entry,
    Header,
    encode_header,
    header_length,
    layout,
    parse_header,
)
from adapterops.files.source import LocalFile, MemoryFile, read_header
from tests.hostile import CASES, GOOD, GOOD_DATA, VALID, entry, file, framed


def parse(blob: bytes) -> Header:
    """The header of a file's bytes, read as from memory."""
    return read_header(MemoryFile("dir/evil.safetensors", blob))


@pytest.mark.parametrize("name", CASES)
def test_each_hostile_header_gives_its_error(name):
    blob, kind, words = CASES[name]
    with pytest.raises(AdapterOpsError) as caught:
        parse(blob)
    assert type(caught.value) is kind, caught.value
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert text.startswith("dir/evil.safetensors: ")
    missing = [word for word in words if word not in text]
    assert not missing, text
    assert len(text) < 1000, "a hostile name or shape must not flood the terminal"
    assert text.isprintable(), "a hostile name must not steer the terminal"


@pytest.mark.parametrize("name", ["overlap", "trailing bytes", "NUL in a name", "cut in the data"])
def test_a_file_on_disk_gives_the_same_error(name, tmp_path):
    blob, kind, _ = CASES[name]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(blob)
    with pytest.raises(kind, match=r"evil\.safetensors"):
        read_header(LocalFile(path))


@pytest.mark.parametrize(
    "blob",
    [
        VALID,
        framed(b"{}"),
        framed(b"{}      "),
        file({"__metadata__": None}),
        file({"__metadata__": {}}),
        file({"__metadata__": {"k": "a\nb\t\U0001f600"}}),
        file({"w": entry([], [0, 4])}, b"data"),
        file({"w": entry([0, 1 << 40], [0, 0])}),
        file({"a": entry([0], [0, 0]), "b": entry([1], [0, 4]), "c": entry([0], [4, 4])}, b"data"),
        file({"b": entry([1], [4, 8]), "a": entry([1], [0, 4])}, b"8 bytes."),
        file({"w": entry([2], [0, 1], "F4")}, b"x"),
        file({"w": entry([4], [0, 3], "F6_E3M2")}, b"xxx"),
        file({"weights/täß.a..b": entry([1], [0, 4])}, b"data"),
        framed(b'{"\\ud83d\\ude00":{"shape":[1],"data_offsets":[0,4],"dtype":"F32"}}', b"data"),
    ],
)
def test_unusual_but_sound_headers_are_accepted(blob, tmp_path):
    header = parse(blob)
    assert header.data_start + max((e.end for e in header.tensors.values()), default=0) == len(blob)
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    with safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(header.tensors)
        assert (reference.metadata() or {}) == header.metadata


def test_a_header_of_just_100_mb_is_allowed_and_one_byte_more_is_not():
    assert header_length((100_000_000).to_bytes(8, "little"), 100_000_008, "p") == 100_000_000
    with pytest.raises(UnsafeFileError):
        header_length((100_000_001).to_bytes(8, "little"), 200_000_000, "p")


def test_a_broken_file_is_not_called_a_pickle_for_its_first_byte():
    """A header of 640 bytes starts with 80 02, as a pickle of protocol 2 does."""
    raw = json.dumps(GOOD).encode().ljust(640)
    assert framed(raw)[:2] == b"\x80\x02"
    with pytest.raises(FormatError, match="truncated") as caught:
        parse(framed(raw, GOOD_DATA[:-1]))
    assert "pickle" not in str(caught.value)


def test_a_header_that_claims_much_is_refused_before_memory_is_taken():
    """A sparse file of 99 MB header is read; one that only claims it costs nothing."""
    program = (
        "import resource, sys\n"
        "from adapterops.files.source import MemoryFile, read_header\n"
        "from adapterops.errors import FormatError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_header(MemoryFile('x', (100_000_000).to_bytes(8, 'little') + b'{}' * 9))\n"
        "except FormatError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "kilobytes"


# Mutations: only our own errors come out, and safetensors opens whatever we accept.

_TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"-", b".", b"e", b"1", b"9",
    b"\0", b" ", b"\n", b"\xff", b"\xed\xa0\x80", b"null", b"NaN", b"-0", b"1e3", b"true",
    b"\\u0000", b"\\ud800", b"F4", b"F64", b"BOOL", b"__metadata__", b"dtype", b"shape",
    b"data_offsets", b"a.weight", b"../", b"4294967296", b"18446744073709551616",
]  # fmt: skip


def _check_against_reference(blob: bytes, path: Path) -> bool:
    """Whether we accept; fails where an error is not ours or safetensors refuses what we take."""
    try:
        header = parse(blob)
    except AdapterOpsError as error:
        assert isinstance(error, FormatError)
        assert str(error)
        return False
    path.write_bytes(blob)
    with safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(header.tensors)
        for name, found in header.tensors.items():
            part = reference.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (found.dtype, found.shape)
    return True


@st.composite
def _mutated(draw):
    """A valid file with a few pieces of its header cut out, doubled, swapped or replaced."""
    raw = bytearray(VALID[8 : -len(GOOD_DATA)])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw) - 1)) if raw else 0
        width = draw(st.integers(0, 4))
        raw[at : at + width] = draw(st.sampled_from(_TOKENS) | st.binary(max_size=3))
    data = draw(st.sampled_from([GOOD_DATA, GOOD_DATA[:-1], GOOD_DATA + b"x"]))
    return framed(bytes(raw), data)


_extents = st.lists(st.sampled_from([0, 1, 2, 3, 8, 1 << 20, 1 << 40]), max_size=4)


@st.composite
def _composed(draw):
    """A header of legal tokens whose extents and offsets may or may not fit together."""
    document, position = {}, 0
    for name in draw(st.lists(st.text(string.printable + "é\u202e", max_size=4), max_size=4)):
        shape, dtype = draw(_extents), draw(st.sampled_from(sorted(DTYPE_BITS)))
        size = int(np.prod([float(x) for x in shape]) * DTYPE_BITS[dtype] / 8)
        size = min(size, 64) + draw(st.sampled_from([0, 0, 0, 0, 1]))
        document[name] = entry(shape, [position, position + size], dtype)
        position += size
    return file(document, bytes(position))


@given(_mutated())
def test_mutated_headers(tmp_path_factory, blob):
    _check_against_reference(blob, _scratch(tmp_path_factory))


@given(_composed())
def test_composed_headers(tmp_path_factory, blob):
    _check_against_reference(blob, _scratch(tmp_path_factory))


@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory, raw):
    _check_against_reference(framed(b"{" + raw), _scratch(tmp_path_factory))


def test_single_byte_changes_of_a_header(tmp_path):
    """Every byte of the header, length included, by each of a few others."""
    path = tmp_path / "candidate.safetensors"
    accepted = 0
    for at in range(len(VALID) - len(GOOD_DATA)):
        for other in b'\x00 "0-:F,{}]9\x80':
            blob = bytearray(VALID)
            blob[at] = other
            accepted += _check_against_reference(bytes(blob), path)
    assert accepted > 100, "names and metadata may change"


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_random_splices_of_a_header(count, tmp_path):
    rng = np.random.default_rng(count)
    path = tmp_path / "candidate.safetensors"
    base = VALID[8 : -len(GOOD_DATA)]
    accepted = 0
    for _ in range(count):
        raw = bytearray(base)
        for _ in range(rng.integers(1, 5)):
            at, width = rng.integers(0, len(raw) + 1), rng.integers(0, 6)
            raw[at : at + width] = _TOKENS[rng.integers(len(_TOKENS))]
        accepted += _check_against_reference(framed(bytes(raw), GOOD_DATA), path)
    assert accepted > count // 200


def _scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "candidate.safetensors"


# Writing.

_names = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1)
_safe_names = _names.filter(lambda s: not any(c in s for c in "/\\:") and s != "__metadata__")
_whole = st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits >= 8])
_tensors = st.dictionaries(
    _safe_names,
    st.tuples(_whole, st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=5,
)
_texts = st.text(st.characters(exclude_categories=("Cs",)))


@given(_tensors, st.dictionaries(_texts, _texts, max_size=3), st.integers(0, 40))
def test_encoded_headers_read_back(shapes, metadata, spare):
    entries = layout(shapes)
    size = max((e.end for e in entries.values()), default=0)
    plain = encode_header(entries, metadata)
    assert len(plain) % 8 == 0
    padded = encode_header(entries, metadata, len(plain) + spare)
    assert len(padded) == len(plain) + spare
    for head in (plain, padded):
        header = parse(head + bytes(size))
        assert (header.tensors, header.metadata) == (entries, metadata)
        assert header.data_start == len(head)
    with pytest.raises(ValueError, match="does not fit"):
        encode_header(entries, metadata, len(plain.rstrip(b" ")) - 1)


_REFERENCE_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def test_layout_is_the_reference_order_for_every_dtype():
    """Names against the dtype order, so that neither alone explains the result."""
    buffer = np.zeros(64, np.uint8)
    shapes, specs = {}, {}
    for position, (dtype, reference) in enumerate(sorted(_REFERENCE_NAMES.items())):
        for letter in "bä":
            name, shape = f"{letter}{position}", (2, position % 3)
            stored = (2, position % 3 * (2 if dtype == "F4" else 1))  # two of F4 in a byte
            shapes[name] = (dtype, stored)
            specs[name] = TensorSpec(
                dtype=reference,
                shape=shape,
                data_ptr=buffer.ctypes.data,
                data_len=math.prod(stored) * DTYPE_BITS[dtype] // 8,
            )
    header = parse(bytes(serialize(specs)))
    assert header.tensors == layout(shapes)


def test_data_section_is_byte_equal_to_safetensors_numpy():
    rng = np.random.default_rng(5)
    kinds = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, np.bool_, np.uint32]
    tensors = {
        f"{letter}.{np.dtype(kind).name}": rng.integers(0, 2, (3, size)).astype(kind)
        for letter, size in (("z", 2), ("a", 3), ("B", 0))
        for kind in kinds
    }
    names = {
        np.float16: "F16",
        np.float32: "F32",
        np.float64: "F64",
        np.int8: "I8",
        np.uint8: "U8",
        np.int64: "I64",
        np.bool_: "BOOL",
        np.uint32: "U32",
    }
    entries = layout({k: (names[v.dtype.type], v.shape) for k, v in tensors.items()})
    data = b"".join(tensors[name].tobytes() for name in entries)
    blob = save(tensors)
    assert parse(blob).tensors == entries
    assert blob[parse(blob).data_start :] == data


def test_a_large_honest_header_is_read():
    shapes = {f"layers.{i}.w": ("F16", (2, 3)) for i in range(20_000)}
    entries = layout(shapes)
    blob = encode_header(entries, {"k": "v"}) + bytes(12 * 20_000)
    assert parse(blob).tensors == entries


def test_entry_counts_its_bytes():
    assert Entry("F16", (2, 3), 10, 22).nbytes == 12


def test_parse_header_takes_the_json_only():
    raw = json.dumps(GOOD).encode()
    header = parse_header(raw, 8 + len(raw) + 32, "p")
    assert header.tensors["b.weight"] == Entry("BF16", (4,), 24, 32)
