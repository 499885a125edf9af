"""Merge methods as their papers' programs compute them: dense matrices and SVDs of them, float32.

Restated from the formulas, on torch, for their cost alone: D (T, m, n) are the adapters' dense
changes, B (T, m, r) and A (T, r, n) their factors; each gives the merged (m, n). What they mean
differs from `adapterops` where merging in factors has to (null directions, scales), see `rules`.

`python benchmarks/methods_dense.py METHOD ADAPTER …` prints the seconds of all modules as JSON.

`seconds` times one module. TSV-M decomposes every adapter alike: one is timed and counted T times,
and stands for the others, its rows rolled, in what follows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import data
import numpy as np
import torch
from peers import timed

DENSITY = 0.2
Seconds = tuple[float, float]


def ties(X: torch.Tensor) -> torch.Tensor:
    """TIES of X (T, …): trim to the largest of each, elect signs, mean of those that agree."""
    flat = X.reshape(len(X), -1)
    keep = int(DENSITY * flat.shape[1])
    low = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1).values
    kept = flat * (flat.abs() >= low[:, None])
    agree = torch.sign(kept) == torch.sign(kept.sum(0))
    count = (agree & (kept != 0)).sum(0).clamp(min=1)
    return ((kept * agree).sum(0) / count).reshape(X.shape[1:])


def knots_ties(D: Sequence[torch.Tensor]) -> torch.Tensor:
    """KnOTS (Stoica et al. 2025, section 4): TIES on the parts of Vᵀ of [D₁ | … | D_T] = UΣVᵀ."""
    U, S, Vh = torch.linalg.svd(torch.cat(tuple(D), 1), full_matrices=False)
    live = S > 1e-5
    parts = (S[live, None] * Vh[live]).reshape(int(live.sum()), len(D), -1)
    return U[:, live] @ ties(parts.transpose(0, 1).contiguous())


def core_ties(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Core space (Panariello et al. 2025, section 4): TIES on the cores between reference bases.

    Thin SVDs of every factor and of both stacks, in float64; the result is a dense matrix.
    """
    B, A = B.double(), A.double()
    left = torch.linalg.svd(torch.cat(tuple(B), 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat(tuple(A), 0), full_matrices=False)[2]
    cores = []
    for b, a in zip(B, A, strict=True):
        Ub, Sb, Vb = torch.linalg.svd(b, full_matrices=False)
        Ua, Sa, Va = torch.linalg.svd(a, full_matrices=False)
        core = (Sb[:, None] * Vb) @ (Ua * Sa)
        cores.append((left.T @ Ub) @ core @ (Va @ right.T))
    return left @ ties(torch.stack(cores)) @ right


def tsv_parts(D: torch.Tensor, members: int) -> tuple[torch.Tensor, ...]:
    """An adapter's share of TSV-M: its leading min(m, n)/T singular triplets."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    keep = len(S) // members
    return U[:, :keep], S[:keep], Vh[:keep]


def tsv(parts: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """TSV-M (Gargiulo et al. 2025, section 4.2): both sides' stacks replaced by polar factors."""
    left, right = torch.cat([U for U, _, _ in parts], 1), torch.cat([Vh for _, _, Vh in parts], 0)
    return (_polar(left) * torch.cat([S for _, S, _ in parts])) @ _polar(right)


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def iso_c(D: Sequence[torch.Tensor]) -> torch.Tensor:
    """Iso-C (Marczak et al. 2025, section 4.1): UVᵀ of the sum at the mean of its σ."""
    U, S, Vh = torch.linalg.svd(torch.stack(tuple(D)).sum(0), full_matrices=False)
    return S.mean() * (U @ Vh)


def seconds(name: str, B: torch.Tensor, A: torch.Tensor) -> Seconds:
    """Wall and CPU seconds of one module, from factors (T, m, r) and (T, r, n) in float32."""
    wall, cpu = 0.0, 0.0

    def clock(call: Callable[[], Any], times: int = 1) -> Any:
        nonlocal wall, cpu
        spent, busy, result = timed(call)
        wall, cpu = wall + times * spent, cpu + times * busy
        return result

    if name == "core_ties":
        clock(lambda: core_ties(B, A))
        return wall, cpu
    D = clock(lambda: [b @ a for b, a in zip(B, A, strict=True)])
    if name == "tsv":
        U, S, Vh = clock(lambda: tsv_parts(D[0], len(D)), len(D))
        parts = [(U.roll(t, 0), S, Vh.roll(t, 1)) for t in range(len(D))]
        clock(lambda: tsv(parts))
    else:
        clock(lambda: {"knots_ties": knots_ties, "iso_c": iso_c}[name](D))
    return wall, cpu


def counted(method: str, *adapters: str) -> dict[str, Any]:
    """Seconds of a dense program on one square and one tall module, counted as often as there are
    modules of that shape, wide ones as tall. KnOTS, whose SVD is that of T matrices side by side,
    is measured on the square one and every module counted as no more.
    """
    picked: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    counts: dict[tuple[int, int], int] = {}
    for place, adapter in enumerate(adapters):
        seen: set[tuple[int, int]] = set()
        for _, B, A in data.tensors(adapter):
            shape = tuple(sorted((len(B), A.shape[1]), reverse=True))
            if place == 0:
                counts[shape] = counts.get(shape, 0) + 1
            if len(B) >= A.shape[1] and shape not in seen:
                picked.setdefault(shape, []).append((B, A))
                seen.add(shape)
    square = min(picked)
    if method == "knots_ties":
        counts, picked = {square: sum(counts.values())}, {square: picked[square]}
    torch.linalg.svd(torch.eye(8))
    wall, cpu = 0.0, 0.0
    for shape, pairs in picked.items():
        stacks = [torch.from_numpy(np.stack(side)).float() for side in zip(*pairs, strict=True)]
        one, busy = seconds(method, *stacks)
        wall, cpu = wall + counts[shape] * one, cpu + counts[shape] * busy
    sizes = " and ".join(f"{m} x {n}" for m, n in picked)
    about = f"the papers' program on one module of {sizes}, counted to {sum(counts.values())}"
    return {"s": wall, "CPU s": cpu, "counted": about}


if __name__ == "__main__":
    print(json.dumps(counted(*sys.argv[1:])))
