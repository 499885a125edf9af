"""Small bases of every layout for the tests of `bake`, and what baking must make of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterops import casts
from tests.checkpoints import INDEX, SHARD
from tests.support import pairs

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32,
}
LAYOUTS = ("file", "folder", "shards", "index", "hub")
_INTEGERS = {"int64": "I64", "uint8": "U8", "bool": "BOOL"}


class Stored(NamedTuple):
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def values(self) -> np.ndarray:
        """In float64; tensors of floats only."""
        data = np.frombuffer(self.raw, np.uint8)
        return np.asarray(casts.decode(data, self.dtype, self.shape))


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """float64 rounded once to a type, as bytes."""
    with np.errstate(invalid="ignore"):  # infinities on purpose
        return bytes(casts.stored_bytes(casts.store(np.atleast_1d(values).astype(float), dtype)))


def pack(tensors: Mapping[str, np.ndarray], dtype: str, pad: int = 0) -> bytes:
    """A safetensors file; float32 arrays are stored as F32, float64 ones rounded to `dtype`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "of": "a test"}}
    data = b""
    for name, value in tensors.items():
        kind = _INTEGERS.get(value.dtype.name) or ("F32" if value.dtype == np.float32 else dtype)
        raw = value.tobytes() if value.dtype.kind in "iub" else rounded(value, kind)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"shape": list(value.shape), "dtype": kind, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def weights(seed: int = 0, layers: int = 2, rows: int = 40, columns: int = 24) -> dict[str, Any]:
    """A language model's weights, and tensors that nothing reads: of integers, empty, of no axis,
    of another type."""
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(shape)

    result: dict[str, Any] = {"model.embed_tokens.weight": some(32, columns)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            result[f"{name}.self_attn.{leaf}.weight"] = some(columns, columns)
        result[f"{name}.mlp.up_proj.weight"] = some(rows, columns)
        result[f"{name}.mlp.down_proj.weight"] = some(columns, rows)
        result[f"{name}.input_layernorm.weight"] = 1 + some(columns)
    return {
        **result,
        "model.norm.weight": 1 + some(columns),
        "lm_head.weight": some(32, columns),
        "model.position_ids": np.arange(9)[None],
        "model.empty": np.zeros((0, 5)),
        "model.empty_too": np.zeros((5, 0)),
        "model.scale": np.array(0.3),
        "model.inv_freq": rng.standard_normal(6).astype(np.float32),
    }


def shapes(layers: int = 2, rows: int = 40, columns: int = 24) -> dict[str, tuple[int, int]]:
    """Modules of `weights` that adapters of these tests change."""
    found = {}
    for layer in range(layers):
        found[f"model.layers.{layer}.self_attn.q_proj"] = (columns, columns)
        found[f"model.layers.{layer}.mlp.up_proj"] = (rows, columns)
        found[f"model.layers.{layer}.mlp.down_proj"] = (columns, rows)
    return found


def factors(seed: int, size: float = 0.02, rank: int = 4, **sizes: int) -> dict[str, Any]:
    """Factors of every such module; `size` is about that of the elements of ΔW."""
    scale = np.float32(size / 0.1 / rank**0.5)
    return {name: (scale * B, A) for name, (B, A) in pairs(seed, shapes(**sizes), rank).items()}


def model(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "BF16",
    layout: str = "folder",
    config: Mapping[str, Any] | None = CONFIG,
    shards: int = 3,
) -> Path:
    """A base on disk, and the path to name: a file, a folder, an index, or a hub cache's links."""
    if layout == "hub":
        return _hub(folder, tensors, dtype, config, shards)
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if layout in ("file", "folder"):
        (folder / "model.safetensors").write_bytes(pack(tensors, dtype, pad=3))
        return folder / "model.safetensors" if layout == "file" else folder
    names, where = list(tensors), {}
    for index in range(shards):
        mine = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        file = SHARD.format(index + 1, shards)
        (folder / file).write_bytes(pack({name: tensors[name] for name in mine}, dtype, index))
        where |= dict.fromkeys(mine, file)
    index_json = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index_json))
    return folder / INDEX if layout == "index" else folder


def _hub(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: str, config: Any, shards: int
) -> Path:
    """As huggingface_hub keeps a model: a folder of links to files named by their hash."""
    model(folder / "blobs", tensors, dtype, "shards", config, shards)
    snapshot = folder / "models--tiny--base" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((folder / "blobs").iterdir())):
        blob = file.rename(folder / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def stored(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, or of all files in a folder and the folders in it."""
    if path.name.endswith(".index.json"):
        path = path.parent
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, Stored] = {}
    for file in files:
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            prefix = f"{file.parent.name}." if file.parent != path and path.is_dir() else ""
            first, last = (start + offset for offset in entry["data_offsets"])
            assert prefix + name not in found
            shape = tuple(entry["shape"])
            found[prefix + name] = Stored(entry["dtype"], shape, data[first:last])
    return found


def head(file: Path) -> bytes:
    """The header of a safetensors file with its length."""
    data = file.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def expected(
    base: Path, deltas: Mapping[str, np.ndarray], dtype: str | None = None
) -> dict[str, Stored]:
    """The base with ΔW of modules (or biases) added in float64, rounded once; the others' bytes.

    `dtype` is the one for all tensors of floats.
    """
    result = {}
    for name, tensor in stored(base).items():
        kind = dtype if dtype and tensor.dtype in casts.FORMATS else tensor.dtype
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is not None:
            total = tensor.values + delta.reshape(tensor.shape)
            result[name] = Stored(kind, tensor.shape, rounded(total, kind))
        elif kind != tensor.dtype:
            result[name] = Stored(kind, tensor.shape, rounded(tensor.values, kind))
        else:
            result[name] = tensor
    assert deltas.keys() <= {name.removesuffix(".weight") for name in result}
    return result


def differing(found: Mapping[str, Stored], wanted: Mapping[str, Stored]) -> list[str]:
    """Names of tensors that are not the same bit by bit, or are in one of the two alone."""
    return sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
