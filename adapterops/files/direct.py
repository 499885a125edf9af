"""Large files written past the page cache, where the file system takes that.

Copying into the page cache costs processor time that arithmetic needs, and leaves gigabytes for the
last fsync. O_DIRECT takes aligned memory at aligned offsets only: what was made in memory of
`aligned` is written from there but for its ends, all else through staging buffers; the tail of a
file that is no whole block goes through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

import numpy as np

from adapterops.errors import FileError
from adapterops.files.output import check_room, unwritable

BUFFER = 8 << 20  # bytes of each staging buffer
_BUFFERS = 3  # one that is filled, one that is written, one that waits
_LEAST = 64 << 10  # bytes from which on a write of their own pays
_BLOCK = 4096  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
_DIRTY = 64 << 20  # bytes in the page cache after which a buffered file is flushed
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_NOTHING = memoryview(b"")
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def aligned(size: int, offset: int) -> Bytes:
    """New memory of `size` bytes that O_DIRECT can write from at `offset` of a file.

    An offset that is no multiple of 8 gets memory that is, for arrays of wider types.
    """
    memory = np.empty(size + 2 * _BLOCK, np.uint8)
    start = (offset // 8 * 8 - memory.ctypes.data) % _BLOCK
    return memory[start : start + size]


class SequentialWriter:
    """A new file of `size` bytes written front to back, by a thread of its own.

    `append` copies into one buffer while another is written; `give` does without the copy. Every
    method raises FileError for what the operating system refuses, at the latest `finish`, whose
    return means that the file is on disk. Measured on ext4, 2 GB, median of 3: 1.8 s so, 2.7 s
    without the thread, 7 s through the page cache with one fsync, 6.5 s by `cp` and fsync; buffers
    of 16 MiB gain nothing beyond the noise.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._appended = self._written = self._dirty = self._fill = 0
        self._error: BaseException | None = None
        self._empty: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._full: SimpleQueue[tuple[mmap.mmap, int, memoryview] | None] = SimpleQueue()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            check_room(path, size)
            _allocate(self._descriptor, size)
            self._direct = _set_direct(self._descriptor, True)
            for _ in range(_BUFFERS):
                self._empty.put(mmap.mmap(-1, BUFFER))
            self._buffer = self._empty.get()
            self._thread: Thread | None = Thread(target=self._run, daemon=True)
            self._thread.start()
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, OSError) and not isinstance(error, FileError):
                raise unwritable(path, error) from None
            raise

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the file, as many as there are."""
        self._copy(self._counted(data))

    def give(self, data: memoryview) -> None:
        """As `append`; `data` must stay as it is, and is not copied if it is `aligned` memory."""
        left = self._counted(data)
        head = -self._fill % _BLOCK
        body = (len(left) - head) // _BLOCK * _BLOCK
        fits = body >= _LEAST and (left.ctypes.data + head) % _BLOCK == 0
        if fits and self._fill + head <= BUFFER:
            self._copy(left[:head], hand_over=False)
            self._hand_over(left[head : head + body].data)
            left = left[head + body :]
        self._copy(left)

    def _counted(self, data: bytes | bytearray | memoryview) -> Bytes:
        left = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
        if self._appended + len(left) > self.size:
            raise ValueError(f"{self._appended + len(left)} bytes for a file of {self.size}")
        self._appended += len(left)
        return left

    def _copy(self, left: Bytes, *, hand_over: bool = True) -> None:
        while len(left):
            count = min(len(left), BUFFER - self._fill)
            # numpy lets other threads run while it copies.
            np.frombuffer(self._buffer, np.uint8, count, self._fill)[:] = left[:count]
            left = left[count:]
            self._fill += count
            if self._fill == BUFFER and hand_over:
                self._hand_over()

    def finish(self) -> None:
        """Write what is left, flush to disk and check the size."""
        if self._appended != self.size:
            raise ValueError(f"{self._appended} bytes for a file of {self.size}")
        self._hand_over()
        self._join()
        self._check()
        try:
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
            size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unwritable(self.path, error) from None
        if size != self.size:
            raise FileError(f"has {size} bytes, {self.size} were written", path=self.path)

    def close(self) -> None:
        """End the thread and close the file, finished or not."""
        self._join()  # first: the descriptor's number may become another file's
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_over(self, more: memoryview = _NOTHING) -> None:
        """The filled buffer and what follows it to the thread, in exchange for an empty buffer."""
        if self._fill or more:
            self._full.put((self._buffer, self._fill, more))
            self._buffer, self._fill = self._empty.get(), 0
        self._check()

    def _join(self) -> None:
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _check(self) -> None:
        if isinstance(self._error, OSError):
            raise unwritable(self.path, self._error) from None
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (piece := self._full.get()) is not None:
            buffer, count, more = piece
            if self._error is None:
                try:
                    done = self._together(memoryview(buffer)[:count], more)
                    self._write(memoryview(buffer)[min(done, count) : count])
                    self._write(more[max(0, done - count) :])
                except BaseException as error:  # for the thread that waits for this buffer
                    self._error = error
            del piece, more  # what was given is let go of
            self._empty.put(buffer)

    def _together(self, first: memoryview, more: memoryview) -> int:
        """Write both at once, for each write of a few blocks waits as long as one of many.

        The result is how many bytes that wrote: what is left is written one after the other.
        """
        if not first or not more or not self._direct:
            return 0
        try:
            done = os.pwritev(self._descriptor, [first, more], self._written)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0
        self._written += done
        return done

    def _write(self, view: memoryview) -> None:
        while view:
            if self._direct and len(view) < _BLOCK:  # the tail
                self._direct = _set_direct(self._descriptor, False)
            piece = view[: len(view) // _BLOCK * _BLOCK] if self._direct else view
            try:
                done = os.pwrite(self._descriptor, piece, self._written)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = _set_direct(self._descriptor, False)
                continue
            view = view[done:]
            self._written += done
            self._dirty += 0 if self._direct else done
            if self._dirty >= _DIRTY:
                os.fdatasync(self._descriptor)
                self._dirty = 0


class PatchWriter:
    """A file that is there already, a clone, and gets other bytes at some places.

    Raises FileError for what the operating system refuses. A file with several names is refused
    by ValueError: a hard link is the source itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise unwritable(path, error) from None
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if status.st_nlink != 1:
            self.close()
            raise ValueError(f"{path} has {status.st_nlink} names; patching it changes them all")

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Replace the bytes from `offset`; the file does not grow."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(view)} of a file of {self.size}")
        try:
            while view:
                done = os.pwrite(self._descriptor, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise unwritable(self.path, error) from None

    def finish(self) -> None:
        """Flush to disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Turn O_DIRECT on or off; whether it is on afterwards, which some file systems refuse."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (_O_DIRECT if wanted else 0))
    except OSError as error:
        if not wanted or error.errno not in _UNSUPPORTED:
            raise
        return False
    return wanted and bool(_O_DIRECT)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file, where the file system can.

    Not by posix_fallocate, which writes into every block where it cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if not size or fallocate is None:
        return
    while fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
