"""What the output says of itself: adapter_config.json, or the metadata in the header."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adapterops.errors import IncompatibleError
from adapterops.extras import Extra
from adapterops.formats import cloneofsimo, diffusers, kohya, mlx, peft, peft_config
from adapterops.formats.model import AdapterFile, Site
from adapterops.plan import Module, Plan


def one_file_metadata(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """The header of a one-file dialect, and warnings about inputs that differ in it."""
    metadata: dict[str, str] = {"format": "pt"}
    dialects = {module.dialect for module in plan.modules} or {plan.dialect}
    warnings: list[str] = []
    if "kohya" in dialects:
        carried, differ = kohya.carried_metadata([file.metadata for file in plan.inputs])
        metadata |= kohya.rewritten(carried, _sizes(plan)) if plan.written else carried
        if differ:
            warnings.append(
                f"the inputs differ in {', '.join(differ)}; the first input's values are kept"
            )
    if "cloneofsimo" in dialects:
        metadata |= cloneofsimo.metadata([file.metadata for file in plan.inputs])
        ranked = [module for module in plan.written if module.dialect == "cloneofsimo"]
        metadata |= {f"{module.stem}:rank": str(module.kept) for module in ranked}
    if dialects == {"diffusers"} and set(styles(plan).values()) <= {"peft"}:
        ranks = {module.stem: module.kept for module in plan.written}
        config = diffusers.write_config(ranks, bias=bool(biased(plan)))
        if config is not None:
            metadata[diffusers.METADATA_KEY] = config
    return metadata, warnings


def says_ranks(plan: Plan) -> bool:
    """Whether the output's dialect can say that modules differ in rank."""
    if plan.dialect == "diffusers":
        return all(diffusers.component(module.stem) for module in plan.modules)
    return plan.dialect in ("peft", "kohya", "cloneofsimo")


def alpha(module: Module, plan: Plan) -> float:
    """What the loader divides by the rank, or by its root, to get the module's scale."""
    return module.scale * (module.kept**0.5 if plan.scaling == "rslora" else module.kept)


def _sizes(plan: Plan) -> set[tuple[int, float]]:
    """Every (rank, alpha) that the output has."""
    return {(module.kept, alpha(module, plan)) for module in plan.written}


def only_input(plan: Plan) -> AdapterFile:
    """The input that a copy is a copy of."""
    return plan.live[0]


def biased(plan: Plan) -> set[str]:
    """The modules whose bias some input shifts."""
    return {
        module.stem
        for module in plan.written
        if any("bias" in part.site.parts for part in module.parts)
    }


def styles(plan: Plan) -> dict[str, str]:
    """The spelling of each component: as in the first input that has it."""
    spellings: dict[str, str] = {}
    for file in plan.inputs:
        for item in file.style.split(" ") if file.style else []:
            part, _, style = item.partition("=")
            spellings.setdefault(part, style)
    # Loaders look at one key to tell the spelling of all, and only one spelling has biases.
    ragged = len({module.kept for module in plan.written}) > 1  # the others cannot say so
    if set(spellings.values()) == {"bare"} and not ragged:
        return spellings
    if {"peft", "bare"} & set(spellings.values()) or biased(plan) or ragged:
        spellings = dict.fromkeys(spellings, "peft")
    return spellings


def config(plan: Plan, extras: Sequence[Extra], copy: bool) -> dict[str, Any]:
    """adapter_config.json of a PEFT or MLX output."""
    base = next((file.base for file in plan.live if file.base), None)
    written = plan.written
    sites = {module.stem: module.parts[0].site for module in written if module.parts}
    if plan.dialect == "mlx":
        configs = [file.config for file in plan.live if file.dialect == "mlx"]
        names = [module.tensors for module in written]
        scale = next((module.scale for module in written), 1.0)
        if copy:
            scale = next((site.scale for site in sites.values()), 1.0)
        return mlx.write_config(configs, base, names, plan.rank, scale)
    first = only_input(plan) if copy else plan.inputs[0]
    sizes: dict[str, tuple[int, float]] = {}
    for module in written:
        site = sites.get(module.stem)
        size = (module.kept, alpha(module, plan))
        if copy and site and site.alpha is not None:
            size = (site.rank, site.alpha)
        meant = [f"{site.owner}.{name}" for name in site.meant] if site else []
        sizes.update(dict.fromkeys(meant or [module.tensors], size))
    owners = {site.owner for site in sites.values() if site.owned}
    targets = [m.stem for m in written if m.stem not in sites or not sites[m.stem].owned]
    as_trained = not plan.left_out and len(written) == len(plan.modules)
    configs = [file.config for file in plan.live] if as_trained else []
    named = peft_config.target_modules(targets, configs, keep_extras=bool(extras))
    if plan.listed_targets and isinstance(named, str):
        named = sorted({peft.target_path(stem) for stem in targets})
    config = peft_config.write_config(
        {**first.config, **_extras_config(plan.live)},
        base,
        sizes,
        targets=named if targets else [],
        keep_extras=bool(extras),
        bias=bool(biased(plan)),
    )
    if owners:
        config["target_parameters"] = peft_config.target_parameters(
            [file.config for file in plan.live], owners, whole=not as_trained
        )
    stabilised = any(_is_stabilised(site) for site in sites.values())
    config["use_rslora"] = stabilised if copy else plan.scaling == "rslora"
    return config


def check_heads(plan: Plan, extras: Sequence[Extra]) -> None:
    """A module cannot be saved whole and adapted in one file: PEFT would ignore the factors."""
    names = {extra.name: extra for extra in extras}
    for module in plan.written:
        extra = names.get(f"{peft.PREFIX}{module.stem}.weight")
        if extra is not None and module.parts:
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
