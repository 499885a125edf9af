"""SCE: select where adapters vary most, weigh each by its energy there, erase the minority sign.

Registered like the methods of `elements`, and with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from adapterops.arrays import Array, host, namespace
from adapterops.rules import sparsify
from adapterops.rules.registry import Limits, Parameter, Ranked, method
from adapterops.rules.votes import Ballot, Part, accumulate, elected, least


def _variances(X: Array, w: Array) -> Array:
    """The variance of sign(wᵢ)Dᵢ over the adapters, weighted by |w|, (1, rows, columns)."""
    xp = namespace(X)
    weights = host(w)
    shares = np.abs(weights) / (np.abs(weights).sum() or 1.0)
    mean, variance = xp.zeros_like(X[0]), xp.zeros_like(X[0])
    for t, share in enumerate(shares.tolist()):
        accumulate(mean, X[t], share * float(np.sign(weights[t])))
    for t, share in enumerate(shares.tolist()):
        deviation = X[t] * float(np.sign(weights[t])) - mean
        deviation *= deviation
        accumulate(variance, deviation, share)
    return variance[None]


def _ranks(total: int, **p: Any) -> tuple[int, ...]:
    return (sparsify.kept(p["select_topk"], total, "adapterops"),)


def _selected(X: Array, w: Array, at: Array) -> Iterator[Part]:
    xp = namespace(X)
    if float(at[0, 0]) <= 0:
        yield from sparsify.whole(X)
        return
    mask, z = _variances(X, w)[0], xp.empty_like(X[0])
    xp.greater_equal(mask, float(at[0, 0]), out=mask)
    for t in range(len(X)):
        yield t, xp.multiply(X[t], mask, out=z), least(X)


def _energies(X: Array, w: Array, at: Array, draws: Array, **p: Any) -> Array:
    """Σ z² of the rows, (T, 1, rows)."""
    xp = namespace(X)
    return np.array(
        [[host(xp.sum(z * z, -1, dtype=xp.float64))] for _, z, _ in _selected(X, w, at)]
    )


@method(
    "sce",
    "elements",
    summary="Where adapters vary most: the mean of the elected sign, weighted by energy.",
    reference="Wan et al. 2024, FuseChat, arXiv 2408.07990 (SCE: select, calculate, erase)",
    parameters=[
        Parameter(
            "select_topk",
            "number",
            1.0,
            "share of positions kept, those of largest variance",
            0,
            1,
            open_low=True,
        ),
    ],
    laws=["identity", "copies", "homogeneous"],
    ranked=Ranked(_ranks, _variances, _energies),
)
def sce(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """Σ ηᵢzᵢ / Σ|ηᵢ| over the entries of the elected sign, ηᵢ = wᵢ·Σ zᵢ², z selected.

    A sign is elected by Σ wᵢzᵢ. mergekit has no weights (all are 1), counts `select_topk` in
    variances above 0, lets tied votes elect plus, and takes equal ηᵢ for Σ mean zᵢ² < 10⁻⁶, which
    most adapters are below; here the energies count at any scale. Where adapters agree their
    variance is rounding, and so is what a `select_topk` below 1 selects.
    """
    assert limits.totals is not None
    w = host(w)
    energies = limits.totals[:, 0]
    energies = energies / (energies.max() or 1.0)
    ballot = Ballot(w * energies, np.abs(w) * energies, w)
    return elected(X, _selected(X, w, limits.at), ballot, normalize=True)
