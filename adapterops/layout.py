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
from adapterops.formats import cloneofsimo, diffusers, kohya, mlx, peft, peft_config, xlabs
from adapterops.formats.model import AdapterFile, Site
from adapterops.formats.names import DIRECTORIES
from adapterops.plan import Module, Plan

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a factor goes: the tensor's name, and how the file arranges it.

    `transposed`: as (n, r) or (r, m). `expert` is (index, count) of a factor that shares its
    tensor: stacked along the first axis, or every count-th column (`interleaved`).
    """

    name: str
    transposed: bool = False
    expert: tuple[int, int] | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """An output before any factor is computed.

    `tensors` maps names to (dtype, shape), `roles` maps each module to its factors' slots by role,
    `constants` holds the bytes that are known already (alphas), `files` the companion files,
    `weights` the name of the weights file in a directory.
    """

    tensors: Tensors
    roles: Mapping[str, Mapping[str, Slot]]
    constants: Mapping[str, bytes]
    metadata: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def output_path(out: str, dialect: str) -> tuple[str, bool, list[str]]:
    """The path to write, whether it is a directory, and notes about how it was understood."""
    if not out or "\0" in out:
        raise UsageError(f"the output {out!r} is no file name")
    if out.lower().endswith(".safetensors"):
        if dialect not in DIRECTORIES:
            return out, False, []
        loaders = "PEFT, vLLM and SGLang need" if dialect == "peft" else "mlx-lm needs"
        note = (
            f"one file with the config in its header: adapterops reads it back; {loaders} "
            "a directory (leave .safetensors off the output's name)"
        )
        return out, False, [note]
    if dialect in DIRECTORIES:
        if os.path.realpath(out) == os.path.realpath("."):
            raise UsageError(f"the output {out!r} is the current folder; name a new one")
        return out, True, []
    inside = out.endswith(("/", os.sep)) or os.path.isdir(out)
    path = os.path.join(out, "merged.safetensors") if inside else f"{out}.safetensors"
    return path, False, [f"{dialect} is one file: writing {path}"]


def weights_name(dialect: str) -> str:
    """The weights file in an output directory."""
    return mlx.WEIGHTS if dialect == "mlx" else peft.WEIGHTS


def plan_output(
    plan: Plan, rank: int, extras: Sequence[Extra], *, directory: bool, copy: bool
) -> Layout:
    """The layout of a result of one uniform rank and scale 1, or of a copy as it is."""
    if copy:
        tensors, roles = _copied_names(plan)
        constants: dict[str, bytes] = {}
    else:
        tensors, roles, constants = _new_names(plan, rank)
    tensors |= {extra.name: (extra.dtype, extra.shape) for extra in extras}
    for delta in plan.deltas:
        dtype = delta.parts[0].ref.dtype if copy else plan.dtype
        tensors[delta.name] = (dtype, delta.shape)
    if plan.dialect in DIRECTORIES:
        if not copy:
            _check_heads(plan, extras)
        text = json.dumps(_config(plan, rank, extras, copy), indent=2, sort_keys=True)
        if directory:
            files = {peft.CONFIG: text.encode() + b"\n"}
            return Layout(tensors, roles, constants, {"format": "pt"}, files)
        metadata = {"format": "pt", diffusers.METADATA_KEY: text}
        return Layout(tensors, roles, constants, metadata)
    if copy:
        return Layout(tensors, roles, {}, dict(_only_input(plan).metadata) or {"format": "pt"})
    metadata, warnings = _metadata(plan, rank)
    return Layout(tensors, roles, constants, metadata, warnings=tuple(warnings))


def _metadata(plan: Plan, rank: int) -> tuple[dict[str, str], list[str]]:
    """The header of a one-file dialect, and warnings about inputs that differ in it."""
    metadata: dict[str, str] = {"format": "pt"}
    dialects = {module.dialect for module in plan.modules} or {plan.dialect}
    warnings: list[str] = []
    if "kohya" in dialects:
        carried, differ = kohya.carried_metadata([file.metadata for file in plan.inputs])
        metadata |= kohya.rewritten(carried, rank) if plan.modules else carried
        if differ:
            warnings.append(
                f"the inputs differ in {', '.join(differ)}; the first input's values are kept"
            )
    if "cloneofsimo" in dialects:
        metadata |= cloneofsimo.metadata([file.metadata for file in plan.inputs])
        ranked = [module.stem for module in plan.modules if module.dialect == "cloneofsimo"]
        metadata |= {f"{stem}:rank": str(rank) for stem in ranked}
    if dialects == {"diffusers"} and set(_styles(plan).values()) <= {"peft"}:
        stems = [module.stem for module in plan.modules]
        config = diffusers.write_config(stems, rank, bias=bool(_biased(plan)))
        if config is not None:
            metadata[diffusers.METADATA_KEY] = config
    return metadata, warnings


def _only_input(plan: Plan) -> AdapterFile:
    """The input that a copy is a copy of."""
    return plan.live[0]


def _copied_names(plan: Plan) -> tuple[Tensors, dict[str, dict[str, Slot]]]:
    """A copy's tensors: under PEFT's current names, else as they are called in the file."""
    tensors: Tensors = {}
    roles: dict[str, dict[str, Slot]] = {}
    whole = _only_input(plan).tensors
    for module in plan.modules:
        parts = module.parts[0].site.parts
        names = {role: ref.name for role, ref in parts.items()}
        if plan.dialect == "peft":
            current = peft.names(module.tensors, module.layer)
            names = {role: current[role] for role in parts if role in current}
        roles[module.stem] = {role: Slot(name) for role, name in names.items()}
        for role, name in names.items():
            ref = whole[parts[role].name]
            tensors[name] = (ref.dtype, ref.shape)
    return tensors, roles


def _new_names(
    plan: Plan, rank: int
) -> tuple[Tensors, dict[str, dict[str, Slot]], dict[str, bytes]]:
    """Tensors, their slots by role, and what is known of them: alphas, zeros for `lora_B.bias`.

    PEFT's lora_bias is one flag for the whole adapter: if one module shifts its bias, each linear
    and convolution must have one.
    """
    tensors: Tensors = {}
    roles: dict[str, dict[str, Slot]] = {}
    constants: dict[str, bytes] = {}
    styles = _styles(plan)
    biased = _biased(plan)
    alpha = bytes(casts.stored_bytes(casts.store(np.array([float(rank)]), "F32")))
    for module in plan.modules:
        names = _module_names(module, styles)
        roles[module.stem] = {}
        shapes = dict(zip("BA", _factor_shapes(module, rank), strict=True))
        for role, shape in shapes.items():
            slot = _slot(module, role, names[role])
            roles[module.stem][role] = slot
            tensors[slot.name] = (plan.dtype, _stored_shape(slot, shape))
        if module.dialect == "kohya":
            tensors[names["alpha"]] = ("F32", ())
            constants[names["alpha"]] = alpha
        if not biased or "bias" not in names:
            continue
        tensors[names["bias"]] = (plan.dtype, (module.shape[0],))
        if module.stem in biased:
            roles[module.stem]["bias"] = Slot(names["bias"])
        else:
            constants[names["bias"]] = bytes(module.shape[0] * FORMATS[plan.dtype].bits // 8)
    return tensors, roles, constants


def _slot(module: Module, role: str, name: str) -> Slot:
    if module.expert is None:
        return Slot(name, transposed=module.dialect == "mlx")
    return Slot(name, expert=module.expert, interleaved=module.dialect == "peft" and role == "B")


def _stored_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape in the file, all experts' together."""
    if slot.expert is None:
        return shape[::-1] if slot.transposed else shape
    count = slot.expert[1]
    if slot.interleaved:
        return (shape[0], shape[1] * count)
    return (shape[0] * count, shape[1]) if slot.name.startswith(peft.PREFIX) else (count, *shape)


def _module_names(module: Module, styles: Mapping[str, str]) -> dict[str, str]:
    if module.dialect == "peft":
        return peft.names(module.tensors, module.layer)
    if module.dialect == "diffusers":
        style = styles.get(diffusers.component(module.stem), "peft")
        return diffusers.names(module.stem, style)
    return {
        "mlx": mlx.names,
        "kohya": kohya.names,
        "xlabs": xlabs.names,
        "cloneofsimo": cloneofsimo.names,
    }[module.dialect](module.tensors)


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


def _config(plan: Plan, rank: int, extras: Sequence[Extra], copy: bool) -> dict[str, Any]:
    """adapter_config.json of a PEFT or MLX output."""
    base = next((file.base for file in plan.live if file.base), None)
    stems = [module.stem for module in plan.modules]
    sites = [module.parts[0].site for module in plan.modules]
    if plan.dialect == "mlx":
        configs = [file.config for file in plan.live if file.dialect == "mlx"]
        config = mlx.write_config(configs, base, [module.tensors for module in plan.modules], rank)
        if copy:
            config["lora_parameters"]["scale"] = sites[0].scale
        return config
    first = _only_input(plan) if copy else plan.inputs[0]
    sizes: dict[str, tuple[int, float]] = {}
    for module, site in zip(plan.modules, sites, strict=True):
        kept = (site.rank, site.alpha if site.alpha is not None else float(site.rank))
        for name in [f"{site.owner}.{name}" for name in site.meant] or [module.tensors]:
            sizes[name] = kept if copy else (rank, float(rank))
    owners = {site.owner for site in sites if site.owned}
    targets = [stem for stem, site in zip(stems, sites, strict=True) if not site.owned]
    configs = [] if plan.left_out else [file.config for file in plan.live]
    named = peft_config.target_modules(targets, configs, keep_extras=bool(extras))
    config = peft_config.write_config(
        {**first.config, **_extras_config(plan.live)},
        base,
        sizes,
        targets=named if targets else [],
        keep_extras=bool(extras),
        bias=bool(_biased(plan)),
    )
    if owners:
        config["target_parameters"] = peft_config.target_parameters(
            [file.config for file in plan.live], owners
        )
    if copy:
        config["use_rslora"] = any(_is_stabilised(site) for site in sites)
    return config


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


def _extras_config(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """What a loader must be told about the extras of several inputs: heads, biases, tokens."""
    configs = [file.config for file in files]
    heads = {str(name) for config in configs for name in peft.listed(config, "modules_to_save")}
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


def sidecar_name(path: Path) -> str:
    """`x.adapterops.json` beside `x.safetensors`."""
    return f"{path.name.removesuffix('.safetensors')}.adapterops.json"
