"""From a module of an adapter to the weight of a base model that it changes, by names.

Adapters and checkpoints agree on a path from its first number on (`0.self_attn.q_proj`); what comes
before may differ (`transformer.h` and `h`, `model.language_model.layers` and
`language_model.model.layers`). Flat stems of kohya lost their dots, so the checkpoint's names are
flattened instead and looked up. Where loaders have other names for modules than files, both count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterops.basemodel.heads import Head, clashing, likeness, related
from adapterops.basemodel.loaded import loaded
from adapterops.formats import Site

_NUMBERED_EXPERT = re.compile(r"(?P<block>.*)\.switch_mlp\.(?P<leaf>\w+)\[(?P<index>\d+)\]$")
_EXPERT = re.compile(r"\[\d+\]$")
# Prefixes of flat stems, the part of the model they mean, and how checkpoints call that part.
_FLAT = (
    (re.compile(r"(lora_unet_+|lora_transformer_|lycoris_)(unet_)?"), "denoiser"),
    (re.compile(r"lora_te(?P<number>[123]?)_"), "text"),
)
_TEXT_MODEL = "text_model_"  # a level that transformers 5 left out of CLIPTextModel
_TEXT = re.compile(r"text_encoder|cond_stage_model|conditioner|text_encoders|clip|t5")
_NUMBERED = (  # text encoders by number; SDXL's refiner has only the second
    (re.compile(r"text_encoder_(?P<number>\d)\."), ""),
    (re.compile(r"conditioner\.embedders\.(1\.|0\.model\.)|text_encoders\.clip_g\."), "2"),
    (re.compile(r"text_encoders\.t5xxl\."), "3"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """A checkpoint's module paths, ready to be looked up.

    `heads` are what comes before the first number of a path, with what follows it; `flat` are paths
    with underscores for dots, with and without leading words; `loaded` are names that loaders have
    for modules which the file calls otherwise, and the file's. All three know both.
    """

    paths: frozenset[str]
    heads: Mapping[Head, frozenset[str]]
    flat: Mapping[str, tuple[str, ...]]
    loaded: Mapping[str, str] = field(default_factory=dict)

    def stored(self, path: str) -> str:
        """What the file calls a module that a loader calls `path`."""
        return self.loaded.get(path, path)


def index(paths: Iterable[str], configs: Mapping[str, Mapping[str, Any]] | None = None) -> Names:
    """The lookup tables of a checkpoint's module paths.

    `configs` of its models, by part of a pipeline, say what loaders call modules.
    """
    heads: dict[Head, set[str]] = defaultdict(set)
    flat: dict[str, list[str]] = defaultdict(list)
    known = frozenset(paths)
    others = loaded(known, configs or {})
    for path in (*known, *others):
        head, tail = split(path)
        heads[head].add(tail)
        for start in range(len(head) + 1 if tail else len(head)):
            flat["_".join((*head[start:], *tail.split(".")) if tail else head[start:])].append(path)
    return Names(
        known,
        {head: frozenset(tails) for head, tails in heads.items()},
        {name: tuple(sorted(found)) for name, found in flat.items()},
        others,
    )


def find(
    sites: Mapping[str, Site], names: Names, fits: Callable[[Site, str], bool]
) -> dict[str, str]:
    """stem -> module path in the checkpoint, as the file has it, for the sites that have one.

    `fits` says whether a site's ΔW has the shape of the weight at a path; it decides where several
    names are there (experts adapted by two parameters).
    """
    found: dict[str, str] = {}
    waiting: dict[Head, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for stem, site in sites.items():
        if site.dialect == "kohya":
            path = unflattened(stem, names)
            if path:
                found[stem] = path
            continue
        spelt = _spellings(site)
        there = [path for path in map(names.stored, spelt) if path in names.paths]
        if there:
            found[stem] = next((path for path in there if fits(site, path)), there[0])
            continue
        for path in spelt:
            head, tail = split(path)
            waiting[head][tail].append(stem)  # experts share a tensor
    below: dict[Head, set[str]] = defaultdict(set)
    for path in found.values():
        head, tail = split(path)
        below[head].add(tail)
    for head, tails in waiting.items():
        below[head] |= tails.keys()
    moved = {head: _renamed(head, list(tails), names) for head, tails in waiting.items()}
    kept = {head: head for head in below.keys() - waiting.keys()}
    sure = {head: other for head, other in moved.items() if other is not None}
    lost = clashing({**kept, **sure}, below)
    for head, other in sure.items():
        if head in lost:
            continue
        for tail, stems in waiting[head].items():
            if tail in names.heads[other]:
                path = names.stored(".".join((*other, tail)))
                for stem in stems:
                    found.setdefault(stem, path)
    return found


def _spellings(site: Site) -> list[str]:
    """Paths under which a checkpoint may keep what a site changes."""
    if site.owned:
        return [f"{site.owner}.{name}" for name in site.meant]
    single = _NUMBERED_EXPERT.match(site.stem)  # MLX stacks what others number
    if single:
        return [
            f"{single['block']}.switch_mlp.{single['leaf']}",
            f"{single['block']}.experts.{single['index']}.{single['leaf']}",
        ]
    plain = _EXPERT.sub("", site.stem).replace(".base_layer", "")
    return [plain, f"{plain}.in_proj_weight"]  # the latter is MultiheadAttention's


def split(path: str) -> tuple[Head, str]:
    """The head of a path, its words before the first number or else the last word; the rest."""
    parts = path.split(".")
    first = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return tuple(parts[:first]), ".".join(parts[first:])


def _renamed(head: Head, tails: Sequence[str], names: Names) -> Head | None:
    """What the checkpoint has before its numbers where an adapter has `head`.

    Of those that it may be called, one that holds most of `tails`; None where two are equally good.
    """
    holding = [h for h, there in names.heads.items() if any(t in there for t in tails)]
    candidates = [h for h in holding if related(head, h, names.heads)]

    def rank(other: Head) -> tuple[int, tuple[bool, bool, int]]:
        return sum(tail in names.heads[other] for tail in tails), likeness(head, other)

    best = sorted(candidates, key=rank, reverse=True)
    if not best or (len(best) > 1 and rank(best[0]) == rank(best[1])):
        return None
    return best[0] if best else None


def unflattened(stem: str, names: Names) -> str | None:
    """The one module path that a flat stem stands for, None if none or several may be meant."""
    for pattern, part in _FLAT:
        found = pattern.match(stem)
        if not found:
            continue
        flat = stem[found.end() :]
        paths = names.flat.get(flat) or names.flat.get(flat.removeprefix(_TEXT_MODEL), ())
        mine = [p for p in paths if bool(_TEXT.match(p)) == (part == "text")] or list(paths)
        number = found.groupdict().get("number")
        if number:
            mine = [path for path in mine if _number(path) == number]
        return names.stored(mine[0]) if len(mine) == 1 else None
    return None


def _number(path: str) -> str:
    """Which text encoder a module is of; the first has no number in its name."""
    for pattern, number in _NUMBERED:
        found = pattern.match(path)
        if found:
            return number or found["number"]
    return "1"
