"""Where an output came from: hashes, weights and options. Never absolute paths, never floats that
were measured: the same inputs and options give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import adapterops
from adapterops.files.source import LocalFile
from adapterops.formats.model import AdapterFile

_BLOCK = 1 << 22
_NUMBERED = re.compile(r"(.+)#(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Origin:
    """One input: its base name, the hashes of its weights and of its config file, its weight."""

    name: str
    sha256: str
    weight: float
    config_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made a file: verb, inputs and the options that decide its tensors."""

    verb: str
    inputs: tuple[Origin, ...]
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tool": "adapterops",
            "version": adapterops.__version__,
            "verb": self.verb,
            "inputs": [
                {key: value for key, value in asdict(origin).items() if value is not None}
                for origin in self.inputs
            ],
            "options": {key: value for key, value in self.options.items() if value is not None},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def given_alphas(inputs: Sequence[AdapterFile]) -> dict[str, float]:
    """Alphas that came from the user, by the input's index."""
    return {
        str(index): site.alpha
        for index, file in enumerate(inputs)
        for site in file.sites.values()
        if site.alpha is not None and site.alpha_given
    }


def base_name(path: str) -> str:
    """The last component of a path, which may end in a slash or be a dot; always valid text."""
    return os.fsencode(os.path.basename(os.path.abspath(path))).decode("utf-8", "replace")


def label_of(file: AdapterFile) -> str:
    """What an adapter is called, and what keys its random bits: its label, or its path's name."""
    return file.label or base_name(file.path)


def distinct(names: Sequence[str]) -> list[str]:
    """The names; the second of one name is called `name#2`."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def undistinct(names: Sequence[str]) -> list[str]:
    """The names before those of equal ones were numbered: a, a#2 are a, a."""
    found: list[str] = []
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        again = numbered and found.count(numbered[1]) == int(numbered[2]) - 1 > 0
        found.append(numbered[1] if numbered and again else name)
    return found


def given_labels(inputs: Sequence[AdapterFile]) -> list[str] | None:
    """What the inputs are called, where their distinct names do not tell; None where they do."""
    labels = [label_of(file) for file in inputs]
    return None if undistinct(distinct(labels)) == labels else labels


def file_sha256(path: str) -> str:
    """sha256 of a file's bytes."""
    file = LocalFile(path)
    digest = hashlib.sha256()
    buffer = bytearray(min(_BLOCK, file.size()))
    try:
        for position in range(0, file.size(), _BLOCK):
            view = memoryview(buffer)[: min(_BLOCK, file.size() - position)]
            file.pread_into(position, view)
            digest.update(view)
    finally:
        file.close()
    return digest.hexdigest()
