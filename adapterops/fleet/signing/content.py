"""Hashes of what an adapter does: equal for byte duplicates only, wherever they lie.

The order of tensors, the rest of the header and of the config, and file names have no part in them.
The base's name has none either: adapters of different bases are never compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.formats.model import AdapterFile

# What a config says of the meaning of tensors, beside the scales, which have their own place.
_MEANING = ("trainable_token_indices", "fan_in_fan_out", "target_parameters")


def content_hash(file: AdapterFile, digests: Mapping[str, bytes]) -> str:
    """SHA-256 over all tensors and every module's kind and scale.

    `digests` are SHA-256 of the tensors' bytes. Of a file with problems the whole config counts,
    since what it means is not known.
    """
    tensors = _tensors(file, file.tensors, digests)
    modules = (
        f"{site.stem}\0{site.kind}\0{site.layer}\0{site.enabled}\0{site.scale.hex()}"
        for site in file.sites.values()
    )
    config: Mapping[str, Any] = file.config
    if not file.problems:
        config = {key: config[key] for key in _MEANING if config.get(key)}
    return _hash("adapter", [*sorted(tensors), *sorted(modules), _text(config)])


def extras_hash(file: AdapterFile, digests: Mapping[str, bytes]) -> str:
    """SHA-256 over what is no factor, "" where there is nothing: extras and changes of biases."""
    biases = [site for site in file.sites.values() if "bias" in site.parts]
    if not file.extras and not biases:
        return ""
    tensors = _tensors(file, file.extras, digests)
    added = (
        f"{site.stem}\0{site.scale.hex()}\0"
        + "".join(_tensors(file, [site.parts["bias"].name], digests))
        for site in biases
    )
    tokens = file.config.get("trainable_token_indices")
    return _hash("extras", [*sorted(tensors), *sorted(added), _text(tokens)])


def _tensors(
    file: AdapterFile, names: Iterable[str], digests: Mapping[str, bytes]
) -> Iterable[str]:
    for name in names:
        ref = file.tensors[name]
        yield f"{name}\0{ref.dtype}\0{ref.shape}\0{digests[name].hex()}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(what: str, lines: Iterable[str]) -> str:
    text = "\n".join((what, *(line.replace("\n", "\\n") for line in lines)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
