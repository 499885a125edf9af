"""What of one adapter lies in the subspaces that others use, and what is left without it.

Taking it out of one adapter before adding the other is NP-LoRA's way to keep a style from being
overwritten: `b + subtract(a, b)`. On the cores: M (T, R, R'), w and noise (T,), float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adapterops import linalg
from adapterops.rules import cuts
from adapterops.rules.registry import Array, Cored, Parameter, Value, method

_REFERENCE = "Chen et al. 2025, NP-LoRA, arXiv 2511.11051, section 4"
_PARAMETERS = (
    Parameter(
        "side",
        "text",
        "right",
        "subspaces of the inputs (right), of the outputs (left), or both",
        choices=("left", "right", "both"),
    ),
    Parameter("rank", "whole", 0, "leading directions taken of each other adapter; 0: all", 0),
    Parameter("share", "number", 1.0, "1 is the hard projection; μ/(1+μ) NP-LoRA's soft one", 0, 1),
    cuts.CUT,
)


def _part(ranks: Sequence[int], values: Mapping[str, Value]) -> int:
    """Of P_U D₁ P_V: no more than of D₁, or of the others together."""
    return min(ranks[0], sum(ranks[1:]))


def _rest(ranks: Sequence[int], values: Mapping[str, Value]) -> int:
    """Of D₁(1 − P) that of D₁; of D₁ − P_U D₁ P_V that of both terms."""
    return ranks[0] + (_part(ranks, values) if values["side"] == "both" else 0)


@method(
    "project",
    "core",
    summary="The part of the first adapter in the subspaces of the others.",
    reference=_REFERENCE,
    parameters=_PARAMETERS,
    laws=["homogeneous", "linear"],
    least=2,
    width=_part,
)
def project(
    M: Array, w: Array, noise: Array, *, side: str, rank: int, share: float, cut: float
) -> Cored:
    """share·w₁·P_U D₁, D₁P_V or P_U D₁P_V, onto the span of the others' leading directions.

    The others' weights only say which of them count. Cored.rank is the width of the span (of the
    narrower one where `side` is both).
    """
    others, weights = M[1:], np.where(w[1:] != 0, 1.0, 0.0)
    own = cuts.members(others, weights)
    largest = max((float(linalg.svd(others[i])[1][0]) for i in own), default=0.0)
    low = cuts.limit(largest, others, weights, noise[1:], cut)
    parts = cuts.joined(
        [cuts.directions(others[i], low, rank) for i in own], M.shape[1], M.shape[2]
    )
    left, right = (cuts.directions(columns * parts.values, low) for columns in (parts.U, parts.V))
    core = share * w[0] * M[0]
    if side != "right":
        core = left.U @ (left.U.T @ core)
    if side != "left":
        core = (core @ right.U) @ right.U.T
    used = {"left": (left,), "right": (right,), "both": (left, right)}[side]
    found = max(parts.gap, *(one.gap for one in used))
    notes = dict.fromkeys((*parts.notes, *(note for one in used for note in one.notes)))
    return Cored(core, low, min(len(one.values) for one in used), found, tuple(notes))


@method(
    "subtract",
    "core",
    summary="The first adapter without its part in the subspaces of the others.",
    reference=_REFERENCE,
    parameters=_PARAMETERS,
    laws=["identity", "homogeneous", "linear"],
    least=2,
    width=_rest,
)
def subtract(
    M: Array, w: Array, noise: Array, *, side: str, rank: int, share: float, cut: float
) -> Cored:
    """w₁D₁ less `project` of it: with share 1 and one side, orthogonal to the others' directions.

    Where `side` is both only what lies in both spans goes.
    """
    taken = project(M, w, noise, side=side, rank=rank, share=share, cut=cut)
    return Cored(w[0] * M[0] - taken.core, taken.cut, taken.rank, taken.gap, taken.notes)
