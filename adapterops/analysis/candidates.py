"""What merge methods would make of a module, from its factors in common coordinates.

Every method that stays in factors gives the same there as between the adapters' own coordinates,
but for the entries of KnOTS, whose columns are the inputs themselves: it gets A as it is.
(Core space and KnOTS fix what is free in singular vectors by the outputs' coordinates, which
matters only where singular values repeat.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops import linalg
from adapterops.derived.rule import Rule, combined
from adapterops.errors import NumericsError
from adapterops.factors import Factors
from adapterops.rules.registry import find

Array = np.ndarray[Any, Any]
DENSE = "ties, dare, della, breadcrumbs and sce between the entries of ΔW itself (--space dense)"
# name, method, space, calibration
_METHODS = (
    ("linear", "linear", "dense", None),
    ("linear, pico", "linear", "dense", "pico"),
    ("nuslerp", "nuslerp", "dense", None),
    ("karcher", "karcher", "dense", None),
    ("model_stock", "model_stock", "dense", None),
    ("tsv", "tsv", "dense", None),
    ("iso_c", "iso_c", "dense", None),
    ("iso_cts", "iso_cts", "dense", None),
    ("ctm", "ctm", "dense", None),
    ("ties, core", "ties", "core", None),
    ("ties, knots", "ties", "knots", None),
)


@dataclass(frozen=True, slots=True)
class Method:
    """A candidate: its name, the options that `merge` takes for it, and the rule."""

    name: str
    options: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class Merged:
    """A candidate's figures of one module: ⟨ΔW, Dᵢ⟩ (T,) and ‖ΔW‖, or what went wrong."""

    inner: Array
    norm: float
    problem: str = ""


def methods(count: int, *, only_linear: bool = False) -> list[Method]:
    """The candidates for so many adapters, with default parameters."""
    found = []
    for name, method, space, calibrate in _METHODS:
        chosen = find(method)
        takes = chosen.least <= count and (chosen.most is None or count <= chosen.most)
        if not takes or (only_linear and name != "linear"):
            continue
        options: tuple[str, ...] = () if name == "linear" else ("-m", method)
        options += () if space == "dense" else ("--space", space)
        options += () if calibrate is None else ("--calibrate", calibrate)
        rule = Rule(chosen, chosen.values({}), space, calibrate=calibrate)  # type: ignore[arg-type]
        found.append(Method(name, options, rule))
    return found


def merge(
    method: Method,
    near: Sequence[Factors],
    half: Sequence[Factors],
    weights: Array,
    noise: Array,
    stem: str,
    shape: tuple[int, int],
) -> Merged:
    """One module by one candidate.

    `near` are the adapters' factors in common coordinates of both sides, `half` with A as it is;
    `noise` (T,) bounds what storage did to each.
    """
    members = half if method.rule.space == "knots" else near
    ranks = [one.rank for one in members]
    width = min(method.rule.method.columns(ranks, method.rule.values), *shape)
    labels = [str(i) for i in range(len(members))]  # key random bits, which none of these draws
    try:
        found = combined(method.rule, members, weights, noise, labels, stem, width)
    except NumericsError as error:
        return Merged(np.zeros(len(members)), 0.0, f"module {stem}: {error.message}")
    result = Factors(found.B, found.A)
    inner = np.array([result.inner(one) for one in members])
    return Merged(inner, linalg.norm(found.B, found.A))
