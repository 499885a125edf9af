"""Entries of config.json that decide how a merged model's weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.baking.entries import merged
from adapterops.baking.targets import Changes
from adapterops.basemodel.config import is_tied
from adapterops.basemodel.model import BaseModel, same_bytes
from adapterops.judging.untargeted import Finding

# Entries that loaders build other weights from, or compute otherwise with: where both configs have
# one, it must be the same. Savers add defaults and rename the rest from version to version.
_DECISIVE = {
    "model_type",
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "hidden_act",
    "scaling_factor",
    "in_channels",
    "block_out_channels",
    "cross_attention_dim",
}


def compare_configs(base: BaseModel, baked: BaseModel, changes: Changes) -> list[Finding]:
    """What differs between both models' configs beyond what the adapters change."""
    found: list[Finding] = []
    for part, before in base.configs.items():
        after = baked.configs.get(part)
        name = f"{part}/config.json" if part else "config.json"
        if not after:
            if before and after is not None:
                found.append(Finding(name, "config", "is missing beside the weights", fails=False))
            continue
        wanted = merged(before, changes.config.get(part, {}))
        found += _differences(name, wanted, after)
    if baked.config:
        found += [*_vocabulary(base, baked), *_tie(baked)]
    return found


def _differences(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], inside: str = ""
) -> Iterator[Finding]:
    for key in before.keys() & after.keys() & _DECISIVE:
        if before[key] != after[key]:
            what = f"has {inside}{key} {after[key]!r}, the base {before[key]!r}"
            yield Finding(name, "config", what)
    for key in before.keys() & after.keys():
        if isinstance(before[key], dict) and isinstance(after[key], dict) and "config" in key:
            yield from _differences(name, before[key], after[key], f"{inside}{key}.")


def _vocabulary(base: BaseModel, baked: BaseModel) -> Iterator[Finding]:
    """A vocabulary that its embedding does not have, where the base's agreed."""
    tokens = baked.config.get("vocab_size")
    name = baked.embedding
    if name is None or not isinstance(tokens, int) or base.embedding is None:
        return
    rows = baked.tensors[name].shape[0]
    agreed = base.config.get("vocab_size") == base.tensors[base.embedding].shape[0]
    if agreed and rows != tokens:
        yield Finding("config.json", "config", f"has vocab_size {tokens}, {name} {rows} rows")


def _tie(baked: BaseModel) -> Iterator[Finding]:
    """A tie that the weights contradict."""
    tied = is_tied(baked.config)
    if tied is None or baked.embedding is None or not baked.is_causal:
        return
    one = baked.tensors[baked.embedding]
    if not tied and baked.head is None:
        what = "says that the head is not tied, and there is none: loaders make a random one"
        yield Finding("config.json", "tie", what)
    if tied and baked.head is not None and not same_bytes(one, baked.tensors[baked.head]):
        what = f"ties the head to {baked.embedding}, and {baked.head} differs: loaders drop it"
        yield Finding("config.json", "tie", what)
