"""Staged output: complete or absent, whatever fails on the way; modes, links, what may be replaced.

Faults are injected at the N-th call of a function of the operating system, for every N until the
write succeeds.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.cli import app
from adapterops.errors import FileError, OutputExistsError, UsageError
from adapterops.files.header import layout
from adapterops.files.output import SIDECAR, stage
from adapterops.files.source import LocalFile, read_bytes, read_header
from tests.support import pairs, write_kohya, write_peft

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
both = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
SHAPES = {"b": ("F32", (50, 10)), "a": ("F16", (7,)), "empty": ("F32", (0,))}


def save(out: Path, directory: bool, *, overwrite: bool = False, fill: int = 1) -> None:
    """A small output of either form, with its sidecar."""
    entries = layout(SHAPES)
    with stage(out, directory=directory, overwrite=overwrite) as target:
        writer = target.tensors("w.safetensors" if directory else target.final.name, entries, 512)
        for name, entry in entries.items():
            writer.put(name, bytes([fill]) * entry.nbytes)
        writer.finish({"fill": str(fill)})
        sidecar = json.dumps(
            {"schema": "adapterops.test/1", "fill": fill, "files": ["w.safetensors"]}
        )
        target.write(SIDECAR if directory else f"{target.final.name}.json", [sidecar.encode()])


def check_whole(out: Path, directory: bool, fill: int | None = None) -> int:
    """Fails unless the output is one whole output, its sidecar included; returns its fill."""
    file = LocalFile(out / "w.safetensors" if directory else out)
    header = read_header(file)
    found = int(header.metadata["fill"])
    assert fill in (None, found)
    data = read_bytes(file, header.data_start, file.size() - header.data_start)
    assert set(data) == {found}
    sidecar = out / SIDECAR if directory else out.with_name(f"{out.name}.json")
    assert json.loads(sidecar.read_text())["fill"] == found
    return found


def state(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below `folder` with its mode and bytes."""
    return {
        str(path.relative_to(folder)): (
            stat.S_IMODE(path.lstat().st_mode),
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder in which every user may write (those of pytest are private)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


# What a clean run leaves.


@both
def test_nothing_but_the_output_appears(directory, tmp_path):
    save(tmp_path / "out", directory)
    check_whole(tmp_path / "out", directory, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ["out"] if directory else ["out", "out.json"]
    )


@both
def test_nothing_is_visible_before_the_end(directory, tmp_path):
    out = tmp_path / "out"
    with stage(out, directory=directory, overwrite=False) as target:
        writer = target.tensors("out", layout(SHAPES), 512)
        for name, entry in layout(SHAPES).items():
            writer.put(name, bytes(entry.nbytes))
            assert not out.exists()
        writer.finish({})
        assert not out.exists()
        assert len(hidden(tmp_path)) == 1
    assert out.exists() and not hidden(tmp_path)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
@both
def test_modes_follow_the_umask(mask, directory, tmp_path):
    before = os.umask(mask)
    try:
        save(tmp_path / "out", directory)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *tmp_path.rglob("*")):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_mode(mode, tmp_path):
    out = tmp_path / "out"
    save(out, False)
    out.chmod(mode)
    save(out, False, overwrite=True, fill=2)
    check_whole(out, False, 2)
    assert stat.S_IMODE(out.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o775])
def test_a_replaced_directory_keeps_its_modes(mode, tmp_path):
    out = tmp_path / "out"
    save(out, True)
    out.chmod(mode)
    (out / "w.safetensors").chmod(0o600)
    save(out, True, overwrite=True, fill=2)
    check_whole(out, True, 2)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert stat.S_IMODE((out / "w.safetensors").stat().st_mode) == 0o600


def test_an_empty_directory_is_filled_and_keeps_its_mode(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    save(out, True)
    check_whole(out, True, 1)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


@both
def test_the_target_of_a_link_is_replaced_and_the_link_stays(directory, tmp_path):
    real, link = tmp_path / "store" / "real", tmp_path / "out"
    real.parent.mkdir()
    link.symlink_to(real)
    save(link, directory)  # dangling at first
    assert link.is_symlink()
    if directory:
        check_whole(real, True, 1)
        save(link, True, overwrite=True, fill=2)
        check_whole(real, True, 2)
    else:
        assert read_header(LocalFile(real)).metadata == {"fill": "1"}
    assert link.is_symlink() and not hidden(tmp_path) and not hidden(real.parent)


def test_a_file_that_somebody_put_into_our_directory_is_not_deleted(tmp_path):
    out = tmp_path / "out"
    save(out, True)
    (out / "precious.safetensors").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match=r"precious\.safetensors.*not written by"):
        save(out, True, overwrite=True, fill=2)
    assert check_whole(out, True) == 1 and (out / "precious.safetensors").exists()


def test_one_of_our_files_among_those_of_others_does_not_make_the_folder_ours(tmp_path):
    write_peft(tmp_path / "a", pairs(1, {"x.q": (16, 24)}, 2))
    folder = tmp_path / "loras"
    folder.mkdir()
    ao.merge([tmp_path / "a"], out=folder / "mine.safetensors")
    (folder / "precious.safetensors").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="not written by adapterops"):
        ao.merge([tmp_path / "a"], out=folder, overwrite=True)
    assert (folder / "precious.safetensors").exists()


def test_a_tensor_that_was_never_put_is_no_output(tmp_path):
    with (
        pytest.raises(ValueError, match="never written"),
        stage(tmp_path / "out", directory=False, overwrite=False) as target,
    ):
        writer = target.tensors("out", layout(SHAPES), 512)
        writer.put("a", bytes(14))
        writer.finish({})
    assert not list(tmp_path.iterdir())


# What is refused.


@both
def test_an_existing_output_is_refused(directory, tmp_path):
    save(tmp_path / "out", directory)
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match=r"out: exists already.*--overwrite") as caught:
        save(tmp_path / "out", directory, fill=2)
    assert caught.value.exit_code == 2
    assert state(tmp_path) == before


@pytest.mark.parametrize("content", ["notes", "weights", "foreign sidecar", "broken sidecar"])
def test_overwrite_does_not_delete_a_directory_of_others(content, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if content == "notes":
        (out / "notes.txt").write_text("mine")
    elif content == "weights":
        write_peft(out, pairs(1, {"m": (4, 4)}, 1))
    elif content == "foreign sidecar":
        (out / SIDECAR).write_text('{"schema": "others/1"}')
    else:
        (out / SIDECAR).write_text('["adapterops."]')
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match="not written by adapterops"):
        save(out, True, overwrite=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@both
def test_a_file_is_no_directory_and_the_other_way_round(directory, overwrite, tmp_path):
    save(tmp_path / "out", not directory)
    before = state(tmp_path)
    with pytest.raises(OutputExistsError, match=r"is (a file|a directory) already"):
        save(tmp_path / "out", directory, overwrite=overwrite)
    assert state(tmp_path) == before


@both
def test_a_missing_parent_is_named(directory, tmp_path):
    with pytest.raises(FileError, match="'absent' of the output does not exist") as caught:
        save(tmp_path / "absent" / "out", directory)
    assert caught.value.exit_code == 6
    assert not list(tmp_path.iterdir())


@both
def test_a_parent_that_is_a_file(directory, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError):
        save(tmp_path / "file" / "out", directory)
    assert len(list(tmp_path.iterdir())) == 1


@both
def test_names_as_long_as_the_file_system_takes(directory, tmp_path):
    save(tmp_path / ("n" * 250), directory)
    before = state(tmp_path)
    with pytest.raises(FileError, match="File name too long"):
        save(tmp_path / ("n" * 256), directory)
    assert state(tmp_path) == before


def test_wrong_sizes_are_refused_and_leave_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="13 bytes for a tensor of 14"),
        stage(tmp_path / "out", directory=False, overwrite=False) as target,
    ):
        target.tensors("out", layout(SHAPES), 512).put("a", bytes(13))
    assert not list(tmp_path.iterdir())


def test_a_header_larger_than_its_reserve_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="does not fit"),
        stage(tmp_path / "out", directory=False, overwrite=False) as target,
    ):
        writer = target.tensors("out", layout(SHAPES), 200)
        for name, entry in layout(SHAPES).items():
            writer.put(name, bytes(entry.nbytes))
        writer.finish({"k": "v" * 100})
    assert not list(tmp_path.iterdir())


def _as_nobody(code: str, folder: Path) -> str:
    """Run code as an ordinary user; `save` is this module's. Its error is printed."""
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.test_output import save\n"
        f"folder = Path({str(folder)!r})\nos.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"try:\n    {code}\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, getattr(error, 'exit_code', None), error)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@as_root
@both
def test_a_directory_that_may_not_be_written(directory, shared_folder):
    shared_folder.chmod(0o755)
    said = _as_nobody(f"save(folder / 'out', {directory})", shared_folder)
    assert said.startswith("FileError 6") and "not writable" in said
    assert not list(shared_folder.iterdir())


@as_root
@both
def test_a_path_through_a_private_directory(directory, shared_folder):
    (shared_folder / "private" / "deep").mkdir(parents=True)
    (shared_folder / "private").chmod(0o700)
    said = _as_nobody(f"save(folder / 'private' / 'deep' / 'out', {directory})", shared_folder)
    assert said.startswith("FileError 6") and "Permission denied" in said


@as_root
def test_an_existing_directory_that_may_not_be_listed(shared_folder):
    (shared_folder / "out").mkdir(mode=0o700)
    said = _as_nobody("save(folder / 'out', True, overwrite=True)", shared_folder)
    assert said.startswith("FileError 6") and "Permission denied" in said


@as_root
@both
def test_a_folder_that_may_be_written_but_not_listed(directory, shared_folder):
    """A drop box: the directory cannot be opened, so its fsync must be left out."""
    shared_folder.chmod(0o733)
    said = _as_nobody(f"save(folder / 'out', {directory})", shared_folder)
    assert said == ""
    check_whole(shared_folder / "out", directory, 1)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory `a`, kohya files `k.safetensors` and `l.safetensors`."""
    folder = tmp_path_factory.mktemp("adapters")
    write_peft(folder / "a", pairs(1, {"m.q_proj": (8, 6)}, 2))
    for seed, name in enumerate(("k", "l")):
        factors = pairs(seed, {"lora_unet_q": (8, 6)}, 2, np.float16)
        write_kohya(folder / f"{name}.safetensors", factors, alpha=1)
    return folder


@pytest.mark.parametrize(
    "inputs, out",
    [
        (["a"], "a"),
        (["a"], "a/adapter_model.safetensors"),
        (["a/adapter_model.safetensors"], "a"),
        (["a"], "."),
        (["k.safetensors", "l.safetensors"], "l.safetensors"),
        (["link.safetensors"], "k.safetensors"),
        (["k.safetensors"], "link.safetensors"),
        (["k.safetensors"], "sub/../k.safetensors"),
    ],
)
def test_an_input_is_never_the_output(inputs, out, tmp_path, adapters):
    subprocess.run(["cp", "-r", f"{adapters}/.", tmp_path], check=True)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.safetensors").symlink_to("k.safetensors")
    (tmp_path / "a" / SIDECAR).write_text('{"schema": "adapterops.merge/1"}')
    (tmp_path / SIDECAR).write_text('{"schema": "adapterops.merge/1"}')
    before = state(tmp_path)
    with pytest.raises(OutputExistsError):
        ao.merge(
            [tmp_path / name for name in inputs],
            [1.0] * len(inputs),
            out=tmp_path / out,
            overwrite=True,
        )
    assert state(tmp_path) == before


VERBS = {
    "merge": "merge a",
    "compress": "compress a --rank 1",
    "compress, many": "compress a k.safetensors --rank 1",
    "convert": "convert a --dtype bf16",
    "index": "index a",
    "index, edited": "index --remove a",
    "cluster": "cluster fleet",
    "assign": "assign plan b=a",
    "deploy": "deploy plan --engine vllm --served-base m",
    "report": "report plan",
    "extract": "extract base base --rank 1",
    "bake": "bake base a",
    "unbake": "unbake baked",
}


@pytest.mark.parametrize("command", VERBS.values(), ids=VERBS)
def test_an_output_without_a_name_is_no_output(command, tmp_path, adapters, monkeypatch):
    """The folder that a command is run in is never what an empty name stands for."""
    subprocess.run(["cp", "-r", f"{adapters}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_file({"m.q_proj.weight": np.ones((8, 6), np.float32)}, "base/model.safetensors")
    ao.bake("base", ["a"], out="baked", reversible=True)
    ao.index("a", out="fleet")
    ao.cluster("fleet", out="plan")
    before = state(tmp_path)
    done = CliRunner().invoke(app, [*command.split(), "-o", ""])
    assert isinstance(done.exception, UsageError), done.output
    assert str(done.exception) == "the output '' is no file name; -o PATH"
    assert state(tmp_path) == before


def test_a_hard_link_to_an_input_is_replaced_without_changing_the_input(tmp_path, adapters):
    """rename puts a new file under the name; the input keeps its bytes."""
    source = adapters / "k.safetensors"
    before = source.read_bytes()
    os.link(source, tmp_path / "out.safetensors")
    ao.merge([source], [2.0], out=tmp_path / "out.safetensors", overwrite=True)
    assert source.read_bytes() == before
    assert (tmp_path / "out.safetensors").read_bytes() != before


def test_the_sidecar_lies_beside_a_file_and_inside_a_directory(tmp_path, adapters):
    ao.merge([adapters / "k.safetensors"], out=tmp_path / "x.safetensors")
    ao.merge([adapters / "a"], out=tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "x.adapterops.json",
        "x.safetensors",
        "y",
    ]
    for path in (tmp_path / "x.adapterops.json", tmp_path / "y" / SIDECAR):
        assert json.loads(path.read_text())["schema"] == "adapterops.merge/1"


def test_a_merge_that_fails_late_leaves_nothing(tmp_path, adapters, monkeypatch):
    from adapterops import save as module

    def broken(*_: object) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(module, "certify", broken)
    for source, out in (("k.safetensors", "out.safetensors"), ("a", "out")):
        with pytest.raises(RuntimeError, match="late"):
            ao.merge([adapters / source], out=tmp_path / out)
    assert not list(tmp_path.iterdir())


# Exceptions, signals.


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("replaced", [False, True])
@both
def test_an_exception_inside_leaves_what_was_there(directory, replaced, kind, tmp_path):
    out = tmp_path / "out"
    if replaced:
        save(out, directory)
    before = state(tmp_path)
    with pytest.raises(kind), stage(out, directory=directory, overwrite=True) as target:
        writer = target.tensors("out", layout(SHAPES), 512)
        writer.put("a", bytes(14))
        target.write("side", [b"x"])
        raise kind("stop")
    assert state(tmp_path) == before


@pytest.mark.parametrize("function", ["rename", "replace", "fsync", "rmdir", "unlink"])
@pytest.mark.parametrize("when", ["before", "after"])
@both
def test_a_signal_around_a_system_call_leaves_no_orphan(directory, when, function, tmp_path):
    """SIGINT and SIGTERM just before or after the N-th call, for every N."""
    out = tmp_path / "out"
    real = getattr(os, function)
    for number in itertools.count(1):
        save_clean(tmp_path, out, directory)
        calls = itertools.count(1)
        sent = False

        def signalled(*args, _number=number, _calls=calls, **kwargs):
            nonlocal sent
            hit = next(_calls) == _number
            sent |= hit
            if hit and when == "before":
                signal.raise_signal(signal.SIGINT)
            result = real(*args, **kwargs)
            if hit and when == "after":
                signal.raise_signal(signal.SIGINT)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, signalled)
            try:
                save(out, directory, overwrite=True, fill=2)
            except KeyboardInterrupt:
                assert sent
        check_whole(out, directory)
        assert not hidden(tmp_path), (number, hidden(tmp_path))
        if not sent:
            check_whole(out, directory, 2)
            break


def save_clean(folder: Path, out: Path, directory: bool) -> None:
    """The first output again, in an otherwise empty folder."""
    subprocess.run(["rm", "-rf", *folder.iterdir()], check=True)
    save(out, directory)


# Faults of the operating system.


@pytest.mark.parametrize(
    "function, code, words",
    [
        ("pwrite", errno.ENOSPC, "disk is full"),
        ("pwrite", errno.EDQUOT, "disk is full"),
        ("pwrite", errno.EIO, "cannot be written"),
        ("fsync", errno.EIO, "cannot be written"),
        ("fsync", errno.ENOSPC, "disk is full"),
        ("ftruncate", errno.ENOSPC, "disk is full"),
        ("replace", errno.EACCES, "cannot be written: Permission denied"),
        ("rename", errno.EACCES, "cannot be written: Permission denied"),
        ("open", errno.EMFILE, "Too many open files"),
        ("mkdir", errno.ENOSPC, "disk is full"),
        ("chmod", errno.EPERM, "cannot be written"),
        ("statvfs", errno.EIO, "cannot be written"),
        ("preadv", errno.EIO, "cannot be read"),
    ],
)
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@both
def test_every_failing_call(directory, replaced, function, code, words, tmp_path):
    """The old state or, where only the last sync failed, the whole new output; never less."""
    out = tmp_path / "out"
    real = getattr(os, function)
    for number in itertools.count(1):
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)
        if replaced:
            save(out, directory)
        before = state(tmp_path)
        calls = itertools.count(1)

        def failing(*args, _number=number, _calls=calls, **kwargs):
            if next(_calls) == _number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, failing)
            try:
                save(out, directory, overwrite=True, fill=2)
                failed = False
            except FileError as error:
                assert error.exit_code == 6 and error.path
                assert words in str(error)
                failed = True
        if next(calls) <= number + 1 and not failed:
            break  # fewer calls than `number`
        after = state(tmp_path)
        if after != before:
            check_whole(out, directory, 2)
            assert not hidden(tmp_path) or function == "open"  # which removing the old one needs
            assert not failed or function in ("fsync", "open")
        assert number < 100
    check_whole(out, directory, 2)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:37], at))
    save(tmp_path / "out", False)
    check_whole(tmp_path / "out", False, 1)


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_a_disk_that_writes_something_else_is_noticed(change, tmp_path, monkeypatch):
    """What the header read back says must be what was meant."""
    real = os.fsync

    def spoiled(descriptor: int) -> None:
        real(descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        if change == "flip":
            os.pwrite(descriptor, b"7", os.pread(descriptor, 200, 0).index(b'"fill":"1"') + 8)
        else:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 1)

    monkeypatch.setattr(os, "fsync", spoiled)
    with pytest.raises(FileError) as caught:
        save(tmp_path / "out", False)
    assert caught.value.exit_code == 6
    assert not list(tmp_path.iterdir())


def test_hashing_a_staged_file_that_somebody_cut_ends(tmp_path):
    with (
        pytest.raises(FileError, match="ends at byte"),
        stage(tmp_path / "out", directory=False, overwrite=False) as target,
    ):
        writer = target.tensors("out", layout(SHAPES), 512)
        writer.put("a", bytes(14))
        os.truncate(writer.path, 520)
        writer.data_sha256()
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    real = os.statvfs

    def small(path: object) -> os.statvfs_result:
        fields = list(real(path))
        fields[4] = 0  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(FileError, match=r"needs \d+ bytes, the disk has 0 free"):
        save(tmp_path / "out", False)
    assert not list(tmp_path.iterdir())


_FILL = """
import json, os, sys
from pathlib import Path
from adapterops.errors import FileError
from adapterops.files.header import layout
from adapterops.files.output import stage
from adapterops.files.source import file_header
from tests.test_output import state

disk, directory = Path(sys.argv[1]), sys.argv[2] == "directory"
roomy = os.statvfs("/")
os.statvfs = lambda _: roomy  # blind the check made beforehand
entries = layout({"w": ("F32", (64, 1024))})
for free in json.loads(sys.argv[3]):
    for path in disk.iterdir():
        path.unlink()
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, (1 << 20) - free)
    before = state(disk)
    try:
        with stage(disk / "out", directory=directory, overwrite=False) as target:
            writer = target.tensors("out", entries, 512)
            writer.put("w", bytes(entries["w"].nbytes))
            writer.finish({})
            target.write("side", [b"x" * 5000])
    except FileError as error:
        assert "disk is full" in str(error) and error.exit_code == 6, error
        assert free < 300_000, free
        assert state(disk) == before
        print("full")
    else:
        assert free > 262_144, free
        assert file_header(disk / "out" / "out" if directory else disk / "out").tensors == entries
        print("fits")
        break
"""


@both
def test_a_disk_that_fills_up(directory, tmp_path):
    """A real file system of 1 MiB, in a mount name space of its own that ends with the process."""
    free = json.dumps([0, 4096, 8192, 12288, 16384, 65536, 250_000, 266_240, 270_336, 600_000])
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    form = "directory" if directory else "file"
    done = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"),
            *(sys.executable, "-c", _FILL, str(tmp_path), form, free),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said.count("full") >= 7 and said[-1] == "fits"


# Others write at the same time.


@both
def test_something_that_appears_meanwhile_is_not_replaced(directory, tmp_path):
    """Without --overwrite the output must still be absent at the end."""
    out = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match="exists already"),
        stage(out, directory=directory, overwrite=False) as target,
    ):
        target.write("out", [b"ours"])
        if directory:
            out.mkdir()
            (out / "notes.txt").write_text("theirs")
        else:
            out.write_text("theirs")
    assert (out / "notes.txt" if directory else out).read_text() == "theirs"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@both
def test_threads_writing_to_one_target(directory, overwrite, tmp_path):
    _compete(tmp_path / "out", directory, overwrite, rounds=5)


@pytest.mark.long
@pytest.mark.parametrize("overwrite", [False, True])
@both
def test_threads_writing_to_one_target_often(directory, overwrite, tmp_path):
    _compete(tmp_path / "out", directory, overwrite, rounds=200)


def _compete(out: Path, directory: bool, overwrite: bool, rounds: int) -> None:
    """Eight writers start together: one whole output, no orphans, clean errors for the rest."""
    for _ in range(rounds):
        subprocess.run(["rm", "-rf", *out.parent.iterdir()], check=True)
        start = threading.Barrier(8)
        wrong: list[BaseException] = []
        winners: list[int] = []

        def write(fill: int, start=start, wrong=wrong, winners=winners) -> None:
            start.wait()
            try:
                save(out, directory, overwrite=overwrite, fill=fill)
                winners.append(fill)
            except (FileError, OutputExistsError):
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=write, args=(fill,)) for fill in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert winners and (overwrite or len(winners) == 1)
        assert check_whole(out, directory) in winners
        assert not hidden(out.parent)


def test_processes_replacing_one_directory(tmp_path):
    """A reader sees the old or the new weights and config, each whole, while writers compete."""
    out = tmp_path / "out"
    save(out, True)
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_output import save\n"
        "from adapterops.errors import FileError, OutputExistsError\n"
        "for _ in range(20):\n"
        "    try:\n        save(Path(sys.argv[1]), True, overwrite=True, fill=int(sys.argv[2]))\n"
        "    except (FileError, OutputExistsError):\n        pass\n"
    )
    root = Path(__file__).parent.parent
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(out), str(fill)], cwd=root)
        for fill in (2, 3, 4)
    ]
    try:
        assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
    assert check_whole(out, True) in (2, 3, 4)
    assert not hidden(tmp_path)


@pytest.mark.parametrize("form", ["directory", "file"])
def test_every_file_and_its_folder_reach_the_disk(form, tmp_path, monkeypatch):
    flushed = set()
    sync = os.fsync

    def recorded(descriptor):
        status = os.fstat(descriptor)
        flushed.add((status.st_dev, status.st_ino))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_peft(tmp_path / "a", pairs(1, {"x.q": (16, 24)}, 2))
    folder = tmp_path / "outputs"
    folder.mkdir()
    ao.merge([tmp_path / "a"], out=folder / ("m" if form == "directory" else "m.safetensors"))
    written = [folder, *folder.rglob("*")]
    assert len(written) == (6 if form == "directory" else 3)
    assert [p for p in written if (p.stat().st_dev, p.stat().st_ino) not in flushed] == []
