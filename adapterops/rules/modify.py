"""Modifiers of any method: adapters calibrated before it, the result calibrated after it.

Pure functions on cores: M (T, R, R') of the adapters, `core` (R, R') of a result, w (T,), float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from adapterops import linalg
from adapterops.errors import NumericsError
from adapterops.rules import cuts
from adapterops.rules.registry import Array

Target = Literal["mean", "max", "sum"]


def pico_map(M: Array, w: Array) -> Array:
    """The symmetric (R, R) matrix that damps output directions which many adapters share.

    I + U·diag(α − 1)·Uᵀ with [B₁ … B_T] = UΣVᵀ, sⱼ = σⱼ²/Σσ², αⱼ = 1/(1 + (T−1)sⱼ) (Tang & Yang
    2026, arXiv 2604.16826, section 4). The paper's B depends on the gauge; here it is the balanced
    Bᵢ = Uᵢ√Σᵢ, so that ΣBᵢBᵢᵀ = Σ(DᵢDᵢᵀ)^½. Weights only say which adapters count.
    """
    own = cuts.members(M, w)
    rows = M.shape[1]
    if len(own) < 2:
        return np.eye(rows)
    energy = np.zeros((rows, rows))
    for core in M[own]:
        U, values, _ = linalg.svd(core)
        energy += (U * values) @ U.T
    values, U = np.linalg.eigh(energy)
    share = np.maximum(values, 0.0) / values.sum()
    return np.asarray((U / (1 + (len(own) - 1) * share)) @ U.T)


def pico(M: Array, w: Array) -> Array:
    """The adapters' cores after `pico_map`, to be merged by any method.

    The paper then brings the result to the mean of the norms before: `match_norm` with "mean".
    """
    return np.asarray(pico_map(M, w) @ M)


def svc(
    core: Array,
    M: Array,
    w: Array,
    noise: Array,
    *,
    alpha: float | None = None,
    cut: float = 1e-3,
) -> Array:
    """A merged core with its singular values scaled down where adapters add up in one direction.

    σ_r ← σ_r·T/Σᵢ max(α, sᵢ), sᵢ = ⟨u_rᵀΔW, u_rᵀwᵢDᵢ⟩/‖u_rᵀwᵢDᵢ‖² (Li et al. 2026, arXiv
    2602.05536, section 4); α is 1/T by default, 1 for TSV. With wᵢDᵢ in place of the paper's Dᵢ a
    direction that one adapter has alone keeps its size; w of ones gives the paper's. An adapter
    with a response below the cut has no vote there (0/0 in the paper), equal singular values are
    calibrated as one, for their vectors are arbitrary, and what is below the cut stays.
    """
    own = cuts.members(M, w)
    if not len(own):
        return core
    floor = 1 / len(own) if alpha is None else alpha
    U, values, Vh = linalg.svd(core)
    largest = float(values.max(initial=0.0))
    low = cuts.limit(largest, M, w, noise, cut)
    merged = values[:, None] * Vh
    responses = U.T @ (M[own] * w[own, None, None])
    scale = np.ones(len(values))
    for run in cuts.clusters(values):
        if values[run.start] <= low:
            break
        parts = responses[:, run]
        sizes = (parts * parts).sum(axis=(1, 2))
        heard = sizes > low * low
        products = (parts * merged[run]).sum(axis=(1, 2))
        votes = np.maximum(floor, products[heard] / sizes[heard])
        if len(votes):
            scale[run] = len(votes) / votes.sum()
    return np.asarray((U * (values * scale)) @ Vh)


def norm_factor(norm: float, norms: Array, w: Array, to: Target) -> float:
    """What brings a result of this norm to the mean, max or sum of the adapters' `norms` (T,).

    mean: Σ|wᵢ|‖Dᵢ‖/Σ|wᵢ|; max: of ‖Dᵢ‖; sum: Σ|wᵢ|‖Dᵢ‖; over adapters that count. 1 without any,
    and of a result that is zero, which stays zero. Raises NumericsError where the result is no more
    than what the sum leaves of rounding.
    """
    sizes = np.abs(w) * (norms > 0)
    total = float(sizes @ norms)
    if total == 0.0 or norm == 0.0:
        return 1.0
    if norm <= 1e3 * linalg.EPSILON * total:
        raise NumericsError(
            "the result is zero up to rounding, no factor gives it the adapters' norm",
            hint="leave out --match-norm",
        )
    if to == "max":
        return float(norms[sizes > 0].max()) / norm
    return total / norm / (1.0 if to == "sum" else float(sizes.sum()))
