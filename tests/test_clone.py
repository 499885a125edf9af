"""Whole files duplicated: links, clones, copies, holes, and whatever fails on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from adapterops.errors import ChangedError, FileError
from adapterops.files import clone
from adapterops.files.clone import duplicate, reflink

SIZES = [0, 1, 4095, 4096, 1_000_001]
MEBIBYTE = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(3 * MEBIBYTE + 17))
    path.chmod(0o640)
    return path


def refuse(code: int):
    """A function of the operating system that fails."""

    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_is_equal(size, tmp_path):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert duplicate(tmp_path / "a", tmp_path / "b") in ("copied", "cloned")
    assert (tmp_path / "b").read_bytes() == data
    assert (tmp_path / "a").read_bytes() == data
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_of_a_copy_follows_the_umask(mask, source, tmp_path):
    before = os.umask(mask)
    try:
        duplicate(source, tmp_path / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("link", [True, False])
def test_a_link_to_the_source_is_followed(link, source, tmp_path):
    """Files in a hub cache are links to blobs."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model").symlink_to("../source")
    duplicate(tmp_path / "hub" / "model", tmp_path / "b", link=link)
    assert not (tmp_path / "b").is_symlink()
    assert (tmp_path / "b").read_bytes() == source.read_bytes()
    assert os.path.samefile(source, tmp_path / "b") == link


def test_a_hard_link_is_the_file_itself(source, tmp_path):
    before = source.stat()
    assert duplicate(source, tmp_path / "b", link=True) == "linked"
    assert (tmp_path / "b").stat().st_ino == before.st_ino
    assert source.stat().st_mode == before.st_mode and source.stat().st_nlink == 2


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_a_link_that_cannot_be_is_a_copy(code, source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(code))
    assert duplicate(source, tmp_path / "b", link=True) in ("copied", "cloned")
    assert (tmp_path / "b").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("link", [True, False])
def test_another_file_system(link, source):
    target = Path(f"/dev/shm/adapterops-{os.getpid()}")
    try:
        assert duplicate(source, target, link=link) == "copied"
        assert target.read_bytes() == source.read_bytes()
    finally:
        target.unlink(missing_ok=True)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL])
def test_a_file_system_without_clones(code, source, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "ioctl", refuse(code))
    with open(source, "rb") as one, open(tmp_path / "b", "wb") as other:
        assert not reflink(one.fileno(), other.fileno())
    assert duplicate(source, tmp_path / "c") == "copied"
    assert (tmp_path / "c").read_bytes() == source.read_bytes()


def test_a_clone_is_asked_for_first(source, tmp_path, monkeypatch):
    asked = []

    def cloning(target: int, request: int, origin: int) -> int:
        asked.append(request)
        os.pwrite(target, os.pread(origin, 1 << 30, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", cloning)
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EIO))
    assert duplicate(source, tmp_path / "b") == "cloned"
    assert asked == [0x40049409] and (tmp_path / "b").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, 0])
def test_where_the_kernel_cannot_copy_a_buffer_does(answer, after, source, tmp_path, monkeypatch):
    """At once, or after some pieces; a return of 0 before the end is a refusal too."""
    real, calls = os.copy_file_range, []

    def some(origin: int, target: int, count: int, start: int, place: int) -> int:
        calls.append(start)
        if len(calls) > after:
            return refuse(answer)() if answer else 0
        return real(origin, target, min(count, 999_999), start, place)

    monkeypatch.setattr(os, "copy_file_range", some)
    monkeypatch.setattr(clone, "reflink", lambda *_: False)
    assert duplicate(source, tmp_path / "b") == "copied"
    assert (tmp_path / "b").read_bytes() == source.read_bytes()
    assert len(calls) == after + 1


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize(
    "data", [(), (0,), (5,), (9,), (0, 9), (2, 3, 7)], ids=lambda at: "-".join(map(str, at))
)
def test_holes_stay_holes(data, in_kernel, tmp_path, monkeypatch):
    """Ten mebibytes with data in some of them."""
    path, copy = tmp_path / "a", tmp_path / "b"
    with open(path, "wb") as file:
        file.truncate(10 * MEBIBYTE)
        for at in data:
            file.seek(at * MEBIBYTE)
            file.write(os.urandom(MEBIBYTE))
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
    duplicate(path, copy)
    assert copy.read_bytes() == path.read_bytes()
    assert copy.stat().st_blocks <= path.stat().st_blocks + 64


def test_a_file_system_that_does_not_know_holes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "lseek", refuse(errno.EINVAL))
    duplicate(source, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("change", ["rewritten", "longer", "shorter", "replaced"])
@pytest.mark.parametrize("link", [True, False])
def test_a_source_that_changes_meanwhile(change, link, source, tmp_path, monkeypatch):
    real = os.fsync

    def changing(descriptor: int) -> None:
        real(descriptor)
        size = source.stat().st_size
        if change == "replaced":
            (tmp_path / "new").write_bytes(bytes(size))
            os.replace(tmp_path / "new", source)
        elif change == "rewritten":
            os.utime(source, ns=(1, 1))
        else:
            os.truncate(source, size + (1 if change == "longer" else -1))

    monkeypatch.setattr(os, "fsync", changing)
    with pytest.raises(ChangedError, match="changed while being read") as caught:
        duplicate(source, tmp_path / "b", link=link)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "b").exists() and source.exists()


def test_a_source_that_is_cut_while_a_buffer_copies_it(source, tmp_path, monkeypatch):
    real = os.pread

    def cutting(*arguments: int) -> bytes:
        os.truncate(source, MEBIBYTE + 5)
        return real(*arguments)

    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
    monkeypatch.setattr(os, "pread", cutting)
    with pytest.raises(ChangedError, match=rf"source: ends at byte {MEBIBYTE + 5}"):
        duplicate(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "function, code, words",
    [
        ("copy_file_range", errno.ENOSPC, "disk is full"),
        ("copy_file_range", errno.EDQUOT, "disk is full"),
        ("copy_file_range", errno.EIO, "cannot be written"),
        ("fsync", errno.ENOSPC, "disk is full"),
        ("ftruncate", errno.EFBIG, "File too large"),
        ("open", errno.EMFILE, "Too many open files"),
    ],
)
def test_failing_calls_leave_no_target(function, code, words, source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, function, refuse(code))
    with pytest.raises(FileError, match=words):
        duplicate(source, tmp_path / "b")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_full_in_the_middle_of_a_buffered_copy(source, tmp_path, monkeypatch):
    real = os.pwrite

    def filling(descriptor: int, data: memoryview, offset: int) -> int:
        return refuse(errno.ENOSPC)() if offset else real(descriptor, data, offset)

    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(FileError, match="the disk is full; nothing was left behind"):
        duplicate(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_real_limit_of_the_size_of_files(source, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom adapterops.files.clone import duplicate\n"
        "from adapterops.errors import FileError\n"
        "try:\n    duplicate(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except FileError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE, MEBIBYTE)),
        timeout=60,
    )
    assert done.returncode == 0 and "File too large" in done.stdout, done
    assert not (tmp_path / "b").exists()


def test_a_target_that_exists_is_not_touched(source, tmp_path):
    (tmp_path / "b").write_text("theirs")
    (tmp_path / "c").symlink_to("absent")
    for target in (tmp_path / "b", tmp_path / "c"):
        with pytest.raises(FileError, match="File exists"):
            duplicate(source, target)
    assert (tmp_path / "b").read_text() == "theirs"
    assert (tmp_path / "c").is_symlink() and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("kind", ["absent", "directory", "fifo", "dangling"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / "a"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    with pytest.raises(FileError):
        duplicate(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()
