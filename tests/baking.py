"""Dense arithmetic on what baking is going to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from adapterops.changes.targets import Changes, Target


def dense_change(target: Target) -> np.ndarray[Any, Any]:
    """D of a target in float64, as the matrix that its tensor is stored as."""
    change = np.zeros(target.matrix)
    for term in target.terms:
        B, A = term.factors()
        part = term.coefficient * (B @ A)
        change[term.rows, term.columns] += part.T if term.turned else part
    for dense in target.dense:
        change += dense.coefficient * np.asarray(dense.change().rows(0, target.matrix[0]))
    return change


def dense_target(target: Target) -> np.ndarray[Any, Any]:
    """W + D of a target in float64, in the shape of its tensor."""
    plain = replace(target.ref, transposed=False)
    W = np.asarray(plain.read()).reshape(target.matrix)
    return (W + dense_change(target)).reshape(target.ref.shape)


def baked(changes: Changes) -> dict[str, np.ndarray[Any, Any]]:
    """Every target of the changes, W + D, by name."""
    return {name: dense_target(target) for name, target in changes.targets.items()}


def gap(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest relative distance of tensors of the same names; shapes must agree."""
    worst = 0.0
    for name, value in found.items():
        other = np.asarray(expected[name], dtype=float)
        assert value.shape == other.shape, name
        worst = max(worst, float(np.linalg.norm(value - other) / max(np.linalg.norm(other), 1e-30)))
    return worst
