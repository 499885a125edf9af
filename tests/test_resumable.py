"""Long outputs: what an interruption leaves, what the next run takes over, what it never does."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterops.errors import (
    ChangedError,
    FileError,
    FormatError,
    MemoryLimitError,
    NumericsError,
    OutputExistsError,
    UsageError,
)
from adapterops.files.direct import SequentialWriter
from adapterops.files.output import MAIN, SIDECAR, foreign_files
from adapterops.files.publish import undisturbed
from adapterops.files.resumable import Resumed, resumable

NAMES = ["model-1.safetensors", "model-2.safetensors", "unet/model.safetensors"]
PARTIAL = ".out.adapterops-partial"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory: these tests write thousands of outputs, and fsync is free there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the disk."""
    return tmp_path_factory.mktemp("disk")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@functools.cache
def content(name: str, plan: str) -> bytes:
    """What a file holds; more than sixteen blocks of 4 KiB, so that a sample is not all."""
    return random.Random(f"{name} {plan}").randbytes(200_000 + len(name))


def put(resumed: Resumed, name: str, plan: str = "p") -> None:
    data = content(name, plan)
    with SequentialWriter(resumed.path(name), len(data)) as writer:
        writer.append(data)
        writer.finish()
    resumed.done(name, {"name": name, "plan": plan})


def companions(resumed: Resumed, plan: str) -> None:
    resumed.write("config.json", [b"{}"])
    files = [*NAMES, "config.json"]
    sidecar = {"schema": "adapterops.bake/1", "plan": plan, "files": files}
    resumed.write(SIDECAR, [json.dumps(sidecar).encode()])


def save(
    out: Path,
    plan: str = "p",
    *,
    overwrite: bool = False,
    fail_at: str = "",
    error: BaseException | None = None,
) -> list[str]:
    """A whole output of three large files; the names of those that were written anew."""
    written = []
    with resumable(out, plan=plan, overwrite=overwrite) as resumed:
        for name in NAMES:
            if resumed.finished(name) == {"name": name, "plan": plan}:
                continue
            if name == fail_at:
                resumed.path(name).write_bytes(b"half")
                raise error or KeyboardInterrupt
            put(resumed, name, plan)
            written.append(name)
        companions(resumed, plan)
    return written


def check_whole(out: Path, *plans: str) -> str:
    """Fails unless the output is one whole output of a plan; which."""
    plan = json.loads((out / SIDECAR).read_text())["plan"]
    assert plan in (plans or ("p",))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        *NAMES,
        "config.json",
        SIDECAR,
    }
    for name in NAMES:
        assert (out / name).read_bytes() == content(name, plan), name
    return plan


def interrupt(out: Path, at: str = NAMES[1], **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        save(out, fail_at=at, **options)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What a clean run leaves.


def test_nothing_but_the_output_appears(tmp_path):
    out = tmp_path / "out"
    with resumable(out, plan="p", overwrite=False) as resumed:
        assert resumed.kept == 0 and resumed.finished(NAMES[0]) is None
        for number, name in enumerate(NAMES):
            put(resumed, name)
            assert resumed.kept == number + 1
            assert not out.exists() and names(tmp_path) == [PARTIAL]
        companions(resumed, "p")
    assert resumed.kept == 0
    assert names(tmp_path) == ["out"]
    check_whole(out)


@pytest.mark.parametrize("length", [230, 231, 255])
@pytest.mark.parametrize("letter", ["n", "é"])
def test_long_names(letter, length, tmp_path):
    name = letter * (length // len(letter.encode()))
    interrupt(tmp_path / name)
    assert len(names(tmp_path)) == 1
    assert save(tmp_path / name) == NAMES[1:]
    assert names(tmp_path) == [name]


def test_long_names_that_begin_alike_do_not_share(tmp_path):
    for end in "ab":
        interrupt(tmp_path / ("n" * 240 + end))
    assert len(names(tmp_path)) == 2


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path):
    with pytest.raises(FileError, match="File name too long"):
        save(tmp_path / ("n" * 256))
    assert not names(tmp_path)


def test_every_file_and_folder_reaches_the_disk_before_it_is_journalled(tmp_path, monkeypatch):
    flushed: list[str] = []
    real = os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with resumable(tmp_path / "out", plan="p", overwrite=False) as resumed:
        path = resumed.path("unet/deep/w")
        path.write_bytes(b"x")
        flushed.clear()
        resumed.done("unet/deep/w", {})
        assert flushed == ["w", "deep", "unet", "output", "journal.jsonl"]
        (resumed.root / "plain").write_bytes(b"not flushed by the caller")
        flushed.clear()
    assert {"plain", "w", "deep", "unet", "output", tmp_path.name} <= set(flushed)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/a", "a//b", "a/", "a\0b"])
def test_names_that_lead_out_are_refused(name, tmp_path):
    with (
        pytest.raises(ValueError, match="no path inside"),
        resumable(tmp_path / "out", plan="p", overwrite=False) as resumed,
    ):
        resumed.path(name)
    assert not names(tmp_path)


# Going on.


@pytest.mark.parametrize("at", range(3))
def test_a_second_run_goes_on(at, disk):
    interrupt(disk / "out", NAMES[at])
    assert names(disk) == ([PARTIAL] if at else [])
    if at:
        left = {path.name for path in (disk / PARTIAL / "output").rglob("*")}
        assert left == {Path(name).name for name in NAMES[:at]}, "the unfinished file is gone"
    assert save(disk / "out") == NAMES[at:]
    check_whole(disk / "out")
    assert names(disk) == ["out"]


def test_how_many_are_kept_is_known(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        resumable(tmp_path / "out", plan="p", overwrite=False) as resumed,
    ):
        put(resumed, NAMES[0])
        put(resumed, NAMES[1])
        raise KeyboardInterrupt
    assert resumed.kept == 2
    with (
        pytest.raises(SystemExit),
        resumable(tmp_path / "out", plan="p", overwrite=False) as resumed,
    ):
        assert resumed.kept == 2
        put(resumed, NAMES[2])
        sys.exit(1)
    assert resumed.kept == 3
    assert save(tmp_path / "out") == []
    check_whole(tmp_path / "out")


def test_a_file_written_again_counts_once(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        resumable(tmp_path / "out", plan="p", overwrite=False) as r,
    ):
        put(r, NAMES[0])
        r.path(NAMES[0]).unlink()
        r.path(NAMES[0]).write_bytes(b"second")
        r.done(NAMES[0], {"time": 2})
        raise KeyboardInterrupt
    with resumable(tmp_path / "out", plan="p", overwrite=False) as r:
        assert r.kept == 1 and r.finished(NAMES[0]) == {"time": 2}
        assert (r.root / NAMES[0]).read_bytes() == b"second"


def test_another_plan_begins_anew(tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    assert save(tmp_path / "out", "q") == NAMES
    check_whole(tmp_path / "out", "q")
    assert names(tmp_path) == ["out"]


def test_outputs_beside_each_other_do_not_mix(tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    assert save(tmp_path / "other") == NAMES
    assert save(tmp_path / "out") == NAMES[2:]
    assert names(tmp_path) == ["other", "out"]


def test_a_link_as_output_goes_on_beside_its_target(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store/out")
    interrupt(tmp_path / "link")
    assert names(tmp_path / "store") == [PARTIAL]
    assert save(tmp_path / "link") == NAMES[1:]
    check_whole(tmp_path / "store" / "out")
    assert (tmp_path / "link").is_symlink()


def test_hard_links_are_taken_over_and_keep_their_mode(disk):
    """A base's untouched shard with --link: neither mode nor bytes of the base may change."""
    base = disk / "base"
    base.write_bytes(content(NAMES[0], "p"))
    base.chmod(0o444)
    out = disk / "out"
    save(out)
    (out / NAMES[0]).chmod(0o600)
    for run in range(2):
        try:
            with resumable(out, plan="p", overwrite=True) as resumed:
                if resumed.finished(NAMES[0]) is None:
                    os.link(base, resumed.path(NAMES[0]))
                    resumed.done(NAMES[0], {"name": NAMES[0], "plan": "p"})
                if not run:
                    raise KeyboardInterrupt
                assert resumed.kept == 1
                for name in NAMES[1:]:
                    put(resumed, name)
                companions(resumed, "p")
        except KeyboardInterrupt:
            assert run == 0
    check_whole(out)
    assert os.path.samefile(base, out / NAMES[0])
    assert stat.S_IMODE(base.stat().st_mode) == 0o444


# What is not taken over.


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"tampered")


def relink(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    os.rename(path, elsewhere)
    path.symlink_to(elsewhere)


TAMPER = {
    "removed": Path.unlink,
    "cut": cut,
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "emptied": lambda path: os.truncate(path, 0),
    "changed": change,
    "a link": relink,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", TAMPER)
def test_a_staged_file_that_was_touched_is_written_again(how, tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    TAMPER[how](tmp_path / PARTIAL / "output" / NAMES[0])
    assert save(tmp_path / "out") == [NAMES[0], NAMES[2]]
    check_whole(tmp_path / "out")


def test_a_staged_folder_that_became_a_link_is_written_again(tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    with (
        pytest.raises(KeyboardInterrupt),
        resumable(tmp_path / "out", plan="p", overwrite=False) as r,
    ):
        put(r, NAMES[2])
        raise KeyboardInterrupt
    staged = tmp_path / PARTIAL / "output" / "unet"
    os.rename(staged, tmp_path / "elsewhere")
    staged.symlink_to(tmp_path / "elsewhere")
    assert save(tmp_path / "out") == [NAMES[2]]
    check_whole(tmp_path / "out")
    assert names(tmp_path / "elsewhere") == ["model.safetensors"], "a link is not followed"


def test_files_that_nobody_journalled_do_not_get_in(tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    output = tmp_path / PARTIAL / "output"
    (output / "stray").write_text("x")
    (output / "folder" / "deep").mkdir(parents=True)
    (output / "folder" / "deep" / "stray").write_text("x")
    (output / "dangling").symlink_to("nowhere")
    assert save(tmp_path / "out") == NAMES[2:]
    check_whole(tmp_path / "out")


@pytest.mark.parametrize("count", [1, 2, 7, 60, 200])
def test_a_journal_that_was_cut(count, tmp_path):
    """A line that is not whole is not there; nothing is appended to it."""
    interrupt(tmp_path / "out", NAMES[2])
    journal = tmp_path / PARTIAL / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - count)
    interrupt(tmp_path / "out", NAMES[2])
    assert [json.loads(line).get("name") for line in journal.read_text().splitlines()] == [
        None,
        *NAMES[:2],
    ]
    assert save(tmp_path / "out") == NAMES[2:]
    check_whole(tmp_path / "out")


def test_a_journal_cut_at_every_byte(tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    whole = (tmp_path / PARTIAL / "journal.jsonl").read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == 10]
    shutil.copytree(tmp_path / PARTIAL, tmp_path / "saved")
    for size in range(0, len(whole), 3):
        shutil.rmtree(tmp_path / PARTIAL, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", tmp_path / PARTIAL)
        os.truncate(tmp_path / PARTIAL / "journal.jsonl", size)
        expected = max(sum(end <= size for end in ends) - 1, 0)
        with (
            pytest.raises(KeyboardInterrupt),
            resumable(tmp_path / "out", plan="p", overwrite=False) as resumed,
        ):
            assert resumed.kept == expected
            assert len(list(resumed.root.iterdir())) == expected
            raise KeyboardInterrupt


BROKEN = {
    "zeros": bytes(100),
    "no JSON": b"{\n",
    "a list": b"[]\n",
    "nested": b"[" * 100_000 + b"\n",
    "no size": b'{"name": "stray", "record": {}, "sample_sha256": ""}\n',
    "leads out": b'{"name": "../x", "size": 1, "sample_sha256": "", "record": {}}\n',
    "no UTF-8": b'{"name": "\xff"}\n',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_line_ends_the_journal(kind, tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    journal = tmp_path / PARTIAL / "journal.jsonl"
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second + BROKEN[kind] + third)
    assert save(tmp_path / "out") == NAMES[1:]
    check_whole(tmp_path / "out")


@pytest.mark.parametrize("kind", [*BROKEN, "another version", "empty"])
def test_a_damaged_first_line_begins_anew(kind, tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    journal = tmp_path / PARTIAL / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    head = {"another version": b'{"version": 2, "plan": "p"}\n', "empty": b""} | BROKEN
    journal.write_bytes(head[kind] + b"".join(lines[1:]))
    assert save(tmp_path / "out") == NAMES
    check_whole(tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "link", "link to a directory"])
def test_something_else_under_the_name_of_the_staging_is_not_deleted(kind, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("x")
    if kind == "file":
        (tmp_path / PARTIAL).write_text("x")
    else:
        (tmp_path / PARTIAL).symlink_to("theirs" if "directory" in kind else "nowhere")
    with pytest.raises(FileError, match=r"partial: is in the way.*remove it"):
        save(tmp_path / "out")
    assert names(tmp_path) == [PARTIAL, "theirs"]
    assert names(tmp_path / "theirs") == ["precious"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_output_folder_inside_that_is_none_is_replaced(kind, tmp_path):
    interrupt(tmp_path / "out", NAMES[2])
    output = tmp_path / PARTIAL / "output"
    os.rename(output, tmp_path / "elsewhere")
    if kind == "file":
        output.write_text("x")
    else:
        output.symlink_to(tmp_path / "elsewhere")
    assert save(tmp_path / "out") == NAMES
    assert names(tmp_path / "elsewhere") == sorted(NAMES[:2])


# Errors.


@pytest.mark.parametrize(
    "error",
    [
        NumericsError("overflow"),
        FormatError("malformed"),
        ChangedError("an input changed"),
        ValueError("unexpected"),
        UsageError("refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_leaves_nothing(error, tmp_path):
    interrupt(tmp_path / "out", NAMES[1])
    with pytest.raises(type(error)) as caught:
        save(tmp_path / "out", fail_at=NAMES[2], error=error)
    assert not names(tmp_path)
    assert "kept" not in str(caught.value)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "full"), r"out: the disk is full; 2 finished files are kept, the"),
        (OSError(errno.EIO, "broken"), r"out: cannot be written: broken; 2 finished files"),
        (FileError("gone", hint="look"), "gone; look; 2 finished files are kept, the same command"),
        (MemoryLimitError("no memory"), "no memory; 2 finished files are kept"),
        (MemoryError("none"), "none"),
    ],
    ids=["ENOSPC", "EIO", "FileError", "MemoryLimitError", "MemoryError"],
)
def test_what_may_pass_keeps_what_is_finished(error, words, tmp_path):
    with pytest.raises(type(error) if isinstance(error, MemoryError) else FileError, match=words):
        save(tmp_path / "out", fail_at=NAMES[2], error=error)
    assert names(tmp_path) == [PARTIAL]
    assert save(tmp_path / "out") == NAMES[2:]


@pytest.mark.parametrize("at", [0, 1])
def test_the_count_in_the_message(at, tmp_path):
    error = OSError(errno.ENOSPC, "full")
    expected = "1 finished file is kept" if at else "nothing was left behind"
    with pytest.raises(FileError, match=f"the disk is full; {expected}"):
        save(tmp_path / "out", fail_at=NAMES[at], error=error)
    assert names(tmp_path) == ([PARTIAL] if at else [])


def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path, monkeypatch):
    """In the thread of the writer; then there is room again."""
    real = os.pwrite
    written = itertools.count()

    def filling(descriptor: int, data: memoryview, offset: int) -> int:
        if next(written) >= 3:  # two for each file: whole blocks, tail
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(FileError, match="disk is full; 1 finished file is kept") as caught:
            save(tmp_path / "out")
    assert caught.value.exit_code == 6
    assert names(tmp_path / PARTIAL / "output") == NAMES[:1]
    assert save(tmp_path / "out") == NAMES[1:]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize(
    "function", ["fsync", "open", "mkdir", "ftruncate", "rename", "write", "pread", "unlink"]
)
def test_every_failing_call(function, code, tmp_path):
    """At any call: the old output or none, or all of the new; the next run makes it whole."""
    out = tmp_path / "out"
    real = getattr(os, function)
    for number in itertools.count(1):
        empty(tmp_path)
        interrupt(out)
        calls = itertools.count(1)

        def failing(*args, _number=number, _calls=calls, **kwargs):
            if next(_calls) == _number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, failing)
            try:
                save(out)
                failed = False
            except FileError:
                failed = True
        if next(calls) <= number + 1 and not failed:
            break
        if out.exists():
            check_whole(out)
        else:
            assert NAMES[0] not in save(out), "what was finished is not lost"
            check_whole(out)
        assert number < 200
    check_whole(out)


@pytest.mark.parametrize("function", ["fsync", "open", "mkdir", "ftruncate", "write"])
def test_a_beginning_that_fails_leaves_nothing(function, tmp_path):
    real = getattr(os, function)
    failed = 0
    for number in range(1, 8):
        calls = itertools.count(1)

        def failing(*args, _number=number, _calls=calls, **kwargs):
            if next(_calls) == _number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, failing)
            try:
                with resumable(tmp_path / "out", plan="p", overwrite=False):
                    patch.undo()
                    raise KeyboardInterrupt
            except FileError as error:
                assert "cannot be written" in str(error)
                failed += 1
            except KeyboardInterrupt:
                pass
        assert not names(tmp_path), number
    assert failed


# Two at once.


def test_two_processes_do_not_write_one_output(tmp_path):
    with resumable(tmp_path / "out", plan="p", overwrite=False) as resumed:
        put(resumed, NAMES[0])
        for plan in "pq":
            with pytest.raises(UsageError, match="another process is writing") as caught:
                save(tmp_path / "out", plan)
            assert caught.value.exit_code == 2
        for name in NAMES[1:]:
            put(resumed, name)
        companions(resumed, "p")
    check_whole(tmp_path / "out")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    from adapterops.files import resumable as module

    def refusing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refusing)
    interrupt(tmp_path / "out")
    assert save(tmp_path / "out") == NAMES[1:]


def test_many_processes_at_once(tmp_path):
    """Each writes the output, or is told that another does, or that it is there."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_resumable import save\n"
        "from adapterops.errors import UsageError\n"
        "for _ in range(10):\n    try:\n        save(Path(sys.argv[1]), overwrite=True)\n"
        "    except UsageError as error:\n        assert 'another process' in str(error), error\n"
        "    else:\n        print('saved')\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "out")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [writer.communicate(timeout=60) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    assert any(shown for shown, _ in said)
    check_whole(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# What may be replaced.


def test_an_output_that_exists_is_refused_first(tmp_path):
    save(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="exists already"):
        save(tmp_path / "out", "q")
    assert names(tmp_path) == ["out"]
    assert save(tmp_path / "out", "q", overwrite=True) == NAMES
    check_whole(tmp_path / "out", "q")


def test_an_output_that_appears_meanwhile_keeps_what_is_finished(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match=r"exists already.*3 finished files are kept"),
        resumable(out, plan="p", overwrite=False) as resumed,
    ):
        for name in NAMES:
            put(resumed, name)
        companions(resumed, "p")
        out.mkdir()
        (out / "notes").write_text("theirs")
    assert (out / "notes").read_text() == "theirs"
    shutil.rmtree(out)
    assert save(out) == []
    check_whole(out)


def test_a_replaced_output_keeps_its_modes_in_subfolders_too(disk):
    out = disk / "out"
    save(out)
    modes = {".": 0o750, "unet": 0o700, NAMES[2]: 0o600, NAMES[0]: 0o640}
    for name, mode in modes.items():
        (out / name).chmod(mode)
    save(out, "q", overwrite=True)
    check_whole(out, "q")
    assert {name: stat.S_IMODE((out / name).stat().st_mode) for name in modes} == modes


def test_a_file_system_that_cannot_exchange(tmp_path, monkeypatch):
    from adapterops.files import publish

    monkeypatch.setattr(publish, "_exchange", lambda *_: False)
    save(tmp_path / "out")
    save(tmp_path / "out", "q", overwrite=True)
    check_whole(tmp_path / "out", "q")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["precious", "unet/precious", "deep/er/precious"])
def test_a_file_of_others_in_a_subfolder_is_not_deleted(where, tmp_path):
    out = tmp_path / "out"
    save(out)
    (out / where).parent.mkdir(parents=True, exist_ok=True)
    (out / where).write_text("x")
    named = where.split("/")[0] if where.startswith("deep") else where
    with pytest.raises(OutputExistsError, match=f"holds '{named}', which was not written"):
        save(out, "q", overwrite=True)
    assert (out / where).read_text() == "x"


@pytest.mark.parametrize("kind", ["empty folder", "link to a folder", "dangling link"])
def test_foreign_things_that_are_no_files(kind, tmp_path):
    out = tmp_path / "out"
    save(out)
    assert foreign_files(out, MAIN) == []
    if kind == "empty folder":
        (out / "unet" / "x").mkdir()
    else:
        (out / "unet" / "x").symlink_to(tmp_path if "folder" in kind else "nowhere")
    assert foreign_files(out, MAIN) == ["unet/x"]


@pytest.mark.parametrize("listed", ["x", [["a"], {}, 3, None], None, {"config.json": 1}])
def test_a_list_of_files_that_is_none(listed, tmp_path):
    """Of a hostile sidecar; what it does not list in a sane way is not ours."""
    save(tmp_path / "out")
    sidecar = {"schema": "adapterops.bake/1", "files": listed}
    (tmp_path / "out" / SIDECAR).write_text(json.dumps(sidecar))
    foreign = foreign_files(tmp_path / "out", MAIN)
    assert foreign is not None and "unet" in foreign and NAMES[0] in foreign


# Kills and signals.

# Dies at the N-th call of a function that changes the disk, for each N; then the next run goes on.
_SUICIDE = """
import os, signal, sys
from pathlib import Path
from tests.test_resumable import NAMES, PARTIAL, check_whole, save

folder, replaced = Path(sys.argv[1]), sys.argv[2] == "old"
out = folder / "out"
FUNCTIONS = ("pwrite", "write", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir", "open")

def child(number):
    left = number
    for name in FUNCTIONS:
        def wrapped(*arguments, name=name, real=getattr(os, name), **options):
            nonlocal left
            left -= name != "open" or bool(arguments[1] & os.O_CREAT)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        setattr(os, name, wrapped)
    save(out, overwrite=True)
    os._exit(0)

for number in range(1, 400):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if replaced:
        save(out, "old")
    if (pid := os.fork()) == 0:
        child(number)
    status = os.waitpid(pid, 0)[1]
    found = check_whole(out, "p", "old") if out.exists() else "none"
    journal = folder / PARTIAL / "journal.jsonl"
    lines = journal.read_bytes().count(b"\\n") if journal.exists() else 0
    if found != "p":
        written = save(out, overwrite=True)
        assert len(written) <= len(NAMES) - max(lines - 1, 0), (number, lines, written)
        check_whole(out)
        assert [path.name for path in folder.iterdir()] == ["out"], list(folder.iterdir())
        found += str(len(written))
    print(found)
    if os.WIFEXITED(status):
        break
"""


@pytest.mark.parametrize("before", ["new", "old"])
def test_sigkill_at_every_call_that_changes_the_disk(before, tmp_path):
    """Never less than whole; the next run writes what was not finished and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", _SUICIDE, str(tmp_path), before],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    states = done.stdout.split()
    kind = "none" if before == "new" else "old"
    assert states[-1] == "p" and len(states) > 40
    order = [f"{kind}3", f"{kind}2", f"{kind}1", f"{kind}0", "p"]
    assert states == sorted(states, key=order.index) and set(states) == set(order)


_WRITER = """
import os, sys, time
from pathlib import Path
from adapterops.files.direct import SequentialWriter
from adapterops.files.resumable import resumable

out, log = Path(sys.argv[1]), sys.argv[2]
block = bytes(range(256)) * 256
with resumable(out, plan="p", overwrite=False) as resumed:
    for number in range(6):
        if resumed.finished(f"{number}"):
            continue
        with open(log, "a") as file:
            file.write(f"{number}\\n")
        with SequentialWriter(resumed.path(f"{number}"), 16 * len(block)) as writer:
            for _ in range(16):
                writer.append(block)
                time.sleep(0.002)
            writer.finish()
        resumed.done(f"{number}", {"number": number})
"""


def _start(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / "out"), str(tmp_path / "log")],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_stopped_at_random_moments_it_still_ends(number, disk):
    """Each stop costs at most the one file that was being written."""
    choose = random.Random(int(number))
    log, out = disk / "log", disk / "out"
    log.touch()
    for stops in range(30):
        process = _start(disk)
        begun = log.stat().st_size
        while stops < 25 and log.stat().st_size == begun and process.poll() is None:
            time.sleep(0.002)
        if stops < 25:
            time.sleep(choose.uniform(0, 0.15))
            process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        if out.exists():
            break
        assert process.returncode == -number, said
    assert stops >= 1
    assert names(disk) == ["log", "out"]
    for name in map(str, range(6)):
        assert (out / name).read_bytes() == bytes(range(256)) * 256 * 16
    assert len(log.read_text().splitlines()) <= 6 + stops


@pytest.mark.parametrize("function", ["mkdir", "rename", "fsync", "rmdir", "unlink", "open"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_a_system_call(when, function, tmp_path):
    """For every N; the next run makes it whole and finds what was finished."""
    out = tmp_path / "out"
    real = getattr(os, function)
    for number in itertools.count(1):
        empty(tmp_path)
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
                save(out)
            except KeyboardInterrupt:
                assert sent
        if not out.exists():
            save(out)
        check_whole(out)
        assert names(tmp_path) == ["out"]
        if not sent:
            break
        assert number < 200


def test_signals_wait_only_for_short_blocks():
    """Inside the output itself Ctrl-C is heard at once."""
    with pytest.raises(KeyboardInterrupt), undisturbed():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done
