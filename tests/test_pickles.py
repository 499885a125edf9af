"""Legacy pickles: refused unless allowed, and then read without running anything from them."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import FileError, FormatError, UnsafeFileError, UnsupportedError
from adapterops.files.pickles import open_pickle
from adapterops.files.source import read_bytes, read_header
from tests.support import pairs, write_peft


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter as `safe/` and, pickled, as `bin/`."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("twins")
    write_peft(folder / "safe", pairs(1, {"m.q_proj": (6, 5), "m.v_proj": (4, 5)}, 2))
    tensors = load_file(folder / "safe" / "adapter_model.safetensors")
    (folder / "bin").mkdir()
    torch.save(tensors, folder / "bin" / "adapter_model.bin")
    config = (folder / "safe" / "adapter_config.json").read_text()
    (folder / "bin" / "adapter_config.json").write_text(config)
    return folder


def save(content: Any, path: Path, **options: Any) -> Path:
    import torch

    torch.save(content, path, **options)
    return path


def rebuilt(source: Path, target: Path, change: Any = None, **options: Any) -> Path:
    """A copy of an archive, entry by entry; `change(name, data)` gives the new data."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(entry.filename, data) if change else data)
    return target


# Permission.


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pth", "x.ckpt", "X.BIN"])
def test_refused_without_permission_before_it_is_opened(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"anything")
    with pytest.raises(FormatError, match="--allow-pickle") as caught:
        ao.open_adapter(path)
    assert caught.value.exit_code == 3
    assert "run code" in str(caught.value)


def test_the_command_line_refuses_with_3_and_a_hint(twins, tmp_path):
    command = [sys.executable, "-m", "adapterops", "merge", str(twins / "bin"), "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 3
    assert "--allow-pickle" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    done = subprocess.run(
        [*command, "--allow-pickle", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "adapterops.merge/1"


def test_a_pickle_called_safetensors_is_recognised(twins, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((twins / "bin" / "adapter_model.bin").read_bytes())
    with pytest.raises(FormatError, match=r"PyTorch pickle.*\.bin or \.pt.*--allow-pickle"):
        ao.open_adapter(path, allow_pickle=True)


def test_read_with_permission_it_is_its_twin(twins):
    safe = ao.open_adapter(twins / "safe")
    loaded = ao.open_adapter(twins / "bin", allow_pickle=True)
    assert list(safe) == list(loaded)
    for module in safe:
        for ours, theirs in zip(
            (loaded[module].B, loaded[module].A), (safe[module].B, safe[module].A), strict=True
        ):
            assert np.array_equal(ours, theirs)


def test_merged_bytes_are_those_of_the_twin(twins, tmp_path):
    data = []
    for name in ("safe", "bin"):
        ao.merge([twins / name], [0.5], out=tmp_path / name, allow_pickle=True)
        source = ao.files.source.LocalFile(tmp_path / name / "adapter_model.safetensors")
        header = read_header(source)
        data.append(read_bytes(source, header.data_start, source.size() - header.data_start))
    assert data[0] == data[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "bool"])
def test_every_type_keeps_its_bytes(dtype, tmp_path):
    import torch

    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    views = {"w": tensor, "t": tensor.T, "row": tensor[1], "p": torch.nn.Parameter(torch.ones(2))}
    source = open_pickle(save(views, tmp_path / "x.bin"))
    header = read_header(source)
    assert header.tensors["t"].shape == (3, 2)
    for name, value in views.items():
        entry = header.tensors[name]
        stored = read_bytes(source, header.data_start + entry.start, entry.nbytes)
        raw = value.detach().contiguous().flatten().view(torch.uint8)
        assert bytes(stored) == raw.numpy().tobytes(), name


def test_an_ordered_dictionary_of_a_module_is_read(tmp_path):
    import torch

    state = torch.nn.Linear(2, 3).state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert set(read_header(open_pickle(save(state, tmp_path / "x.pt"))).tensors) == {
        "weight",
        "bias",
    }


# Code.


class Canary:
    """Runs a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def canaries(path: Path) -> dict[str, Any]:
    """Pickles that create the file at `path` if anything in them is executed."""
    code = f"open({str(path)!r}, 'w').close()"
    return {
        "os.system": Canary(os.system, f"touch {path}"),
        "eval": Canary(eval, code),
        "exec": Canary(exec, code),
        "open": Canary(open, str(path), "w"),
        "io": Canary(io.open, str(path), "w"),
        "subprocess": Canary(subprocess.call, ["touch", str(path)]),
        "mknod": Canary(os.mknod, str(path)),
        "loads": Canary(pickle.loads, pickle.dumps(Canary(os.mknod, str(path)))),
        "import": Canary(__import__, "antigravity"),
    }


@pytest.mark.parametrize("kind", list(canaries(Path("x"))))
@pytest.mark.parametrize("place", ["whole", "value", "key"])
def test_no_code_runs(kind, place, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "x.bin"
    bad = canaries(canary)[kind]
    save({"whole": bad, "value": {"w": bad}, "key": {"m": {"w": bad}}}[place], path)
    with pytest.raises(
        UnsafeFileError, match=r"x\.bin: .*not a plain archive of tensors"
    ) as caught:
        open_pickle(path)
    assert caught.value.exit_code == 3
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_runs_from_plain_pickles(protocol, tmp_path):
    for name, bad in canaries(tmp_path / "canary").items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(pickle.dumps(bad, protocol))
        with pytest.raises(UnsafeFileError):
            open_pickle(path)
    assert not (tmp_path / "canary").exists()


def test_the_canary_would_sing(tmp_path):
    """The pickles above do something when they are loaded carelessly."""
    for name in ("os.system", "eval", "exec", "subprocess", "mknod", "loads"):
        canary = tmp_path / name
        pickle.loads(pickle.dumps(canaries(canary)[name]))
        assert canary.exists(), name


# Archives.


def test_a_legacy_pickle_is_refused(tmp_path):
    import torch

    path = save({"w": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match=r"not a PyTorch zip archive.*re-save"):
        open_pickle(path)


def test_a_legacy_pickle_with_an_archive_behind_it_is_refused(tmp_path):
    """Zip is found from the end, but torch decides by the start: two readers, two contents."""
    import torch

    old = save({"w": torch.ones(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    new = save({"w": torch.zeros(2)}, tmp_path / "new")
    path = tmp_path / "x.bin"
    path.write_bytes(old.read_bytes() + new.read_bytes())
    with pytest.raises(UnsafeFileError, match="not a PyTorch zip archive"):
        open_pickle(path)


def test_a_compressed_archive_is_refused(tmp_path):
    import torch

    path = save({"w": torch.zeros(1 << 20)}, tmp_path / "big")
    small = rebuilt(path, tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < 1 << 15
    with pytest.raises(UnsafeFileError, match="compressed"):
        open_pickle(small)


def test_entries_that_claim_more_than_the_file_are_refused(tmp_path):
    """The sizes in the central directory, which a reader may trust."""
    import torch

    path = save({"w": torch.zeros(100)}, tmp_path / "x.bin")
    blob = bytearray(path.read_bytes())
    at = blob.rindex(b"data/0")
    entry = blob.rindex(b"PK\x01\x02", 0, at)
    blob[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(blob)
    with pytest.raises(
        UnsafeFileError, match=rf"{1 << 30}|claim \d+ bytes, the file has {len(blob)}"
    ):
        open_pickle(path)


def test_a_storage_that_claims_more_than_its_entry_is_refused(tmp_path):
    """Else the tensor would read whatever lies behind it in memory."""
    import torch

    path = save({"w": torch.zeros(10), "pad": torch.zeros(100_000)}, tmp_path / "honest")

    def shrink(name: str, data: bytes) -> bytes:
        return data[:8] if name.endswith("data/0") else data

    with pytest.raises((UnsafeFileError, FormatError)):
        open_pickle(rebuilt(path, tmp_path / "x.bin", shrink))


@pytest.mark.parametrize("cut", [1, 30, 200, 1000])
def test_a_truncated_archive_is_refused(cut, tmp_path):
    import torch

    path = save({"w": torch.zeros(1000)}, tmp_path / "x.bin")
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(FormatError, match=r"x\.bin"):
        open_pickle(path)


def test_an_archive_that_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(UnsafeFileError, match="not a plain archive"):
        open_pickle(path)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_tiny_files_are_refused(content, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="zip archive"):
        open_pickle(path)


def test_random_damage_gives_only_our_errors(tmp_path):
    import torch

    good = save({"w": torch.arange(20.0)}, tmp_path / "good").read_bytes()
    rng = np.random.default_rng(3)
    path = tmp_path / "x.bin"
    refused = 0
    for _ in range(150):
        blob = bytearray(good)
        for at in rng.integers(0, len(blob), 3):
            blob[at] = rng.integers(256)
        path.write_bytes(blob)
        try:
            read_header(open_pickle(path))
        except FormatError:
            refused += 1
        except UnsupportedError:
            refused += 1
    assert refused > 20


# Contents.


def test_a_tensor_larger_than_the_file_is_refused(tmp_path):
    """Stride 0: one number, shown four trillion times."""
    import torch

    path = save({"w": torch.zeros(1).expand(1 << 21, 1 << 21)}, tmp_path / "x.bin")
    assert path.stat().st_size < 10_000
    with pytest.raises(UnsafeFileError, match=rf"claim {4 << 42} bytes, more than the file has"):
        open_pickle(path)


def test_many_views_of_one_storage_are_refused_when_they_add_up(tmp_path):
    import torch

    shared = torch.zeros(10_000)
    views = {f"w{i}": shared.view(100, 100) for i in range(50)}
    with pytest.raises(UnsafeFileError, match="more than the file has"):
        open_pickle(save(views, tmp_path / "x.bin"))


def test_a_tensor_without_data_is_refused(tmp_path):
    import torch

    path = save({"w": torch.empty(2, device="meta")}, tmp_path / "x.bin")
    with pytest.raises(FormatError):
        open_pickle(path)


@pytest.mark.parametrize("kind", ["list", "tuple", "tensor", "none", "number", "string"])
def test_what_has_no_names_is_refused_by_its_kind(kind, tmp_path):
    import torch

    one = torch.ones(2)
    content = {
        "list": [one, one],
        "tuple": (one,),
        "tensor": one,
        "none": None,
        "number": 3,
        "string": "hello",
    }[kind]
    with pytest.raises(UnsupportedError, match="not a dictionary of named tensors") as caught:
        open_pickle(save(content, tmp_path / "x.bin"))
    assert type(content).__name__ in str(caught.value)


@pytest.mark.parametrize("kind", ["nested", "number", "text", "int key", "sparse", "list"])
def test_what_is_no_named_tensor_is_refused_by_its_name(kind, tmp_path):
    import torch

    one = torch.ones(2)
    content, named = {
        "nested": ({"state_dict": {"w": one}}, "'state_dict' is a dict"),
        "number": ({"w": one, "epoch": 3}, "'epoch' is a int"),
        "text": ({"w": one, "note": "x"}, "'note' is a str"),
        "int key": ({5: one}, "5 is a Tensor"),
        "sparse": ({"s": torch.eye(2).to_sparse()}, "'s' is a Tensor"),
        "list": ({"w": [one]}, "'w' is a list"),
    }[kind]
    with pytest.raises(FormatError, match=named):
        open_pickle(save(content, tmp_path / "x.bin"))


@pytest.mark.parametrize("name", ["../w", "a\0b", "", "__metadata__", "\ud800", "a\u202eb"])
def test_hostile_names_in_a_pickle_meet_the_strict_header(name, tmp_path):
    import torch

    path = save({name: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"x\.bin"):
        read_header(open_pickle(path))


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_file_that_is_not_there(kind, tmp_path):
    if kind == "directory":
        (tmp_path / "x.bin").mkdir()
    with pytest.raises(FileError) as caught:
        open_pickle(tmp_path / "x.bin")
    assert caught.value.exit_code == 6


def test_a_file_that_cannot_be_read_is_an_input_error_not_a_bad_pickle(tmp_path, monkeypatch):
    import torch

    path = save({"w": torch.ones(2)}, tmp_path / "x.bin")

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(FileError, match="Input/output error"):
        open_pickle(path)
