"""A directory that takes long to write: what is finished survives an interruption.

Beside OUT lies `.OUT.adapterops-partial` with the `output` so far and a journal: one JSON line for
every finished file, written and flushed after the file itself. A run with the same plan goes on
where the last one ended; one with another plan begins anew. The commit is that of `output.stage`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from adapterops.errors import (
    AdapterOpsError,
    ChangedError,
    FileError,
    MemoryLimitError,
    OutputExistsError,
    UsageError,
)
from adapterops.files.output import NOTHING_LEFT, check_output, unwritable, write_file
from adapterops.files.publish import (
    alone,
    begun,
    completed,
    publish_directory,
    sync_directory,
    sync_file,
    sync_tree,
    undisturbed,
)
from adapterops.files.source import LocalFile, sample

_VERSION = 1
_JOURNAL, _OUTPUT = "journal.jsonl", "output"
_LONGEST = 230  # bytes of a name that leave room for what is put around it

Record = dict[str, Any]


class Resumed:
    """The unfinished output, perhaps with files that an earlier run finished.

    `root` is the directory that will be the output. `kept` counts the finished files in it: at
    first those of earlier runs, after an interruption those that the next run will find, 0 once
    the output is committed or removed.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self._folder = final.with_name(_partial_name(final.name))
        self.root = self._folder / _OUTPUT
        self._journal = -1
        self._finished: dict[str, Record] = {}

    @property
    def kept(self) -> int:
        return len(self._finished)

    def finished(self, name: str) -> Record | None:
        """What was recorded of the file `name`, None if it has to be written."""
        return self._finished.get(name)

    def path(self, name: str) -> Path:
        """Where to write the file `name`, in folders that exist; ValueError if it leads out."""
        if not _is_inside(name):
            raise ValueError(f"{name!r} is no path inside the output")
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A small file called `name`, flushed to disk; not recorded, each run writes it."""
        write_file(self.path(name), chunks)

    def done(self, name: str, record: Mapping[str, Any]) -> None:
        """Record that the file `name` is finished and closed; `record` must be JSON."""
        path = self.path(name)
        sync_file(path)
        for folder in PurePosixPath(name).parents:
            sync_directory(self.root / folder)
        line = json.dumps({"name": name, **_fingerprint(path), "record": dict(record)})
        self._append(line)
        self._finished[name] = json.loads(line)["record"]

    def begin(self, plan: str) -> None:
        """Take over what an earlier run of `plan` finished, remove the rest.

        Raises UsageError while another process writes this output.
        """
        is_new = self._make_folder()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._journal = os.open(self._folder / _JOURNAL, flags, 0o666)
            is_ours = _lock(self._journal)
            if is_ours:
                self._recover(plan)
                sync_directory(self._folder)
                sync_directory(self._folder.parent)
        except BaseException:
            if is_new:
                self._remove()
            self._close()
            raise
        if not is_ours:
            self._close()
            raise UsageError(
                "another process is writing this output",
                path=self.final,
                hint="wait for it, or choose another name",
            )

    def commit(self, overwrite: bool) -> None:
        """Give the directory its final name, unless something has appeared there meanwhile."""
        sync_tree(self.root)
        with alone(self.final.parent):
            check_output(self.final, directory=True, overwrite=overwrite)
            publish_directory(self.root, self.final)
            self._remove()
        sync_directory(self.final.parent)

    def end(self, keep: bool) -> None:
        """After an error: keep the finished files, or nothing; safe to call twice."""
        if self._journal < 0:
            return
        if keep and self._finished:
            with suppress(OSError):
                self._tidy()
            self._close()
        else:
            with alone(self.final.parent):
                self._remove()

    def _make_folder(self) -> bool:
        """Whether the staging directory is new."""
        try:
            self._folder.mkdir()
        except FileExistsError:
            if self._folder.is_symlink() or not self._folder.is_dir():
                raise FileError(
                    "is in the way, no directory", path=self._folder, hint="remove it"
                ) from None
            return False
        return True

    def _recover(self, plan: str) -> None:
        head = {"version": _VERSION, "plan": plan}
        lines, length = _read_journal(self._journal)
        is_usable = lines[:1] == [head] and not self.root.is_symlink() and self.root.is_dir()
        if is_usable:
            os.ftruncate(self._journal, length)  # without a last line that was cut
            found = {line["name"]: line for line in lines[1:]}
            self._finished = {
                name: line["record"]
                for name, line in found.items()
                if _is_unchanged(self.root / name, line)
            }
            self._tidy()
            return
        os.ftruncate(self._journal, 0)
        if self.root.is_symlink() or self.root.is_file():
            self.root.unlink()
        elif self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir()
        self._append(json.dumps(head))

    def _append(self, line: str) -> None:
        """One line at the end of the journal, flushed; all of it or nothing."""
        end = os.fstat(self._journal).st_size
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._journal, data) :]
            os.fsync(self._journal)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._journal, end)
            raise

    def _tidy(self) -> None:
        """Remove whatever is in the directory and was not finished."""
        for folder, folders, names in os.walk(self.root, topdown=False):
            for path in (Path(folder, name) for name in names):
                if path.relative_to(self.root).as_posix() not in self._finished:
                    path.unlink()
            for path in (Path(folder, name) for name in folders):
                if path.is_symlink():
                    path.unlink()
                elif not any(path.iterdir()):
                    path.rmdir()

    def _remove(self) -> None:
        """Remove everything; the lock last, so that nobody begins in between."""
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):
            (self._folder / _JOURNAL).unlink(missing_ok=True)
            self._folder.rmdir()
        self._finished.clear()
        self._close()

    def _close(self) -> None:
        """Close the journal, which is the lock."""
        if self._journal >= 0:
            journal, self._journal = self._journal, -1
            os.close(journal)


@contextmanager
def resumable(out: str | os.PathLike[str], *, plan: str, overwrite: bool) -> Iterator[Resumed]:
    """Write the directory `out`; commit on a clean exit.

    `plan` stands for all inputs and options: files of another plan are never taken over. An
    interruption, a full disk, too little memory, an output that appeared meanwhile: finished files
    are kept and the error says so (a KeyboardInterrupt does not: see `kept`). Any other error
    removes everything. Raises OutputExistsError, UsageError while another process writes `out`,
    and FileError for whatever the operating system refuses.
    """
    final = check_output(out, directory=True, overwrite=overwrite)
    resumed = Resumed(final)
    try:
        with undisturbed(), alone(final.parent):
            begun()
            resumed.begin(plan)
        yield resumed
        with undisturbed():
            resumed.commit(overwrite)
            completed(final)
    except BaseException as error:
        with undisturbed():
            resumed.end(keep=_is_passing(error))
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise _with_kept(unwritable(out, error), resumed.kept) from None
        if isinstance(error, FileError | MemoryLimitError | OutputExistsError):
            _with_kept(error, resumed.kept)
        raise


def _is_passing(error: BaseException) -> bool:
    """Whether the same command may end well another time, by no change of the inputs."""
    if isinstance(error, ChangedError):
        return False
    passing = (OSError, MemoryError, OutputExistsError, KeyboardInterrupt)
    return isinstance(error, passing) or not isinstance(error, Exception)


def _with_kept(error: AdapterOpsError, kept: int) -> AdapterOpsError:
    """The error, saying that finished files are kept where any are."""
    if kept:
        files = "1 finished file is" if kept == 1 else f"{kept} finished files are"
        said = [error.hint] if error.hint and error.hint != NOTHING_LEFT else []
        error.hint = "; ".join([*said, f"{files} kept, the same command continues"])
    return error


def _partial_name(name: str) -> str:
    """The name of the staging directory for an output called `name`, the same for each run."""
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.adapterops-partial"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return "\0" not in name and path.as_posix() == name != "." and not {"/", ".."} & {*path.parts}


def _lock(descriptor: int) -> bool:
    """False where another holds the lock; a file system without locks has nobody else."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _fingerprint(path: Path) -> dict[str, Any]:
    file = LocalFile(path)
    try:
        found = hashlib.sha256(sample(file, 0, file.size())).hexdigest()
    finally:
        file.close()
    return {"size": file.size(), "sample_sha256": found}


def _is_unchanged(path: Path, line: Mapping[str, Any]) -> bool:
    """Whether the file is there, reached through no link, with the size and sample recorded."""
    if not path.is_file() or os.path.realpath(path) != os.fspath(path):
        return False
    return all(line[key] == value for key, value in _fingerprint(path).items())


def _read_journal(descriptor: int) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal up to the first that is damaged, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    length = 0
    for raw in os.pread(descriptor, os.fstat(descriptor).st_size, 0).splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict) or (lines and not _is_done(line)):
            break
        lines.append(line)
        length += len(raw)
    return lines, length


def _is_done(line: Mapping[str, Any]) -> bool:
    kinds = {"name": str, "size": int, "sample_sha256": str, "record": dict}
    is_whole = all(isinstance(line.get(key), kind) for key, kind in kinds.items())
    return is_whole and _is_inside(line["name"])
