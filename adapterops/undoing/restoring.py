"""A baked model turned back into its base, file by file, each checked by its sha256."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapterops.certificate import plain
from adapterops.errors import FormatError, IncompatibleError, Interrupted
from adapterops.files import checkpoint
from adapterops.files.clone import duplicate
from adapterops.files.direct import SequentialWriter
from adapterops.files.output import check_outside, check_room, stage, write_file
from adapterops.files.publish import complete
from adapterops.files.resumable import Resumed, resumable
from adapterops.files.source import LocalFile
from adapterops.provenance import file_sha256
from adapterops.stream import Compute, megabytes
from adapterops.undoing.record import NAME, FileRecord, Record, read_record
from adapterops.undoing.restore import restored, tensors_of
from adapterops.undoing.undo import SUFFIX, Undo, read_undo

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class RestoredFile:
    """A file as it was: whence its bytes came (the baked file, its undo file, the record)."""

    name: str
    size: int
    sha256: str
    how: Literal["same", "undo", "kept"]


@dataclass(frozen=True, slots=True)
class UnbakeReport:
    """The result of `unbake`: every file has the sha256 that the base's had when it was baked."""

    output: str
    baked: str
    files: Sequence[RestoredFile]
    size: int
    resumed: int = 0
    warnings: tuple[str, ...] = ()

    schema = "adapterops.unbake/1"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"schema": self.schema, **plain(self)}


def restore_file(
    baked: str, out: str, on: Compute, *, overwrite: bool, progress: Progress | None
) -> UnbakeReport:
    """The base of one baked file, from it and the undo file beside it.

    Raises IncompatibleError for a file that is not the one that was baked, FormatError for a
    damaged undo file, NumericsError where what comes out is not the base: nothing is written then.
    """
    undo = _undo_of(baked)
    check_outside(out, (baked, undo.file.path))
    _check_baked(Path(baked), undo)
    check_room(Path(out), undo.source.size)
    with stage(out, directory=False, overwrite=overwrite) as staging:
        name = Path(staging.final).name
        _restore(undo, Path(baked), staging.path(name), on, megabytes(undo.source.size, progress))
    file = RestoredFile(name, undo.source.size, undo.source.sha256, "undo")
    return UnbakeReport(out, baked, (file,), undo.source.size)


def restore_folder(
    baked: str, out: str, on: Compute, *, overwrite: bool, progress: Progress | None
) -> UnbakeReport:
    """The base's folder, from a baked one and its undo files; raises as `restore_file` does.

    What was finished when a run was interrupted is kept, and the next goes on from there.
    """
    folder = Path(baked)
    if not (folder / NAME).is_file():
        raise FormatError(
            f"holds no {NAME}: it was not baked with --reversible",
            path=baked,
            hint="fetch the base again",
        )
    record = read_record(folder / NAME)
    check_outside(out, [folder])
    total = sum(file.size for file in record.files)
    tick = megabytes(total, progress)
    there = 0
    with _staged(out, record, overwrite) as place:
        waiting = [file for file in record.files if place.finished(file.name) is None]
        check_room(Path(out), sum(file.size for file in waiting))
        for file in record.files:
            if place.finished(file.name) is not None:
                there += 1
                tick(file.size)
                continue
            path = place.path(file.name)
            _restore_one(folder, file, path, record, on, tick)
            place.done(file.name, {})
    files = [RestoredFile(f.name, f.size, f.sha256, f.how) for f in record.files]
    return UnbakeReport(out, baked, tuple(files), total, there)


@contextmanager
def _staged(out: str, record: Record, overwrite: bool) -> Iterator[Resumed]:
    """The place for a folder; an interruption says what is kept of it."""
    kept = 0
    try:
        plan = file_sha256(record.file.path)
        with resumable(out, plan=plan, overwrite=overwrite) as resumed:
            try:
                yield resumed
            finally:
                kept = resumed.kept
    except KeyboardInterrupt:
        if not kept or complete():
            raise
        raise Interrupted(
            f"interrupted; {kept} of {len(record.files)} files are kept",
            path=out,
            hint="the same command goes on from there",
        ) from None


def _restore_one(
    folder: Path,
    file: FileRecord,
    path: Path,
    record: Record,
    on: Compute,
    tick: Callable[[int], None],
) -> None:
    """One file of the base's folder at `path`, its sha256 as recorded."""
    source = folder / file.name
    if file.how == "kept":
        try:
            write_file(path, record.kept(file.name))
        except BaseException:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        tick(file.size)
    elif file.how == "same":
        duplicate(source, path)
        tick(file.size)
    else:
        undo = _undo_of(os.fspath(source))
        _check_baked(source, undo)
        if undo.source.sha256 != file.sha256:
            raise FormatError(
                f"restores a file of sha256 {undo.source.sha256[:12]}…, the record has "
                f"{file.sha256[:12]}…",
                path=f"{source}{SUFFIX}",
                hint="it belongs to another bake",
            )
        _restore(undo, source, path, on, tick)
        return
    found = file_sha256(os.fspath(path))
    if found != file.sha256:
        raise IncompatibleError(
            f"has sha256 {found[:12]}…, {file.sha256[:12]}… was baked: it was changed since",
            path=source,
            hint="restore the baked folder as `bake` wrote it",
        )


def _undo_of(baked: str) -> Undo:
    if not os.path.isfile(baked):
        LocalFile(baked)  # says why
    if checkpoint.is_index(Path(baked)):
        raise FormatError(
            "is the index of a model's folder", path=baked, hint="name the folder to unbake it"
        )
    if not os.path.isfile(baked + SUFFIX):
        raise FormatError(
            f"has no {os.path.basename(baked)}{SUFFIX} beside it: it was not baked with "
            "--reversible, or was moved without it",
            path=baked,
            hint="fetch the base again, or put the undo file beside it",
        )
    return read_undo(baked + SUFFIX)


def _check_baked(baked: Path, undo: Undo) -> None:
    """Raise IncompatibleError unless the file is the one that the undo file was made for."""
    size = os.stat(baked).st_size
    found = file_sha256(os.fspath(baked)) if size == undo.baked.size else ""
    if found != undo.baked.sha256:
        mine = f"sha256 {found[:12]}…" if found else f"{size} bytes"
        wanted = f"{undo.baked.sha256[:12]}…" if found else f"{undo.baked.size} bytes"
        raise IncompatibleError(
            f"has {mine}, {wanted} was baked: it was changed since, or belongs to another bake",
            path=baked,
            hint="unbake the file as `bake` wrote it",
        )


def _restore(undo: Undo, baked: Path, path: Path, on: Compute, tick: Callable[[int], None]) -> None:
    file = LocalFile(baked)
    try:
        with (
            SequentialWriter(path, undo.source.size) as writer,
            closing(restored(undo, tensors_of(file), on)) as pieces,
        ):
            for piece in pieces:
                writer.append(piece)
                tick(len(piece))
            writer.finish()
        file.check_unchanged()
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    finally:
        file.close()
