"""What an output says of how it was made: the provenance in its header or in its sidecar."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops.batch.outputs import recorded
from adapterops.errors import FormatError, UsageError
from adapterops.files.output import SIDECAR
from adapterops.files.source import LocalFile, read_bytes
from adapterops.layout import sidecar_name

_LARGEST = 64 << 20
_DEEPEST = 200  # lists and objects within one another: 66 methods


@dataclass(frozen=True, slots=True)
class Made:
    """The provenance of the output at `path`, whose parts have the right types.

    `inputs` are adapters by name, hash and weight, `is_directory` whether the output is a folder.
    """

    path: str
    verb: str
    version: str
    inputs: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    is_directory: bool


def read_made(path: str | os.PathLike[str]) -> Made:
    """The provenance of an output: a folder, a .safetensors file, or a sidecar.

    Raises UsageError where there is none, FormatError for a damaged one, FileError.
    """
    found = find_made(path)
    if found is None:
        raise UsageError(
            "carries no provenance of adapterops, so nothing says how it was made",
            path=path,
            hint="give a recipe, an output of adapterops, or its sidecar",
        )
    return found


def find_made(path: str | os.PathLike[str]) -> Made | None:
    """`read_made`, None where there is no provenance."""
    given = os.fspath(path)
    is_directory = os.path.isdir(given)
    if given.endswith(".json"):
        found = of_sidecar(given)
        is_directory = os.path.basename(given) == SIDECAR
    elif is_directory:
        found = recorded(given) or of_sidecar(os.path.join(given, SIDECAR))
    else:
        LocalFile(given)  # raises where it is missing or unreadable
        file = Path(given)
        found = recorded(given) or of_sidecar(os.fspath(file.with_name(sidecar_name(file))))
    return None if found is None else _checked(found, given, is_directory)


def of_sidecar(path: str) -> Any:
    """The provenance in a sidecar, None where there is no such file or nothing in it.

    Raises FormatError for what is no JSON, FileError.
    """
    if not os.path.isfile(path):
        return None
    file = LocalFile(path)
    try:
        if file.size() > _LARGEST:
            raise FormatError(f"has {file.size()} bytes, which no sidecar has", path=path)
        document = json.loads(bytes(read_bytes(file, 0, file.size())))
    except (ValueError, RecursionError):
        raise FormatError("is no JSON", path=path) from None
    finally:
        file.close()
    return document.get("provenance") if isinstance(document, dict) else None


def _is_deep(found: Any) -> bool:
    """Whether reading it may need more stack than there is."""
    level = [found]
    for _ in range(_DEEPEST):
        within = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in within for each in values if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _checked(found: Any, path: str, is_directory: bool) -> Made:
    if isinstance(found, dict) and _is_deep(found):
        raise FormatError(f"its provenance has more than {_DEEPEST} levels", path=path)
    try:
        json.dumps(found, ensure_ascii=False).encode()  # text that is none cannot be written again
        inputs = tuple(found["inputs"])
        made = Made(
            path,
            str(found["verb"]),
            str(found.get("version")),
            inputs,
            dict(found["options"]),
            is_directory,
        )
        sound = all(
            isinstance(each["name"], str)
            and isinstance(each["sha256"], str)
            and isinstance(each.get("config_sha256", ""), str)
            and not isinstance(each["weight"], bool)
            and math.isfinite(each["weight"])
            for each in inputs
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound or not inputs:
        raise FormatError("its provenance is damaged", path=path)
    return made
