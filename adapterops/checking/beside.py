"""Findings about the files beside the weights: stale twins, names that nobody opens, no config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from adapterops.checking.findings import Finding, Findings, finding
from adapterops.errors import AdapterOpsError
from adapterops.files.source import LocalFile, Source, read_header
from adapterops.formats import AdapterFile, Ref, mlx, peft

_SECOND = re.compile(r" ?\(\d+\)$| copy( \d+)?$|[-_. ](copy|old|bak|backup|orig)$")
_SUFFIXES = (" (1)", "(1)", " (2)", " copy", "_copy", "-copy", "_old", "-old", ".old", "_backup")
_PICKLES = (".bin", ".pt")
_MAIN = (
    peft.WEIGHTS,
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    mlx.WEIGHTS,
)


def twins(file: AdapterFile, *, allow_pickle: bool) -> Findings:
    """Files beside the weights that could be taken for them, compared with them."""
    for path in _candidates(file.weights_file):
        yield _compared(file, path, allow_pickle)


def _candidates(weights: str) -> Iterator[str]:
    """Paths that exist under the names that old savers, browsers and people give to a copy.

    Only these names are asked for: a folder may hold ten thousand adapters.
    """
    folder, name = os.path.split(weights)
    stem, extension = os.path.splitext(name)
    names = [f"{stem}{suffix}{extension}" for suffix in _SUFFIXES]
    if extension == ".safetensors":
        names += [stem + other for other in _PICKLES]
    if name in _MAIN:
        names += [other for other in _MAIN if other != name]
    if not _SECOND.search(stem):
        for other in dict.fromkeys(names):
            path = os.path.join(folder, other)
            if os.path.isfile(path):
                yield path


def _compared(file: AdapterFile, path: str, allow_pickle: bool) -> Finding:
    name, own = os.path.basename(path), os.path.basename(file.weights_file)
    hint = f"loaders differ on which they open; keep one of {own} and {name}"
    if path.endswith(_PICKLES) and not allow_pickle:
        text = f"{name} lies beside {own} and may be another adapter"
        return finding("stale-twin", text, hint=f"{hint}; --allow-pickle compares them")
    try:
        difference = _difference(file, path)
    except AdapterOpsError as error:
        return finding("stale-twin", f"{name} beside {own} cannot be read: {error.message}")
    if difference:
        return finding("stale-twin", f"{name} beside {own} is another: {difference}", hint=hint)
    return finding("twin-copy", f"{name} beside {own} holds the same tensors", hint="one can go")


def _difference(file: AdapterFile, path: str) -> str | None:
    """The first thing in which another file of tensors differs, None if in nothing."""
    source: Source
    if path.endswith(_PICKLES):
        from adapterops.files.pickles import open_pickle  # needs torch

        source = open_pickle(path)
    else:
        source = LocalFile(path)
    try:
        header = read_header(source)
        if header.tensors.keys() != file.tensors.keys():
            return f"{len(header.tensors)} tensors, here {len(file.tensors)}, names differ"
        for name, entry in header.tensors.items():
            own = file.tensors[name]
            if (entry.dtype, entry.shape) != (own.dtype, own.stored_shape):
                return (
                    f"{name} is {entry.dtype} {list(entry.shape)}, here {own.dtype} "
                    f"{list(own.stored_shape)}"
                )
        for name, entry in header.tensors.items():
            start = header.data_start + entry.start
            other = Ref(source, name, entry.dtype, entry.shape, start, entry.nbytes)
            if other.raw().tobytes() != file.tensors[name].raw().tobytes():
                return f"{name} has other values"
    finally:
        source.close()
    return None


def names(file: AdapterFile) -> Findings:
    """Weights in an adapter's folder under a name that its loaders do not look for."""
    own = os.path.basename(file.weights_file)
    expected = {"peft": peft.WEIGHTS, "mlx": mlx.WEIGHTS}.get(file.dialect)
    in_folder = os.path.isdir(file.path) or (
        _SECOND.search(os.path.splitext(own)[0]) and file.config_file is not None
    )
    if expected and in_folder and own not in (expected, "adapter_model.bin"):
        yield finding(
            "renamed-weights",
            f"its weights are in {own!r}, loaders open {expected!r}",
            hint="rename the file",
        )


def config(file: AdapterFile) -> Findings:
    """No config for a dialect that keeps the base's name and the scale there."""
    lacks = {site.dialect for site in file.sites.values()} & {"peft", "mlx"}
    unread = any(error.message.startswith("no scale") for error in file.problems)
    if lacks and not file.config and not unread:
        yield finding(
            "config-missing",
            f"no {peft.CONFIG}: nothing says the base model, the task and what else was trained",
            hint="loaders of directories stop without it",
        )


CHECKS = (names, config)
