"""The closest matrix of a given rank to a weighted sum, on the cores.

Dᵢ = Q_B Mᵢ Q_Aᵀ with Q orthonormal: the singular values of a core are those of its matrix.
"""

from __future__ import annotations

import numpy as np

from adapterops import linalg
from adapterops.rules import cuts
from adapterops.rules.registry import Array, Cored, Parameter, method


@method(
    "svd",
    "core",
    summary="The matrix of the rank asked for that is closest to the weighted sum.",
    reference="Eckart and Young 1936, The approximation of one matrix by another of lower rank, "
    "doi 10.1007/BF02288367",
    parameters=[Parameter("rank", "whole", None, "rank of the result at most", 1)],
    laws=["homogeneous", "low-rank"],
    width=lambda ranks, values: int(values["rank"]),
)
def svd(M: Array, w: Array, noise: Array, *, rank: int) -> Cored:
    """Σ_{k ≤ rank} σₖuₖvₖᵀ of ΣwᵢDᵢ = Σσₖuₖvₖᵀ; the sum itself where its rank is no larger.

    M (T, R, R'), w and noise (T,), float64. Only what is rounding in float64 is left out besides.
    The rank is a promise: where σ_rank = σ_{rank+1} a part of equal directions stays, any part
    being as close as another and which one a matter of rounding. `gap` shows it, a note says it.
    """
    core = np.tensordot(w, M, 1)
    U, values, Vh = linalg.svd(core)
    low = cuts.limit(0.0, M, w, np.zeros(len(w)), 0.0)
    live = cuts.above(values, low)
    if live <= rank:
        return Cored(core, low, live, 0.0)
    found = cuts.gap(values, rank)
    best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
    return Cored(best, float(values[rank]), rank, found, cuts.remarks(found, asked=True))
