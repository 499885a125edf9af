"""Findings about a PEFT config by itself: keys, lists, defaults, the name of the base."""

from __future__ import annotations

import re
from typing import Any

from adapterops.checking.findings import Findings, few, finding
from adapterops.formats import AdapterFile

# Fields of peft 0.21.2's configs; what else a config holds is dropped with a warning on load.
_COMMON = """
    peft_type task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
    r target_modules exclude_modules modules_to_save layers_to_transform layers_pattern rank_pattern
    alpha_pattern
"""
_LORA = f"""{_COMMON}
    lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights megatron_config
    megatron_core trainable_token_indices loftq_config eva_config corda_config lora_ga_config
    use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size monteclora_config
    layer_replication runtime_config lora_bias target_parameters use_bdlora arrow_config kasa_config
    ensure_weight_tying
"""
_ADALORA = f"""{_LORA}
    beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step
"""
_LOHA = f"{_COMMON} alpha init_weights module_dropout rank_dropout use_effective_conv2d"
_LOKR = f"{_LOHA} decompose_both decompose_factor rank_dropout_scale"
_BY_KIND = {"LORA": _LORA, "ADALORA": _ADALORA, "LOHA": _LOHA, "LOKR": _LOKR}
_FIELDS = {kind: frozenset(names.split()) for kind, names in _BY_KIND.items()}
_LISTS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)
_DEFAULT_RANK = 8
# Drive letters, network shares, absolute and relative paths, links to files.
_LOCAL = re.compile(r"[A-Za-z]:[\\/]|\\\\|/|~|\.{1,2}[\\/]|file:|.*\\")


def is_peft(file: AdapterFile) -> bool:
    """Whether the adapter has a PEFT config that its modules are named by."""
    return bool(file.config) and file.dialect in ("peft", "mixed")


def kind_of(file: AdapterFile) -> str:
    """`peft_type` of the config, LORA where it is silent."""
    return str(file.config.get("peft_type") or "LORA").upper()


def unknown_keys(file: AdapterFile) -> Findings:
    """Keys that PEFT drops; older versions of it stop there."""
    fields = _FIELDS.get(kind_of(file))
    unknown = sorted(set(file.config) - fields) if fields and is_peft(file) else []
    if unknown:
        yield finding(
            "config-key",
            f"{few(unknown)}: unknown to PEFT 0.21.2, which drops "
            f"{'it' if len(unknown) == 1 else 'them'} on load",
        )


def lists(file: AdapterFile) -> Findings:
    """Lists that repeat themselves, and empty ones where the loader expects null."""
    if not is_peft(file):
        return
    for key in _LISTS:
        value = file.config.get(key)
        if not isinstance(value, list):
            continue
        twice = sorted({str(item) for item in value if value.count(item) > 1})
        if twice:
            yield finding("repeated-entry", f"{key} names {few(twice)} more than once")
        if not value and key != "target_modules":
            yield finding("empty-list", f"{key} is [], expected null or a list with entries")


def defaults(file: AdapterFile) -> Findings:
    """Missing keys for which the loader takes a value that does not fit the file."""
    if not is_peft(file):
        return
    config = file.config
    if not config.get("peft_type"):
        yield finding(
            "config-default",
            "no peft_type: PEFT cannot tell what it is",
            hint='"peft_type": "LORA"',
        )
    dims = sorted({site.dim for site in file.sites.values() if site.dialect == "peft"})
    if config.get("r") is None and dims and dims != [_DEFAULT_RANK] and kind_of(file) == "LORA":
        shown = ", ".join(map(str, dims))
        yield finding(
            "config-default",
            f"no r: PEFT takes {_DEFAULT_RANK}, the tensors have rank {shown}",
            hint=f'"r": {dims[-1]}',
        )
    if not config.get("target_modules") and not config.get("target_parameters") and file.sites:
        yield finding(
            "config-default",
            f"target_modules is {_shown(config.get('target_modules'))}: PEFT adapts what it takes "
            "for the architecture's usual modules, or stops",
            hint="list the names of the modules in the file",
        )


def base_path(file: AdapterFile) -> Findings:
    """A base model named by where it lay on somebody's disk."""
    if file.base and _LOCAL.match(file.base):
        yield finding(
            "base-path",
            f"the base model is {file.base!r}, a path of the machine it was trained on",
            hint="name the model as loaders can find it; some engines compare this name",
        )


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)


CHECKS = (unknown_keys, lists, defaults, base_path)
