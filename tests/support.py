"""Writes small adapters and reads results back densely: the oracle is five lines of numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]  # module -> (B (out, r), A (r, in))


def pairs(
    seed: int, shapes: Mapping[str, tuple[int, int]], rank: int, dtype: Any = np.float32
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random factors for each module."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (0.1 * rng.standard_normal((m, rank))).astype(dtype),
            rng.standard_normal((rank, n)).astype(dtype),
        )
        for name, (m, n) in shapes.items()
    }


def write_peft(
    folder: Path,
    factors: Pairs,
    *,
    alpha: float | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A PEFT directory; alpha = rank unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = dict(extras or {})
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(factors.values()))[0].shape[1]
    document = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "base_model_name_or_path": "tiny/base",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def write_kohya(
    file: Path,
    factors: Pairs,
    *,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A kohya file; no `.alpha` tensors if alpha is None."""
    tensors: dict[str, np.ndarray] = {}
    for name, (B, A) in factors.items():
        tensors[f"{name}.lora_up.weight"] = B
        tensors[f"{name}.lora_down.weight"] = A
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, B.dtype)
    save_file(tensors, file, metadata=dict(metadata or {}))
    return file


def dense(factors: Pairs, scale: float = 1.0) -> dict[str, np.ndarray]:
    """ΔW of each module in float64."""
    return {
        name: scale
        * (B.astype(np.float64).reshape(len(B), -1) @ A.astype(np.float64).reshape(len(A), -1))
        for name, (B, A) in factors.items()
    }


def load_file(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, bfloat16 widened to float32 (numpy has none)."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
    result = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            value = np.frombuffer(data[start:end], kinds[entry["dtype"]])
            if entry["dtype"] == "BF16":
                value = (value.astype(np.uint32) << 16).view(np.float32)
            result[name] = value.reshape(entry["shape"])
    return result


def read_peft(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of each module of a written PEFT directory, by its own config."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    return _deltas(tensors, ".lora_B.weight", ".lora_A.weight", config["lora_alpha"] / config["r"])


def read_kohya(file: Path) -> dict[str, np.ndarray]:
    """ΔW of each module of a written kohya file, by its own alphas."""
    tensors = load_file(file)
    result = _deltas(tensors, ".lora_up.weight", ".lora_down.weight", 1.0)
    for name in result:
        rank = tensors[f"{name}.lora_down.weight"].shape[0]
        result[name] = result[name] * (float(tensors[f"{name}.alpha"]) / rank)
    return result


def _deltas(
    tensors: Mapping[str, np.ndarray], up: str, down: str, scale: float
) -> dict[str, np.ndarray]:
    result = {}
    for key, value in tensors.items():
        if key.endswith(up):
            stem = key.removesuffix(up)
            B = value.astype(np.float64).reshape(len(value), -1)
            A = tensors[stem + down].astype(np.float64)
            name = stem.removeprefix("base_model.model.")
            result[name] = scale * (B @ A.reshape(len(A), -1))
    return result


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """‖a − b‖_F / ‖b‖_F over all modules."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    gap = sum(float(np.sum((a[name] - b[name]) ** 2)) for name in b)
    return (gap / sum(float(np.sum(value**2)) for value in b.values())) ** 0.5


def weighted(
    *terms: tuple[float, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Σ w·ΔW, a module that a term lacks counting as zero."""
    result: dict[str, np.ndarray] = {}
    for weight, deltas in terms:
        for name, value in deltas.items():
            result[name] = result.get(name, 0.0) + weight * value
    return result
