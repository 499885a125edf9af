"""Adapters in a store: found, fetched by ranges, nothing left behind; against memory:// and S3."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from adapterops.errors import (
    AdapterOpsError,
    ChangedError,
    FileError,
    FormatError,
    UnsafeFileError,
    UsageError,
)
from adapterops.files import names, patience, scratch
from adapterops.files.objects import HEAD, Store
from adapterops.files.output import stage
from adapterops.files.remote import fetched, is_remote, listing, located
from adapterops.fleet.tenants.finding import check_adapter
from adapterops.formats import mlx, open_adapter_file, peft
from tests import hostile
from tests.remote_adapters import adapter, large
from tests.support import pairs, write_kohya


class Counting(MemoryFileSystem):
    """memory:// that counts what is asked for and fails as told."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[list[tuple[str, int]]] = []
    faults: ClassVar[list[BaseException]] = []
    after_read: ClassVar[list[Any]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counting://").strip("/")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.asked.append((path, (end or 0) - (start or 0)))
        if self.faults:
            raise self.faults.pop(0)
        data = super().cat_file(path, start, end, **options)
        if self.after_read:
            self.after_read.pop(0)()
        return data


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses, a TMPDIR of the test's own, which is empty afterwards, and an empty store."""
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.02))
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(folder))
    for kept in (Counting.store, Counting.asked, Counting.faults, Counting.after_read):
        kept.clear()
    yield
    assert list(folder.iterdir()) == []


def upload(place: Path, uri: str) -> str:
    """A file or folder brought into a store."""
    fs = Store(uri).fs
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        if path.is_file():
            inner = "" if path == place else f"/{path.relative_to(place).as_posix()}"
            fs.pipe_file(Store(uri + inner).root, path.read_bytes())
    return uri


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://a/b", True), ("memory://a", True), ("gs://a", True), ("hf://a/b", True),
     ("a/b", False), ("/a", False), ("C:/a", False), ("a:b", False), (Path("s3://a"), False)],
)  # fmt: skip
def test_a_uri_is_remote(path, expected):
    assert is_remote(path) is expected


def test_the_names_of_an_adapters_files_are_those_of_their_dialects():
    assert (names.CONFIG, names.WEIGHTS[0], names.WEIGHTS[-1]) == (
        peft.CONFIG,
        peft.WEIGHTS,
        mlx.WEIGHTS,
    )


def test_a_listing_tells_one_state_from_another(tmp_path):
    uri = upload(adapter(tmp_path / "a"), "counting://bucket/a")
    first = listing("counting://bucket/")
    assert [entry.path for entry in first] == [
        f"{uri}/adapter_config.json",
        f"{uri}/adapter_model.safetensors",
    ]
    weights = tmp_path / "a" / "adapter_model.safetensors"
    assert first[1].size == weights.stat().st_size
    assert listing(uri) == first and listing(first[1].path) == [first[1]]
    upload(weights, first[1].path)
    again = listing(uri)
    assert again[0] == first[0] and again[1].version != first[1].version
    assert listing("counting://bucket/none") == []


def test_a_folder_is_fetched_whole(tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    uri = upload(folder, "counting://bucket/x/a") + "/"
    for side_files in (False, True):
        with located(uri, side_files=side_files) as path:
            file = open_adapter_file(path)
            assert file.side_files == (("tokenizer.json",) if side_files else ())
            assert not Path(path, "README.md").exists()
            for name in os.listdir(path):
                assert Path(path, name).read_bytes() == (folder / name).read_bytes()
        assert not os.path.exists(path)


@pytest.mark.parametrize("config", ["x.json", "x/adapter_config.json", "adapter_config.json"])
def test_a_file_brings_the_config_that_is_its(tmp_path, config):
    folder = adapter(tmp_path / "a")
    os.rename(folder / "adapter_model.safetensors", folder / "x.safetensors")
    (folder / config).parent.mkdir(exist_ok=True)
    os.rename(folder / "adapter_config.json", folder / config)
    upload(folder, "counting://bucket/many")
    with located("counting://bucket/many/x.safetensors") as path:
        scales = {site.scale for site in open_adapter_file(path).sites.values()}
    assert scales == {2.0}
    assert len(Counting.asked) == 4  # the file and three names, however many lie beside it


def test_a_kohya_file_is_fetched_alone(tmp_path):
    file = write_kohya(tmp_path / "k.safetensors", pairs(0, {"lora_unet_a": (8, 8)}, 2), alpha=1)
    upload(file, "counting://bucket/k.safetensors")
    with located("counting://bucket/k.safetensors") as path:
        assert Path(path).read_bytes() == file.read_bytes()
        beside = [name for name in os.listdir(os.path.dirname(path)) if name[0] != "."]
        assert beside == ["k.safetensors"]


def test_a_long_name_is_shortened(tmp_path):
    name = "x" * 300
    folder = adapter(tmp_path / "a")
    upload(folder, f"counting://bucket/{name}")
    upload(folder / "adapter_model.safetensors", f"counting://bucket/{name}.safetensors")
    upload(folder / "adapter_config.json", f"counting://bucket/{name}.json")
    for uri in (f"counting://bucket/{name}", f"counting://bucket/{name}.safetensors"):
        with located(uri) as path:
            assert len(open_adapter_file(path).sites) == 2


def test_a_local_path_is_given_back_as_it_is(tmp_path):
    with located("some/where") as path:
        assert path == "some/where"


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ((), FileError, "no such file"),
        (("README.md",), FormatError, "is not an adapter: the directory holds no"),
        (("a.safetensors", "b.safetensors"), FormatError, "holds 2 safetensors files"),
        (("adapter_model.bin",), FormatError, "PyTorch pickle"),
    ],
    ids=["nothing", "no-adapter", "several", "pickle"],
)
def test_what_a_folder_does_not_hold(files, error, words):
    for name in files:
        Store("counting://bucket").fs.pipe_file(f"/bucket/a/{name}", b"x")
    with pytest.raises(error, match=words) as caught, located("counting://bucket/a"):
        pass
    assert str(caught.value).startswith("counting://bucket/a")
    assert Counting.asked == []


def test_an_allowed_pickle_is_fetched(tmp_path):
    Store("counting://bucket").fs.pipe_file("/bucket/a/adapter_model.bin", b"PK")
    with located("counting://bucket/a", allow_pickle=True) as path:
        assert Path(path, "adapter_model.bin").read_bytes() == b"PK"


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_headers_are_refused_before_the_rest(name):
    data, kind, _ = hostile.CASES[name]
    uri = "counting://bucket/a.safetensors"
    Store(uri).fs.pipe_file("/bucket/a.safetensors", data)
    with pytest.raises(kind) as caught, located(uri):
        pass
    assert caught.value.path == uri
    assert sum(size for _, size in Counting.asked) <= len(data) + HEAD


def test_what_is_no_adapter_is_refused_by_its_header():
    size = 40 << 20
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    raw = json.dumps({"model.embed_tokens.weight": entry}).encode()
    uri = "counting://bucket/a.safetensors"
    data = struct.pack("<Q", len(raw)) + raw + bytes(size)
    Store(uri).fs.pipe_file("/bucket/a.safetensors", data)
    with (
        pytest.raises(FormatError, match="is not a LoRA adapter"),
        located(uri, accept=check_adapter),
    ):
        pass
    assert [size for _, size in Counting.asked] == [HEAD]


@pytest.mark.parametrize(
    "key",
    ["../a", "a/../b", "a//b", "/a", "a\\b", "a/./b", "a\nb", ".."],
)
def test_hostile_keys_are_refused(key):
    with pytest.raises(UnsafeFileError, match="which is no name"), located(f"s3://bucket/{key}"):
        pass


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.EBUSY, "Please reduce your request rate"),
        OSError(errno.EIO, "An error occurred (504)"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("slow"),
        type("HfHubHTTPError", (Exception,), {"response": type("R", (), {"status_code": 429})})(),
        type("HttpError", (Exception,), {"code": 503})(),
        type("EndpointConnectionError", (type("HTTPClientError", (Exception,), {}),), {})(),
    ],
    ids=["slow-down", "status", "reset", "timeout", "hub-429", "gcs-503", "botocore"],
)
def test_a_busy_store_is_asked_again(tmp_path, fault):
    uri = upload(adapter(tmp_path / "a"), "counting://bucket/a")
    Counting.faults += [fault] * len(patience.PAUSES)
    with located(uri) as path:
        assert len(open_adapter_file(path).sites) == 2
    Counting.faults += [fault] * (len(patience.PAUSES) + 1)
    with pytest.raises(FileError, match="gave up after 3 tries") as caught, located(uri):
        pass
    assert caught.value.path == f"{uri}/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (FileNotFoundError("NoSuchBucket"), "no such file"),
        (PermissionError("Access Denied"), "access is refused: Access Denied.*credentials"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate"), "access is refused"),
        (type("HttpError", (Exception,), {"code": 403})("forbidden"), "access is refused"),
        (type("HttpError", (Exception,), {"code": 404})("gone"), "no such file"),
        (ValueError("odd\nlines"), "cannot be read: odd$"),
    ],
    ids=["missing", "forbidden", "credentials", "status-403", "status-404", "other"],
)
def test_what_no_patience_helps_is_said_at_once(tmp_path, fault, words):
    uri = upload(adapter(tmp_path / "a"), "counting://bucket/a")
    Counting.faults.append(fault)
    with pytest.raises(FileError, match=words), located(uri):
        pass
    assert len(Counting.asked) == 1


def test_no_more_requests_run_at_once_than_may():
    full, lock, active, peak = threading.Event(), threading.Lock(), 0, 0

    def request() -> None:
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
            if active == patience.REQUESTS:
                threading.Timer(0.1, full.set).start()
        full.wait(10)
        with lock:
            active -= 1

    with ThreadPoolExecutor(2 * patience.REQUESTS) as pool:
        for done in [pool.submit(patience.patiently, request, "x") for _ in range(40)]:
            done.result()
    assert peak == patience.REQUESTS


@pytest.mark.parametrize("change", ["replaced", "shorter", "longer"])
def test_a_file_that_changes_while_read(tmp_path, change):
    uri = upload(large(tmp_path / "a"), "counting://bucket/a")
    data = Counting.store["/bucket/a/adapter_model.safetensors"].getvalue()
    new = {"replaced": bytes(len(data)), "shorter": data[: 9 << 20], "longer": data + b"x"}[change]

    def replace() -> None:
        Store(uri).fs.pipe_file("/bucket/a/adapter_model.safetensors", new)

    Counting.after_read += [lambda: None, lambda: None, replace]
    folder = tmp_path / "kept"
    folder.mkdir()
    with pytest.raises(ChangedError, match="changed while being read"):
        fetched(uri, folder)
    assert not (folder / "a" / "adapter_model.safetensors").exists()


def test_ranges_give_the_same_bytes_and_few_are_in_memory(tmp_path):
    folder = large(tmp_path / "a")
    uri = upload(folder, "counting://bucket/a")
    with located(uri) as path:
        data = Path(path, "adapter_model.safetensors").read_bytes()
    assert data == (folder / "adapter_model.safetensors").read_bytes()
    asked = [size for name, size in Counting.asked if name.endswith(".safetensors")]
    assert sum(asked) == len(data) and max(asked) == 8 << 20 and len(asked) == 4


def test_an_unfinished_file_of_a_killed_run_is_read_again(tmp_path):
    folder = adapter(tmp_path / "a")
    uri = upload(folder, "counting://bucket/a")
    kept = tmp_path / "kept"
    (kept / "a").mkdir(parents=True)
    (kept / "a" / ".adapter_model.safetensors.partial").write_bytes(b"old" * 10_000)
    (kept / "a" / "adapter_config.json").write_text("{")
    assert fetched(uri, kept) == kept / "a"
    assert sorted(os.listdir(kept / "a")) == ["adapter_config.json", "adapter_model.safetensors"]
    for path in (kept / "a").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    uri = upload(large(tmp_path / "a"), "counting://bucket/a")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FileError, match="the disk is full"), located(uri):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_error(tmp_path, error):
    uri = upload(adapter(tmp_path / "a"), "counting://bucket/a")
    with pytest.raises(error), located(uri) as path:
        assert os.path.exists(path)
        raise error
    Counting.faults.append(error())
    expected = FileError if error is ValueError else error
    with pytest.raises(expected), located(uri):
        pass


def test_an_abandoned_thread_brings_nothing_back(tmp_path):
    uri = upload(adapter(tmp_path / "a"), "counting://bucket/a")
    go, results = threading.Event(), []
    with scratch.scratch() as folder:
        inside = located(uri, inside=folder)
        path = inside.__enter__()
        assert Path(path).parent.parent == folder

        def late() -> None:
            go.wait()
            for attempt in (lambda: Path(path, "more").write_text("x"), lambda: fetched(uri, path)):
                try:
                    attempt()
                except (OSError, AdapterOpsError) as error:
                    results.append(type(error))
            inside.__exit__(None, None, None)

        thread = threading.Thread(target=late)
        thread.start()
    assert not folder.exists()
    go.set()
    thread.join()
    assert results == [FileNotFoundError, FileError] and not folder.exists()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    temporary = Path(tempfile.gettempdir())
    old = time.time() - 3600
    left, fresh, foreign = (
        temporary / name for name in (f"{scratch.PREFIX}a", f"{scratch.PREFIX}b", "x")
    )
    for folder in (left, fresh, foreign):
        (folder / "inner").mkdir(parents=True)
    with scratch.scratch() as held:
        for folder in (left, foreign, held):
            os.utime(folder, (old, old))
        with scratch.scratch():
            assert not left.exists() and fresh.exists() and foreign.exists() and held.exists()
    for folder in (fresh, foreign):
        (folder / "inner").rmdir()
        folder.rmdir()


def test_a_temporary_folder_that_cannot_be_made(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(FileError, match="cannot be written"), scratch.scratch():
        pass


@pytest.mark.parametrize(
    ("missing", "uri", "words"),
    [
        ("fsspec", "s3://bucket/a", r"pip install 'adapterops\[s3\]'"),
        ("fsspec", "gs://bucket/a", r"pip install 'adapterops\[remote\]' gcsfs"),
        ("fsspec", "hf://owner/name", r"pip install 'adapterops\[remote\]' huggingface_hub"),
        ("fsspec", "memory://a", r"pip install 'adapterops\[remote\]'$"),
        ("s3fs", "s3://bucket/a", r"pip install 'adapterops\[s3\]'"),
        ("gcsfs", "gs://bucket/a", "gs:// cannot be opened: .*; pip install .* gcsfs"),
        (
            "huggingface_hub",
            "hf://owner/name",
            "cannot be opened: .*; pip install .* huggingface_h",
        ),
        ("", "nosuch://bucket/a", "cannot be opened: .*nosuch"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, missing, uri, words):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
        for protocol in ("s3", "gs", "hf"):
            monkeypatch.delitem(_registry, protocol, raising=False)
    with pytest.raises(UsageError, match=words):
        listing(uri)


def test_hub_uris_are_opened_by_the_hubs_file_system():
    store = Store("hf://owner/name/adapter/")
    assert type(store.fs).__name__ == "HfFileSystem"
    assert store.root == "owner/name/adapter"
    info = {"name": "owner/name/adapter/x.safetensors", "size": 5, "blob_id": "abc"}
    assert store.entry(info) == ("hf://owner/name/adapter/x.safetensors", 5, "abc")


def test_files_can_be_published_into_a_temporary_folder(tmp_path):
    """Publishing locks the folder it writes into; the lock of a temporary one is none of it."""
    with (
        scratch.scratch(tmp_path) as folder,
        stage(folder / "a", directory=True, overwrite=False) as made,
    ):
        made.write("x", [b"1"])
    assert not folder.exists()
