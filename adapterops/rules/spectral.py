"""Methods that even out singular values or decorrelate singular vectors, on the cores.

M is (T, R, R') with Dᵢ = Q_B Mᵢ Q_Aᵀ, w and noise (T,), float64 on the host. All of them commute
with orthogonal changes of both bases, so that the cores give the result of the dense matrices, in
its rank-R form: a dense SVD would also even out min(m, n) − R directions that no adapter has, in
an arbitrary basis of them.

Where two singular values agree the vectors of each are arbitrary, but what is made of them here is
not: UVᵀ of a cluster, and both polar factors together, depend on its span only. `cuts` says which
directions count, and that a number of them never parts a cluster.
"""

from __future__ import annotations

import numpy as np

from adapterops import linalg
from adapterops.rules import cuts
from adapterops.rules.registry import Array, Cored, Parameter, method

_ALPHA = Parameter("alpha", "number", 1.0, "multiplies the result", 0.0, open_low=True)
_SCALE = Parameter(
    "scale",
    "text",
    "norm",
    "norm: ‖ΔW‖ is the weighted mean of the adapters' norms; mean: σ is the mean σ of their sum, "
    "as in the paper",
    choices=("norm", "mean"),
)
_NOTHING = "nothing of the sum is above its noise: the result is zero"


@method(
    "iso_c",
    "core",
    summary="The weighted sum with all its singular values made equal.",
    reference="Marczak et al. 2025, No task left behind, arXiv 2502.04959, section 4.1 (Iso-C)",
    parameters=[_ALPHA, _SCALE, cuts.CUT],
    laws=["homogeneous"],
)
def iso_c(M: Array, w: Array, noise: Array, *, alpha: float, scale: str, cut: float) -> Cored:
    """UVᵀ of ΣwᵢDᵢ = UΣVᵀ, times α·(weighted mean ‖Dᵢ‖)/√k or α·mean(σ₁ … σ_k).

    The paper's mean runs over min(m, n) values, most of them zero for adapters; here over those
    that count, so its α does not carry over.
    """
    core = np.tensordot(w, M, 1)
    U, values, Vh = linalg.svd(core)
    low = cuts.limit(float(values.max(initial=0.0)), M, w, noise, cut)
    kept = cuts.above(values, low)
    if not kept:
        return _nothing(core, M, w, low)
    size = cuts.mean_norm(M, w) / np.sqrt(kept) if scale == "norm" else values[:kept].mean()
    found = cuts.gap(values, kept)
    flat = alpha * size * (U[:, :kept] @ Vh[:kept])
    return Cored(flat, low, kept, found, cuts.remarks(found))


@method(
    "tsv",
    "core",
    summary="The adapters' singular vectors, decorrelated across adapters, with their own σ.",
    reference="Gargiulo et al. 2025, Task singular vectors, arXiv 2412.00081, section 4.2 (TSV-M)",
    parameters=[
        _ALPHA,
        Parameter("rank", "whole", 0, "directions kept of each adapter; 0: all it has", 0),
        cuts.CUT,
    ],
    laws=["homogeneous"],
    least_response=1.0,
)
def tsv(M: Array, w: Array, noise: Array, *, alpha: float, rank: int, cut: float) -> Cored:
    """α·polar([U₁ … U_T])·diag(Σ₁ … Σ_T)·polar([V₁ … V_T])ᵀ with wᵢDᵢ = UᵢΣᵢVᵢᵀ.

    The paper keeps min(m, n)/T directions of each, which for adapters takes in null directions;
    here those of the adapter. k equal adapters give 1/k of their sum.
    """
    scaled = M * w[:, None, None]
    low = cuts.limit(_largest(scaled), M, w, noise, cut)
    parts = [cuts.directions(scaled[i], low, rank) for i in cuts.members(M, w)]
    all_of = cuts.joined(parts, *M.shape[1:])
    if not len(all_of.values):
        return _nothing(np.zeros(M.shape[1:]), M, w, low)
    left, right = (cuts.isometry(side, all_of.values, low) for side in (all_of.U, all_of.V))
    core = alpha * (left.matrix * all_of.values) @ right.matrix.T
    return _cored(core, low, all_of, left, right, _left_out(M, w, low))


@method(
    "iso_cts",
    "core",
    summary="Equal singular values in the sum's leading directions and in each adapter's own.",
    reference="Marczak et al. 2025, No task left behind, arXiv 2502.04959, section 4.2 (Iso-CTS)",
    parameters=[
        Parameter("common", "number", 0.8, "share of the sum's directions kept as common", 0, 1),
        _ALPHA,
        _SCALE,
        cuts.CUT,
    ],
    laws=["homogeneous"],
)
def iso_cts(
    M: Array, w: Array, noise: Array, *, common: float, alpha: float, scale: str, cut: float
) -> Cored:
    """polar(U)·polar(V)ᵀ of common and specific directions, scaled as in `iso_c`.

    Common are the leading U_k of ΣwᵢDᵢ; specific the s leading ones of each (I − U_kU_kᵀ)wᵢDᵢ.
    Of the sum's K directions s = round((1 − common)·K/T) go to each adapter and the K − Ts others
    are common, as in the authors' program with K for min(m, n).
    """
    core = np.tensordot(w, M, 1)
    values = linalg.svd(core)[1]
    low = cuts.limit(float(values.max(initial=0.0)), M, w, noise, cut)
    total, own = cuts.above(values, low), cuts.members(M, w)
    if not total:
        return _nothing(core, M, w, low)
    each = min(round((1 - common) * total / len(own)), total // len(own))
    shared = cuts.joined([], *core.shape)
    if total > len(own) * each:
        shared = cuts.directions(core, low, total - len(own) * each)
    parts = [shared]
    if each:
        for i in own:
            rest = w[i] * (M[i] - shared.U @ (shared.U.T @ M[i]))
            parts.append(cuts.directions(rest, low, each))
    all_of = cuts.joined(parts, *core.shape)
    left, right = (cuts.isometry(side, all_of.values, low) for side in (all_of.U, all_of.V))
    flat = left.matrix @ right.matrix.T
    if scale == "norm":
        flat *= cuts.mean_norm(M, w) / np.linalg.norm(flat)
    else:
        flat *= all_of.values.mean()
    return _cored(alpha * flat, low, all_of, left, right)


def _cored(
    core: Array,
    low: float,
    parts: cuts.Directions,
    left: cuts.Isometry,
    right: cuts.Isometry,
    notes: tuple[str, ...] = (),
) -> Cored:
    found = max(left.gap, right.gap)
    every = dict.fromkeys((*parts.notes, *cuts.remarks(found), *notes))
    rank = min(left.rank, right.rank)
    return Cored(core, low, rank, max(parts.gap, found), tuple(every))


def _largest(M: Array) -> float:
    return max((float(linalg.svd(core)[1].max(initial=0.0)) for core in M), default=0.0)


def _nothing(core: Array, M: Array, w: Array, low: float) -> Cored:
    return Cored(np.zeros_like(core), low, 0, 0.0, (_NOTHING,) if len(cuts.members(M, w)) else ())


def _left_out(M: Array, w: Array, low: float) -> tuple[str, ...]:
    """Warnings of adapters that are below the cut altogether. A Frobenius norm bounds σ₁."""
    sizes = np.abs(w) * cuts.norms(M)
    return tuple(
        f"adapter {i + 1} is below the cut and has no part in the result"
        for i in cuts.members(M, w)
        if sizes[i] <= low
    )
