"""Inputs of bake.py: sharded Llama-shaped checkpoints, one of them with holes, and their adapters.

`python benchmarks/bake_data.py NAME` writes a set into benchmarks/data; NAME is a type and a size
(`bf16`, `fp16-quick`), or `sparse`, whose files are holes but for their headers: what reads it gets
zeros, and it takes no room. Every set has `base` and `adapter`, of rank 16 on all linear layers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import data
import numpy as np

RANK = 16
VOCABULARY = 32000
_SIZE = 0.1  # of what data.noise makes: ‖ΔW‖ is a hundredth of ‖W‖
_HIDDEN = {"": 4096, "quick": 1024}
_LAYERS = {"": 5, "quick": 4, "sparse": 20, "sparse-quick": 16}
_CODES = {"bf16": "BF16", "fp16": "F16"}
Shapes = dict[str, tuple[int, ...]]


def shapes(hidden: int) -> data.Shapes:
    """The linear layers of a decoder layer as wide as that."""
    narrow = 4096 // hidden
    return {name: (m // narrow, n // narrow) for name, (m, n) in data.LLAMA_7B.items()}


def files(layers: int, hidden: int, vocabulary: int) -> list[Shapes]:
    """The tensors of each shard: one a layer, the first with the embedding, the last the rest."""
    result: list[Shapes] = []
    for index in range(layers):
        stem = f"model.layers.{index}"
        mine: Shapes = {f"{stem}.{name}.weight": shape for name, shape in shapes(hidden).items()}
        mine |= {
            f"{stem}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")
        }
        result.append(mine)
    result[0]["model.embed_tokens.weight"] = (vocabulary, hidden)
    result[-1] |= {"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    return result


def _header(tensors: Shapes, dtype: str) -> tuple[bytes, int]:
    """A file's header and the bytes of its data."""
    document, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **document}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, at


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> bytes:
    W = np.float32(0.02) * rng.standard_normal(shape, np.float32)
    if dtype == "F16":
        return W.astype(np.float16).tobytes()
    return (W.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _base(folder: Path, dtype: str, layers: int, hidden: int, sparse: bool) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)
    vocabulary = VOCABULARY * hidden // 4096
    where, total = {}, 0
    shards = files(layers, hidden, vocabulary)
    for index, tensors in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        header, size = _header(tensors, dtype)
        with open(folder / name, "wb") as file:
            file.write(header)
            if sparse:
                os.ftruncate(file.fileno(), len(header) + size)
            else:
                for shape in tensors.values():
                    file.write(_values(rng, shape, dtype))
        where |= dict.fromkeys(tensors, name)
        total += size
    index_file = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes(hidden)["mlp.up_proj"][0],
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _adapter(folder: Path, layers: int, hidden: int) -> None:
    rng = np.random.default_rng(12)
    tensors: data.Tensors = {}
    for stem, shape in data.layers(layers, shapes(hidden)).items():
        B, A = data.noise(rng, shape, RANK)
        name = f"base_model.model.{stem}"
        small = (np.float32(_SIZE) * B.astype(np.float32)).astype(np.float16)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": small}
    data.write_peft(folder, tensors, RANK)


def make(name: str) -> Path:
    """The folder of a set, written first if it is not there."""
    folder = data.DATA / f"bake-{name}"
    if not folder.exists():
        unfinished = data.DATA / f".bake-{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        kind, _, size = name.partition("-")
        sparse = kind == "sparse"
        layers = _LAYERS[name if sparse else size]
        hidden = _HIDDEN[size]
        _base(unfinished / "base", _CODES.get(kind, "BF16"), layers, hidden, sparse)
        _adapter(unfinished / "adapter", layers, hidden)
        unfinished.rename(folder)
    return folder


def size(folder: Path) -> int:
    """Bytes of all files of a folder, holes included."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    print(make(sys.argv[1]).name)
