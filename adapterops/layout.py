"""What an output file looks like in each dialect: names, shapes, header and companion files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapterops import casts
from adapterops.casts import FORMATS
from adapterops.descriptions import (
    alpha,
    biased,
    check_heads,
    config,
    one_file_metadata,
    only_input,
    styles,
)
from adapterops.errors import UsageError
from adapterops.extras import Extra
from adapterops.files.output import resolved
from adapterops.formats import cloneofsimo, diffusers, kohya, mlx, peft, xlabs
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


def output_path(out: str, dialect: str, name: str = "merged") -> tuple[str, bool, list[str]]:
    """The path to write, whether it is a directory, and notes about how it was understood."""
    resolved(out)  # or UsageError
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
    path = os.path.join(out, f"{name}.safetensors") if inside else f"{out}.safetensors"
    return path, False, [f"{dialect} is one file: writing {path}"]


def weights_name(dialect: str) -> str:
    """The weights file in an output directory."""
    return mlx.WEIGHTS if dialect == "mlx" else peft.WEIGHTS


def plan_output(plan: Plan, extras: Sequence[Extra], *, directory: bool, copy: bool) -> Layout:
    """The layout of a result at the ranks of the plan, or of a copy as it is."""
    if copy:
        tensors, roles = _copied_names(plan)
        constants: dict[str, bytes] = {}
    else:
        tensors, roles, constants = _new_names(plan)
    tensors |= {extra.name: (extra.dtype, extra.shape) for extra in extras}
    for delta in plan.deltas:
        dtype = delta.parts[0].ref.dtype if copy else plan.dtype
        tensors[delta.name] = (dtype, delta.shape)
    if plan.dialect in DIRECTORIES:
        if not copy:
            check_heads(plan, extras)
        text = json.dumps(config(plan, extras, copy), indent=2, sort_keys=True)
        if directory:
            files = {peft.CONFIG: text.encode() + b"\n"}
            return Layout(tensors, roles, constants, {"format": "pt"}, files)
        metadata = {"format": "pt", diffusers.METADATA_KEY: text}
        return Layout(tensors, roles, constants, metadata)
    if copy:
        return Layout(tensors, roles, {}, dict(only_input(plan).metadata) or {"format": "pt"})
    metadata, warnings = one_file_metadata(plan)
    return Layout(tensors, roles, constants, metadata, warnings=tuple(warnings))


def _copied_names(plan: Plan) -> tuple[Tensors, dict[str, dict[str, Slot]]]:
    """A copy's tensors: under PEFT's current names, else as they are called in the file."""
    tensors: Tensors = {}
    roles: dict[str, dict[str, Slot]] = {}
    whole = only_input(plan).tensors
    for module in plan.written:
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
    plan: Plan,
) -> tuple[Tensors, dict[str, dict[str, Slot]], dict[str, bytes]]:
    """Tensors, their slots by role, and what is known of them: alphas, zeros for `lora_B.bias`.

    PEFT's lora_bias is one flag for the whole adapter: if one module shifts its bias, each linear
    and convolution must have one.
    """
    tensors: Tensors = {}
    roles: dict[str, dict[str, Slot]] = {}
    constants: dict[str, bytes] = {}
    spelling = styles(plan)
    shifted = biased(plan)
    for module in plan.written:
        names = _module_names(module, spelling)
        roles[module.stem] = {}
        shapes = dict(zip("BA", _factor_shapes(module, module.kept), strict=True))
        for role, shape in shapes.items():
            slot = _slot(module, role, names[role])
            roles[module.stem][role] = slot
            tensors[slot.name] = (plan.dtype, _stored_shape(slot, shape))
        if module.dialect == "kohya":
            tensors[names["alpha"]] = ("F32", ())
            value = casts.store(np.array([alpha(module, plan)]), "F32")
            constants[names["alpha"]] = bytes(casts.stored_bytes(value))
        if not shifted or "bias" not in names:
            continue
        tensors[names["bias"]] = (plan.dtype, (module.shape[0],))
        if module.stem in shifted:
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


def _factor_shapes(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, columns = module.shape
    if not module.kernel:
        return (out, rank), (rank, columns)
    channels = columns // int(np.prod(module.kernel))
    return (out, rank, *(1 for _ in module.kernel)), (rank, channels, *module.kernel)


def sidecar_name(path: Path) -> str:
    """`x.adapterops.json` beside `x.safetensors`."""
    return f"{path.name.removesuffix('.safetensors')}.adapterops.json"
