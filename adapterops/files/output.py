"""Staged output: everything is written under a temporary name and appears complete or not at all.

A file is staged beside its final name, a directory as a hidden sibling. Commit is fsync, reopen and
compare, rename, fsync of the parent. An exception, Ctrl-C or SIGTERM removes the staging; after
SIGKILL a dot-file `.NAME.adapterops-PID-…` is left, never anything under the final name. Commits
into one folder wait for each other, and a signal waits for the commit.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapterops.errors import FileError, FormatError, OutputExistsError, UsageError
from adapterops.files.header import Entry
from adapterops.files.publish import (
    alone,
    begun,
    completed,
    hidden_name,
    keep_mode,
    publish_directory,
    sync_directory,
    undisturbed,
)
from adapterops.files.source import file_header
from adapterops.files.writer import TensorWriter

SIDECAR = "adapterops.json"
MAIN = "adapter_model.safetensors"  # the weights in a directory that we write
_COMPANIONS = ("adapter_config.json", "README.md")
PROVENANCE_KEY = "adapterops"
NOTHING_LEFT = "nothing was left behind"


class Staging:
    """The unfinished output: files inside it are renamed to their final names on commit."""

    def __init__(self, final: Path, directory: bool, overwrite: bool) -> None:
        self.final = final
        self.directory = directory
        self.overwrite = overwrite
        self.root = final.with_name(hidden_name(final))
        self._files: dict[str, Path] = {}
        self._writers: list[TensorWriter] = []
        if directory:
            self.root.mkdir()

    def tensors(self, name: str, entries: Mapping[str, Entry], header_size: int) -> TensorWriter:
        """A tensor file called `name`; checks first that the disk has room for it."""
        path = self.path(name)
        needed = header_size + max((entry.end for entry in entries.values()), default=0)
        check_room(self.final, needed)
        writer = TensorWriter(path, entries, header_size)
        self._writers.append(writer)
        return writer

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A companion file called `name`, flushed to disk."""
        write_file(self.path(name), chunks)

    def path(self, name: str) -> Path:
        """Where to write the file `name`."""
        if self.directory:
            return self.root / name
        if name in self._files:
            return self._files[name]
        staged = self.root.with_name(f"{self.root.name}-{len(self._files)}")
        self._files[name] = staged
        return staged

    def commit(self) -> None:
        """Give everything its final name, unless something has appeared there meanwhile."""
        self._close()
        if self.directory:
            sync_directory(self.root)
        with alone(self.final.parent):
            check_output(self.final, directory=self.directory, overwrite=self.overwrite)
            if self.directory:
                publish_directory(self.root, self.final)
            else:
                self._publish_files()
        sync_directory(self.final.parent)

    def _publish_files(self) -> None:
        """The companions, then the main file in one step; if that fails, the old companions."""
        staged = {self.final.with_name(name): path for name, path in self._files.items()}
        main = staged.pop(self.final)
        swapped: list[tuple[Path, Path]] = []
        try:
            for target, path in staged.items():
                old = path.with_name(path.name + "-old")
                if target.exists():
                    keep_mode(path, target)
                    os.rename(target, old)
                swapped.append((target, old))
                os.rename(path, target)
            keep_mode(main, self.final)
            os.replace(main, self.final)
        except BaseException:
            for target, old in swapped:
                target.unlink(missing_ok=True)
                if old.exists():
                    os.rename(old, target)
            raise
        for _, old in swapped:
            old.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove whatever was staged."""
        self._close()
        if self.directory:
            shutil.rmtree(self.root, ignore_errors=True)
        for staged in self._files.values():
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def _close(self) -> None:
        while self._writers:
            self._writers.pop().close()


@contextmanager
def stage(
    out: str | os.PathLike[str], *, directory: bool, overwrite: bool, main: bool = True
) -> Iterator[Staging]:
    """Stage `out`; commit on a clean exit, leave no trace otherwise.

    A `main` output is what a command is for: of that an interruption speaks. Raises
    OutputExistsError, UsageError for an empty name, and FileError for whatever the operating system
    refuses.
    """
    final = check_output(out, directory=directory, overwrite=overwrite)
    staging = None
    try:
        with undisturbed():
            if main:
                begun()
            staging = Staging(final, directory, overwrite)
        yield staging
        with undisturbed():
            staging.commit()
            if main:
                completed(final)
    except BaseException as error:
        if staging:
            with undisturbed():
                staging.discard()
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise unwritable(out, error) from None
        raise


def resolved(out: str | os.PathLike[str]) -> Path:
    """The path to write, links resolved. Raises UsageError for "", which would be this folder."""
    name = os.fspath(out)
    if not name or "\0" in name:
        raise UsageError(f"the output {name!r} is no file name", hint="-o PATH")
    return Path(os.path.realpath(out))


def check_output(out: str | os.PathLike[str], *, directory: bool, overwrite: bool) -> Path:
    """`resolved`, of what may be written; refuses what exists and must not be replaced."""
    try:
        return _checked(out, directory, overwrite)
    except FileError:
        raise
    except OSError as error:
        raise unwritable(out, error) from None


def _checked(out: str | os.PathLike[str], directory: bool, overwrite: bool) -> Path:
    final = resolved(out)
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
    if directory:
        foreign = foreign_files(final, MAIN)
        if foreign is None or foreign:
            what = f"holds {foreign[0]!r}, which" if foreign else "exists and"
            raise OutputExistsError(
                f"{what} was not written by adapterops; --overwrite does not delete it",
                path=os.fspath(out),
                hint="remove it yourself or choose another name",
            )
    return final


def check_outside(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise OutputExistsError for an output that is, lies inside or contains an input."""
    final = resolved(out)
    for path in inputs:
        place = Path(os.path.realpath(path))
        inside = place in final.parents and place.is_dir()
        if final == place or inside or final in place.parents:
            how = "is" if final == place else "is inside" if inside else "contains"
            raise OutputExistsError(
                f"the output {how} the input {os.fspath(path)}",
                path=os.fspath(out),
                hint="choose another name; inputs are never changed",
            )


def is_our_sidecar(path: Path) -> bool:
    """Whether a file is a certificate that adapterops wrote."""
    return _sidecar(path) is not None


def _sidecar(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(document, dict) and str(document.get("schema", "")).startswith("adapterops.")
    return document if ours else None


def foreign_files(directory: Path, main: str) -> list[str] | None:
    """What in a directory is not our work, or None if it carries no provenance of ours at all.

    Ours are the files that the sidecar lists, by their paths in it, and the folders that hold
    them; without a sidecar, `main` if its header says so.
    """
    document = _sidecar(directory / SIDECAR)
    if document is not None:
        listed = document.get("files")
        names = listed if isinstance(listed, list) else [main, *_COMPANIONS]
        return _unlisted(directory, [SIDECAR, *(name for name in names if isinstance(name, str))])
    try:
        if PROVENANCE_KEY in file_header(directory / main).metadata:
            return _unlisted(directory, [main, *_COMPANIONS])
    except (FileError, FormatError):
        pass
    return None


def _unlisted(directory: Path, names: Iterable[str]) -> list[str]:
    """Paths below a directory that are neither named nor a folder of one that is."""
    ours = {os.fspath(path) for name in names for path in (Path(name), *Path(name).parents)}
    return sorted(
        os.fspath(path.relative_to(directory))
        for path in directory.rglob("*")
        if os.fspath(path.relative_to(directory)) not in ours
    )


def check_room(path: Path, needed: int) -> None:
    """Raise FileError unless the file system that `path` will be on has `needed` bytes free.

    One that counts no blocks at all (ramfs, some network file systems) cannot be asked.
    """
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < needed:
        raise FileError(f"the output needs {needed} bytes, the disk has {free} free", path=path)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """A new file with these bytes, its mode by the umask, flushed to disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def unwritable(path: str | os.PathLike[str], error: OSError) -> FileError:
    """The one wording for an operating-system error on writing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError("the disk is full", path=path, hint=NOTHING_LEFT)
    return FileError(f"cannot be written: {error.strerror or error}", path=path)
