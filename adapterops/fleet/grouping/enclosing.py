"""The point whose largest relative distance to a set of points is smallest, from distances alone.

    max over λ on the simplex of g(λ) = ½·vᵀΔv / Σv,   v = λ∘s, sᵢ = 1/‖Dᵢ‖², Δᵢⱼ = ‖Dᵢ − Dⱼ‖²,

the dual of min over X of max_i ‖Dᵢ − X‖²/‖Dᵢ‖²: a smallest enclosing ball where each point has a
unit of its own. With u = v/Σv the gradient is S·(Δu − ½uᵀΔu), which are the squared relative
distances to Σuᵢ·Dᵢ, and the Hessian S·[Δ − (Δu)1ᵀ − 1(Δu)ᵀ + uᵀΔu]·S/Σv ≤ 0, S = diag(sᵢ). So
Newton steps on g(λ) + μ·Σlog λᵢ, μ → 0, find it; a barrier of μ leaves a gap of N·μ at most (Fiacco
& McCormick 1968; Boyd & Vandenberghe 2004, section 11.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_GAP = 1e-9
_STEPS = 50
_DECREMENT = 1e-9
_SHRINK = 0.1
_INSIDE = 0.95
_SMALLEST_STEP = 1e-12


def enclosing(squares: Array, norms: Array) -> Array:
    """λ (N,), sum 1, of ‖Dᵢ − Dⱼ‖² (N, N) and ‖Dᵢ‖ > 0 (N,).

    At λ the mean C = Σλᵢsᵢ·Dᵢ/Σλᵢsᵢ has the smallest largest ‖Dᵢ − C‖/‖Dᵢ‖ of all matrices, to
    1e-9 in its square, relative to the largest of `squares` over the smallest ‖Dᵢ‖².
    """
    *_, weights = approaching(squares, norms)
    return weights


def approaching(squares: Array, norms: Array) -> Iterator[Array]:
    """The λ of `enclosing`, coarse at first, each ten times nearer; the last is its."""
    count = len(norms)
    weights = np.full(count, 1.0 / count)
    scales = (norms.min() / norms) ** 2
    size = float(squares.max())
    if count == 1 or size == 0.0:
        yield weights
        return
    squares = squares / size
    barrier = float(_value(squares, scales, weights)) / count
    while True:
        for _ in range(_STEPS):
            step, decrement = _newton(squares, scales, weights, barrier)
            if decrement <= _DECREMENT * barrier:
                break
            weights = _moved(squares, scales, weights, step, barrier)
        yield np.asarray(weights / weights.sum())
        barrier *= _SHRINK
        if count * barrier <= _SHRINK * _GAP or barrier == 0.0:
            return


def _value(squares: Array, scales: Array, weights: Array) -> float:
    v = scales * weights
    return float(0.5 * (v @ squares @ v) / v.sum())


def _newton(squares: Array, scales: Array, weights: Array, barrier: float) -> tuple[Array, float]:
    """The Newton step on the simplex and its decrement, the rise that it promises."""
    v = scales * weights
    total = v.sum()
    apart = squares @ (v / total)
    own = float(apart @ v) / total
    gradient = scales * (apart - 0.5 * own) + barrier / weights
    gradient -= weights @ gradient  # a constant changes nothing on the simplex
    curved = squares - apart[:, None] - apart + own
    # In units of the weights themselves the barrier's part is μ·I, whatever the λ are. g is
    # homogeneous, so its Hessian vanishes along λ: there the constraint's own square stands in.
    units = weights * scales
    hessian = -(curved * units[:, None]) * units / total + barrier * np.eye(len(weights))
    hessian += np.outer(weights, weights)
    both = np.linalg.solve(hessian, np.stack([weights * gradient, weights], axis=1))
    multiplier = float(weights @ both[:, 0]) / float(weights @ both[:, 1])
    step = weights * (both[:, 0] - multiplier * both[:, 1])
    return step, float(gradient @ step)


def _moved(squares: Array, scales: Array, weights: Array, step: Array, barrier: float) -> Array:
    """The weights after as much of a step as raises the objective (Armijo 1966)."""

    def height(at: Array) -> float:
        return _value(squares, scales, at) + barrier * float(np.log(at).sum())

    down = step < 0
    longest = float((weights[down] / -step[down]).min()) if down.any() else math.inf
    size, start = min(1.0, _INSIDE * longest), height(weights)
    while size > _SMALLEST_STEP and height(weights + size * step) < start:
        size *= 0.5
    moved = weights + size * step
    return np.asarray(moved / moved.sum())
