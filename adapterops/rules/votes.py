"""How entries of several adapters become one: summed, or the mean of those of the elected sign.

Everything works entry by entry on blocks (rows, columns), float32 or float64, numpy or torch, one
adapter after the other, in few passes: a block stays in the cache. Masks are 0 and 1 in the type of
the entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from adapterops.arrays import Array, namespace

# What rounding may do to a vote: a smaller majority, relative to all mass, elects no sign.
_MARGIN = 2.0**-20
_LEAST = {32: 2.0**-149, 64: 2.0**-1074}

# Adapter, its entries, and the size from which on an entry counts.
Part = tuple[int, Array, float]


@dataclass(frozen=True, slots=True)
class Ballot:
    """What each adapter's entries weigh: in the result, in the vote, in the divisor.

    All (T,). Entries of a negative `values` or `votes` stand for the other sign; None in `votes`
    means that they are as the values are. `counted`: an adapter votes with its weight whatever the
    size of its entry. `positive`: a tied vote elects plus, and any majority counts.
    """

    values: Array
    divisors: Array
    votes: Array | None = None
    counted: bool = False
    positive: bool = False


def least(X: Array, limit: float = 0.0) -> float:
    """The limit, or the smallest positive number, so that zeros never count."""
    return max(limit, _LEAST[namespace(X).finfo(X.dtype).bits])


def accumulate(total: Array, entries: Array, factor: float) -> None:
    """total += factor · entries."""
    if isinstance(total, np.ndarray):
        total += entries if factor == 1 else entries * entries.dtype.type(factor)
    else:
        total.add_(entries, alpha=factor)


def summed(X: Array, parts: Iterable[Part], weights: Sequence[float]) -> Array:
    """Σ wᵢ zᵢ of parts z. X (T, rows, columns) says what the result is like."""
    total = namespace(X).zeros_like(X[0])
    for t, z, _ in parts:
        accumulate(total, z, weights[t])
    return total


def elected(X: Array, parts: Iterable[Part], ballot: Ballot, normalize: bool) -> Array:
    """Σ cᵢzᵢ over the entries of the elected sign, divided by the Σ dᵢ of those if `normalize`.

    The sign of an entry is that of Σ vᵢzᵢ (`counted`: Σ vᵢ sign zᵢ): Yadav et al. 2023, TIES-
    Merging, sign election and disjoint merge. Without a majority the result is 0.
    """
    xp = namespace(X)
    plus, minus = _Side(X), _Side(X)
    up, down = xp.empty_like(X[0]), xp.empty_like(X[0])
    votes = ballot.values if ballot.votes is None else ballot.votes
    polled = ballot.counted or ballot.votes is not None
    if polled:
        poll, size = xp.zeros_like(X[0]), xp.zeros_like(X[0])
    for t, z, low in parts:
        value, divisor, vote = (float(each[t]) for each in (ballot.values, ballot.divisors, votes))
        xp.greater_equal(z, low, out=up)
        xp.less_equal(z, -low, out=down)
        sides = (minus, plus) if vote < 0 else (plus, minus)
        for mask, side in zip((up, down), sides, strict=True):
            if normalize:
                accumulate(side.divisor, mask, divisor)
            if polled and ballot.counted:
                accumulate(poll, mask, abs(vote) if side is plus else -abs(vote))
                if not ballot.positive:
                    accumulate(size, mask, abs(vote))
            mask *= z
            if polled and not ballot.counted:
                accumulate(poll, mask, vote)
                if not ballot.positive:
                    accumulate(size, mask, vote if side is plus else -vote)
            if value != 1:
                mask *= value
            side.value += mask
    if not polled:
        poll, size = plus.value + minus.value, plus.value - minus.value
    size *= 0.0 if ballot.positive else _MARGIN
    majority = xp.greater_equal if ballot.positive else xp.greater
    majority(poll, size, out=up)
    xp.less(poll, xp.negative(size, out=size), out=down)
    result = xp.multiply(plus.mean(normalize, size), up, out=up)
    result += xp.multiply(minus.mean(normalize, size), down, out=down)
    return result


class _Side:
    """Sums over the entries of one sign, each (rows, columns)."""

    def __init__(self, X: Array) -> None:
        xp = namespace(X)
        self.value = xp.zeros_like(X[0])
        self.divisor = xp.zeros_like(X[0])

    def mean(self, normalize: bool, scratch: Array) -> Array:
        """The sum, over the divisor where that is not 0. Changes what is held."""
        if normalize:
            self.divisor += namespace(scratch).logical_not(self.divisor, out=scratch)
            self.value /= self.divisor
        return self.value
