"""What an output file looks like in each dialect: names, shapes, header and companion files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.casts import FORMATS
from adapterops.errors import IncompatibleError, UsageError
from adapterops.extras import Extra
from adapterops.formats import diffusers, kohya, peft
from adapterops.formats.model import AdapterFile, Site
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
    if not out or "\0" in out:
        raise UsageError(f"the output {out!r} is no file name")
    if out.lower().endswith(".safetensors"):
        if dialect != "peft":
            return out, False, []
        note = (
            "one file with the config in its header: adapterops reads it back; PEFT, vLLM and "
            "SGLang need a directory (leave .safetensors off the output's name)"
        )
        return out, False, [note]
    if dialect == "peft":
        if os.path.realpath(out) == os.path.realpath("."):
            raise UsageError(f"the output {out!r} is the current folder; name a new one")
        return out, True, []
    inside = out.endswith(("/", os.sep)) or os.path.isdir(out)
    path = os.path.join(out, "merged.safetensors") if inside else f"{out}.safetensors"
    return path, False, [f"{dialect} is one file: writing {path}"]


def plan_output(
    plan: Plan, rank: int, extras: Sequence[Extra], *, directory: bool, copy: bool
) -> Layout:
    """The layout of a result of one uniform rank and scale 1, or of a copy as it is."""
    if plan.dialect == "peft":
        return _peft(plan, rank, extras, directory, copy)
    travelling = {extra.name: (extra.dtype, extra.shape) for extra in extras}
    if copy:
        tensors, roles = _copied_names(plan)
        header = dict(_only_input(plan).metadata) or {"format": "pt"}
        return Layout(tensors | travelling, roles, {}, header)
    tensors, roles, constants = _new_names(plan, rank)
    metadata: dict[str, str] = {"format": "pt"}
    warnings: list[str] = []
    if plan.dialect == "kohya":
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
    elif set(_styles(plan).values()) <= {"peft"}:
        config = diffusers.write_config(list(roles), rank, bias=bool(_biased(plan)))
        if config is not None:
            metadata[diffusers.METADATA_KEY] = config
    return Layout(tensors | travelling, roles, constants, metadata, warnings=tuple(warnings))


def _only_input(plan: Plan) -> AdapterFile:
    """The input that a copy is a copy of."""
    return plan.inputs[plan.modules[0].parts[0].input]


def _copied_names(plan: Plan) -> tuple[Tensors, dict[str, dict[str, str]]]:
    tensors: Tensors = {}
    roles: dict[str, dict[str, str]] = {}
    for module in plan.modules:
        parts = module.parts[0].site.parts
        roles[module.stem] = {role: ref.name for role, ref in parts.items()}
        tensors.update({ref.name: (ref.dtype, ref.shape) for ref in parts.values()})
    return tensors, roles


def _new_names(
    plan: Plan, rank: int
) -> tuple[Tensors, dict[str, dict[str, str]], dict[str, bytes]]:
    """Tensors, their names by role, and the zeros that fill up `lora_B.bias`.

    PEFT's lora_bias is one flag for the whole adapter: if one module shifts its bias, each linear
    and convolution must have one.
    """
    tensors: Tensors = {}
    roles: dict[str, dict[str, str]] = {}
    zeros: dict[str, bytes] = {}
    styles = _styles(plan) if plan.dialect == "diffusers" else {}
    biased = _biased(plan)
    for module in plan.modules:
        names = _module_names(plan, module, styles)
        shape_b, shape_a = _factor_shapes(module, rank)
        tensors[names["B"]] = (plan.dtype, shape_b)
        tensors[names["A"]] = (plan.dtype, shape_a)
        roles[module.stem] = {"B": names["B"], "A": names["A"]}
        if not biased or "bias" not in names:
            continue
        tensors[names["bias"]] = (plan.dtype, (module.shape[0],))
        if module.stem in biased:
            roles[module.stem]["bias"] = names["bias"]
        else:
            zeros[names["bias"]] = bytes(module.shape[0] * FORMATS[plan.dtype].bits // 8)
    return tensors, roles, zeros


def _module_names(plan: Plan, module: Module, styles: Mapping[str, str]) -> dict[str, str]:
    if plan.dialect == "peft":
        return peft.names(module.stem, module.layer)
    if plan.dialect == "kohya":
        return kohya.names(module.stem)
    style = styles.get(diffusers.component(module.stem), "peft")
    return diffusers.names(module.stem, style)


def _biased(plan: Plan) -> set[str]:
    """The modules whose bias some input shifts."""
    return {
        module.stem
        for module in plan.modules
        if any("bias" in part.site.parts for part in module.parts)
    }


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
    # Loaders look at one key to tell the spelling of all, and only one spelling has biases.
    if set(styles.values()) == {"bare"}:
        return styles
    if {"peft", "bare"} & set(styles.values()) or _biased(plan):
        styles = dict.fromkeys(styles, "peft")
    return styles


def _peft(plan: Plan, rank: int, extras: Sequence[Extra], directory: bool, copy: bool) -> Layout:
    first = _only_input(plan) if copy else plan.inputs[0]
    source = {**first.config, **_extras_config(plan.live)}
    if copy:
        tensors, roles, sizes = _copied_peft(plan)
        constants: dict[str, bytes] = {}
    else:
        tensors, roles, constants = _new_names(plan, rank)
        sizes = {module.stem: (rank, float(rank)) for module in plan.modules}
        _check_heads(plan, extras)
    config = peft.write_config(
        source,
        next((file.base for file in plan.live if file.base), None),
        sizes,
        targets=_targets(plan, keep_extras=bool(extras)),
        keep_extras=bool(extras),
        bias=bool(_biased(plan)),
    )
    if copy:
        config["use_rslora"] = any(_is_stabilised(module.parts[0].site) for module in plan.modules)
    tensors.update({extra.name: (extra.dtype, extra.shape) for extra in extras})
    text = json.dumps(config, indent=2, sort_keys=True)
    metadata = {"format": "pt"}
    if not directory:
        return Layout(tensors, roles, constants, {**metadata, diffusers.METADATA_KEY: text})
    return Layout(tensors, roles, constants, metadata, {peft.CONFIG: text.encode() + b"\n"})


def _check_heads(plan: Plan, extras: Sequence[Extra]) -> None:
    """A module cannot be saved whole and adapted in one file: PEFT would ignore the factors."""
    names = {extra.name: extra for extra in extras}
    for module in plan.modules:
        extra = names.get(f"{peft.PREFIX}{module.stem}.weight")
        if extra is not None:
            adapted = plan.inputs[module.parts[0].input]
            raise IncompatibleError(
                f"{adapted.path} adapts it, {extra.refs[0].source.path} carries it whole "
                "(modules_to_save); one adapter cannot do both",
                module=module.stem,
                hint="choose --extras drop, or leave the module out with --modules",
            )


def _copied_peft(
    plan: Plan,
) -> tuple[Tensors, dict[str, dict[str, str]], dict[str, tuple[int, float]]]:
    """A copy's tensors under PEFT's current names, with each module's own rank and alpha."""
    tensors: Tensors = {}
    roles: dict[str, dict[str, str]] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for module in plan.modules:
        site = module.parts[0].site
        names = peft.names(module.stem, module.layer)
        roles[module.stem] = {role: names[role] for role in site.parts if role in names}
        for role, name in roles[module.stem].items():
            tensors[name] = (site.parts[role].dtype, site.parts[role].shape)
        sizes[module.stem] = (site.rank, site.alpha if site.alpha is not None else site.rank)
    return tensors, roles, sizes


def _extras_config(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """What a loader must be told about the extras of several inputs: heads, biases, tokens."""
    configs = [file.config for file in files]
    heads = {str(name) for config in configs for name in config.get("modules_to_save") or ()}
    biases = [config["bias"] for config in configs if config.get("bias") in peft.BIASES]
    tokens = [
        config["trainable_token_indices"]
        for config in configs
        if config.get("trainable_token_indices")
    ]
    result: dict[str, Any] = {
        "modules_to_save": sorted(heads),
        "bias": max(biases, key=peft.BIASES.index, default="none"),
    }
    if tokens and all(isinstance(item, dict) for item in tokens):
        merged: dict[str, Any] = {}
        for item in reversed(tokens):
            merged.update(item)
        result["trainable_token_indices"] = merged
    elif tokens:
        result["trainable_token_indices"] = tokens[0]
    return result


def _is_stabilised(site: Site) -> bool:
    """Whether the scale is alpha / √r (rsLoRA)."""
    if site.alpha is None or site.rank < 2:
        return False
    return not math.isclose(site.scale, site.alpha / site.rank, rel_tol=1e-9)


def _targets(plan: Plan, *, keep_extras: bool) -> list[str] | str:
    stems = [module.stem for module in plan.modules]
    configs = [] if plan.left_out else [file.config for file in plan.live]
    return peft.target_modules(stems, configs, keep_extras=keep_extras)


def sidecar_name(path: Path) -> str:
    """`x.adapterops.json` beside `x.safetensors`."""
    return f"{path.name.removesuffix('.safetensors')}.adapterops.json"
