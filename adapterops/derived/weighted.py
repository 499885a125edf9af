"""A Gram method's Σ cᵢDᵢ where some Dᵢ is itself known by its rows alone: streamed like those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adapterops.derived.grid import BLOCK_ROWS, OnGrid
from adapterops.derived.rule import coefficients
from adapterops.geometry import beta

if TYPE_CHECKING:
    from adapterops.derived.combination import Combination

Block = np.ndarray[Any, Any]


class Weighted(OnGrid):
    """Σ cᵢDᵢ by rows, added up in float64 and rounded to float32 once."""

    def __init__(self, made: Combination) -> None:
        sides = made.sides()
        sizes = [side.beta(0.0) if isinstance(side, OnGrid) else beta(side) for side in sides]
        super().__init__(made, sides, made.weights, float(np.abs(made.weights) @ np.array(sizes)))

    @property
    def shares(self) -> Block:
        """(T,) the cᵢ, found once."""

        def find() -> Block:
            rule = self.made.rule
            G = self.gram() if rule.method.measures else None
            return coefficients(rule, G, self.weights)

        known = self.made.whole.known if self.made.whole else None
        if known and known.shares is not None:
            return known.shares
        return self.made.once("shares", find)

    def gram(self) -> Block:
        """(T, T) inner products, by rows in float64."""
        G = np.zeros((len(self.sides), len(self.sides)))
        for start in range(0, self.shape[0], BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.shape[0])
            flat = np.stack([np.ravel(side.rows(start, stop)) for side in self.sides])
            with np.errstate(over="ignore", invalid="ignore"):
                G += flat @ flat.T
        for side, size in zip(self.sides, np.diagonal(G), strict=True):
            if not np.isfinite(size):
                (side if isinstance(side, OnGrid) else self).check()
        return G

    def _raw(self, start: int) -> Block:
        stop = min(start + BLOCK_ROWS, self.shape[0])
        total = np.zeros((stop - start, self.shape[1]))
        for share, side in zip(self.shares.tolist(), self.sides, strict=True):
            if share:
                total += share * side.rows(start, stop)
        with np.errstate(over="ignore"):  # infinities are found, and named, later
            return total.astype(np.float32)
