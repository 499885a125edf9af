"""From the path a user gives to the files that make one adapter."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from adapterops.errors import FileError, FormatError, PickleRefusedError
from adapterops.files.names import PICKLES, SIDE_FILES, WEIGHTS
from adapterops.files.source import LocalFile, read_bytes, unreadable
from adapterops.formats import mlx, peft

_CONFIG_KEYS = {"peft_type", "lora_alpha", "r", "lora_parameters"}


@dataclass(frozen=True, slots=True)
class Located:
    """One adapter's files. `shared_config`: the config lies beside and may serve other files."""

    weights: str
    config: str | None
    shared_config: bool = False
    side_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_pickle(self) -> bool:
        return self.weights.lower().endswith(PICKLES)


def locate(path: str | os.PathLike[str]) -> Located:
    """The weights, config and side files at `path`, a file or a directory.

    Raises FileError if there is nothing, FormatError if a directory holds no adapter or several.
    """
    given = os.fspath(Path(path))
    if _is_directory(given):
        return _in_directory(given)
    LocalFile(given)  # raises where it is missing or unreadable
    config, shared = _sibling_config(Path(given))
    return Located(given, config, shared)


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # opening it as a file says what is wrong


def _in_directory(directory: str) -> Located:
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        raise unreadable(directory, error) from None
    found = [name for name in WEIGHTS if name in names and _is_file(directory, name)]
    if not found:
        found = sorted(
            name for name in names if name.endswith(".safetensors") and _is_file(directory, name)
        )
        if len(found) > 1:
            raise FormatError(
                f"holds {len(found)} safetensors files ({', '.join(found[:4])}, …) and no "
                f"{peft.WEIGHTS}",
                path=directory,
                hint="name one of the files",
            )
    if not found:
        inside = sorted(p.parent.name for p in Path(directory).glob(f"*/{peft.WEIGHTS}"))
        raise FormatError(
            f"is not an adapter: the directory holds no {peft.WEIGHTS}",
            path=directory,
            hint=f"its folders hold some: {', '.join(inside[:4])}" if inside else None,
        )
    weights, *others = found
    notes = [
        f"{directory}: {weights} is read; {other} beside it may be another adapter"
        for other in others
    ]
    has_config = peft.CONFIG in names and _is_file(directory, peft.CONFIG)
    return Located(
        os.path.join(directory, weights),
        os.path.join(directory, peft.CONFIG) if has_config else None,
        False,
        tuple(name for name in SIDE_FILES if name in names and _is_file(directory, name)),
        tuple(notes),
    )


def _is_file(directory: str, name: str) -> bool:
    return os.path.isfile(os.path.join(directory, name))


def _sibling_config(file: Path) -> tuple[str | None, bool]:
    own = [file.with_suffix(".json"), file.with_suffix("") / peft.CONFIG]
    for candidate in own:
        if candidate.is_file() and _is_config(candidate):
            return os.fspath(candidate), False
    beside = file.parent / peft.CONFIG
    if not beside.is_file():
        return None, False
    return os.fspath(beside), file.name not in (peft.WEIGHTS, "adapter_model.bin", mlx.WEIGHTS)


def _is_config(path: Path) -> bool:
    """Whether a JSON file speaks of an adapter; image UIs keep notes of their own beside a file."""
    try:
        document = json.loads(read_text(os.fspath(path)))
    except (FormatError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(_CONFIG_KEYS & document.keys())


def read_text(path: str, limit: int = 16_000_000) -> bytes:
    """A small file's bytes; a config of more than 16 MB is none."""
    file = LocalFile(path)
    if file.size() > limit:
        raise FormatError(f"has {file.size()} bytes, too large for a config", path=path)
    try:
        return bytes(read_bytes(file, 0, file.size()))
    finally:
        file.close()


def missing_pickle_permission(path: str) -> FileError | FormatError:
    """The refusal of a pickle that was not allowed."""
    return PickleRefusedError(
        "is a PyTorch pickle, which can run code when it is opened",
        path=path,
        hint="pass --allow-pickle to read it with weights_only=True",
    )
