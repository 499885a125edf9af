"""Entries of config.json that decide how a merged model's weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.basemodel.config import is_tied
from adapterops.basemodel.model import BaseModel, same_bytes
from adapterops.changes.entries import merged
from adapterops.changes.targets import Changes
from adapterops.judging.rope import DEFAULTS, SPELLINGS, normal_form
from adapterops.judging.untargeted import Finding

# Entries that change neither the weights nor what is computed with them; everything else does, or
# may. Ties and the vocabulary are looked at apart, rotary embeddings in their normal form.
_HARMLESS = re.compile(
    r"_(?!class_name$).*"
    r"|transformers_version|auto_map|dtype|torch_dtype|use_cache|cache_implementation"
    r"|.*token_ids?|.*token_index|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|tokenizer_class|prefix|name|model_name|license|unsloth_.*"
    r"|.*p?drop(out)?|.*drop(out)?_.*|layerdrop|initializer_.*|init_.*|.*_init(_std)?"
    r"|router_(aux_loss_coef|jitter_noise|z_loss_coef)|output_(attentions|hidden_states)"
    r"|output_router_logits|aux_loss_.*|return_dict|use_return_dict|torchscript"
    r"|gradient_checkpointing|chunk_size_feed_forward|pretraining_tp|pruned_heads"
    r"|attn_implementation|use_flash_attn|reorder_and_upcast_attn"
    r"|max_length|min_length|do_sample|temperature|top_[kp]|typical_p|num_beams|num_beam_groups"
    r"|num_return_sequences|repetition_penalty|length_penalty|diversity_penalty|early_stopping"
    r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|output_scores|remove_invalid_values"
    r"|return_dict_in_generate|bad_words_ids|begin_suppress_tokens|suppress_tokens"
    r"|exponential_decay_length_penalty|summary_.*"
    r"|vocab_size|tie_word_embeddings|quantization_config"
)
# How long an input may be, which tools set to what they trained with.
_LIMITS = {
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "sample_size",
}
_LONG = 80  # characters of a value that are said


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
    """What differs: a failure where both configs have it, a note where one is silent."""
    notes: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if key in SPELLINGS or _HARMLESS.fullmatch(key):
            continue
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict) and key.endswith("_config"):
            yield from _differences(name, one, other, f"{inside}{key}.")
        elif one is None or other is None:
            if not _is_default(key, one if other is None else other, before):
                notes.append(_said(inside + key, one, other))
        elif one != other and key in _LIMITS:
            notes.append(_said(inside + key, one, other))
        elif one != other and not _is_gemmas(key, one, other, before):
            yield Finding(name, "config", f"has {_said(inside + key, one, other)}")
    if notes:
        yield Finding(name, "config", f"has {'; '.join(notes)}", fails=False)
    yield from _rope(name, before, after, inside)


def _said(key: str, before: Any, after: Any) -> str:
    one, other = ("none" if value is None else _brief(repr(value)) for value in (before, after))
    return f"no {key}, the base {one}" if after is None else f"{key} {other}, the base {one}"


def _brief(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _is_gemmas(key: str, before: Any, after: Any, config: Mapping[str, Any]) -> bool:
    """Whether two activations are Gemma's, whose first configs say gelu and mean its tanh form."""
    names = {"gelu", "gelu_pytorch_tanh"}
    return config.get("model_type") == "gemma" and key == "hidden_act" and {before, after} == names


def _is_default(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether an entry that one of two configs has says what its absence does."""
    if value is None or value is False or value in ([], {}):
        return True
    heads = next((config[k] for k in ("num_attention_heads", "n_head") if config.get(k)), None)
    if key == "num_key_value_heads":
        return bool(value == heads)
    if key == "head_dim":
        width = next((config[k] for k in ("hidden_size", "n_embd") if config.get(k)), 0)
        return bool(heads and value * heads == width)
    if key == "layer_types":
        return set(value) == {"full_attention"}
    return key == "is_decoder" or (key == "n_inner" and value == 4 * config.get("n_embd", 0))


def _rope(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], inside: str
) -> Iterator[Finding]:
    """Rotary embeddings: what the base says must be there, in any spelling."""
    one, other = normal_form(before), normal_form(after)
    if one and not other and isinstance(after.get("text_config"), dict):
        other = normal_form(after["text_config"])  # where newer savers put a flat config's entries
    limit = after.get("max_position_embeddings")
    for key in sorted(one.keys() | other.keys()):
        default = DEFAULTS.get(key)
        was, there = one.get(key, default), other.get(key, default)
        if was == there:
            continue
        said = _said(inside + key, one.get(key), other.get(key))
        known = key in one or key.endswith("rope_type")
        if key not in one and key == "original_max_position_embeddings" and there == limit:
            continue
        yield Finding(name, "config", f"has {said}", fails=known)


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
