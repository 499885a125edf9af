"""Positioned reads of local files, never mmap: truncating a mapped file kills the process.

At most `POOL_SIZE` descriptors are open at once, so that a merge of a thousand adapters fits the
usual limit of 1,024. Every reopening checks that it is still the same file.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from adapterops.errors import ChangedError, FileError, FormatError
from adapterops.files.header import Header, header_length, parse_header

POOL_SIZE = 64
_FIRST_READ = 1 << 16
_SAMPLE, _SAMPLES = 1 << 12, 16  # bytes of a block, blocks


class Source(Protocol):
    """Bytes that can be read at any position."""

    path: str

    def size(self) -> int: ...
    def pread_into(self, offset: int, buffer: memoryview) -> None: ...
    def check_unchanged(self) -> None: ...
    def close(self) -> None: ...


class LocalFile:
    """A file on disk, opened when first read and perhaps closed and reopened between reads."""

    __slots__ = ("_identity", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from None
        except ValueError as error:  # a path with NUL
            raise FileError(f"cannot be read: {error}", path=self.path) from None
        if not stat.S_ISREG(status.st_mode):
            raise FileError("not a regular file", path=self.path)
        self._identity = _identity(status)

    def size(self) -> int:
        return self._identity[2]

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; a short read means that the file shrank."""
        done = 0
        with _POOL.descriptor(self) as descriptor:
            while done < len(buffer):
                try:
                    got = os.preadv(descriptor, [buffer[done:]], offset + done)
                except OSError as error:
                    raise unreadable(self.path, error) from None
                if got == 0:
                    raise ChangedError(
                        f"ends at byte {offset + done}, expected {self.size()}: "
                        "it was truncated while being read",
                        path=self.path,
                    )
                done += got

    def check_unchanged(self) -> None:
        """Raise ChangedError unless the path still names the file that was opened."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from None
        self._compare(status)

    def open(self) -> int:
        """A new descriptor; it does not wait where the path has become a fifo."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise unreadable(self.path, error) from None
        try:
            self._compare(os.fstat(descriptor))
        except ChangedError:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Give the descriptor back: while one is open, a deleted file still fills the disk."""
        _POOL.forget(self)

    def _compare(self, status: os.stat_result) -> None:
        if _identity(status) != self._identity:
            raise ChangedError(
                f"changed while being read: it had {self._identity[2]} bytes, "
                f"now {status.st_size}, or was replaced; run again when nothing writes to it",
                path=self.path,
            )


class MemoryFile:
    """Bytes in memory that read like a file (what a checked pickle was turned into)."""

    __slots__ = ("_data", "_origin", "path")

    def __init__(self, path: str, data: bytes, origin: LocalFile | None = None) -> None:
        self.path = path
        self._data = data
        self._origin = origin

    def size(self) -> int:
        return len(self._data)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to give back."""

    def check_unchanged(self) -> None:
        """Raise ChangedError if the file that the bytes were made from is another now."""
        if self._origin:
            self._origin.check_unchanged()


def unreadable(path: str, error: OSError) -> FileError:
    """The one wording for an operating-system error on reading `path`."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FileError("no such file or directory", path=path)
    return FileError(f"cannot be read: {error.strerror or error}", path=path)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Pool:
    """Least recently used descriptors; one in use is never closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[LocalFile, int]] = OrderedDict()
        self._users: dict[int, int] = {}

    @contextmanager
    def descriptor(self, file: LocalFile) -> Iterator[int]:
        key = id(file)
        with self._lock:
            if key not in self._open:
                self._open[key] = (file, file.open())
            self._open.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            descriptor = self._open[key][1]
            self._close_idle()
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[key] -= 1

    def forget(self, file: LocalFile) -> None:
        with self._lock:
            if id(file) in self._open and not self._users.get(id(file)):
                self._users.pop(id(file), None)
                os.close(self._open.pop(id(file))[1])

    def _close_idle(self) -> None:
        for key in list(self._open):
            if len(self._open) <= self._limit:
                return
            if not self._users.get(key):
                os.close(self._open.pop(key)[1])
                self._users.pop(key, None)


_POOL = _Pool(POOL_SIZE)


def read_bytes(source: Source, offset: int, length: int) -> bytearray:
    """`length` bytes of `source` from `offset`."""
    buffer = bytearray(length)
    source.pread_into(offset, memoryview(buffer))
    return buffer


def sample(source: Source, offset: int, nbytes: int) -> bytes:
    """Sixteen blocks of 4 KiB, spread evenly over `nbytes` of `source` from `offset`."""
    last = max(nbytes - _SAMPLE, 0)
    starts = sorted({last * k // (_SAMPLES - 1) for k in range(_SAMPLES)})
    size = min(_SAMPLE, nbytes)
    return b"".join(bytes(read_bytes(source, offset + start, size)) for start in starts)


def read_header(source: Source) -> Header:
    """The checked safetensors header of a source, in one read where it is small."""
    size = source.size()
    first = bytes(read_bytes(source, 0, min(size, _FIRST_READ)))
    try:
        length = header_length(first[:8], size, source.path)
        raw = first[8 : 8 + length]
        if len(raw) < length:
            raw += bytes(read_bytes(source, 8 + len(raw), length - len(raw)))
        return parse_header(raw, size, source.path)
    except FormatError:
        if first[:5].lower() in (b"<!doc", b"<html") or first.startswith(
            b"version https://git-lfs"
        ):
            raise FormatError(
                "is a Git LFS pointer or a web page, not the file itself",
                path=source.path,
                hint="fetch it again, with `git lfs pull` or from the hub",
            ) from None
        if _looks_like_pickle(first):
            raise FormatError(
                "this is a PyTorch pickle, not a safetensors file",
                path=source.path,
                hint="name it .bin or .pt and pass --allow-pickle if you trust where it is from",
            ) from None
        raise


def file_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a file that is not read any further."""
    file = LocalFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


def _looks_like_pickle(first: bytes) -> bool:
    """By the first bytes; a header's length may look the same, but `{` follows it."""
    return first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[8:9] != b"{")
