"""The record of a baked folder: files as they were, and names that stay inside of it."""

from __future__ import annotations

import hashlib

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
    assert {name: found.kept(name) for name in FILES} == FILES
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
        record.read_record(path).kept("a")
