"""An index that is not there yet: its directory and its empty database, in one step."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from adapterops.errors import FileError, OutputExistsError
from adapterops.files.output import unwritable
from adapterops.files.publish import sync_directory
from adapterops.fleet.indexing import schema
from adapterops.fleet.indexing.lock import LOCK, hold
from adapterops.fleet.indexing.schema import DATABASE, SIGNATURES


def has_index(path: str | os.PathLike[str]) -> bool:
    """Whether there is an index at `path`; one whose creation was cut off is none.

    Raises FormatError and IncompatibleError for a database that is no such index.
    """
    folder = Path(os.path.realpath(path))
    if not (folder / DATABASE).is_file():
        return False
    with schema.reported(folder / DATABASE), closing(schema.connect(folder)) as database:
        return bool(schema.meta(database))


def create_index(path: str | os.PathLike[str], seed: int) -> None:
    """Make an empty index for sketches of `seed`.

    Raises OutputExistsError where there is anything but what a creation that was cut off leaves,
    FileError for what the operating system refuses, or where another process is creating it.
    """
    folder = Path(os.path.realpath(path))
    if has_index(folder):
        raise OutputExistsError("is an index already", path=path, hint="choose another name")
    try:
        if folder.exists() and not (folder.is_dir() and _is_begun(folder)):
            raise OutputExistsError(
                "exists and is no index of adapterops", path=path, hint="choose another name"
            )
        (folder / SIGNATURES).mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise unwritable(path, error) from None
    try:
        (folder / DATABASE).touch()
        with schema.reported(folder / DATABASE), closing(schema.connect(folder)) as database:
            database.execute("BEGIN IMMEDIATE")
            if not schema.meta(database):  # nobody was faster where there are no locks
                schema.create_tables(database, {"seed": str(seed), "writer": ""})
            database.execute("COMMIT")
        sync_directory(folder)
        sync_directory(folder.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise unwritable(path, error) from None
    finally:
        os.close(lock)


def _is_begun(folder: Path) -> bool:
    """Whether a directory is empty, or what a creation that was cut off leaves."""
    ours = {LOCK, SIGNATURES, DATABASE, f"{DATABASE}-journal"}
    return set(os.listdir(folder)) <= ours and not any((folder / SIGNATURES).glob("*"))
