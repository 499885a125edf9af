"""Files in an object store, through fsspec: listed, read by ranges, brought to disk.

No store is asked to remember a listing: a second look must see what has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adapterops.errors import ChangedError, FileError, UsageError
from adapterops.files.output import check_room, unwritable
from adapterops.files.patience import missing_package, patiently

HEAD = 1 << 18  # bytes of the first read: the header of nearly every adapter
_RANGE = 8 << 20  # bytes of one request for the rest
_READERS = 4  # requests at once for one file
_MARKS = ("ETag", "generation", "etag", "e_tag", "blob_id", "md5Hash")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


class Entry(NamedTuple):
    """A file of a store: its URI, its size in bytes, and what differs once its bytes do."""

    path: str
    size: int
    version: str


class Store:
    """The file system that a URI's protocol names, and the URI's path in it."""

    __slots__ = ("fs", "root", "uri")

    def __init__(self, uri: str) -> None:
        self.uri = trimmed(uri)
        self.fs = _file_system(self.uri)
        self.root: str = self.fs._strip_protocol(self.uri)

    def entry(self, info: Mapping[str, Any]) -> Entry:
        """An answer of the store about a file at or below the root."""
        name = str(info["name"])
        root = self.root.rstrip("/")
        if name == root:
            path = self.uri
        elif name.startswith(root + "/"):
            path = self.uri + name[len(root) :]
        else:  # a store that spells the root in another way
            path = str(self.fs.unstrip_protocol(name))
        size = info.get("size")
        return Entry(path, int(size) if size is not None else -1, _version(info))


def trimmed(uri: str) -> str:
    """A URI without the slashes at its end."""
    protocol, mark, rest = uri.partition("://")
    return protocol + mark + rest.rstrip("/")


def _file_system(uri: str) -> Any:
    protocol = uri.partition("://")[0]
    try:
        import fsspec  # an extra, and not needed for what is on disk
    except ImportError as error:
        raise missing_package(uri, error) from None
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if protocol in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
            # `patience` repeats requests; botocore's own tries would multiply with its.
            options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}}
        return kind(**options, **kind._get_kwargs_from_urls(uri))
    except ImportError as error:
        raise missing_package(uri, error) from None
    except ValueError as error:
        raise UsageError(f"cannot be opened: {error}", path=uri) from None


def _version(info: Mapping[str, Any]) -> str:
    for name in _MARKS:
        if info.get(name):
            return str(info[name]).strip('"')
    changed = next((info[name] for name in _TIMES if info.get(name)), "")
    if isinstance(changed, datetime):  # memory:// does so of a file, but not in a listing
        changed = changed.timestamp()
    return f"{info.get('size')}-{changed}"


def listing(uri: str) -> list[Entry]:
    """Every file at and below a URI, by path; [] where there is none.

    One request for a page of names (1,000 on S3), none for a single file. Raises FileError.
    """
    store = Store(uri)
    if not hasattr(store.fs, "call_s3"):
        found = patiently(lambda: store.fs.find(store.root, withdirs=False, detail=True), uri)
        return _files(store, found.values())
    entries = _files(store, _s3_pages(store))
    alone = None if entries else find_file(uri)
    return entries if alone is None else [alone]


def _s3_pages(store: Store) -> Iterator[dict[str, Any]]:
    """What `find` of s3fs gives, page by page.

    That one compares each folder with all others beside it: four minutes for 50,000 tenants, where
    this takes as long as the answers. A page that is throttled is asked for again alone.
    """
    bucket, key, _ = store.fs.split_path(store.root)
    wanted = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    while True:
        page = patiently(partial(store.fs.call_s3, "list_objects_v2", **wanted), store.uri)
        for item in page.get("Contents", ()):
            name, size = f"{bucket}/{item['Key']}", item["Size"]
            yield {"name": name, "type": "file", "size": size, "ETag": item["ETag"]}
        if not page.get("IsTruncated"):
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def folder_listing(uri: str) -> list[Entry]:
    """The files that lie in a folder of a store itself, by path; [] where there are none."""
    store = Store(uri)
    try:
        found = patiently(lambda: store.fs.ls(store.root, detail=True), uri)
    except FileError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return []
        raise
    return _files(store, found)


def _files(store: Store, found: Any) -> list[Entry]:
    # Folders that a console made are empty objects whose names end with a slash.
    files = (info for info in found if info["type"] == "file" and info["name"][-1:] != "/")
    return sorted(store.entry(info) for info in files)


def find_file(uri: str) -> Entry | None:
    """What the store says of one file, None where there is no such file."""
    store = Store(uri)
    try:
        info = patiently(lambda: store.fs.info(store.root), uri)
    except FileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return store.entry(info) if info["type"] == "file" else None


def read_small(uri: str, limit: int) -> bytes | None:
    """The first `limit` bytes of a file in one request, None where there is no such file."""
    store = Store(uri)
    try:
        data = patiently(lambda: store.fs.cat_file(store.root, start=0, end=limit), uri)
    except FileError as error:
        if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
            return None
        if _is_past_the_end(error.__cause__):
            return b""
        raise
    return bytes(data)


def _is_past_the_end(error: BaseException | None) -> bool:
    """Whether a store refused a range because the file is shorter: S3 says so of an empty one."""
    return isinstance(error, OSError) and "InvalidRange" in f"{error} {error.__cause__}"


class RemoteFile:
    """A `Source`: a file of a store read at any position, the same version from first to last."""

    __slots__ = ("_entry", "_head", "_store", "path")

    def __init__(self, entry: Entry) -> None:
        self.path = entry.path
        self._entry = entry
        self._store = Store(entry.path)
        self._head = b""
        if entry.size < 0:
            raise FileError("the store does not say how large it is", path=self.path)

    def size(self) -> int:
        return self._entry.size

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; the first `HEAD` bytes are asked for once."""
        if offset + len(buffer) <= min(HEAD, self.size()):
            self._head = self._head or self._ranged(0, min(HEAD, self.size()))
            buffer[:] = self._head[offset : offset + len(buffer)]
        else:
            buffer[:] = self._ranged(offset, offset + len(buffer))

    def check_unchanged(self) -> None:
        """Raise ChangedError unless the store still has the version that was found first."""
        store = self._store
        info = patiently(lambda: store.fs.info(store.root), self.path)
        if store.entry(info)[1:] != self._entry[1:]:
            self._changed()

    def close(self) -> None:
        """Forget the first bytes."""
        self._head = b""

    def save(self, path: Path) -> None:
        """Write the whole file to `path`, which appears complete or not at all.

        At most four ranges of 8 MiB are in memory. Raises ChangedError, FileError.
        """
        unfinished = path.with_name(f".{path.name}.partial")
        unfinished.unlink(missing_ok=True)  # of a run that was killed
        check_room(path, self.size())
        try:
            with open(unfinished, "xb") as file:
                file.write(self._head)
            self._copy(unfinished)
            self.check_unchanged()
            os.rename(unfinished, path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, FileError):
                raise unwritable(path, error) from None
            raise

    def _copy(self, unfinished: Path) -> None:
        starts = range(len(self._head), self.size(), _RANGE)
        if len(starts) < 2:
            for start in starts:
                self._copy_range(unfinished, start)
            return
        pool = ThreadPoolExecutor(min(_READERS, len(starts)))
        try:
            for done in [pool.submit(self._copy_range, unfinished, start) for start in starts]:
                done.result()
        finally:  # after an error the file is removed, and what still runs finds none to write to
            pool.shutdown(wait=False, cancel_futures=True)

    def _copy_range(self, unfinished: Path, start: int) -> None:
        data = memoryview(self._ranged(start, min(start + _RANGE, self.size())))
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while data:
                done = os.pwrite(descriptor, data, start)
                data, start = data[done:], start + done
        finally:
            os.close(descriptor)

    def _ranged(self, start: int, end: int) -> bytes:
        if start == end:
            return b""
        store = self._store
        try:
            data = patiently(lambda: store.fs.cat_file(store.root, start=start, end=end), self.path)
        except FileError as error:
            if _is_past_the_end(error.__cause__):
                self._changed()
            raise
        if len(data) != end - start:
            self._changed()
        return bytes(data)

    def _changed(self) -> NoReturn:
        raise ChangedError(
            f"changed while being read: it had {self.size()} bytes, or was replaced; "
            "run again when nothing writes to it",
            path=self.path,
        )
