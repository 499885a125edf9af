"""The record of a baked folder: files as they were, and names that stay inside of it."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib

import pytest

from adapterops.errors import FormatError, UnsafeFileError
from adapterops.undoing import record

FILES = {"config.json": b'{"vocab_size": 32}', "empty.txt": b"", "unet/config.json": b"{}" * 999}


def listed(name, data, how="kept"):
    return record.FileRecord(name, len(data), hashlib.sha256(data).hexdigest(), how)


def test_a_record_keeps_files_whole(tmp_path):
    path = tmp_path / record.NAME
    files = [listed(name, data) for name, data in FILES.items()]
    files.append(listed("model.safetensors", b"weights", "undo"))
    record.write_record(path, files, FILES)
    found = record.read_record(path)
    assert list(found.files) == files
    assert {name: b"".join(found.kept(name)) for name in FILES} == FILES
    with pytest.raises(ValueError, match="listed as kept"):
        record.write_record(tmp_path / "other", files, {})


@pytest.mark.parametrize("name", ["../x", "a/../x", "/etc/x", "a//b", "..", "", "a\\b", "a\0b"])
def test_records_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    path = tmp_path / record.NAME
    record.write_record(path, [listed(name, b"", "same")], {})
    with pytest.raises(UnsafeFileError, match="outside of its folder"):
        record.read_record(path)


def test_a_kept_file_does_not_grow_when_it_is_read(tmp_path):
    path = tmp_path / record.NAME
    files = [record.FileRecord("a", 10, "0" * 64, "kept")]
    record.write_record(path, files, {"a": bytes(1 << 20)})
    with pytest.raises(FormatError, match="more than 10 bytes"):
        list(record.read_record(path).kept("a"))


def test_a_kept_file_is_inflated_in_pieces(tmp_path):
    path, size = tmp_path / record.NAME, 100 << 20
    record.write_record(path, [record.FileRecord("a", size, "0" * 64, "kept")], {"a": bytes(size)})
    found = record.read_record(path)
    tracemalloc.start()
    try:
        assert sum(map(len, found.kept("a"))) == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-9], lambda data: data[:9] + b"?" + data[10:]]
)
def test_what_is_packed_and_damaged_is_refused(spoil, tmp_path, monkeypatch):
    path, data = tmp_path / record.NAME, bytes(range(256)) * 99
    compress = zlib.compress
    monkeypatch.setattr(record.zlib, "compress", lambda data: spoil(compress(data)))
    record.write_record(path, [listed("a", data)], {"a": data})
    with pytest.raises(FormatError, match="damaged"):
        list(record.read_record(path).kept("a"))


def test_a_record_of_a_huge_file_is_refused(tmp_path):
    path = tmp_path / record.NAME
    record.write_record(path, [record.FileRecord("a", 257 << 20, "0" * 64, "kept")], {"a": b""})
    with pytest.raises(FormatError, match="cannot have"):
        record.read_record(path)
