"""Findings of an adapter against its base model: names, shapes, orientation, coverage.

Only headers of the base are read, or its config.json where there is no more.
"""

from __future__ import annotations

import re
from collections import defaultdict

from adapterops.basemodel.shapes import EMBEDDINGS, leaf
from adapterops.checking import orientation
from adapterops.checking.config import is_peft
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.checking.located import Base, Found, locate
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats import AdapterFile, Site
from adapterops.inspection.stems import families, ranges

_UNCOUNTED = -1  # experts by number, of which there are not as many as the adapter has
_ANOTHER = "is it an adapter of this model, and is the model stored as it was trained?"
_NOT_COVERED = re.compile(r".*(norm|ln_\w+|embed|wpe|wte|rotary|lm_head|position)[^.]*$", re.I)


def against(file: AdapterFile, base: Base) -> Findings:
    """Everything that is found in an adapter beside its base."""
    try:
        found = locate(file, base)
    except (IncompatibleError, UnsupportedError) as error:
        yield finding("base-place", error.message, module=error.module, hint=error.hint)
        return
    yield from _names(file, base, found)
    if not found.tensors:
        return
    yield from _shapes(file, base, found)
    yield from _kernels(file, base, found)
    yield from _deltas(found)
    yield from _fused(base, found)
    yield from _orientation(file, base, found)
    yield from _tied(file, base)
    yield from _coverage(base, found.changed)


def _names(file: AdapterFile, base: Base, found: Found) -> Findings:
    absent = found.absent
    if not absent:
        return
    if not found.tensors:
        first = next(iter(base.shapes.shapes), "none")
        yield finding(
            "base-names",
            f"none of its {len(absent)} modules has a name in {base.name}, such as {absent[0]} "
            f"here and {first} there",
            module=absent[0],
            hint="another model, or one that names its blocks otherwise; give the checkpoint that "
            "the adapter was trained on",
        )
        return
    yield finding(
        "base-module",
        f"{len(absent)} of {len(file.sites) + len(file.deltas)} modules are not in {base.name}: "
        f"{few(absent)}",
        module=absent[0],
        hint="is it an adapter of this model?",
    )


def _shapes(file: AdapterFile, base: Base, found: Found) -> Findings:
    if found.packed:
        yield finding(
            "base-packed",
            f"{plural(len(found.packed), 'weight')} of {base.name} are packed or quantised, and "
            f"their shapes were not compared: {few(found.packed)}",
        )
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    lost = {stem.rpartition("[")[0] for stem in found.absent}
    for stem, way in found.misfits.items():
        counted = way[0].experts == _UNCOUNTED
        if not counted or stem.rpartition("[")[0] not in lost:  # of which too few are there
            other = f"{'more experts, of ' if counted else ''}{_size(way[0].ref.shape)}"
            groups[_size(file.sites[stem].shape), other].append(stem)
    for (own, other), stems in groups.items():
        yield finding(
            "base-shape",
            f"{plural(len(stems), 'module')} change a weight of {own}, {base.name} has {other}",
            module=stems[0],
            hint="are both of the same model? a grown vocabulary shows in the embedding only",
        )


def _kernels(file: AdapterFile, base: Base, found: Found) -> Findings:
    """LoRA whose factors are matrices although the weight has a kernel, of PEFT's loaders."""
    flat = {}
    for stem, every in found.fitting.items():
        site, piece = file.sites[stem], every[0][0]
        plain = site.kind == "lora" and site.layer == "linear" and not site.owned
        loads_strictly = site.dialect in ("peft", "diffusers")
        if plain and loads_strictly and piece.experts is None and len(piece.ref.shape) > 2:
            flat[stem] = piece.ref.shape
    if flat:
        first, shape = next(iter(flat.items()))
        yield finding(
            "base-kernel",
            f"{plural(len(flat), 'module')} with matrices as factors change a convolution of "
            f"{base.name}, such as one of {_size(shape)}: PEFT and diffusers do not load them",
            module=first,
            hint="convert --base MODEL writes a LoHa, LoKr or AdaLoRA with the kernels",
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _deltas(found: Found) -> Findings:
    """Full deltas that have no weight of their shape; one finding for those refused alike."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, error in found.refused.items():
        same = isinstance(error, IncompatibleError)
        groups["base-shape" if same else "base-place"].append(name)
    for code, names in groups.items():
        error = found.refused[names[0]]
        more = f" (and {len(names) - 1} more full deltas)" if len(names) > 1 else ""
        yield finding(code, error.message + more, module=names[0], hint=_ANOTHER)


def _fused(base: Base, found: Found) -> Findings:
    """Modules that other software does not find by their names."""
    if found.fused:
        first = found.fused[0]
        where = " and ".join(found.tensors[first])
        yield finding(
            "base-fused",
            f"{plural(len(found.fused), 'module')} of {base.name} are fused with others, or in "
            f"pieces: {first} is in {where}",
            module=first,
            hint="bake finds them; loaders that go by the names of modules, as PEFT does, may not",
        )


def _orientation(file: AdapterFile, base: Base, found: Found) -> Findings:
    if not is_peft(file):
        return
    straight: list[Site] = []
    turned: list[Site] = []
    square: list[Site] = []
    for stem, every in found.fitting.items():
        site, piece = file.sites[stem], every[0][0]
        plain = site.dialect == "peft" and site.layer == "linear" and piece.experts is None
        if plain and len(piece.ref.shape) == 2 and stem not in found.fused:
            even = site.shape[0] == site.shape[1]
            (square if even else turned if piece.turned else straight).append(site)
    flag = bool(file.config.get("fan_in_fan_out"))
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
    is_head = base.places.model.is_head
    touched = [s for s in file.sites if leaf(s) in EMBEDDINGS or is_head(f"{s}.weight")]
    if base.shapes.tied and touched:
        yield finding(
            "base-tied",
            f"{few(touched)}: embedding and head are one weight in {base.name}",
            module=touched[0],
            hint="merged into it, the change acts at both ends; bake unties them",
        )


def _coverage(base: Base, changed: set[str]) -> Findings:
    """Which kinds of weight matrices of the base the adapter changes, wholly or in part."""
    matrices = tuple(
        sorted(
            path
            for path, shape in base.shapes.shapes.items()
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
