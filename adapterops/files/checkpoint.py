"""The files of a base model: which there are, and what tensors they hold by their headers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from adapterops.errors import FileError, FormatError, UnsafeFileError
from adapterops.files.header import Entry
from adapterops.files.source import LocalFile, file_header, read_bytes

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
_HALF = re.compile(r"\.(fp16|bf16)\.")
_INDEX = ".safetensors.index.json"
_INDEXES = tuple(f"{name}{_INDEX}" for name in ("model", "diffusion_pytorch_model"))
_LARGEST_INDEX = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_index(path: Path) -> bool:
    """Whether a path names the index of a sharded model."""
    return path.name.endswith(_INDEX)


def is_shard(path: Path) -> bool:
    """Whether a file is one of several that make a model, by its name."""
    return _SHARD.search(path.name) is not None


def weight_files(folder: Path) -> list[Path]:
    """The files of the one model in a folder: those that an index names, all its shards, or the
    file that is no other's copy.

    Raises FormatError where shards are missing or the folder holds several models, UnsafeFileError
    for an index that names files elsewhere.
    """
    index = index_of(folder)
    if index is not None:
        return indexed(index)
    files = sorted(folder.glob("*.safetensors"))
    shards = [file for file in files if is_shard(file)]
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


def index_of(folder: Path) -> Path | None:
    """The index that says which files of a folder are its model, None where none does.

    One under another name than libraries give it decides only where all files are shards, and
    none does beside a file of the whole model, which loaders look for first.
    """
    found = [folder / name for name in _INDEXES]
    if all(is_shard(file) for file in folder.glob("*.safetensors")):
        found += sorted(folder.glob(f"*{_INDEX}"))
    return next((i for i in found if i.is_file() and not _whole(i).is_file()), None)


def _whole(index: Path) -> Path:
    """The file that would hold a whole model by itself."""
    return index.with_name(index.name.removesuffix(".index.json"))


def indexed(index: Path) -> list[Path]:
    """The shards that an index names, each in its own folder.

    Raises FormatError for an index that is none or names a file that is missing, UnsafeFileError
    for a name that leads out of the folder.
    """
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if not name.endswith(".safetensors") or re.search(r"[/\\\0-\x1f]|^\.", name):
            raise UnsafeFileError(
                f"names {name[:80]!r}, which is no file of its own folder", path=index
            )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FormatError(
            f"holds {len(names) - len(absent)} of {len(names)} shards: {absent[0]} is missing",
            path=index.parent,
            hint="fetch the rest",
        )
    return [index.parent / name for name in names]


def weight_map(index: Path) -> dict[str, str]:
    """tensor -> shard, as an index says."""
    file = LocalFile(index)
    try:
        if file.size() > _LARGEST_INDEX:
            raise FormatError("is too large for an index of shards", path=index)
        found = json.loads(bytes(read_bytes(file, 0, file.size())))["weight_map"]
        if not found or not all(isinstance(x, str) for item in found.items() for x in item):
            raise ValueError("weight_map does not map names to files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"is no index of shards ({error})", path=index) from None
    finally:
        file.close()
    return dict(found)


def model_files(path: str | os.PathLike[str]) -> list[tuple[str, Path]]:
    """(what comes before its tensors' names, file) for every file of the model at `path`.

    `path` is a file, the index or folder of shards, or the folder of a pipeline (it has no
    config.json of its own), whose models' folders (`unet`, `text_encoder`) come before their
    tensors' names. Raises FileError and FormatError; [] for a folder without weights.
    """
    given = Path(path)
    if is_index(given):
        return [("", file) for file in indexed(given)]
    if not given.is_dir():
        return [("", given)]
    try:
        folders = [("", given)]
        own = ("*.safetensors", f"*{_INDEX}", "config.json")
        if not any(file for pattern in own for file in given.glob(pattern)):
            folders = [(f"{f.name}.", f) for f in sorted(given.iterdir()) if f.is_dir()]
        return [(prefix, file) for prefix, folder in folders for file in weight_files(folder)]
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be read: {error.strerror}", path=given) from None


def pickles(folder: Path) -> Iterator[Path]:
    """Weights in a folder that are in a format which is not read."""
    return (file for pattern in (*_PICKLES, "*.gguf") for file in sorted(folder.glob(pattern)))


def tensors(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """name -> header entry of every tensor of the model at `path`; offsets are of its own file.

    Raises what `model_files` raises; {} for a folder without weights.
    """
    return {
        prefix + name: entry
        for prefix, file in model_files(path)
        for name, entry in file_header(file).tensors.items()
    }
