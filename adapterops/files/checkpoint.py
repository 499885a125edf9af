"""The files of a base model: which there are, and what tensors they hold by their headers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from adapterops.errors import FileError, FormatError
from adapterops.files.header import Entry
from adapterops.files.source import file_header

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
_HALF = re.compile(r"\.(fp16|bf16)\.")
_INDEX = ".safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files of the one model in a folder: all its shards, or the file that is no other's copy.

    Raises FormatError where shards are missing or the folder holds several models.
    """
    files = sorted(folder.glob("*.safetensors"))
    shards = [file for file in files if _SHARD.search(file.name)]
    single = [file for file in files if file not in shards]
    whole = [file for file in single if _HALF.sub(".", file.name, count=1) == file.name] or single
    if shards and {_SHARD.sub("", file.name) for file in whole} <= {"consolidated.safetensors"}:
        whole = []  # Mistral's own format of the same weights
    if len(whole) + bool(shards) > 1:
        names = ", ".join(file.name for file in (*shards[:1], *whole)[:4])
        raise FormatError(
            f"holds several models ({names})", path=folder, hint="name the file of the base"
        )
    for file in shards:
        found = _SHARD.search(file.name)
        if found and int(found[2]) != len(shards):
            raise FormatError(
                f"holds {len(shards)} of {int(found[2])} shards", path=folder, hint="fetch the rest"
            )
    return shards or whole


def tensors(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """name -> header entry of every tensor of the model at `path`; offsets are of its own file.

    `path` is a file, the index or folder of shards, or the folder of a pipeline (it has no
    config.json of its own), whose models' folders (`unet`, `text_encoder`) come before their
    tensors' names. Raises FileError and FormatError, {} for a folder without weights.
    """
    given = Path(path)
    if given.name.endswith(_INDEX):
        given = given.parent
    if not given.is_dir():
        return dict(file_header(given).tensors)
    try:
        folders = [("", given)]
        if not any(given.glob("*.safetensors")) and not (given / "config.json").is_file():
            folders = [(f"{f.name}.", f) for f in sorted(given.iterdir()) if f.is_dir()]
        found = [(prefix, file) for prefix, folder in folders for file in weight_files(folder)]
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", path=given) from None
    return {
        prefix + name: entry
        for prefix, file in found
        for name, entry in file_header(file).tensors.items()
    }
