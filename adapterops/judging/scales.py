"""Factors that a change is wrong by when a tool misreads its scale, with their names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterops.changes.targets import Target

_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Named:
    """A factor by which a change comes out wrong, what kind of error that is, and which."""

    factor: float
    kind: str
    text: str


def named_factors(target: Target) -> list[Named]:
    """What is likely to go wrong with the scales and weights of a target's adapters.

    Only factors that all of its terms share; equal ones have their texts joined.
    """
    each = [_of(t.coefficient, t.site.scale, t.site.alpha, t.site.dim) for t in target.terms]
    shared = each[0] if each else []
    for others in each[1:]:
        shared = [n for n in shared if any(_equal(n, o) and n.text == o.text for o in others)]
    found = [
        Named(-1.0, "sign", "subtracted, not added"),
        Named(2.0, "twice", "added twice"),
        *shared,
    ]
    joined: list[Named] = []
    for name in found:
        same = next((n for n in joined if _equal(n, name)), None)
        if same is None:
            joined.append(name)
        else:
            at = joined.index(same)
            joined[at] = Named(same.factor, same.kind, f"{same.text}, or {name.text}")
    return [n for n in joined if abs(n.factor - 1) > _SAME]


def _equal(one: Named, other: Named) -> bool:
    return abs(one.factor / other.factor - 1) < _SAME


def _of(coefficient: float, scale: float, alpha: float | None, dim: int) -> list[Named]:
    """The factors of one adapter, whose scale was made from alpha and its rank `dim`."""
    if not scale or not coefficient:
        return []
    kind = "wrong-scale"
    found = [
        Named(1 / scale, kind, f"the scale {scale:.4g} was left out"),
        Named(scale, kind, f"the scale {scale:.4g} was applied twice"),
    ]
    weight = coefficient / scale
    if abs(weight - 1) > _SAME:
        found += [
            Named(1 / weight, kind, f"the weight {weight:.4g} was left out"),
            Named(weight, kind, f"the weight {weight:.4g} was applied twice"),
            Named(1 / coefficient, kind, "weight and scale were left out"),
        ]
    root = math.sqrt(dim) if dim else 1.0
    if alpha and math.isclose(scale, alpha / dim, rel_tol=_SAME):
        found += [
            Named(root, kind, f"alpha/√r, {alpha / root:.4g}, in place of alpha/r, {scale:.4g}"),
            Named(float(dim), kind, f"alpha, {alpha:.4g}, was not divided by the rank"),
        ]
    elif alpha and math.isclose(scale, alpha / root, rel_tol=_SAME):
        what = f"alpha/r, {alpha / dim:.4g}, in place of alpha/√r, {scale:.4g}"
        found += [
            Named(1 / root, kind, what),
            Named(root, kind, f"alpha, {alpha:.4g}, was not divided by √r"),
        ]
    return found
