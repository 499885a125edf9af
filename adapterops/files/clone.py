"""Copies of whole files that nothing decodes: linked, cloned or copied by the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

from adapterops.errors import ChangedError, FileError
from adapterops.files.output import unwritable
from adapterops.files.publish import sync_file
from adapterops.files.source import LocalFile

_FICLONE = 0x40049409  # linux/fs.h
_PIECE = 64 << 20  # bytes between two moments at which Ctrl-C is heard
_BUFFER = 1 << 20
_REFUSED = (
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.EPERM,
    errno.EBADF,
)

How = Literal["linked", "cloned", "copied"]


def duplicate(source: Path, target: Path, *, link: bool = False) -> How:
    """Make `target` a durable copy of `source`, links followed; how it was done.

    A hard link if `link` allows it (one file then has two names), else a clone that shares its
    blocks until one is written, else a copy, holes kept. A clone or copy gets its mode by the
    umask. Raises FileError, ChangedError if the source changed meanwhile; then there is no target.
    """
    file = LocalFile(os.path.realpath(source))
    if os.path.lexists(target):
        raise unwritable(target, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
    try:
        how: How = "linked" if link and _link(file, target) else _copy(file, target)
        file.check_unchanged()
    except BaseException as error:
        with suppress(OSError):
            target.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise unwritable(target, error) from None
        raise
    return how


def reflink(source: int, target: int) -> bool:
    """Make the open file `target` share all blocks of `source`; False where that cannot be."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def _link(file: LocalFile, target: Path) -> bool:
    """A second name; False on another file system or where the system's rules forbid it."""
    try:
        os.link(file.path, target)
    except OSError as error:
        if error.errno not in (*_REFUSED, errno.EACCES, errno.EMLINK):
            raise
        return False
    sync_file(target)
    return True


def _copy(file: LocalFile, target: Path) -> How:
    with ExitStack() as opened:
        source = file.open()
        opened.callback(os.close, source)
        copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        opened.callback(os.close, copy)
        is_clone = reflink(source, copy)
        if not is_clone:
            os.ftruncate(copy, file.size())
            for start, stop in _extents(source, file.size()):
                _copy_extent(source, copy, start, stop, file.path)
        os.fsync(copy)
    return "cloned" if is_clone else "copied"


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are no holes; all of it where the file system cannot say."""
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            stop = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            start, stop = position, size
        yield start, stop
        position = stop


def _copy_extent(source: int, target: int, start: int, stop: int, path: str) -> None:
    """By the kernel as far as it can, the rest through a buffer."""
    try:
        while start < stop and (
            done := os.copy_file_range(source, target, min(stop - start, _PIECE), start, start)
        ):
            start += done
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    while start < stop:
        data = memoryview(os.pread(source, min(stop - start, _BUFFER), start))
        if not data:
            raise ChangedError(
                f"ends at byte {start}: it was truncated while being copied", path=path
            )
        while data:
            done = os.pwrite(target, data, start)
            data, start = data[done:], start + done
