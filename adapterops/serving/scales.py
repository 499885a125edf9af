"""The scale that an engine would serve each module with, beside the one that was trained."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterops.formats.model import AdapterFile, Site
from adapterops.serving.model import Engine

LORA_KINDS = ("lora", "dora")  # whose factors are stored as PEFT's LoRA stores them


@dataclass(frozen=True, slots=True)
class ModuleType:
    """One kind of module in all layers: `self_attn.q_proj`.

    `layers` is how many layers the file knows of, counted from 0; `missing` are those without it.
    """

    name: str
    sites: tuple[Site, ...]
    layers: int
    missing: tuple[int, ...]


def leaf(stem: str) -> str:
    """The last part of a module's path."""
    return stem.rpartition(".")[2]


def number(config: Mapping[str, Any], key: str) -> float | None:
    """A number of the config, None if it is missing or none."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def configured_ranks(config: Mapping[str, Any]) -> list[int]:
    """r and the values of rank_pattern, which engines check before they see a tensor."""
    patterns = config.get("rank_pattern")
    values = [number(patterns, key) for key in patterns] if isinstance(patterns, dict) else []
    return [int(value) for value in (number(config, "r"), *values) if value]


def module_types(sites: Sequence[Site], engine: Engine) -> list[ModuleType]:
    """Sites by what follows their layer's number, in the order in which the engine loads types."""
    kinds: dict[tuple[str, str], dict[int, Site]] = defaultdict(dict)
    for site in sites:
        prefix, layer, name = split_layer(site.stem)
        kinds[prefix, name][layer] = site
    layers = {prefix: 0 for prefix, _ in kinds}
    for (prefix, _), found in kinds.items():
        layers[prefix] = max(layers[prefix], *(layer + 1 for layer in found))
    result = [
        ModuleType(
            name,
            tuple(found[layer] for layer in sorted(found)),
            layers[prefix],
            tuple(layer for layer in range(layers[prefix]) if layer not in found),
        )
        for (prefix, name), found in kinds.items()
    ]
    place = {name: index for index, name in enumerate(engine.order)}
    return sorted(result, key=lambda kind: place.get(leaf(kind.name), len(place)))


def split_layer(stem: str) -> tuple[str, int, str]:
    """What comes before the first number in a path, that number, and what follows.

    A path without a number is its own prefix and its own rest, in layer 0.
    """
    parts = stem.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return stem, 0, stem


def served(
    file: AdapterFile, sites: Sequence[Site], engine: Engine, tensor_parallel: int
) -> Iterator[tuple[Site, float, str]]:
    """Each site with the scale it would get and what makes that differ, if it does.

    The cause is "rslora", "patterns" or "padding". Nothing where the engine reads the config as
    PEFT does, or where the config says no alpha or rank.
    """
    alpha, rank = number(file.config, "lora_alpha"), number(file.config, "r")
    if engine.scaling == "config" or alpha is None or not rank:
        return
    stabilised = bool(file.config.get("use_rslora"))
    cause = "patterns" if engine.reads_rslora or not stabilised else "rslora"

    def scale(r: float) -> float:
        return alpha / (math.sqrt(r) if stabilised and engine.reads_rslora else r)

    if engine.scaling != "padded":
        for site in sites:
            yield site, scale(site.rank if engine.scaling == "tensor" else rank), cause
        return
    current = rank
    for kind in module_types(sites, engine):
        if kind.missing:
            continue  # left out before the rank is touched
        for site in kind.sites:
            yield site, scale(current), cause if current == rank else "padding"
        current = engine.padded_rank(kind.sites[0].rank, tensor_parallel)
