"""What other tools' merges come to, restated by their arithmetic, and merges that went wrong.

A style takes a stored weight W (out, in) and pairs (B, A, scale) with the factors as their file
holds them, and gives W′ in W's type. A tool that merges one adapter at a time is applied again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Pair = tuple[torch.Tensor, torch.Tensor, float]
Style = Callable[[torch.Tensor, Sequence[Pair]], torch.Tensor]
Adapter = Mapping[str, Pair]  # by module


def peft_unsafe(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """PEFT's default: factors widened to float32 on loading, W += float32 delta, rounded once."""
    for B, A, scale in pairs:
        W = W.clone().add_((B.float() @ A.float()) * scale)
    return W


def peft_safe(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """safe_merge=True: the delta is rounded to W's type, then the sum."""
    for B, A, scale in pairs:
        W = W + ((B.float() @ A.float()) * scale).to(W.dtype)
    return W


def peft_half_factors(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """autocast_adapter_dtype=False, factors in W's 16 bits: the delta is rounded to those too."""
    for B, A, scale in pairs:
        delta = (B.to(W.dtype).float() @ A.to(W.dtype).float()) * scale
        W = W.clone().add_(delta.to(W.dtype))
    return W


def axolotl(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """lora_merge_efficient: float32 throughout, one rounding an adapter."""
    for B, A, scale in pairs:
        W = (W.float() + scale * (B.float() @ A.float())).to(W.dtype)
    return W


def unsloth(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """One addmm on Wᵀ in float32, the scale its alpha, then one rounding."""
    for B, A, scale in pairs:
        wide = W.float().T.contiguous()
        W = wide.addmm_(A.float().T, B.float().T, alpha=scale).to(W.dtype).T.contiguous()
    return W


def llama_factory(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """merge_and_unload in a loop: PEFT's default, rounded after every adapter."""
    for pair in pairs:
        W = peft_unsafe(W, [pair])
    return W


def torchtune(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """get_merged_lora_ckpt: scale·B, its product with A and the sum each rounded to W's type."""
    for B, A, scale in pairs:
        scaled = scale * B.to(W.dtype)
        W = W + (scaled.float() @ A.to(W.dtype).float()).to(W.dtype)
    return W


def mlx(W: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """fuse: (scale·B)·A in float32 factors, rounded to W's type, then the sum."""
    for B, A, scale in pairs:
        W = W + ((scale * B.float()) @ A.float()).to(W.dtype)
    return W


STYLES: dict[str, Style] = {
    "peft_unsafe": peft_unsafe,
    "peft_safe": peft_safe,
    "peft_half_factors": peft_half_factors,
    "axolotl": axolotl,
    "unsloth": unsloth,
    "llama_factory": llama_factory,
    "torchtune": torchtune,
    "mlx": mlx,
}


def read_adapter(folder: str | Path) -> dict[str, Pair]:
    """module -> (B, A, scale) of a plain PEFT directory."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            pair = (tensors[f"{stem}.lora_B.weight"], A, scale)
            found[stem.removeprefix("base_model.model.")] = pair
    return found


def merge_checkpoint(
    base: str | Path,
    adapters: Iterable[str | Path | Adapter],
    out: str | Path,
    style: str | Style = "peft_unsafe",
    change: Callable[[dict[str, torch.Tensor]], None] = lambda state: None,
) -> Path:
    """A checkpoint with the adapters merged in a style, in the same files; all else is copied.

    `change` may spoil the tensors of each file before they are written.
    """
    merge = STYLES[style] if isinstance(style, str) else style
    loaded = [a if isinstance(a, Mapping) else read_adapter(a) for a in adapters]
    base, out = Path(base), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    unmerged = {module for adapter in loaded for module in adapter}
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
            continue
        state = load_file(file)
        for module in sorted(unmerged):
            name = f"{module}.weight"
            if name in state:
                state[name] = merge(state[name], [a[module] for a in loaded if module in a])
                unmerged.discard(module)
        change(state)
        save_file(state, out / file.name, {"format": "pt"})
    if unmerged:
        raise ValueError(f"no weight for {sorted(unmerged)[:3]}")
    return out


def _one(adapter: Adapter) -> str:
    """The module that a defect of a single layer strikes: the middle one of those that matter."""
    modules = sorted(module for module, (B, _, _) in adapter.items() if bool(B.any()))
    return modules[len(modules) // 2]


def _square(adapter: Adapter) -> str:
    """A module whose ΔW is square: its transpose fits too."""
    return next(m for m in sorted(adapter) if len(adapter[m][0]) == adapter[m][1].shape[1])


def not_applied(adapter: Adapter) -> Adapter:
    """One layer was left out."""
    return {module: pair for module, pair in adapter.items() if module != _one(adapter)}


def scaled(adapter: Adapter, factor: float) -> dict[str, Pair]:
    """Everything is too strong or too weak by a factor."""
    return {module: (B, A, scale * factor) for module, (B, A, scale) in adapter.items()}


def root_rank(adapter: Adapter) -> dict[str, Pair]:
    """alpha/√r where alpha/r was meant."""
    return {m: (B, A, scale * math.sqrt(len(A))) for m, (B, A, scale) in adapter.items()}


def transposed(adapter: Adapter) -> dict[str, Pair]:
    """ΔWᵀ was added to a square weight."""
    B, A, scale = adapter[_square(adapter)]
    return {**adapter, _square(adapter): (A.T.contiguous(), B.T.contiguous(), scale)}


def flipped(adapter: Adapter) -> dict[str, Pair]:
    """One layer was subtracted."""
    B, A, scale = adapter[_one(adapter)]
    return {**adapter, _one(adapter): (B, A, -scale)}


def partial(adapter: Adapter) -> dict[str, Pair]:
    """One layer lost the second half of its rank."""
    B, A, scale = adapter[_one(adapter)]
    half = len(A) // 2
    return {**adapter, _one(adapter): (B[:, :half].contiguous(), A[:half].contiguous(), scale)}


def _zeroed(state: dict[str, torch.Tensor]) -> None:
    for name in state:
        if name.endswith("norm.weight") and ".layers." not in name:
            state[name] = torch.zeros_like(state[name])


def _headless(state: dict[str, torch.Tensor]) -> None:
    state.pop("lm_head.weight", None)


BROKEN = (
    "not_applied",
    "wrong_scale",
    "transposed",
    "sign",
    "partial",
    "twice",
    "other",
    "zeroed_norm",
    "lost_head",
)


def broken_checkpoint(
    defect: str,
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    other: str | Path | None = None,
    style: str | Style = "peft_unsafe",
) -> Path:
    """A merge of one adapter with one of the defects of BROKEN.

    `other` is the adapter that was merged instead, for the defect of that name. `transposed` needs
    a square module, `zeroed_norm` a norm outside of the layers, `lost_head` an `lm_head.weight`.
    """
    right = read_adapter(adapter)
    wrong: dict[str, Callable[[], Sequence[Any]]] = {
        "not_applied": lambda: [not_applied(right)],
        "wrong_scale": lambda: [root_rank(right)],
        "transposed": lambda: [transposed(right)],
        "sign": lambda: [flipped(right)],
        "partial": lambda: [partial(right)],
        "twice": lambda: [right, right],
        "other": lambda: [other],
    }
    spoil = {"zeroed_norm": _zeroed, "lost_head": _headless}.get(defect)
    merged = wrong.get(defect, lambda: [right])()
    if defect not in BROKEN or None in merged:
        raise ValueError(f"no merge is {defect!r} without another adapter")
    result = merge_checkpoint(base, merged, out, style, spoil or (lambda state: None))
    if defect == "lost_head":
        _forget_head(result)
    return result


def _forget_head(out: Path) -> None:
    for index in out.glob("*.index.json"):
        document = json.loads(index.read_text())
        document["weight_map"].pop("lm_head.weight", None)
        index.write_text(json.dumps(document))
