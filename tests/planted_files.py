"""Small PEFT files: written fast, read back without the package, their deltas compared."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Deltas = dict[str, tuple[Array, Array]]  # stem -> (B (out, r), A (r, in)), the scale folded in

BASE = "planted/base"
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def inner(X: Deltas, Y: Deltas) -> float:
    """⟨X, Y⟩ = Σ tr((B₁ᵀB₂)(A₂A₁ᵀ)) over the modules that both have."""
    return sum(
        float(((B.T @ Y[stem][0]) * (A @ Y[stem][1].T)).sum())
        for stem, (B, A) in X.items()
        if stem in Y
    )


def norm(X: Deltas) -> float:
    return math.sqrt(max(0.0, inner(X, X)))


def error(centre: Deltas, member: Deltas) -> float:
    """‖C − D‖ / ‖D‖ by the Gram matrix of the stacked factors, absent modules zero."""
    size = norm(member)
    if size == 0:
        return math.inf
    stacked = {stem: (-B, A) for stem, (B, A) in centre.items()}
    for stem, (B, A) in member.items():
        b, a = stacked.get(stem, (B[:, :0], A[:0]))
        stacked[stem] = (np.hstack([B, b]), np.vstack([A, a]))
    return norm(stacked) / size


def _narrow(x: Array, dtype: str) -> Array:
    """Round to the nearest number of the type; its raw words."""
    if dtype == "F16":
        return x.astype("<f2").view("<u2")
    words = x.astype("<f4").view("<u4")
    if dtype == "F32":
        return words
    words = words + (0x7FFF + ((words >> np.uint32(16)) & np.uint32(1)))
    return (words >> np.uint32(16)).astype("<u2")


def _widen(words: Array, dtype: str) -> Array:
    if dtype == "F16":
        return words.view("<f2").astype(np.float64)
    if dtype == "BF16":
        words = words.astype("<u4") << np.uint32(16)
    return words.view("<f4").astype(np.float64)


@lru_cache(maxsize=256)
def _header(shapes: tuple[tuple[str, int, int, int], ...], dtype: str) -> bytes:
    """The header of a file of A, then B, for every (stem, out, in, rank), its length before it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, width = 0, _WIDTHS[dtype]
    for stem, m, n, r in shapes:
        for letter, shape in (("A", [r, n]), ("B", [m, r])):
            end = offset + width * shape[0] * shape[1]
            entries[f"base_model.model.{stem}.lora_{letter}.weight"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@lru_cache(maxsize=256)
def _config(stems: tuple[str, ...], rank: int, alpha: float, rslora: bool) -> str:
    return json.dumps(
        {
            "peft_type": "LORA",
            "base_model_name_or_path": BASE,
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": rslora,
            "bias": "none",
            "target_modules": sorted({stem.rpartition(".")[2] for stem in stems}),
        }
    )


def write(folder: Path, deltas: Deltas, alpha: float, dtype: str, rslora: bool = False) -> Deltas:
    """Write a PEFT directory; the deltas that its files hold, in float64, scale folded in."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(deltas.values()))[1].shape[0]
    scale = alpha / (rank**0.5 if rslora else rank)
    shapes = tuple((stem, len(B), A.shape[1], rank) for stem, (B, A) in deltas.items())
    parts = [_header(shapes, dtype)]
    stored: Deltas = {}
    for stem, (B, A) in deltas.items():
        b, a = _narrow(B / scale, dtype), _narrow(A, dtype)
        parts += (a.tobytes(), b.tobytes())
        stored[stem] = (scale * _widen(b, dtype), _widen(a, dtype))
    (folder / "adapter_model.safetensors").write_bytes(b"".join(parts))
    (folder / "adapter_config.json").write_text(_config(tuple(deltas), rank, alpha, rslora))
    return stored


def read(folder: Path) -> Deltas:
    """The deltas of a PEFT directory of one rank and scale, read without the package."""
    config = json.loads((folder / "adapter_config.json").read_text())
    raw = np.fromfile(folder / "adapter_model.safetensors", np.uint8)
    start = 8 + int(raw[:8].view("<u8")[0])
    header = json.loads(bytes(raw[8:start]))
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    found: dict[str, dict[str, Array]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            stem, letter = (
                name.removesuffix(".weight").removeprefix("base_model.model.").split(".lora_")
            )
            begin, end = (start + offset for offset in entry["data_offsets"])
            words = raw[begin:end].view(f"<u{_WIDTHS[entry['dtype']]}")
            values = _widen(words, entry["dtype"]).reshape(entry["shape"])
            found.setdefault(stem, {})[letter] = values
    return {stem: (scale * pair["B"], pair["A"]) for stem, pair in found.items()}
