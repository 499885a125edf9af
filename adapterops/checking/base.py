"""Findings of an adapter against its base model: names, shapes, orientation, coverage.

Only headers of the base are read, or its config.json where there is no more.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache

from adapterops.basemodel import names as basenames
from adapterops.basemodel import shapes
from adapterops.basemodel.config import is_conv1d_name
from adapterops.basemodel.shapes import EMBEDDINGS, HEADS, Base, leaf, owner_of
from adapterops.checking import orientation
from adapterops.checking.config import is_peft
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.formats import AdapterFile, Site
from adapterops.inspection.stems import families, ranges

_NOT_COVERED = re.compile(r".*(norm|ln_\w+|embed|wpe|wte|rotary|lm_head|position)[^.]*$", re.I)


load = lru_cache(maxsize=1)(shapes.load)  # one base, many adapters


def against(file: AdapterFile, base: Base) -> Findings:
    """Everything that is found in an adapter beside its base."""
    found = basenames.find(file.sites, base.names, lambda site, path: _may_be(site, path, base))
    for stem in file.sites:  # one head, whatever it is called; perhaps it is the embedding
        others = HEADS + EMBEDDINGS if base.tied else HEADS
        if stem not in found and leaf(stem) in HEADS:
            path = next((p for name in others for p in base.shapes if leaf(p) == name), None)
            if path:
                found[stem] = path
    yield from _names(file, base, found)
    if not found:
        return
    yield from _shapes(file, base, found)
    yield from _kernels(file, base, found)
    yield from _orientation(file, base, found)
    yield from _tied(file, base)
    yield from _coverage(file, base, set(found.values()))


def _may_be(site: Site, path: str, base: Base) -> bool:
    """Whether a site may change this weight, of those that its names allow."""
    shape = base.shapes[path]
    return shape is None or _fit(site, shape, lambda _: True) is not None


def _names(file: AdapterFile, base: Base, found: Mapping[str, str]) -> Findings:
    absent = [stem for stem in file.sites if stem not in found]
    if not absent:
        return
    if not found:
        first = next(iter(base.shapes), "none")
        yield finding(
            "base-names",
            f"none of its {len(absent)} modules has a name in {base.name}, such as {absent[0]} "
            f"here and {first} there",
            hint="another model, or one that names its blocks otherwise; give the checkpoint that "
            "the adapter was trained on",
        )
        return
    near = {_fused(stem, base) for stem in absent} - {None}
    extra = f"; {base.name} has them fused, as {sorted(map(str, near))[0]}" if near else ""
    yield finding(
        "base-module",
        f"{len(absent)} of {len(file.sites)} modules are not in {base.name}: {few(absent)}{extra}",
        module=absent[0],
        hint="is it an adapter of this model?",
    )


def _fused(stem: str, base: Base) -> str | None:
    """The fused weight that a base has in place of a split one."""
    block = owner_of(stem)
    fused = ("qkv_proj", "query_key_value", "c_attn", "gate_up_proj", "qkv", "to_qkv")
    return next((f"{block}.{name}" for name in fused if f"{block}.{name}" in base.shapes), None)


def _shapes(file: AdapterFile, base: Base, found: Mapping[str, str]) -> Findings:
    packed = [stem for stem, path in found.items() if base.shapes[path] is None]
    if packed:
        yield finding(
            "base-packed",
            f"{plural(len(packed), 'weight')} of {base.name} are packed or quantised, and their "
            f"shapes were not compared: {few(packed)}",
        )
    turned = _may_be_turned(file, base)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for stem, path in found.items():
        site, shape = file.sites[stem], base.shapes[path]
        if shape is not None and _fit(site, shape, turned) is None:
            groups[_size(site.shape), _size(shape)].append(stem)
    for (own, other), stems in groups.items():
        yield finding(
            "base-shape",
            f"{plural(len(stems), 'module')} change a weight of {own}, {base.name} has {other}",
            module=stems[0],
            hint="are both of the same model? a grown vocabulary shows in the embedding only",
        )


def _kernels(file: AdapterFile, base: Base, found: Mapping[str, str]) -> Findings:
    """LoRA whose factors are matrices although the weight has a kernel, of PEFT's loaders."""
    flat = [
        stem
        for stem, path in found.items()
        if file.sites[stem].kind == "lora"
        and file.sites[stem].dialect in ("peft", "diffusers")
        and file.sites[stem].layer == "linear"
        and not file.sites[stem].owned
        and len(base.shapes[path] or ()) > 2
    ]
    if flat:
        shape = _size(base.shapes[found[flat[0]]] or ())
        yield finding(
            "base-kernel",
            f"{plural(len(flat), 'module')} with matrices as factors change a convolution of "
            f"{base.name}, such as one of {shape}: PEFT and diffusers do not load them",
            module=flat[0],
            hint="convert --base MODEL writes a LoHa, LoKr or AdaLoRA with the kernels",
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _may_be_turned(file: AdapterFile, base: Base) -> Callable[[Site], bool]:
    """Whether the base may keep a site's weight as (in, out): its kind, the flag or a name says."""
    if base.conv1d is not None:
        return lambda site: bool(base.conv1d)
    flag = is_peft(file) and bool(file.config.get("fan_in_fan_out"))
    return lambda site: flag or is_conv1d_name(site.stem)


def _fit(site: Site, shape: tuple[int, ...], turned: Callable[[Site], bool]) -> str | None:
    """How a site's ΔW lies on a weight: "as is", "transposed", or "square"; None if it does not."""
    out, columns = site.shape
    if site.expert is not None and len(shape) == 3:
        return "as is" if shape[0] == site.expert[1] and _turned(site, shape[1:]) else None
    if site.owned:
        return "as is" if len(shape) > 1 and _turned(site, shape[-2:]) else None
    if site.layer == "embedding":
        return "as is" if shape == (columns, out) else None
    if not shape or shape[0] * math.prod(shape[1:]) != out * columns:
        return None
    kernel = shape[2:]
    if len(shape) > 2 or site.kernel:
        fits = shape[0] == out and (not site.kernel or site.kernel == kernel or not kernel)
        return "as is" if fits else None
    if shape == (out, columns):
        return "square" if out == columns else "as is"
    return "transposed" if shape == (columns, out) and turned(site) else None


def _turned(site: Site, shape: tuple[int, ...]) -> bool:
    """Whether a parameter has a site's shape, or its transpose: experts are kept either way."""
    return shape in (site.shape, site.shape[::-1])


def _orientation(file: AdapterFile, base: Base, found: Mapping[str, str]) -> Findings:
    if not is_peft(file):
        return
    can_turn = _may_be_turned(file, base)
    ways: dict[str, list[Site]] = defaultdict(list)
    for stem, path in found.items():
        site, shape = file.sites[stem], base.shapes[path]
        if site.dialect == "peft" and site.layer == "linear" and shape and not site.owned:
            ways[_fit(site, shape, can_turn) or ""].append(site)
    flag = bool(file.config.get("fan_in_fan_out"))
    straight, turned, square = ways["as is"], ways["transposed"], ways["square"]
    if flag and straight and not turned:
        what = f"(out, in) in {base.name}"
        yield orientation.contradiction("base-orientation", flag, straight + square, what)
    elif not flag and turned and not straight:
        what = f"(in, out) in {base.name}"
        yield orientation.contradiction("base-orientation", flag, turned + square, what)
    elif square and (flag or turned):
        way = "(in, out)" if flag else "(out, in)"
        yield finding(
            "base-square",
            f"{plural(len(square), 'square weight')} of {base.name}: only fan_in_fan_out "
            f"{str(flag).lower()} says that {way} is their order",
            module=square[0].stem,
        )


def _tied(file: AdapterFile, base: Base) -> Findings:
    touched = [s for s in file.sites if leaf(s) in (*HEADS, *EMBEDDINGS)]
    if base.tied and touched:
        yield finding(
            "base-tied",
            f"{few(touched)}: embedding and head are one weight in {base.name}",
            module=touched[0],
            hint="merged into it, the change acts at both ends; bake unties them",
        )


def _coverage(file: AdapterFile, base: Base, changed: set[str]) -> Findings:
    """Which kinds of weight matrices of the base the adapter changes, wholly or in part."""
    matrices = tuple(
        sorted(
            path
            for path, shape in base.shapes.items()
            if (path in changed or not _NOT_COVERED.match(leaf(path)))
            and (shape is None or len(shape) > 1)
            and not path.endswith((".bias", "_bias"))
        )
    )
    covered = sum(path in changed for path in matrices)
    if covered == len(matrices):
        return
    untouched, partly = [], []
    for family in families(matrices):
        members = [matrices[position] for position in family.members]
        hit = [path in changed for path in members]
        if not any(hit):
            untouched.append(leaf(family.name))
        elif not all(hit):
            missing = [i for i, done in zip(family.indices, hit, strict=True) if not done]
            partly.append(f"{family.name} without {ranges(missing)}")
    parts = [f"changes {covered} of the {len(matrices)} weight matrices of {base.name}"]
    if partly:
        parts.append(f"in part {few(partly)}")
    if untouched:
        parts.append(f"not {few(list(dict.fromkeys(untouched)), 8)}")
    yield finding("base-coverage", "; ".join(parts))
