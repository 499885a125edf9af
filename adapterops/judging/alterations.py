"""Ways to get a change wrong, as alterations of its stacked factors (left, c, right) of a band."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapterops.baking.bands import Band
from adapterops.judging.measure import Alter, Array

_Parts = tuple[Array, Array, Array]


def scaled(factor: float) -> Alter:
    """factor · D."""
    return lambda band, left, c, right: (left, factor * c, right)


def weighted(factors: Mapping[int, float]) -> Alter:
    """Σ factorᵢ · Dᵢ over the inputs."""

    def alter(band: Band, left: Array, c: Array, right: Array) -> _Parts:
        each = [np.full(term.site.rank, factors[term.input]) for term in band.terms]
        return left, c * np.concatenate([*each, np.zeros(0)]), right

    return alter


def transposed() -> Alter:
    """Dᵀ, of a square matrix in one band."""
    return lambda band, left, c, right: (right.T, c, left.T)


def directions(kept: Array) -> Alter:
    """Some columns of the stacked factors only: `kept` is a mask over them."""
    return lambda band, left, c, right: (left, np.where(kept, c, 0.0), right)


def without_lines(missing: Array, axis: int) -> Alter:
    """D without the rows (axis 0) or columns (1) of the matrix where `missing` is true."""

    def alter(band: Band, left: Array, c: Array, right: Array) -> _Parts:
        if axis == 0:
            return np.where(missing[band.start : band.stop, None], 0.0, left), c, right
        return left, c, np.where(missing[None, :], 0.0, right)

    return alter
