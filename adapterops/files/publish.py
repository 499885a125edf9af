"""How a staged output gets its final name: signals wait, one commit at a time, then one rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def hidden_name(final: Path) -> str:
    """A name beside `final` that no other process and no other call uses."""
    return f".{final.name[:40]}.adapterops-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done; only the main thread ever sees them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: late.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if late:
            signal.raise_signal(late[0])


_complete: list[str] = []  # the last output that this process gave its name, if none is begun


def begun() -> None:
    """Note that an output is worked on: what is interrupted now is that one."""
    _complete.clear()


def completed(final: Path) -> None:
    """Note that an output is under its final name: who is interrupted later has it all the same."""
    _complete[:] = [os.fspath(final)]


def complete() -> str | None:
    """The output that was completed last, None while another is worked on."""
    return _complete[0] if _complete else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One commit into a folder at a time, where the folder can be locked at all."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def publish_directory(staged: Path, final: Path) -> None:
    """Put a staged directory under its final name; one that is replaced is removed, modes stay."""
    old = final.with_name(hidden_name(final))
    if final.exists():
        for path in final.rglob("*"):
            if not path.is_symlink():
                keep_mode(staged / path.relative_to(final), path)
        keep_mode(staged, final)
        if any(final.iterdir()):
            if _exchange(staged, final):
                shutil.rmtree(staged, ignore_errors=True)
                return
            os.rename(final, old)
    try:
        os.rename(staged, final)
    except BaseException:
        if old.exists():
            os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def keep_mode(staged: Path, replaced: Path) -> None:
    """The mode of what is replaced; not on a hard link, which would change another's file."""
    is_same_kind = staged.exists() and replaced.exists() and staged.is_dir() == replaced.is_dir()
    if is_same_kind and (staged.is_dir() or staged.stat().st_nlink == 1):
        os.chmod(staged, replaced.stat().st_mode & 0o7777)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that no moment is without either; False if it cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; not on every file system
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)
    return done == 0


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Flush a directory's names to disk, where it may be opened and its file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and folder below `root`, then `root`."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))
