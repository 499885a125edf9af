"""Positioned reads: what changes, vanishes or cannot be read is named, and never hangs."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterops.errors import ChangedError, FileError
from adapterops.files import source
from adapterops.files.source import LocalFile, MemoryFile, file_header, read_bytes, read_header

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of 256 known bytes."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)))
    return path


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users may enter (those of pytest are private)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("offset, length", [(0, 256), (0, 0), (100, 1), (255, 1), (17, 100)])
def test_reads_what_is_there(numbers, offset, length):
    expected = bytes(range(256))[offset : offset + length]
    assert read_bytes(LocalFile(numbers), offset, length) == expected
    assert read_bytes(MemoryFile("m", bytes(range(256))), offset, length) == expected


def test_a_read_that_comes_in_pieces_is_put_together(numbers, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    assert read_bytes(LocalFile(numbers), 3, 200) == bytes(range(3, 203))


def test_a_read_past_the_end_is_a_change(numbers):
    with pytest.raises(ChangedError, match=r"numbers: ends at byte 256, expected 256") as caught:
        read_bytes(LocalFile(numbers), 250, 10)
    assert caught.value.exit_code == 6


def test_truncation_between_two_reads(numbers):
    file = LocalFile(numbers)
    assert read_bytes(file, 0, 10) == bytes(range(10))
    os.truncate(numbers, 100)
    assert read_bytes(file, 50, 50) == bytes(range(50, 100))
    with pytest.raises(ChangedError, match=r"ends at byte 100, expected 256"):
        read_bytes(file, 90, 20)
    with pytest.raises(ChangedError, match=r"256 bytes, now 100"):
        file.check_unchanged()


def test_truncation_before_the_first_read(numbers):
    file = LocalFile(numbers)
    os.truncate(numbers, 100)
    with pytest.raises(ChangedError, match=r"256 bytes, now 100"):
        read_bytes(file, 0, 10)


def test_another_file_of_the_same_size_and_time_is_noticed(numbers, tmp_path):
    file = LocalFile(numbers)
    times = os.stat(numbers).st_mtime_ns
    other = tmp_path / "other"
    other.write_bytes(bytes(256))
    os.utime(other, ns=(times, times))
    os.replace(other, numbers)
    for check in (file.check_unchanged, lambda: read_bytes(file, 0, 1)):
        with pytest.raises(ChangedError, match="replaced"):
            check()


def test_writing_in_place_is_noticed(numbers):
    file = LocalFile(numbers)
    before = os.stat(numbers).st_mtime_ns
    with open(numbers, "r+b") as out:
        out.write(b"x")
    os.utime(numbers, ns=(before + 1, before + 1))
    with pytest.raises(ChangedError):
        file.check_unchanged()


def test_a_file_that_vanishes(numbers):
    file = LocalFile(numbers)
    numbers.unlink()
    for check in (file.check_unchanged, lambda: read_bytes(file, 0, 1)):
        with pytest.raises(FileError, match="no such file") as caught:
            check()
        assert caught.value.exit_code == 6


def test_an_unchanged_file_stays_unchanged(numbers):
    file = LocalFile(numbers)
    read_bytes(file, 0, 10)
    file.check_unchanged()
    assert file.size() == 256


def test_a_read_error_names_the_file(numbers, monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(FileError, match=r"numbers: cannot be read: Input/output error"):
        read_bytes(LocalFile(numbers), 0, 1)


@pytest.mark.parametrize(
    "name, words",
    [
        ("absent", "no such file"),
        ("numbers/below", "no such file"),
        ("n" * 300, "cannot be read: File name too long"),
        ("nul\0byte", "cannot be read"),
    ],
)
def test_paths_that_lead_nowhere(numbers, name, words):
    with pytest.raises(FileError, match=words) as caught:
        LocalFile(f"{numbers.parent}/{name}")
    assert caught.value.exit_code == 6


def test_a_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError, match="symbolic links"):
        LocalFile(tmp_path / "loop")


def test_a_link_is_followed(numbers, tmp_path):
    (tmp_path / "link").symlink_to(numbers)
    assert read_bytes(LocalFile(tmp_path / "link"), 1, 2) == b"\x01\x02"


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "socket"])
def test_what_is_no_regular_file_is_refused_without_opening_it(kind, tmp_path):
    path = tmp_path / "odd"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    with pytest.raises(FileError, match="not a regular file"):
        LocalFile(path)


def test_a_file_replaced_by_a_fifo_does_not_hang(numbers):
    """In a process of its own: opening a fifo waits for a writer, for ever."""
    program = (
        "import os, sys\n"
        "from adapterops.errors import ChangedError\n"
        "from adapterops.files.source import LocalFile, read_bytes\n"
        "file = LocalFile(sys.argv[1])\n"
        "os.unlink(sys.argv[1])\n"
        "os.mkfifo(sys.argv[1])\n"
        "try:\n    read_bytes(file, 0, 1)\n"
        "except ChangedError as error:\n    print(error)\n"
    )
    try:
        done = run_python(program, str(numbers))
    except subprocess.TimeoutExpired:
        pytest.fail("waits for a writer")
    assert "changed while being read" in done.stdout, done.stderr


@as_root
def test_a_file_that_may_not_be_read(shared_folder):
    path = shared_folder / "secret"
    path.write_bytes(b"x" * 20)
    path.chmod(0o000)
    program = (
        "import os, sys\n"
        "from adapterops.files.source import LocalFile, read_header\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try:\n    read_header(LocalFile(sys.argv[1]))\n"
        "except Exception as error:\n    print(type(error).__name__, error.exit_code, error)\n"
    )
    done = run_python(program, str(path))
    assert done.stdout.startswith("FileError 6"), done.stdout + done.stderr
    assert "Permission denied" in done.stdout


# Many files.


def test_more_files_than_descriptors():
    """500 files under a limit of 100 descriptors, from several threads, twice."""
    program = (
        "import os, resource, tempfile\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from adapterops.files.source import LocalFile, read_bytes\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    files = []\n"
        "    for i in range(500):\n"
        "        with open(f'{folder}/{i}', 'wb') as out:\n"
        "            out.write(i.to_bytes(4, 'little'))\n"
        "        files.append(LocalFile(f'{folder}/{i}'))\n"
        "    def read(i):\n"
        "        return int.from_bytes(read_bytes(files[i], 0, 4), 'little') == i\n"
        "    with ThreadPoolExecutor(8) as pool:\n"
        "        assert all(pool.map(read, list(range(500)) * 2))\n"
        "    print(len(os.listdir('/proc/self/fd')))\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= source.POOL_SIZE + 10


def test_too_few_descriptors_is_an_error_with_a_name(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    program = (
        "import resource, sys\n"
        "from adapterops.files.source import LocalFile, read_bytes\n"
        "file = LocalFile(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try:\n    read_bytes(file, 0, 1)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = run_python(program, str(tmp_path / "x"))
    assert done.stdout.startswith("FileError"), done.stdout + done.stderr
    assert "Too many open files" in done.stdout


def test_a_descriptor_in_use_is_not_closed(tmp_path, monkeypatch):
    """A read that is under way while the pool wraps around still reads its own file."""
    pool = source._Pool(2)
    monkeypatch.setattr(source, "_POOL", pool)
    files = []
    for index in range(20):
        (tmp_path / str(index)).write_bytes(bytes([index]) * 8)
        files.append(LocalFile(tmp_path / str(index)))
    entered, leave = threading.Event(), threading.Event()

    def slow() -> bytes:
        with pool.descriptor(files[0]) as descriptor:
            entered.set()
            leave.wait(30)
            return os.pread(descriptor, 8, 0)

    with ThreadPoolExecutor(1) as worker:
        result = worker.submit(slow)
        entered.wait(30)
        for index in range(1, 20):
            assert read_bytes(files[index], 0, 8) == bytes([index]) * 8
        leave.set()
        assert result.result() == bytes(8)
    assert len(pool._open) <= 2
    for _, descriptor in pool._open.values():
        os.close(descriptor)


def test_a_closed_file_holds_no_descriptor_and_can_be_read_again(numbers):
    """An open descriptor would keep the space of a deleted file."""
    file = LocalFile(numbers)
    file.close()
    assert read_bytes(file, 0, 2) == b"\x00\x01"
    assert _links_to(numbers) == 1
    file.close()
    file.close()
    assert _links_to(numbers) == 0
    assert read_bytes(file, 0, 2) == b"\x00\x01"
    file.close()
    (numbers.parent / "x").write_bytes(b"\x02" + bytes(7) + b"{}")
    assert file_header(numbers.parent / "x").tensors == {}
    assert _links_to(numbers.parent / "x") == 0


def _links_to(path: Path) -> int:
    """How many descriptors of this process are open on a file."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += entry.readlink() == path
    return found


def test_a_file_opened_again_must_be_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_POOL", source._Pool(1))
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"other")
    a, b = LocalFile(tmp_path / "a"), LocalFile(tmp_path / "b")
    assert read_bytes(a, 0, 5) == b"first"
    assert read_bytes(b, 0, 5) == b"other"  # closes a
    (tmp_path / "new").write_bytes(b"third")
    os.replace(tmp_path / "new", tmp_path / "a")
    with pytest.raises(ChangedError, match="replaced"):
        read_bytes(a, 0, 5)
    for _, descriptor in source._POOL._open.values():
        os.close(descriptor)


def test_a_header_longer_than_the_first_read(tmp_path):
    from adapterops.files.header import encode_header, layout

    shapes = {f"layer.{index}": ("U8", (1,)) for index in range(3000)}
    entries = layout(shapes)
    blob = encode_header(entries, {}) + bytes(3000)
    assert len(blob) > 1 << 16
    (tmp_path / "x").write_bytes(blob)
    assert read_header(LocalFile(tmp_path / "x")).tensors == entries
