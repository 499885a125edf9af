"""Findings about files, config and what lies beside the factors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from adapterops.formats import peft
from adapterops.formats.model import AdapterFile
from adapterops.serving.finding import Finding, Findings, few, grouped
from adapterops.serving.model import Engine

CONFIG = "adapter_config.json"
# Initialisations that change the base while training: the factors mean nothing beside another one.
_MOVED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_FEATURES = {  # key: rule, the value of a plain LoRA
    "use_dora": ("dora", "false"),
    "alora_invocation_tokens": ("alora", "null"),
    "layer_replication": ("layer-replication", "null"),
    "use_bdlora": ("bd-lora", "null"),
    "use_qalora": ("qa-lora", "false"),
}
_KINDS = {"adalora": "adalora", "merged_linear": "merged-linear"}
_EMBEDDING_COPY = re.compile(r".*\b(embed_tokens|lm_head)\.base_layer\.weight")
_SAVED_EMBEDDING = re.compile(r".*\b(embed_tokens|lm_head)\.weight")


def files(file: AdapterFile, engine: Engine) -> Findings:
    """Names of files, keys that the config lacks, token lists."""
    weights = os.path.basename(file.weights_file)
    if not any(fnmatchcase(weights, pattern) for pattern in engine.weights):
        wanted = " or ".join(engine.weights)
        yield Finding("weights-file", f"its weights are in {weights!r}, expected {wanted}")
    config = os.path.basename(file.config_file or "")
    if config != CONFIG:
        place = f"its config is {config!r}" if config else "there is no config beside its weights"
        yield Finding("config-missing", f"{place}, expected {CONFIG!r}")
    missing = [key for key in engine.required if key not in file.config]
    if missing and config == CONFIG:
        has = ", ".join(key for key in engine.required if key in file.config) or "none of these"
        yield Finding("config-key", f"{CONFIG} lacks {' and '.join(missing)}, it has {has}")
    if "added_tokens.json" in file.side_files:
        yield Finding("added-tokens", "added_tokens.json lies beside the weights")


def config_fields(file: AdapterFile, engine: Engine) -> Findings:
    """Fields of the config that change what the factors mean."""
    config = file.config
    for key, (rule, plain) in _FEATURES.items():
        if config.get(key):
            yield Finding(rule, says(config, key, plain))
    biased = tuple(site.stem for site in file.sites.values() if "bias" in site.parts)
    if biased:
        yield Finding("lora-bias", f"{few(biased)}: lora_B has a bias, expected none", biased)
    elif config.get("lora_bias"):
        yield Finding("lora-bias", says(config, "lora_bias", "false"))
    if config.get("bias") not in (None, "none"):
        yield Finding("bias-config", says(config, "bias", "none"))
    init = config.get("init_lora_weights")
    if isinstance(init, str):
        if engine.inits is not None and init.lower() not in engine.inits:
            yield Finding("init", says(config, "init_lora_weights", "true"))
        elif init.lower().startswith(_MOVED_BASE):
            yield Finding("init-moved", says(config, "init_lora_weights", "true"))
    targets = config.get("target_modules", [])
    if not isinstance(targets, list) and targets not in ("all", "all-linear"):
        yield Finding("target-modules", says(config, "target_modules", "a list of names"))


def says(config: Mapping[str, Any], key: str, expected: str) -> str:
    """What the config has for `key` beside what is expected."""
    value = json.dumps(config.get(key))
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{CONFIG} has {key} {shown}, expected {expected}"


def kinds(file: AdapterFile) -> Findings:
    """Modules that are no plain LoRA."""
    found = grouped((site.kind, site.stem) for site in file.sites.values())
    for kind, stems in found.items():
        if kind == "dora" and not file.config.get("use_dora"):
            yield Finding("dora", f"{few(stems)}: magnitudes beside the factors", stems)
        elif kind not in ("lora", "dora"):
            rule = _KINDS.get(kind, "kind")
            yield Finding(rule, f"{few(stems)} of kind {kind}, expected lora", stems)
    if file.deltas:
        yield Finding("deltas", f"{few(list(file.deltas))}: a full delta, expected factors")


def extras(file: AdapterFile, engine: Engine) -> Findings:
    """Absolute tensors that travel along."""
    names = [name for name in file.extras if not (engine.heads and engine.heads.fullmatch(name))]
    for rule, found in grouped((_extra_rule(n, file.config), n) for n in names).items():
        count = "one tensor," if len(found) == 1 else f"{len(found)} tensors such as"
        yield Finding(rule, f"{count} {found[0]!r}, expected factors only")
    saved = [str(name) for name in peft.listed(file.config, "modules_to_save")]
    absent = {name for name in saved if not any(f".{name}." in extra for extra in file.extras)}
    if absent - {"classifier", "score"}:
        yield Finding("modules-to-save", says(file.config, "modules_to_save", "null"))


def _extra_rule(name: str, config: Mapping[str, Any]) -> str:
    if "trainable_tokens" in name:
        return "token-rows"
    if _EMBEDDING_COPY.fullmatch(name):
        return "embedding-copy"
    if _SAVED_EMBEDDING.fullmatch(name):
        return "saved-embeddings"
    of_head = set(map(str, peft.listed(config, "modules_to_save"))) & set(name.split("."))
    trained = config.get("bias") not in (None, "none") and name.endswith(".bias")
    return "bias-tensors" if trained and not of_head else "heads"
