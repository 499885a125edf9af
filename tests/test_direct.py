"""Files written past the page cache: every size and cut, file systems that refuse, full disks."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from adapterops.errors import FileError
from adapterops.files import direct
from adapterops.files.direct import BUFFER, PatchWriter, SequentialWriter

SMALL = 64 << 10  # a buffer for these tests, so that small files take several
SIZES = [0, 1, 4095, 4096, 4097, SMALL - 1, SMALL, SMALL + 1, 2 * SMALL, 7 * SMALL + 12_345]


@pytest.fixture(params=["disk", "tmpfs", "no O_DIRECT", "refused at first write"])
def folder(request, tmp_path, monkeypatch):
    """A folder on a file system that takes O_DIRECT, or does not, or says so late."""
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    if request.param == "tmpfs":
        path = Path(f"/dev/shm/adapterops-{os.getpid()}")
        path.mkdir()
        yield path
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        return
    if request.param == "no O_DIRECT":
        refuse_flag(monkeypatch)
    elif request.param == "refused at first write":
        refuse_writes(monkeypatch)
    yield tmp_path


def refuse_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """O_DIRECT cannot be set, as on ramfs."""
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refusing)


def refuse_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """O_DIRECT can be set and every write with it fails, as where blocks are larger."""
    real = os.pwrite

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def write(path: Path, data: bytes, cuts: list[int]) -> None:
    with SequentialWriter(path, len(data)) as writer:
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.append(memoryview(data)[start:stop])
        writer.finish()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_in_pieces_of_every_size(size, folder):
    choose = random.Random(size)
    data = choose.randbytes(size)
    for count in (0, 1, 7, 40):
        path = folder / f"{count}"
        write(path, data, sorted(choose.randint(0, size) for _ in range(count)))
        assert path.read_bytes() == data


def test_larger_than_the_real_buffers(tmp_path):
    data = os.urandom(5 * BUFFER // 2 + 777)
    write(tmp_path / "a", data, [100, BUFFER + 100])
    assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_kinds_of_buffers(kind, tmp_path):
    with SequentialWriter(tmp_path / "a", 6) as writer:
        writer.append(kind(b"abc"))
        writer.append(kind(b""))
        writer.append(kind(b"def"))
        writer.finish()
    assert (tmp_path / "a").read_bytes() == b"abcdef"


def test_items_wider_than_a_byte(tmp_path):
    values = memoryview(b"abcdefgh").cast("I")
    with SequentialWriter(tmp_path / "a", 8) as writer:
        writer.append(values)
        writer.finish()
    with PatchWriter(tmp_path / "a") as patch:
        patch.write(4, values[:1])
        patch.finish()
    assert (tmp_path / "a").read_bytes() == b"abcdabcd"


def test_a_buffer_may_be_changed_once_it_is_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    piece = bytearray(SMALL // 3)
    with SequentialWriter(tmp_path / "a", 20 * len(piece)) as writer:
        for number in range(20):
            piece[:] = bytes([number]) * len(piece)
            writer.append(piece)
        writer.finish()
    expected = b"".join(bytes([number]) * len(piece) for number in range(20))
    assert (tmp_path / "a").read_bytes() == expected


def test_whole_blocks_go_past_the_cache_and_the_tail_through_it(tmp_path, monkeypatch):
    """Where this disk takes O_DIRECT at all; memory, length and offset are aligned."""
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    seen = []
    real = os.pwrite

    def recorded(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append((is_direct(descriptor), offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", recorded)
    with open(tmp_path / "probe", "wb") as probe:
        takes = direct._set_direct(probe.fileno(), True)
    write(tmp_path / "a", bytes(SMALL + 4096 + 5), [])
    assert [size for _, _, size in seen] == ([SMALL, 4096, 5] if takes else [SMALL, 4101])
    assert [flag for flag, _, _ in seen] == ([True, True, False] if takes else [False, False])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """Also where what is left is not aligned any more."""
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:4608], at))
    data = os.urandom(3 * SMALL + 5)
    write(tmp_path / "a", data, [])
    assert (tmp_path / "a").read_bytes() == data


def test_what_is_in_the_page_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    monkeypatch.setattr(direct, "_DIRTY", 2 * SMALL)
    refuse_flag(monkeypatch)
    flushed = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.append(fd) or real(fd))
    write(tmp_path / "a", bytes(9 * SMALL), [])
    assert len(flushed) == 4


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", b"x", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("size", [10, SMALL, 5 * SMALL])
def test_too_few_or_too_many_bytes(size, folder):
    with (
        pytest.raises(ValueError, match=f"{size - 1} bytes for a file of {size}"),
        SequentialWriter(folder / "a", size) as writer,
    ):
        writer.append(bytes(size - 1))
        writer.finish()
    with (
        pytest.raises(ValueError, match=f"{size + 1} bytes for a file of {size}"),
        SequentialWriter(folder / "b", size) as writer,
    ):
        writer.append(bytes(size - 1))
        writer.append(b"xy")


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_text("theirs")
    (tmp_path / "b").symlink_to("c")
    for name in "ab":
        with pytest.raises(FileError, match="File exists"):
            SequentialWriter(tmp_path / name, 5)
    assert (tmp_path / "a").read_text() == "theirs" and not (tmp_path / "c").exists()


def test_nothing_stays_open(tmp_path, monkeypatch):
    """Finished or not, refused or not: neither descriptors nor threads."""
    monkeypatch.setattr(direct, "BUFFER", SMALL)
    threads = threading.active_count()
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        write(tmp_path / f"whole{number}", bytes(3 * SMALL), [])
        with (
            pytest.raises(RuntimeError, match="stop"),
            SequentialWriter(tmp_path / f"part{number}", 9 * SMALL) as writer,
        ):
            writer.append(bytes(5 * SMALL + 1))
            raise RuntimeError("stop")
        writer.close()
        with pytest.raises(FileError):
            SequentialWriter(tmp_path / "absent" / "a", 1)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == opened


# Full disks.


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "disk is full"), (errno.EIO, "written")])
@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_write_that_fails(at, code, words, folder, monkeypatch):
    """In the thread; it is said by the next call, at the latest by finish."""
    real, calls = os.pwrite, []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == at:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with (
        pytest.raises(FileError, match=words) as caught,
        SequentialWriter(folder / "a", 20 * SMALL) as writer,
    ):
        for _ in range(20):
            writer.append(bytes(SMALL))
        writer.finish()
    assert caught.value.exit_code == 6 and caught.value.path == str(folder / "a")


@pytest.mark.parametrize("function", ["fsync", "ftruncate"])
def test_a_failing_end(function, folder, monkeypatch):
    def failing(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(FileError, match="cannot be written"):
        write(folder / "a", b"abc", [])


def test_too_little_room_is_said_at_once(tmp_path):
    with pytest.raises(FileError, match=rf"needs {1 << 60} bytes, the disk has \d+ free"):
        SequentialWriter(tmp_path / "a", 1 << 60)


def test_a_file_system_that_counts_no_blocks_is_not_full(tmp_path, monkeypatch):
    """ramfs says that it has none and takes everything."""
    none = os.statvfs_result([4096, 4096, *[0] * 6, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda _: none)
    write(tmp_path / "a", b"abc", [])
    assert (tmp_path / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("size", [1 << 20, 1 << 21])
def test_a_real_limit_of_the_size_of_files(size, tmp_path):
    """Reserving the blocks beforehand meets it, not the last write."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom adapterops.errors import FileError\n"
        "from adapterops.files.direct import SequentialWriter\n"
        f"try:\n    with SequentialWriter(Path(sys.argv[1]), {size}) as writer:\n"
        f"        writer.append(bytes({size}))\n        writer.finish()\n        print('fits')\n"
        "except FileError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert ("fits" if size == 1 << 20 else "File too large") in done.stdout


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR])
def test_a_file_system_that_cannot_reserve(code, tmp_path, monkeypatch):
    """The file is written all the same; an interrupted call is made again."""
    answers = iter([code, 0])

    def fallocate(*_: object) -> int:
        wanted = next(answers)
        direct.ctypes.set_errno(wanted)
        return -1 if wanted else 0

    library = type("library", (), {"fallocate64": staticmethod(fallocate)})
    monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: library)
    write(tmp_path / "a", b"abc", [])
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert next(answers, None) == (None if code == errno.EINTR else 0)


def test_a_disk_that_has_no_blocks_to_reserve(tmp_path, monkeypatch):
    """Although there seemed to be room: others write, or a quota."""

    def fallocate(*_: object) -> int:
        direct.ctypes.set_errno(errno.ENOSPC)
        return -1

    library = type("library", (), {"fallocate64": staticmethod(fallocate)})
    monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: library)
    with pytest.raises(FileError, match="disk is full"):
        SequentialWriter(tmp_path / "a", 5)


# Patching.


def test_patches_change_what_they_say(tmp_path):
    path = tmp_path / "a"
    choose = random.Random(1)
    data = bytearray(choose.randbytes(100_000))
    path.write_bytes(data)
    with PatchWriter(path) as writer:
        for _ in range(50):
            start = choose.randrange(100_000)
            piece = choose.randbytes(choose.randint(0, min(5000, 100_000 - start)))
            writer.write(start, piece)
            data[start : start + len(piece)] = piece
        writer.finish()
    assert path.read_bytes() == data


@pytest.mark.parametrize("offset, size", [(-1, 1), (10, 1), (8, 3), (1 << 40, 1)])
def test_a_patch_does_not_let_the_file_grow(offset, size, tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    with (
        pytest.raises(ValueError, match="of a file of 10"),
        PatchWriter(tmp_path / "a") as writer,
    ):
        writer.write(offset, b"x" * size)
    assert (tmp_path / "a").read_bytes() == bytes(10)


def test_a_hard_link_is_not_patched(tmp_path):
    (tmp_path / "base").write_bytes(b"base")
    os.link(tmp_path / "base", tmp_path / "a")
    with pytest.raises(ValueError, match="has 2 names"):
        PatchWriter(tmp_path / "a")
    (tmp_path / "b").symlink_to("base")
    with pytest.raises(FileError):
        PatchWriter(tmp_path / "b")


@pytest.mark.parametrize("function", ["pwrite", "fsync"])
def test_a_patch_that_fails(function, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(10))

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(FileError, match="disk is full"), PatchWriter(tmp_path / "a") as writer:
        writer.write(2, b"x")
        writer.finish()


@pytest.mark.parametrize("size", [0, 5, 4096, 70_000, 3 * SMALL, 1 << 20])
def test_given_memory_is_written_as_it_is_wherever_it_lies(size, folder):
    """Aligned to its place in the file, off by some bytes, between small pieces."""
    choose = random.Random(size)
    for number, shift in enumerate([0, 1, 8, 4095]):
        pieces = [choose.randbytes(choose.choice([0, 3, 777, 4096])), choose.randbytes(size)] * 3
        data = b"".join(pieces)
        path = folder / f"{number}"
        with SequentialWriter(path, len(data)) as writer:
            position = 0
            for index, piece in enumerate(pieces):
                if index % 2:
                    memory = direct.aligned(len(piece), position + shift)
                    memory[:] = np.frombuffer(piece, np.uint8)
                    writer.give(memory.data)
                else:
                    writer.append(piece)
                position += len(piece)
            writer.finish()
        assert path.read_bytes() == data


def address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def test_aligned_memory_is_written_without_a_copy(tmp_path, monkeypatch):
    """From its own address, from the first whole block of the file to the last."""
    seen = []
    single, several = os.pwrite, os.pwritev

    def recorded(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append((address(data), offset, len(data)))
        return single(descriptor, data, offset)

    def together(descriptor: int, parts: list[memoryview], offset: int) -> int:
        for part in parts:
            seen.append((address(part), offset, len(part)))
            offset += len(part)
        return several(descriptor, parts, offset - sum(map(len, parts)))

    monkeypatch.setattr(os, "pwrite", recorded)
    monkeypatch.setattr(os, "pwritev", together)
    memory = direct.aligned(1 << 20, 104)
    memory[:] = 7
    with SequentialWriter(tmp_path / "a", 104 + len(memory)) as writer:
        writer.append(bytes(104))
        writer.give(memory.data)
        writer.finish()
    assert (tmp_path / "a").read_bytes() == bytes(104) + b"\7" * len(memory)
    assert (memory.ctypes.data + 4096 - 104, 4096, (1 << 20) - 4096) in seen


@pytest.mark.parametrize("blocks", [0, 1, 2, 20])
def test_short_writes_of_two_parts_are_continued(blocks, tmp_path, monkeypatch):
    """Nothing, the first part only, or some of the second."""
    real, most = os.pwritev, 4096 * blocks

    def short(descriptor: int, parts: list[memoryview], offset: int) -> int:
        first, more = parts
        return real(descriptor, [first[:most], more[: max(0, most - len(first))]], offset)

    memory = direct.aligned(200_000, 104)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    data = bytes(104) + memory.tobytes()
    monkeypatch.setattr(os, "pwritev", short)
    with SequentialWriter(tmp_path / "a", len(data)) as writer:
        writer._direct = True  # also where this disk takes no O_DIRECT
        writer.append(data[:104])
        writer.give(memory.data)
        writer.finish()
    assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EINVAL])
def test_two_parts_that_are_refused(code, tmp_path, monkeypatch):
    """A full disk is an error; a file system that takes no such writes gets them one by one."""

    def refusing(descriptor: int, parts: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", refusing)
    memory = direct.aligned(1 << 20, 104)
    memory[:] = 9

    def write_both() -> None:
        with SequentialWriter(tmp_path / "a", 104 + len(memory)) as writer:
            writer._direct = True
            writer.append(bytes(104))
            writer.give(memory.data)
            writer.finish()

    if code == errno.ENOSPC:
        with pytest.raises(FileError, match="disk is full"):
            write_both()
    else:
        write_both()
        assert (tmp_path / "a").read_bytes() == bytes(104) + memory.tobytes()
