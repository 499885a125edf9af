"""Requests to an object store: few at a time, repeated while it is busy, errors in our words.

fsspec's file systems raise whatever their clients do. Three things matter here: what is worth
another try (throttling, 5xx, a connection that broke), what is not there, and what is forbidden.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from adapterops.errors import AdapterOpsError, FileError, UsageError

T = TypeVar("T")
REQUESTS = 16  # in flight at once, in the whole process
PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try, less a random part
_TURNS = threading.BoundedSemaphore(REQUESTS)
_BUSY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_BUSY_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: SlowDown, 503
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,  # s3fs: a status that it does not know
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: InternalError, 500
    errno.ETIMEDOUT,
}
# Broken connections as botocore, aiohttp, httpx, google-auth and http.client name them; none of
# these packages has to be installed.
_BROKEN = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "TransportError",
}
# What opens a protocol, as pip takes it; fsspec says only sometimes what it could not import.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "'adapterops[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "'adapterops[remote]' gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "'adapterops[remote]' adlfs"),
    "hf": "'adapterops[remote]' huggingface_hub",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}


def patiently(call: Callable[[], T], where: str) -> T:
    """The result of a request about `where`, a URI; at most `REQUESTS` run at once.

    A busy store is asked again after each of `PAUSES`. Raises FileError in the end, or at once for
    what is missing or forbidden, and UsageError where a package is missing.
    """
    for pause in (*PAUSES, None):
        try:
            with _TURNS:
                return call()
        except (AdapterOpsError, MemoryError):
            raise
        except ImportError as error:
            raise missing_package(where, error) from None
        except Exception as error:
            if pause is None or not _is_busy(error):
                raise _unreadable(where, error, gave_up=pause is None) from error
        time.sleep(pause * random.uniform(0.5, 1))
    raise AssertionError("unreachable: the last try returns or raises")


def missing_package(where: str, error: ImportError) -> UsageError:
    """What to install for a URI whose file system cannot be imported."""
    protocol = where.partition("://")[0]
    own = "'adapterops[remote]'" if error.name == "fsspec" else error.name
    wanted = _PACKAGES.get(protocol, own)
    return UsageError(
        f"{protocol}:// cannot be opened: {error}",
        path=where,
        hint=f"pip install {wanted}" if wanted else None,
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error speaks of, where it says so."""
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status"), (error, "code")):
        value = getattr(holder, name, None)
        if isinstance(value, int | str) and str(value).isdecimal():
            return int(value)
    return None


def _is_busy(error: Exception) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = _status(error)
    if status is not None:
        return status in _BUSY_STATUS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _BUSY_ERRNO:
        return True
    return any(kind.__name__ in _BROKEN for kind in type(error).__mro__)


def _unreadable(where: str, error: Exception, *, gave_up: bool) -> FileError:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileError("no such file or directory", path=where)
    lines = str(error).splitlines()
    said = lines[0] if lines else type(error).__name__
    forbidden = isinstance(error, PermissionError) or status in (401, 403)
    if forbidden or type(error).__name__ in _NO_CREDENTIALS:
        return FileError(
            f"access is refused: {said}", path=where, hint="check the credentials of the store"
        )
    hint = f"gave up after {len(PAUSES) + 1} tries; run again later" if gave_up else None
    return FileError(f"cannot be read: {said}", path=where, hint=hint)
