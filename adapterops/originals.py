"""Inputs of an earlier run, found again below a folder by what tells them apart, never by name.

Adapters are found by the sha256 of their weights and config, models by a hash of samples, shapes
and activations by their digests. Names only say where to look first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adapterops.activations import open_activations
from adapterops.basemodel import open_model
from adapterops.basemodel.shapes import digest, load
from adapterops.batch.search import WEIGHTS, is_adapter
from adapterops.errors import AdapterOpsError, FileError
from adapterops.formats.locate import locate
from adapterops.options import compute
from adapterops.provenance import file_sha256
from adapterops.stream import Compute, Job, run

Origin = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
_MOST = 1_000_000  # files
_PEAK = 4 << 20
# Weights of base models and states of trainers: no adapters, and large.
_NO_ADAPTER = re.compile(
    r".*-\d{5}-of-\d{5}\..*|(diffusion_)?(pytorch_)?model\..*|(optimizer|rng_).*"
)


class Originals:
    """Files below a folder; each is read for its hash at most once, and only where one is sought.

    Hidden folders and links to folders are not entered. Raises FileError where there are more than
    a million files to look at.
    """

    def __init__(
        self, folder: str, on: Compute | None = None, progress: Progress | None = None
    ) -> None:
        self.folder = folder
        self._on = on or compute()
        self._progress = progress
        self._adapters: list[str] = []
        self._models: list[str] = []
        self._known: dict[tuple[str, str], str] = {}
        for place, folders, names in os.walk(folder, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self._add(place, sorted(names))

    def _add(self, place: str, names: Sequence[str]) -> None:
        weights = [name for name in names if name.lower().endswith(WEIGHTS)]
        paths = {name: os.path.join(place, name) for name in weights}
        self._adapters += [path for name, path in paths.items() if not _NO_ADAPTER.fullmatch(name)]
        if not is_adapter(names) or "config.json" in names:
            if weights or "config.json" in names or "model_index.json" in names:
                self._models.append(place)
            self._models += [path for name, path in paths.items() if name.endswith(".safetensors")]
        if len(self._adapters) + len(self._models) > _MOST:
            raise FileError(
                f"has more than {_MOST} files that could be inputs",
                path=self.folder,
                hint="say where they are with --inputs DIR",
            )

    def find(self, origin: Origin) -> str | None:
        """The weights file of one adapter; see `find_all`."""
        return self.find_all([origin])[0]

    def find_all(self, origins: Sequence[Origin]) -> list[str | None]:
        """The weights file with the hashes of each adapter, None where there is none."""
        self._hash(p for o in origins for p in self._adapters if _is_likely(p, o))
        found = [self._adapter(origin) for origin in origins]
        if None in found:
            self._hash(self._adapters)
            found = [self._adapter(origin) for origin in origins]
        return found

    def _adapter(self, origin: Origin) -> str | None:
        for path in sorted(self._adapters, key=lambda path: not _is_likely(path, origin)):
            found = self._known.get(("sha256", path))
            if not found or found != origin.get("sha256"):
                continue
            recorded = origin.get("config_sha256")
            config = locate(path).config
            if recorded is None or (config and _sha256(config) == recorded):
                return path
        return None

    def _hash(self, paths: Iterable[str]) -> None:
        """Read these files, several at a time."""
        waiting = [path for path in dict.fromkeys(paths) if ("sha256", path) not in self._known]
        jobs = (Job(path, _sha256, (path,), _PEAK) for path in waiting)
        for count, (path, found) in enumerate(zip(waiting, run(jobs, self._on), strict=True)):
            self._known["sha256", path] = found
            if self._progress:
                self._progress("looking for inputs", count + 1, len(waiting))

    def model(
        self,
        identity: str,
        name: str = "",
        fits: Callable[[str], bool] = lambda path: True,
    ) -> str | None:
        """The base model whose samples have this hash, a folder rather than a file, and `fits`."""
        return self._first("model", filter(fits, self._models), identity, name)

    def activations(self, wanted: str) -> str | None:
        """The file of activations with this digest."""
        return self._first("activations", self._adapters, wanted)

    def shapes(self, wanted: str) -> str | None:
        """The base model, or its config.json, whose shapes have this digest."""
        return self._first("shapes", self._models, wanted)

    def _first(self, kind: str, paths: Iterable[str], wanted: str, name: str = "") -> str | None:
        for path in sorted(paths, key=lambda path: name not in path.split(os.sep)):
            if (kind, path) not in self._known:
                try:
                    self._known[kind, path] = _MARKS[kind](path)
                except AdapterOpsError:
                    self._known[kind, path] = ""  # not one of these
            if wanted and self._known[kind, path] == wanted:
                return path
        return None


def _is_likely(path: str, origin: Origin) -> bool:
    """Whether an adapter of this name was here, or one that was called the second of its name."""
    name = str(origin.get("name"))
    parts = path.split(os.sep)
    return name in parts or re.sub(r"#\d+$", "", name) in parts


def _sha256(path: str) -> str:
    """The hash of a file, "" of one that cannot be read."""
    try:
        return file_sha256(path)
    except AdapterOpsError:
        return ""


def _model(path: str) -> str:
    model = open_model(path)
    try:
        return model.identity
    finally:
        for ref in model.tensors.values():
            ref.source.close()


_MARKS: Mapping[str, Callable[[str], str]] = {
    "model": _model,
    "activations": lambda path: open_activations(path).digest,
    "shapes": lambda path: digest(load(path)),
}
