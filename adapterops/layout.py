"""What an output file looks like in each dialect: names, shapes, header and companion files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.extras import Extra
from adapterops.formats import diffusers, kohya, peft
from adapterops.formats.model import Site
from adapterops.plan import Module, Plan

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Layout:
    """An output before any factor is computed.

    `tensors` maps names to (dtype, shape), `roles` maps each module to its tensors' names by role,
    `constants` holds the bytes that are known already (alphas), `files` the companion files.
    """

    tensors: Tensors
    roles: Mapping[str, Mapping[str, str]]
    constants: Mapping[str, bytes]
    metadata: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def output_path(out: str, dialect: str) -> tuple[str, bool, list[str]]:
    """The path to write, whether it is a directory, and notes about how it was understood."""
    if out.endswith(".safetensors"):
        if dialect != "peft":
            return out, False, []
        return (
            out,
            False,
            [
                "one file with the config in its header: adapterops reads it back; PEFT, vLLM and "
                "SGLang need a directory (leave .safetensors off the output's name)"
            ],
        )
    if dialect == "peft":
        return out, True, []
    return f"{out}.safetensors", False, [f"{dialect} is one file: writing {out}.safetensors"]


def plan_output(
    plan: Plan, rank: int, extras: Sequence[Extra], *, directory: bool, copy: bool
) -> Layout:
    """The layout of a result of one uniform rank and scale 1, or of a copy as it is."""
    if plan.dialect == "peft":
        return _peft(plan, rank, extras, directory, copy)
    tensors, roles = _copied_names(plan) if copy else _new_names(plan, rank)
    constants: dict[str, bytes] = {}
    metadata: dict[str, str] = {"format": "pt"}
    warnings: list[str] = []
    if copy:
        metadata = dict(plan.inputs[plan.modules[0].parts[0].input].metadata) or metadata
    elif plan.dialect == "kohya":
        carried, differ = kohya.carried_metadata([file.metadata for file in plan.inputs])
        metadata = {**metadata, **kohya.rewritten(carried, rank)}
        if differ:
            warnings.append(
                f"the inputs differ in {', '.join(differ)}; the first input's values are kept"
            )
        alpha = bytes(casts.stored_bytes(casts.store(np.array([float(rank)]), "F32")))
        for stem in roles:
            tensors[f"{stem}.alpha"] = ("F32", ())
            constants[f"{stem}.alpha"] = alpha
    elif set(_styles(plan).values()) == {"peft"}:
        metadata[diffusers.METADATA_KEY] = diffusers.write_config(list(roles), rank)
    tensors.update({extra.name: (extra.dtype, extra.shape) for extra in extras})
    return Layout(tensors, roles, constants, metadata, warnings=tuple(warnings))


def _copied_names(plan: Plan) -> tuple[Tensors, dict[str, dict[str, str]]]:
    tensors: Tensors = {}
    roles: dict[str, dict[str, str]] = {}
    for module in plan.modules:
        parts = module.parts[0].site.parts
        roles[module.stem] = {role: ref.name for role, ref in parts.items()}
        tensors.update({ref.name: (ref.dtype, ref.shape) for ref in parts.values()})
    return tensors, roles


def _new_names(plan: Plan, rank: int) -> tuple[Tensors, dict[str, dict[str, str]]]:
    tensors: Tensors = {}
    roles: dict[str, dict[str, str]] = {}
    styles = _styles(plan) if plan.dialect == "diffusers" else {}
    for module in plan.modules:
        if plan.dialect == "peft":
            names = peft.names(module.stem, module.layer)
        elif plan.dialect == "kohya":
            names = kohya.names(module.stem)
        else:
            style = styles.get(diffusers.component(module.stem), "peft")
            names = diffusers.names(module.stem, style)
        shape_b, shape_a = _factor_shapes(module, rank)
        tensors[names["B"]] = (plan.dtype, shape_b)
        tensors[names["A"]] = (plan.dtype, shape_a)
        roles[module.stem] = {"B": names["B"], "A": names["A"]}
        if any("bias" in part.site.parts for part in module.parts) and "bias" in names:
            tensors[names["bias"]] = (plan.dtype, (module.shape[0],))
            roles[module.stem]["bias"] = names["bias"]
    return tensors, roles


def _factor_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, columns = module.shape
    if not module.kernel:
        return (out, rank), (rank, columns)
    channels = columns // int(np.prod(module.kernel))
    return (out, rank, *(1 for _ in module.kernel)), (rank, channels, *module.kernel)


def _styles(plan: Plan) -> dict[str, str]:
    """The spelling of each component: as in the first input that has it."""
    styles: dict[str, str] = {}
    for file in plan.inputs:
        for item in file.style.split(" ") if file.style else []:
            part, _, style = item.partition("=")
            styles.setdefault(part, style)
    if "peft" in styles.values():  # loaders look at one key to tell the spelling of all
        styles = dict.fromkeys(styles, "peft")
    return styles


def _peft(plan: Plan, rank: int, extras: Sequence[Extra], directory: bool, copy: bool) -> Layout:
    tensors, roles = _new_names(plan, rank)
    source: dict[str, Any] = dict(plan.inputs[0].config)
    sizes = {module.stem: (rank, float(rank)) for module in plan.modules}
    if copy:
        for module in plan.modules:
            site = module.parts[0].site
            for role in roles[module.stem]:
                ref = site.parts[role]
                tensors[roles[module.stem][role]] = (ref.dtype, ref.shape)
            sizes[module.stem] = (site.rank, site.alpha if site.alpha is not None else site.rank)
        source = dict(plan.inputs[plan.modules[0].parts[0].input].config)
    for file in plan.inputs:
        for key in ("modules_to_save", "trainable_token_indices", "bias"):
            if source.get(key) in (None, [], "none") and file.config.get(key):
                source[key] = file.config[key]
    config = peft.write_config(
        source,
        next((file.base for file in plan.inputs if file.base), None),
        sizes,
        targets=_targets(plan),
        keep_extras=bool(extras),
        bias=any("bias" in names for names in roles.values()),
    )
    if copy:
        config["use_rslora"] = any(_is_stabilised(module.parts[0].site) for module in plan.modules)
    tensors.update({extra.name: (extra.dtype, extra.shape) for extra in extras})
    text = json.dumps(config, indent=2, sort_keys=True)
    metadata = {"format": "pt"}
    if not directory:
        return Layout(tensors, roles, {}, {**metadata, diffusers.METADATA_KEY: text})
    return Layout(tensors, roles, {}, metadata, {peft.CONFIG: text.encode() + b"\n"})


def _is_stabilised(site: Site) -> bool:
    """Whether the scale is alpha / √r (rsLoRA)."""
    if site.alpha is None or site.rank < 2:
        return False
    return not math.isclose(site.scale, site.alpha / site.rank, rel_tol=1e-9)


def _targets(plan: Plan) -> list[str]:
    stems = [module.stem for module in plan.modules]
    if plan.left_out:
        return sorted(stems)
    return peft.target_modules(stems, [file.config for file in plan.inputs])


def sidecar_name(path: Path) -> str:
    """`x.adapterops.json` beside `x.safetensors`."""
    return f"{path.name.removesuffix('.safetensors')}.adapterops.json"
