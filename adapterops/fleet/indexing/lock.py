"""One writer at a time: a lock that ends with its process, and a token that outlives it.

The lock is `flock` on a file of its own beside the database. The kernel drops it with the process,
however that ends, so no lock is ever stale and nobody has to judge whether one is; Linux carries it
to the server of an NFS mount, which SQLite's own locks need as well. A lock file created with
O_EXCL would work without that, but after SIGKILL or a dead node it has to be broken by guessing.
Where a file system has no locks, or its server forgot them, the token decides: whoever opens the
index for writing leaves one in it, and each transaction first looks whether it is still there. So
the later one goes on, the earlier one stops with an error, and no two write.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from adapterops.errors import FileError
from adapterops.files.output import unwritable

LOCK = "lock"


def hold(path: Path) -> int:
    """The lock of the index at `path`, to be closed in the end. FileError if another has it."""
    file = path / LOCK
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        raise unwritable(file, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise FileError(
            f"another process is writing this index ({owner or 'unknown'})",
            path=path,
            hint="wait for it, or index into another FLEET",
        ) from None
    except OSError:
        pass  # no locks here: the token has to do
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise unwritable(file, error) from None
    return descriptor
