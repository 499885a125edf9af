"""Adapters for the tests that read from a store: one of a few kB, one of several ranges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support import pairs, write_peft

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.mlp.up_proj": (32, 16)}


def adapter(folder: Path) -> Path:
    """A small PEFT adapter of two modules, at twice its factors."""
    return write_peft(folder, pairs(0, SHAPES, 4), alpha=8)


def large(folder: Path, mebibytes: int = 20) -> Path:
    """An adapter of several ranges, with real factors first."""
    rng = np.random.default_rng(0)
    rows = mebibytes << 16
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    folder.mkdir(parents=True)
    A = rng.standard_normal((4, rows)).astype(np.float32)
    B = rng.standard_normal((8, 4)).astype(np.float32)
    save_file({f"{stem}_A": A, f"{stem}_B": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
