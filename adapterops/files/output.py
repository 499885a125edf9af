"""Staged output: everything is written under a temporary name and appears complete or not at all.

A file is staged beside its final name, a directory as a hidden sibling. Commit is fsync, reopen and
compare, rename, fsync of the parent. An exception, Ctrl-C or SIGTERM removes the staging; after
SIGKILL a dot-file `.NAME.adapterops-PID-…` is left, never anything under the final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapterops.errors import FileError, FormatError, OutputExistsError
from adapterops.files.header import Entry, encode_header
from adapterops.files.source import LocalFile, read_header

SIDECAR = "adapterops.json"
PROVENANCE_KEY = "adapterops"
_HASH_BLOCK = 1 << 20


class TensorWriter:
    """A safetensors file with a reserved header: data at their offsets first, the header last."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], header_size: int) -> None:
        self.path = path
        self.entries = entries
        self.header_size = header_size
        self.data_size = max((entry.end for entry in entries.values()), default=0)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write one tensor's bytes at its place."""
        entry = self.entries[name]
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if len(view) != entry.nbytes:
            raise ValueError(f"{name}: {len(view)} bytes for a tensor of {entry.nbytes}")
        self._write(view, self.header_size + entry.start)

    def data_sha256(self) -> tuple[str, bytes]:
        """sha256 of the data section and the data section's first 2 MiB as written."""
        digest = hashlib.sha256()
        start = b""
        position = 0
        while position < self.data_size:
            block = os.pread(
                self._descriptor,
                min(_HASH_BLOCK, self.data_size - position),
                self.header_size + position,
            )
            if len(start) < 2 * _HASH_BLOCK:
                start += block
            digest.update(block)
            position += len(block)
        return digest.hexdigest(), start

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, flush to disk, read it back and compare."""
        self._write(memoryview(encode_header(self.entries, metadata, self.header_size)), 0)
        os.ftruncate(self._descriptor, self.header_size + self.data_size)
        os.fsync(self._descriptor)
        written = read_header(LocalFile(self.path))
        if dict(written.tensors) != dict(self.entries) or written.metadata != dict(metadata):
            raise FileError("the header read back differs from what was written", path=self.path)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done


class Staging:
    """The unfinished output: files inside it are renamed to their final names on commit."""

    def __init__(self, final: Path, directory: bool) -> None:
        self.final = final
        self.directory = directory
        tag = f".{final.name}.adapterops-{os.getpid()}-{secrets.token_hex(4)}"
        self.root = final.parent / tag
        self._files: dict[str, Path] = {}
        self._writers: list[TensorWriter] = []
        if directory:
            self.root.mkdir()

    def tensors(self, name: str, entries: Mapping[str, Entry], header_size: int) -> TensorWriter:
        """A tensor file called `name`; checks first that the disk has room for it."""
        path = self._place(name)
        needed = header_size + max((entry.end for entry in entries.values()), default=0)
        status = os.statvfs(path.parent)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise FileError(
                f"the output needs {needed} bytes, the disk has {free} free", path=self.final
            )
        writer = TensorWriter(path, entries, header_size)
        self._writers.append(writer)
        return writer

    def write(self, name: str, data: bytes) -> None:
        """A small file called `name`, flushed to disk."""
        descriptor = os.open(
            self._place(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _place(self, name: str) -> Path:
        if self.directory:
            return self.root / name
        staged = self.root.with_name(f"{self.root.name}-{len(self._files)}")
        self._files[name] = staged
        return staged

    def commit(self) -> None:
        """Give everything its final name, the main file last."""
        self._close()
        if self.directory:
            _sync_directory(self.root)
            _publish_directory(self.root, self.final)
        else:
            for name, staged in sorted(
                self._files.items(), key=lambda item: item[0] == self.final.name
            ):
                target = self.final.with_name(name)
                if target.exists():
                    os.chmod(staged, target.stat().st_mode & 0o7777)
                os.replace(staged, target)
        _sync_directory(self.final.parent)

    def discard(self) -> None:
        """Remove whatever was staged."""
        self._close()
        if self.directory:
            shutil.rmtree(self.root, ignore_errors=True)
        for staged in self._files.values():
            staged.unlink(missing_ok=True)

    def _close(self) -> None:
        while self._writers:
            self._writers.pop().close()


@contextmanager
def stage(out: str | os.PathLike[str], *, directory: bool, overwrite: bool) -> Iterator[Staging]:
    """Stage `out`; commit on a clean exit, leave no trace otherwise.

    Raises OutputExistsError, and FileError for whatever the operating system refuses.
    """
    final = check_output(out, directory=directory, overwrite=overwrite)
    try:
        staging = Staging(final, directory)
    except OSError as error:
        raise unwritable(out, error) from None
    try:
        yield staging
        staging.commit()
    except BaseException as error:
        staging.discard()
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise unwritable(out, error) from None
        raise


def check_output(out: str | os.PathLike[str], *, directory: bool, overwrite: bool) -> Path:
    """The path to write, links resolved; refuses one that exists and must not be replaced."""
    final = Path(os.path.realpath(out))
    if not final.parent.is_dir():
        raise FileError(
            f"the folder {final.parent.name!r} of the output does not exist", path=os.fspath(out)
        )
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise FileError("the folder of the output is not writable", path=os.fspath(out))
    if not final.exists() or (directory and final.is_dir() and not any(final.iterdir())):
        return final
    if directory != final.is_dir():
        kind = "a directory" if final.is_dir() else "a file"
        raise OutputExistsError(
            f"is {kind} already, the output would be {'a directory' if directory else 'a file'}",
            path=os.fspath(out),
            hint="choose another name",
        )
    if not overwrite:
        raise OutputExistsError(
            "exists already", path=os.fspath(out), hint="pass --overwrite or choose another name"
        )
    if directory and not is_ours(final):
        raise OutputExistsError(
            "exists and was not written by adapterops; --overwrite does not delete it",
            path=os.fspath(out),
            hint="remove it yourself or choose another name",
        )
    return final


def is_ours(directory: Path) -> bool:
    """Whether a directory carries our provenance, in the sidecar or in a tensor file's header."""
    try:
        document = json.loads((directory / SIDECAR).read_text(encoding="utf-8"))
        if str(document.get("schema", "")).startswith("adapterops."):
            return True
    except (OSError, ValueError, AttributeError):
        pass
    for path in directory.glob("*.safetensors"):
        try:
            if PROVENANCE_KEY in read_header(LocalFile(path)).metadata:
                return True
        except (FileError, FormatError):
            continue
    return False


def unwritable(path: str | os.PathLike[str], error: OSError) -> FileError:
    """The one wording for an operating-system error on writing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError("the disk is full; nothing was left behind", path=path)
    return FileError(f"cannot be written: {error.strerror or error}", path=path)


def _publish_directory(staged: Path, final: Path) -> None:
    if not final.exists() or not any(final.iterdir()):
        os.rename(staged, final)
        return
    os.chmod(staged, final.stat().st_mode & 0o7777)
    old = staged.with_name(staged.name + "-old")
    os.rename(final, old)
    try:
        os.rename(staged, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
