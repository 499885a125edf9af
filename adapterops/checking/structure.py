"""Findings about names: what an adapter is made of, and what it lacks where others have it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container

from adapterops.casts import format_name
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.formats import AdapterFile
from adapterops.inspection.stems import Family, families, ranges

_DOUBLED = re.compile(
    r"(lora_)?(?P<part>unet|te\d?|text_encoder(_[23])?|transformer|base_model\.model)[_.]+(?P=part)[_.]"
)
_IMAGE = ("kohya", "diffusers", "xlabs", "cloneofsimo", "mixed")
# What image trainers and their tools put beside the factors, and loaders know.
_BUNDLED = re.compile(r"bundle_emb\.|emb_params$|<[^>]*>$|string_to_param|networks_temp")
_FEWEST = 4  # layers from which a kind of module that one of them lacks is a gap
_LAYERS = 8  # layers from which one without any module is a gap; U-Nets number theirs with holes
_GAP = 8  # a gap of up to one in so many layers is no pattern of its own


def mixed_dialects(file: AdapterFile) -> Findings:
    """Modules of one file in several dialects: loaders of one of them miss the others."""
    if file.dialect == "mixed":
        counts = Counter(site.dialect for site in file.sites.values())
        parts = (f"{plural(count, 'module')} {name}" for name, count in counts.most_common())
        yield finding("mixed-dialects", f"{', '.join(parts)}")


def mixed_formats(file: AdapterFile) -> Findings:
    """Factors in several number formats."""
    counts = Counter(site.dtype for site in file.sites.values())
    if len(counts) > 1:
        parts = (
            f"{plural(n, 'module')} in {format_name(name)}" for name, n in counts.most_common()
        )
        yield finding("mixed-formats", ", ".join(parts))


def doubled_prefix(file: AdapterFile) -> Findings:
    """Names such as `lora_unet_unet_down_blocks…`, which no loader looks for."""
    doubled = [stem for stem in file.sites if _DOUBLED.match(stem)]
    if doubled:
        yield finding(
            "doubled-prefix",
            f"{plural(len(doubled), 'module')} with a doubled prefix",
            module=doubled[0],
            hint="rename the tensors; most loaders leave these modules out without a word",
        )


def stray_tensors(file: AdapterFile) -> Findings:
    """Tensors of an image adapter that are neither factors nor anything its loaders know."""
    if file.dialect not in _IMAGE:
        return
    strays = [
        name
        for name in file.extras
        if not _BUNDLED.search(name) and not _is_below(name, file.sites)
    ]
    if strays:
        yield finding(
            "stray-tensor",
            f"{plural(len(strays), 'tensor')} of no module: {few(strays)}",
            hint="loaders leave them out; were they cut off from their module's name?",
        )


def _is_below(name: str, modules: Container[str]) -> bool:
    """Whether a tensor's name continues that of a module; the reader objects to those."""
    return any(name[:at] in modules for at, letter in enumerate(name) if letter == ".")


def missing_modules(file: AdapterFile) -> Findings:
    """Modules that nearly all layers have and a few lack, and layers that lack everything.

    A kind of module (`model.layers.*.self_attn.v_proj`) is compared with the others of the same
    blocks. More than one layer in eight without it is taken for what was meant (hybrid models have
    attention in some layers only, people train halves), and so are the first layers (mixtures of
    experts begin with dense ones).
    """
    broken = {error.module for error in file.problems if error.module}  # told already
    names = tuple(sorted(broken.union(file.sites)))
    found = families(names) if names else ()
    for family in found:
        missing = [index for index in family.missing if index > family.indices[0]]
        if _is_gap(len(missing), len(family.indices)):
            yield finding(
                "missing-modules",
                f"{family.name} is missing for {ranges(missing)}, there for "
                f"{ranges(family.indices)}",
                hint="was the file cut? where it is missing the base stays as it is",
            )
    if not file.config.get("layers_to_transform"):
        yield from _missing_layers([f for f in found if f.name.count("*") == 1])


def _missing_layers(found: list[Family]) -> Findings:
    for prefix in dict.fromkeys(_prefix(family.name) for family in found):
        here = {index for f in found if _prefix(f.name) == prefix for (index,) in f.indices}
        holes = [(index,) for index in range(min(here), max(here)) if index not in here]
        if len(here) >= _LAYERS and _is_gap(len(holes), len(here)):
            yield finding(
                "missing-modules",
                f"no module in {prefix}{ranges(holes)}; {prefix}{ranges((i,) for i in here)} have "
                "some",
                hint="was the file cut? these layers stay as in the base",
            )


def _is_gap(missing: int, present: int) -> bool:
    known = missing + present
    return 0 < missing <= max(1, known // _GAP) and known >= _FEWEST


def _prefix(name: str) -> str:
    return name[: name.find("*")]


CHECKS = (mixed_dialects, mixed_formats, doubled_prefix, stray_tensors, missing_modules)
