"""Findings about names of modules and tensors, and about modules that others need beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from adapterops.formats.model import AdapterFile, Site
from adapterops.serving.features import says
from adapterops.serving.finding import Finding, Findings, few, grouped
from adapterops.serving.model import Engine
from adapterops.serving.scales import LORA_KINDS, leaf, module_types

_PEFT_NAME = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")
_ELSEWHERE = "serve it elsewhere: the base's layers have other names than this engine looks for"
_FUSED_EXPERT = re.compile(r".*\.experts(\.base_layer)?(\[\d+\])?")
_ONE_EXPERT = re.compile(r".*\.experts\.\d+\..+")


def layers(sites: Iterable[Site]) -> list[Site]:
    """Those on ordinary layers: no vocabulary, no experts, factors as PEFT's LoRA has them."""
    return [
        site
        for site in sites
        if site.kind in LORA_KINDS
        and not vocabulary_layer(site)
        and not _FUSED_EXPERT.fullmatch(site.stem)
        and not _ONE_EXPERT.fullmatch(site.stem)
    ]


def vocabulary_layer(site: Site) -> str:
    """Which layer over the vocabulary it is, "embedding" or "lm-head"; "" for others."""
    if site.layer == "embedding":
        return "embedding"
    return "lm-head" if leaf(site.stem) == "lm_head" else ""


def is_taken(site: Site, engine: Engine) -> bool:
    """Whether the engine recognises the tensors' names and the module."""
    known = engine.modules is None or leaf(site.stem) in engine.modules
    return known and not _unknown_names(site, engine)


def _unknown_names(site: Site, engine: Engine) -> list[str]:
    factors = [site.parts[role].name for role in "AB" if role in site.parts]
    return [name for name in factors if not engine.names.fullmatch(name)]


def names(plain: Sequence[Site], engine: Engine) -> Findings:
    """Ordinary layers whose tensors or modules the engine does not know."""
    wrong = {site.stem: names for site in plain if (names := _unknown_names(site, engine))}
    if wrong:
        stems, name = tuple(wrong), next(iter(wrong.values()))[0]
        shown = f"{few(stems)}: named {name!r}, expected {engine.named}"
        yield Finding("names", shown, stems, _ELSEWHERE if _PEFT_NAME.fullmatch(name) else "")
    unknown = [site.stem for site in plain if site.stem not in wrong and not is_taken(site, engine)]
    if unknown:
        leaves = ", ".join(sorted({leaf(stem) for stem in unknown}))
        known = ", ".join(sorted(engine.modules or ()))
        shown = known if len(known) < 120 else f"{known[:117]}..."
        yield Finding("module", f"{few(unknown)}: {leaves}, not among {shown}", tuple(unknown))
    convolutions = tuple(site.stem for site in plain if site.layer == "conv")
    if convolutions:
        yield Finding("conv", f"{few(convolutions)}: a convolution, expected linear", convolutions)


def vocabulary(file: AdapterFile, engine: Engine) -> Findings:
    """Factors of embeddings and of lm_head."""
    targets = file.config.get("target_modules")
    listed = sorted({leaf(str(name)) for name in targets}) if isinstance(targets, list) else None
    for site in file.sites.values():
        rule = vocabulary_layer(site)
        if not rule:
            continue
        size = site.shape[0] if rule == "lm-head" else site.shape[1]
        yield Finding(rule, f"{site.stem}: factors over {size} tokens", (site.stem,))
        if listed is not None and leaf(site.stem) not in listed:
            shown = f"{site.stem}: not in target_modules {listed}"
            yield Finding("untargeted", shown, (site.stem,))
        if rule == "lm-head" and engine.max_vocabulary and size > engine.max_vocabulary:
            shown = f"{site.stem}: {size} tokens, at most {engine.max_vocabulary}"
            yield Finding("vocabulary", shown, (site.stem,))


def experts(file: AdapterFile) -> Findings:
    """Factors of experts, fused in one tensor or one by one."""
    fused = tuple(stem for stem in file.sites if _FUSED_EXPERT.fullmatch(stem))
    if fused or file.config.get("target_parameters"):
        shown = says(file.config, "target_parameters", "null")
        yield Finding("target-parameters", shown, fused)
    single = tuple(stem for stem in file.sites if _ONE_EXPERT.fullmatch(stem))
    if single:
        yield Finding("experts", f"{few(single)}: factors of single experts", single)


def siblings(file: AdapterFile, taken: Sequence[Site], engine: Engine) -> Findings:
    """Modules that the engine fuses with others which are not there."""
    lonely = []
    for site in taken:
        name = leaf(site.stem)
        block = site.stem.removesuffix(name)
        lacking = [s for s in engine.siblings.get(name, ()) if block + s not in file.sites]
        if lacking:
            lonely.append(((name, " and ".join(lacking)), site.stem))
    for (name, missing), stems in grouped(lonely).items():
        yield Finding("siblings", f"{few(stems)}: {name} without {missing}", stems)


def missing_layers(taken: Sequence[Site], engine: Engine) -> Findings:
    """Kinds of modules that some layer lacks, of the layers that the file itself names."""
    if not engine.every_layer:
        return
    kinds = [kind for kind in module_types(taken, engine) if kind.missing]
    for (layers, missing), found in grouped(((k.layers, k.missing), k) for k in kinds).items():
        stems = tuple(site.stem for kind in found for site in kind.sites)
        have = f"in {layers - len(missing)} of at least {layers} layers"
        gaps = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        shown = f"{few([kind.name for kind in found])}: {have}, not in {gaps}"
        yield Finding("missing-layers", shown, stems)
