"""All files of a base, so that unbaking gives back its folder and not its weights alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterops.baking.beside import Carried
from adapterops.basemodel import BaseModel
from adapterops.errors import UnsupportedError
from adapterops.files import checkpoint
from adapterops.files.output import SIDECAR
from adapterops.files.source import LocalFile, read_bytes
from adapterops.provenance import file_sha256
from adapterops.undoing.record import LARGEST, FileRecord
from adapterops.undoing.undo import FileId


def file_id(path: str | Path) -> FileId:
    """A file by its name, size and sha256."""
    return FileId(os.path.basename(path), os.stat(path).st_size, file_sha256(os.fspath(path)))


def folder_record(
    base: BaseModel, weights: Mapping[str, str], changed: Sequence[str], beside: Sequence[Carried]
) -> tuple[list[FileRecord], dict[str, bytes]]:
    """Every file of the base's folder that the result has a successor of, and bytes to keep.

    `weights` are the sha256 of its files of weights, by their path in the folder, `changed` those
    that an undo file restores. Indexes and files that the result has otherwise are kept, and so is
    the base's own sidecar, which tells what made it.
    """
    given = Path(base.path)
    root = given if given.is_dir() else given.parent
    records = [
        FileRecord(
            name, os.stat(root / name).st_size, sha256, "undo" if name in changed else "same"
        )
        for name, sha256 in weights.items()
    ]
    kept: dict[str, bytes] = {}
    for name in dict.fromkeys([*_indexes(base, root, weights), *(file.name for file in beside)]):
        path = root / name
        if not path.is_file():
            continue
        copy = next((file.source for file in beside if file.name == name), None)
        if copy is not None and os.path.realpath(copy) == os.path.realpath(path):
            found = file_id(path)
            records.append(FileRecord(name, found.size, found.sha256, "same"))
        else:
            kept[name] = _content(path)
    if (root / SIDECAR).is_file():
        kept[SIDECAR] = _content(root / SIDECAR)
    for name, content in kept.items():
        records.append(FileRecord(name, len(content), hashlib.sha256(content).hexdigest(), "kept"))
    return records, kept


def _indexes(base: BaseModel, root: Path, weights: Mapping[str, str]) -> list[str]:
    """The index of every folder of shards, which baking writes anew."""
    given = Path(base.path)
    if given.is_file():
        return [given.name]
    folders = dict.fromkeys(os.path.dirname(name) for name in weights)
    found = ((folder, checkpoint.index_of(root / folder)) for folder in folders)
    return [os.path.join(folder, index.name) for folder, index in found if index is not None]


def _content(path: Path) -> bytes:
    file = LocalFile(path)
    try:
        if file.size() > LARGEST:
            raise UnsupportedError(
                f"has {file.size()} bytes, and a record of what was baked keeps at most {LARGEST} "
                "of a file beside the weights",
                path=path,
                hint="bake without --reversible",
            )
        return bytes(read_bytes(file, 0, file.size()))
    finally:
        file.close()
