"""Rules of weights, applied: every module of every adapter gets the factor of its weight."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from adapterops.errors import UnsupportedError, UsageError
from adapterops.files.names import PICKLES
from adapterops.formats import diffusers
from adapterops.formats.model import AdapterFile, Ref, Ruled, Site
from adapterops.moduleweights.blocks import family
from adapterops.moduleweights.grammar import BlockRule, WeightRule, parse, shown
from adapterops.moduleweights.paths import layer
from adapterops.moduleweights.vectors import multipliers
from adapterops.provenance import distinct, label_of
from adapterops.suggestion import meant, nearest

_OPTION = "--module-weights"


def apply(
    files: Sequence[AdapterFile], weights: Sequence[float], specs: Sequence[str]
) -> tuple[list[AdapterFile], list[float]]:
    """The adapters with a `factor` in each module that rules say something of, and their weights.

    At a module, weight times factor is what the last rule with weights that matches it gives, or
    the adapter's own weight, times the value that the last block vector for the adapter has for its
    block. Modules of factor 0 are taken out; an adapter that nothing is left of keeps them all and
    has the weight 0. A weight of 0 becomes 1 where rules give others. Extras keep the weight.

    Raises UsageError for a malformed rule, one that matches nothing and a wrong number of weights,
    UnsupportedError for blocks of a model that has none known and for a full delta whose weight
    would have to differ from the others'.
    """
    specs = [specs] if isinstance(specs, str) else specs
    if not specs:
        return list(files), list(weights)
    rules = [parse(spec, len(files)) for spec in specs]
    modules = [_modules(file) for file in files]
    model = family({stem: width for stems in modules for stem, width in stems.items()})
    given = _given([r for r in rules if isinstance(r, WeightRule)], modules, model)
    vectors = [r for r in rules if isinstance(r, BlockRule)]
    chosen = _last({rule.text: _named(rule, files) for rule in vectors}, vectors, len(files))
    result, scales = [], []
    for index, (file, weight) in enumerate(zip(files, weights, strict=True)):
        own = {stem: given[stem][index] for stem in modules[index] if stem in given}
        rule, stems = chosen[index], list(modules[index])
        blocks = multipliers(rule, model, stems, file.path) if rule and stems else {}
        made, scale = _scaled(file, weight, own, blocks)
        if made is not file:
            given_to = tuple(zip(weights, files, strict=True))
            made = replace(made, ruled=Ruled(tuple(specs), given_to, index))
        result.append(made)
        scales.append(scale)
    _check_owners(files, result, scales)
    return result, scales


def _modules(file: AdapterFile) -> dict[str, int]:
    """Everything that the file changes: stem -> the width of its input, 0 for full deltas."""
    widths = {_changed(name, file): 0 for name in file.deltas}
    return widths | {stem: site.shape[1] for stem, site in file.sites.items()}


def _changed(name: str, file: AdapterFile) -> str:
    """The module that a full delta changes, by the name that the factors' modules have."""
    stem = name.rpartition(".")[0]
    full = diffusers.canonical(stem)
    return full if stem not in file.sites and full in file.sites else stem


def _given(
    rules: Sequence[WeightRule], modules: Sequence[Mapping[str, int]], model: str | None
) -> dict[str, tuple[float, ...]]:
    """stem -> the weights that the last rule that matches it gives."""
    stems = list(dict.fromkeys(stem for each in modules for stem in each))
    given: dict[str, tuple[float, ...]] = {}
    for rule in rules:
        if model and rule.kind != "re":
            _refuse_image(rule, model)
        matched = [stem for stem in stems if rule.matches(stem)]
        if not matched:
            raise UsageError(
                f"{_OPTION} {shown(rule.text)}: matches none of the {len(stems)} modules",
                hint=_nearest(rule, stems),
            )
        given.update(dict.fromkeys(matched, rule.weights))
    return given


def _refuse_image(rule: WeightRule, model: str) -> NoReturn:
    """Layers are no name for what U-Nets and Flux have, and attention there is of several kinds."""
    if rule.kind != "layers":
        what, instead = f"{rule.kind!r} is a part of language models", "re:REGEX: … matches by name"
    else:
        what = "Flux has two lists of blocks" if model == "flux" else "a U-Net has blocks"
        instead = "blocks[NAME]=… gives weights by block"
    raise UsageError(
        f"{_OPTION} {shown(rule.text)}: the adapters are of an image model, and {what}",
        hint=instead,
    )


def _nearest(rule: WeightRule, stems: Sequence[str]) -> str | None:
    """What a rule without matches may have meant."""
    if not stems:
        return None
    if rule.kind == "layers":
        numbers = [number for number in map(layer, stems) if number is not None]
        if numbers:
            return f"the layers are {min(numbers)} to {max(numbers)}"
        return f"no module has the number of a layer; the first is {min(stems)!r}"
    if rule.kind != "re":
        return f"the first is {min(stems)!r}; re:REGEX: … gives weights by name"
    pattern = rule.text.partition(":")[2].rpartition(":")[0].strip().replace("\\", "")
    return f"a module matches as a whole; the nearest is {nearest(pattern, stems, 0.0)!r}"


def _named(rule: BlockRule, files: Sequence[AdapterFile]) -> set[int]:
    """Which adapters a rule is for: by label, with or without a file's ending, or number from 1."""
    if rule.adapter == "*":
        return set(range(len(files)))
    labels = distinct([label_of(file) for file in files])
    plain = [os.path.splitext(label)[0] if _is_file(label) else label for label in labels]
    numbers = [str(number) for number in range(1, len(files) + 1)]
    for names in (labels, plain, numbers):
        if names.count(rule.adapter) == 1:
            return {names.index(rule.adapter)}
    hint = meant(rule.adapter, labels) or f"they are {', '.join(labels)}; * is for all"
    raise UsageError(
        f"{_OPTION} {shown(rule.text)}: no adapter is called {rule.adapter!r}", hint=hint
    )


def _is_file(label: str) -> bool:
    return label.endswith((".safetensors", *PICKLES))


def _last(
    named: Mapping[str, set[int]], rules: Sequence[BlockRule], count: int
) -> list[BlockRule | None]:
    """The last rule for each adapter."""
    return [
        next((rule for rule in reversed(rules) if index in named[rule.text]), None)
        for index in range(count)
    ]


def _scaled(
    file: AdapterFile,
    weight: float,
    given: Mapping[str, float],
    blocks: Mapping[str, float | None],
) -> tuple[AdapterFile, float]:
    """One adapter with its factors, and the weight that they multiply."""

    def target(stem: str) -> tuple[float, float]:
        value = blocks.get(stem)
        return given.get(stem, weight), 1.0 if value is None else value

    stems = [*file.sites, *(_changed(name, file) for name in file.deltas)]
    if not any(own and value for own, value in map(target, stems)):
        return file, 0.0
    scale = weight or 1.0
    sites: dict[str, Site] = {}
    for stem, site in file.sites.items():
        own, value = target(stem)
        if own and value:
            factor = (own / scale if stem in given else 1.0) * value
            sites[stem] = site if factor == 1.0 else replace(site, factor=site.factor * factor)
    deltas: dict[str, Ref] = {}
    for name, ref in file.deltas.items():
        own, value = target(_changed(name, file))
        if own * value == scale:
            deltas[name] = ref
        elif own and value:
            raise UnsupportedError(
                f"is a full delta: its weight is the adapter's, {weight:g}, or 0, and the rules "
                f"give {own * value:g}",
                path=file.path,
                module=name,
                hint=f"except it from the rules, or let them give {weight:g} or 0",
            )
    free = [stem for stem, value in blocks.items() if value is None]
    notes = file.notes
    if free:
        more = f" and {len(free) - 1} more" if len(free) > 1 else ""
        note = f"{file.path}: no block of the vector holds {free[0]}{more}: the weight stays there"
        notes = (*notes, note)
    left_out = file.left_out | (file.sites.keys() - sites.keys())
    made = replace(file, sites=sites, deltas=deltas, notes=notes, left_out=left_out)
    return made, scale


def _check_owners(
    before: Sequence[AdapterFile], after: Sequence[AdapterFile], weights: Sequence[float]
) -> None:
    """PEFT tells nested parameters of one module apart by their number: all stay, or none."""
    pairs: dict[str, set[str]] = defaultdict(set)
    kept: set[str] = set()
    for file in before:
        for stem, site in file.sites.items():
            if site.owned:
                pairs[site.owner].add(stem.partition("[")[0])
    for file, weight in zip(after, weights, strict=True):
        kept |= {stem.partition("[")[0] for stem in file.sites if weight}
    for owner, stems in pairs.items():
        if kept & stems not in (set(), stems):
            raise UsageError(
                f"{_OPTION} leaves {min(kept & stems)} and takes out {min(stems - kept)}, two "
                f"parameters of {owner} that PEFT can only tell apart together"
            )
