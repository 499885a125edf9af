"""Other tools' arithmetic on the same adapters, in a process of its own (torch is large).

`python benchmarks/peers.py svd A B PAIRS` times PEFT's SVD merge and ours in turn;
`python benchmarks/peers.py methods A B` compares results only. Both print JSON with relative
Frobenius errors to the exact 0.7·ΔW_a + 0.3·ΔW_b, computed densely in float64.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any

import data
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from adapterops import Factors

WEIGHTS = (0.7, 0.3)
RANK = 16
Raw = list[tuple[np.ndarray, np.ndarray]]


class Attention(torch.nn.Module):
    """A model of one linear layer."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(n, m, bias=False)


def peft_model(raw: Raw) -> Any:
    """A one-layer model with the adapters loaded, named a, b, …"""
    from peft import LoraConfig, get_peft_model

    m, n = raw[0][0].shape[0], raw[0][1].shape[1]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj"])
    first, *others = names = ascii_lowercase[: len(raw)]
    model = get_peft_model(Attention(m, n), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    layer = model.base_model.model.q_proj
    for name, (B, A) in zip(names, raw, strict=True):
        layer.lora_B[name].weight.data = torch.from_numpy(B).float()
        layer.lora_A[name].weight.data = torch.from_numpy(A).float()
    return model


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock, CPU seconds of all threads, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def by_peft(model: Any, how: str, name: str) -> tuple[float, float, np.ndarray]:
    """Seconds and CPU seconds of the call alone, and the ΔW that the merged adapter has."""
    options = {"svd_rank": RANK} if how == "svd" else {}
    wall, cpu, _ = timed(
        lambda: model.add_weighted_adapter(
            ["a", "b"], list(WEIGHTS), name, combination_type=how, **options
        )
    )
    layer = model.base_model.model.q_proj
    B, A = layer.lora_B[name].weight.data, layer.lora_A[name].weight.data
    return wall, cpu, layer.scaling[name] * (B.double() @ A.double()).numpy()


def ours(raw: Raw, rank: int | None) -> Factors:
    """From float16 factors in memory to truncated float64 factors."""
    wide = [Factors(B.astype(np.float64), A.astype(np.float64)) for B, A in raw]
    total = WEIGHTS[0] * wide[0] + WEIGHTS[1] * wide[1]
    return total.truncate(rank) if rank else total


def by_kohya(exact: np.ndarray, rank: int) -> np.ndarray:
    """What svd_merge_lora of sd-scripts does: full SVD, then both factors clamped at a quantile."""
    U, S, Vh = torch.linalg.svd(torch.from_numpy(exact).float())
    U, Vh = U[:, :rank] * S[:rank], Vh[:rank]
    limit = torch.quantile(torch.cat([U.flatten(), Vh.flatten()]), 0.99)
    return (U.clamp(-limit, limit) @ Vh.clamp(-limit, limit)).double().numpy()


def kohya_resize(
    B: np.ndarray, A: np.ndarray, rank: int, how: str
) -> tuple[np.ndarray, np.ndarray]:
    """up (m, rank) and down (rank, n) in float32 as resize_lora of sd-scripts has them.

    `svd` decomposes the dense up·down in full, with square singular vectors; `lowrank` is the
    randomised route that sd-scripts takes where both sides are above 2048. All of σ goes into up.
    """
    dense = torch.from_numpy(B).float() @ torch.from_numpy(A).float()
    if how == "lowrank":
        U, S, V = torch.svd_lowrank(dense, q=min(2 * rank, *dense.shape), niter=2)
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(dense)
    return (U[:, :rank] @ torch.diag(S[:rank])).numpy(), Vh[:rank].numpy()


def mergekit_extract(
    base: torch.Tensor, tuned: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A as mergekit-extract-lora has them, in the dtype of the checkpoints.

    The difference is taken in that dtype, its thin SVD in float32, and √σ goes to each side.
    """
    delta = (tuned - base).float()
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(base.dtype), (root[:, None] * Vh[:rank]).to(base.dtype)


def sdxl_modules() -> data.Shapes:
    """Linear layers in the attention blocks of SDXL's U-Net as diffusers builds it, by flat name.

    The model (2,567,463,684 parameters) is built without memory for its weights.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {
        "lora_unet_" + name.replace(".", "_"): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attentions." in name
    }


def exact_sum(raw: Raw) -> np.ndarray:
    terms = zip(WEIGHTS, raw, strict=True)
    return sum(w * (B.astype(np.float64) @ A.astype(np.float64)) for w, (B, A) in terms)


def distance(matrix: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(matrix - reference) / np.linalg.norm(reference))


def load(adapters: list[str]) -> Raw:
    """The factors of the one module in float16, scale left out: it is the same for all."""
    modules = [next(data.tensors(adapter)) for adapter in adapters]
    return [((B / 2).astype(np.float16), A.astype(np.float16)) for _, B, A in modules]


def svd(first: str, second: str, pairs: str) -> dict[str, Any]:
    raw = load([first, second])
    model = peft_model(raw)
    ours(raw, RANK)
    times: dict[str, list[float]] = {"peft": [], "peft CPU": [], "ours": [], "ours CPU": []}
    for index in range(int(pairs)):
        wall, cpu, theirs = by_peft(model, "svd", f"merged{index}")
        times["peft"].append(wall)
        times["peft CPU"].append(cpu)
        with threadpool_limits(1):
            runs = [timed(lambda: ours(raw, RANK)) for _ in range(21)]
        times["ours"].append(float(np.median([wall for wall, _, _ in runs])))
        times["ours CPU"].append(float(np.median([cpu for _, cpu, _ in runs])))
    mine = runs[-1][2].dense()
    exact = exact_sum(raw)
    U, S, Vh = np.linalg.svd(exact, full_matrices=False)
    best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    errors = {"best rank 16 to exact": distance(best, exact)}
    for name, matrix in (("ours", mine), ("PEFT", theirs)):
        errors[f"{name} to best"] = distance(matrix, best)
        values = np.linalg.svd(matrix, compute_uv=False)[:RANK]
        errors[f"{name} singular values"] = float(np.max(np.abs(values / S[:RANK] - 1)))
    return {"times": times, "errors": errors}


def methods(first: str, second: str) -> dict[str, Any]:
    raw = load([first, second])
    model, exact = peft_model(raw), exact_sum(raw)
    errors = {
        f"PEFT {how}": distance(by_peft(model, how, how)[2], exact)
        for how in ("cat", "linear", "svd")
    }
    errors["kohya"] = distance(by_kohya(exact, RANK), exact)
    errors["ours, no rank"] = distance(ours(raw, None).dense(), exact)
    errors["ours, rank 16"] = distance(ours(raw, RANK).dense(), exact)
    S = np.linalg.svd(exact, compute_uv=False)
    errors["best rank 16"] = float(np.linalg.norm(S[RANK:]) / np.linalg.norm(S))
    return {"errors": errors}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"svd": svd, "methods": methods}[sys.argv[1]](*sys.argv[2:])))
