"""How many parameters a base model has: from the headers of its files, or from its config.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterops.errors import FormatError, UnsupportedError
from adapterops.files.checkpoint import tensors
from adapterops.files.header import Entry
from adapterops.formats.locate import read_text
from adapterops.formats.peft import read_config

# Types of which one number is one parameter; 4-bit and integer types pack or quantise them.
_PLAIN = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
# Decoders of one design, by transformers' model_type; attention biases are q, k, v (and o).
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def base_parameters(path: str | os.PathLike[str]) -> int:
    """Parameters of the model at `path`: a safetensors file, a folder or index of them, a config.

    For a pipeline the models in its folders are added up; a folder without weights is counted by
    its config.json. Raises FileError, FormatError, and UnsupportedError for quantised weights and
    for architectures that are not known here.
    """
    given = Path(path)
    if given.suffix == ".json" and not given.name.endswith(".index.json"):
        return _by_config(read_config(read_text(os.fspath(given)), os.fspath(given)), given)
    found = tensors(given)
    if not found:
        return base_parameters(given / "config.json")
    return sum(_parameters(name, entry, given) for name, entry in found.items())


def _parameters(name: str, entry: Entry, path: Path) -> int:
    if entry.dtype in ("I64", "BOOL"):  # position ids and masks
        return 0
    if entry.dtype not in _PLAIN:
        raise UnsupportedError(
            f"{name!r} is of type {entry.dtype}: quantised weights do not say how many parameters "
            "they stand for",
            path=path,
            hint="give --base the model's config.json",
        )
    return math.prod(entry.shape)


def _by_config(config: Mapping[str, Any], path: Path) -> int:
    """Parameters of a decoder by its configuration (transformers, modeling_llama.py and kin)."""
    kind = config.get("model_type")
    if kind not in _DECODERS:
        raise UnsupportedError(
            f"parameters of the architecture {kind!r} cannot be counted from its config",
            path=path,
            hint="give --base the checkpoint itself; only its headers are read",
        )

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise FormatError(f"{name} in the config is {json.dumps(value)}", path=path)
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    width = size("head_dim", hidden // max(heads, 1))
    queries, keys = heads * width, size("num_key_value_heads", heads) * width
    attention = hidden * (2 * queries + 2 * keys)
    if kind == "qwen2" or config.get("attention_bias"):
        attention += queries + 2 * keys + (0 if kind == "qwen2" else hidden)
    if kind == "qwen3":
        attention += 2 * width
    inner = size("intermediate_size")
    feed = 3 * hidden * inner + (2 * inner + hidden if config.get("mlp_bias") else 0)
    layers = size("num_hidden_layers") * (attention + feed + 2 * hidden)
    tied = config.get("tie_word_embeddings", False)
    return layers + hidden + size("vocab_size") * hidden * (1 if tied else 2)
