"""Small checkpoints: from numpy arrays, or tiny models of transformers and diffusers, changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterops import casts

SHARD = "model-{:05d}-of-{:05d}.safetensors"
INDEX = "model.safetensors.index.json"


def encode(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A safetensors file of these values, float tensors rounded to `dtype`."""
    header, data, at = {}, b"", 0
    for name, value in tensors.items():
        if value.dtype.kind == "f":
            with np.errstate(invalid="ignore"):  # infinities on purpose
                stored = casts.store(value.astype(float), dtype)
            raw, kind = bytes(casts.stored_bytes(stored)), dtype
        else:
            raw, kind = (
                value.tobytes(),
                {"uint8": "U8", "int32": "I32", "int64": "I64"}[value.dtype.name],
            )
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [at, at + len(raw)],
        }
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "F32",
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A model's folder: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(encode(tensors, dtype))
        return folder
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        mine = names[index::shards]
        file = SHARD.format(index + 1, shards)
        (folder / file).write_bytes(encode({name: tensors[name] for name in mine}, dtype))
        weight_map |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weights(seed: int = 0, rows: int = 48, columns: int = 40, layers: int = 3) -> dict[str, Any]:
    """A few linear layers and a norm."""
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {}
    for layer in range(layers):
        for name in ("q_proj", "o_proj"):
            result[f"model.layers.{layer}.{name}.weight"] = 0.02 * rng.standard_normal(
                (rows, columns)
            )
        result[f"model.layers.{layer}.norm.weight"] = 1 + 0.01 * rng.standard_normal(columns)
    return result


def plus(
    tensors: Mapping[str, np.ndarray], rank: int, size: float = 1e-2, seed: int = 5, **only: Any
) -> dict[str, np.ndarray]:
    """Every matrix changed by a random delta of this rank."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, value in tensors.items():
        if value.ndim == 2 and only.get("part", "") in name:
            m, n = value.shape
            value = value + size * rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
        result[name] = value
    return result


def language_model(kind: str, **config: Any) -> Any:
    """A tiny model of transformers with fixed random weights."""
    import torch
    import transformers as t

    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    if kind == "gpt2":
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_positions": 16, "vocab_size": 32}
        return t.GPT2LMHeadModel(t.GPT2Config(**{**sizes, **config})).eval()
    if kind == "bert":
        more = {"hidden_size": 24, "intermediate_size": 36, "max_position_embeddings": 16}
        made = t.BertConfig(**{**sizes, **more, **config})
        return t.BertForSequenceClassification(made).eval()
    more = {"hidden_size": 24, "intermediate_size": 36, "num_key_value_heads": 2}
    return t.LlamaForCausalLM(
        t.LlamaConfig(**{**sizes, **more, "tie_word_embeddings": False, **config})
    ).eval()


def change(
    model: Any, wanted: Callable[[str], bool], rank: int = 2, size: float = 0.05, seed: int = 3
) -> Any:
    """The model with deltas of this rank in its matrices, and small ones in its vectors."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return size * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, value in model.named_parameters():
            if not wanted(name):
                continue
            if value.ndim < 2:
                value.add_(random(*value.shape))
            else:
                flat = value.view(len(value), -1)
                flat.add_(random(len(flat), rank) @ random(rank, flat.shape[1]) / size)
    return model


def logits(model: Any) -> np.ndarray:
    """What a language model or classifier computes for a fixed input."""
    import torch

    with torch.no_grad():
        result: np.ndarray = model(torch.arange(12)[None] * 5 % 32).logits.double().numpy()
    return result
