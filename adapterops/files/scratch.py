"""Temporary folders that are gone after the run, however it ends.

An error or Ctrl-C removes them in the thread that made them. What a killed run left is removed by
the next one: each folder is locked while its process lives, and no lock outlives a process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterops.files.output import unwritable
from adapterops.files.publish import undisturbed

PREFIX = "adapterops-fetched-"
_LOCK = ".lock"
_AGE = 60  # seconds; a younger folder may be about to be locked


@contextmanager
def scratch(inside: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new folder, inside the given one or where TMPDIR says, removed with all that is in it.

    Threads that an interruption left at work cannot bring it back: whatever they make below it
    fails. Raises FileError where no folder can be made.
    """
    if inside is None:
        _sweep(tempfile.gettempdir())
    folder, lock = None, -1
    try:
        with undisturbed():
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=inside))
            lock = _lock(folder)
        yield folder
    except OSError as error:
        if folder is None:
            raise unwritable(inside or tempfile.gettempdir(), error) from None
        raise
    finally:
        with undisturbed():
            if folder is not None:
                _remove(folder)
            if lock >= 0:
                os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of a folder; of a file system without locks, none.

    It is a file's in it: whoever publishes files into the folder locks the folder itself.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / _LOCK, flags, 0o600)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove(folder: Path) -> None:
    gone = folder.with_name(folder.name + "-gone")
    with suppress(OSError):
        os.rename(folder, gone)  # at once: a file made meanwhile would keep the folder from going
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(parent: str) -> None:
    """Remove folders of this user whose process was killed."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(PREFIX)]:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _AGE:
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(folder: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / _LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
