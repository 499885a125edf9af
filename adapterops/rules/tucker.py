"""Compress, then merge: shared subspaces of the width of the result, and the sum inside them.

A Tucker-2 decomposition of the adapters side by side: U (R, r) and V (R', r) with orthonormal
columns maximise Σ‖UᵀXᵢV‖², Xᵢ the adapters at like norms. Everything happens on the cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapterops import linalg
from adapterops.rules import cuts
from adapterops.rules.registry import Array, Cored, Parameter, method

_STEP = 1e-9
_STEPS = 25  # the fit is then within 10⁻⁵ of its limit


@dataclass(frozen=True, slots=True)
class Shared:
    """U (R, k), V (R', k') orthonormal; `fit` the share of Σ‖Xᵢ‖² inside them, and its bound.

    No subspaces of this width hold more than `bound`: what U or V alone holds (the spectra of the
    stacked cores; De Lathauwer et al. 2000, A multilinear singular value decomposition).
    """

    U: Array
    V: Array
    fit: float
    bound: float
    cut: float
    gap: float
    notes: tuple[str, ...] = ()


def shared(M: Array, w: Array, noise: Array, *, rank: int, beta: float, cut: float) -> Shared:
    """The subspaces of at most `rank` directions that hold most of the adapters M (T, R, R').

    Xᵢ = Mᵢ·λᵢ/‖Mᵢ‖, λᵢ = β‖Mᵢ‖ + (1 − β)·mean‖M‖ over those that count. Alternating from the
    leading singular vectors of the stacks (De Lathauwer et al. 2000, On the best rank-1 and
    rank-(R₁, …, R_N) approximation, algorithm 4.2) until the subspaces move by less than 10⁻⁹ or
    25 times: the fit never falls, it need not be the largest there is. `rank` 0 is the largest
    numerical rank of an adapter.
    """
    own = cuts.members(M, w)
    rows, columns = M.shape[1:]
    if not len(own):
        return Shared(np.zeros((rows, 0)), np.zeros((columns, 0)), 1.0, 1.0, 0.0, 0.0)
    sizes = cuts.norms(M[own])
    scale = beta + (1 - beta) * sizes.mean() / sizes
    X = M[own] * scale[:, None, None]
    left = linalg.svd(np.concatenate(list(X), axis=1))
    right = linalg.svd(np.concatenate(list(X.mT), axis=1))
    low = cuts.limit(float(left[1][0]), X, np.ones(len(X)), noise[own] * scale, cut)
    wanted = rank or max(int((linalg.svd(x)[1] > low).sum()) for x in X)
    keep = [min(wanted, int((side[1] > low).sum())) for side in (left, right)]
    U, V = left[0][:, : keep[0]], right[0][:, : keep[1]]
    for _ in range(_STEPS):
        before = U
        U = _leading(X @ V, keep[0])
        V = _leading(X.mT @ U, keep[1])
        if np.linalg.norm(U - before @ (before.T @ U)) <= _STEP:
            break
    inside = U.T @ X @ V
    energy = float((X * X).sum())
    sides = list(zip((left[1], right[1]), keep, strict=True))
    bound = min(float(values[:k] @ values[:k]) for values, k in sides) / energy
    notes = [cuts.remarks(cuts.gap(values, k), asked=k == wanted) for values, k in sides]
    fit = float((inside * inside).sum()) / energy
    return Shared(
        U,
        V,
        fit,
        max(fit, bound),
        low,
        max(cuts.gap(values, k) for values, k in sides),
        tuple(dict.fromkeys(notes[0] + notes[1])),
    )


def _leading(X: Array, count: int) -> Array:
    """The leading eigenvectors of ΣXᵢXᵢᵀ, X (T, R, k)."""
    stack = np.concatenate(list(X), axis=1)
    return np.asarray(np.linalg.eigh(stack @ stack.T)[1][:, ::-1][:, :count])


@method(
    "ctm",
    "core",
    summary="The weighted sum inside subspaces that all adapters share, of the rank asked for.",
    reference="He et al. 2026, Compress then merge, arXiv 2606.03723, section 4",
    parameters=[
        Parameter("rank", "whole", 0, "rank of the result; 0: the largest of the adapters'", 0),
        Parameter("beta", "number", 0.25, "1 keeps the adapters' norms, 0 makes them equal", 0, 1),
        cuts.CUT,
    ],
    laws=["homogeneous", "linear", "low-rank"],
    width=lambda ranks, values: int(values["rank"]) or max(ranks, default=0),
)
def ctm(M: Array, w: Array, noise: Array, *, rank: int, beta: float, cut: float) -> Cored:
    """UUᵀ(ΣwᵢDᵢ)VVᵀ with U, V of `shared`; the norms are evened out for finding U and V only.

    The rank is `rank` or less, never more, with nothing truncated afterwards. `fit` of the result
    is what the subspaces hold and the bound of it.
    """
    found = shared(M, w, noise, rank=rank, beta=beta, cut=cut)
    U, V = found.U, found.V
    core = U @ (U.T @ np.tensordot(w, M, 1) @ V) @ V.T
    width = min(U.shape[1], V.shape[1])
    return Cored(core, found.cut, width, found.gap, found.notes, (found.fit, found.bound))
