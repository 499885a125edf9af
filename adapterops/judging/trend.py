"""Whether what is left of a merge follows the change: a scale error that no bound can see.

x = W' − RN(W + D) is regressed on D through the origin. Rounding errors of any tool are as often
for D as against it, so its slope is 0 to within its standard error; a change that was added 0.1 %
too strong has the slope 10⁻³, times how much of a change the format shows.

The standard error is the larger of two: each element by itself (White 1980), and rows and columns
as clusters (Cameron, Gelbach & Miller 2011, eq. 2.11, of residuals), for an error in a factor's
element is one in a whole row or column of D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

SLOPE = 1e-4  # a scale error below this is none
CERTAIN = 5.0  # standard errors
ENOUGH = 10_000  # changed codes that make a scale error visible
SAMPLED = 64  # every so many rows show how far codes are from changing
_LOW, _HIGH, _PER_OCTAVE = -16, 4, 2
BINS = (_HIGH - _LOW) * _PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Trend:
    """Sums over elements, that add up: Σx·D, Σx²D², ΣD², and Σx·D by row and by column.

    `rows` maps the first row of a block to its sums.
    """

    product: float = 0.0
    squares: float = 0.0
    delta: float = 0.0
    rows: tuple[tuple[int, Array], ...] = ()
    columns: Array | float = 0.0

    def __add__(self, other: Trend) -> Trend:
        return Trend(
            self.product + other.product,
            self.squares + other.squares,
            self.delta + other.delta,
            self.rows + other.rows,
            self.columns + other.columns,
        )

    @property
    def slope(self) -> float:
        """Σx·D / ΣD², 0 where D = 0."""
        return self.product / self.delta if self.delta else 0.0

    @property
    def error(self) -> float:
        """The standard error of the slope, elements taken to be independent."""
        return math.sqrt(self.squares) / self.delta if self.delta else 0.0

    def clustered(self, rows: Array, columns: Array) -> float:
        """The standard error with whole rows and columns as clusters too.

        `rows` and `columns` are ΣD² of each row and column of the matrix.
        """
        if not self.delta:
            return 0.0
        by_row = -self.slope * rows
        for start, sums in self.rows:
            by_row[start : start + len(sums)] += sums
        by_column = self.columns - self.slope * columns
        both = float(by_row @ by_row + by_column @ by_column) - self.squares
        return math.sqrt(max(both, self.squares)) / self.delta


def significant(slope: float, error: float) -> bool:
    """Whether a slope is a scale error: more than 10⁻⁴ and five standard errors."""
    return abs(slope) > SLOPE and abs(slope) > CERTAIN * error


def z_score(slope: float, error: float) -> float:
    """The slope in standard errors, 0 where nothing differs."""
    return slope / error if error else 0.0


def regress(
    x: torch.Tensor, D: torch.Tensor, wrong: torch.Tensor, start: int, delta: float
) -> Trend:
    """The sums of a block, rows from `start` on.

    x holds W' − RN(W + D) at the flat indices `wrong`, 0 elsewhere; `delta` is ΣD² of the block.
    """
    m, n = D.shape
    if not len(wrong):
        return Trend(delta=delta)
    products = x.double() * D.reshape(-1)[wrong].double()
    rows = torch.zeros(m, dtype=torch.float64).index_add_(0, wrong // n, products)
    columns = torch.zeros(n, dtype=torch.float64).index_add_(0, wrong % n, products)
    return Trend(
        float(products.sum()),
        float(products @ products),
        delta,
        ((start, rows.numpy()),),
        columns.numpy(),
    )


def margins(T: torch.Tensor, D: torch.Tensor, step: torch.Tensor) -> Array:
    """How many codes change if D grows by a factor 1 + x: counts by x, in bins of half an octave.

    T = W + D, D and the grid's spacing `step` at T, float64. A code changes where T passes the
    middle between two values of the grid.
    """
    moving = D != 0
    t = (T[moving] / step[moving]) * D[moving].sign()
    room = (t + 0.5).floor() + 0.5 - t
    x = (room * step[moving] / D[moving].abs()).clamp_(min=2.0**_LOW)
    bins = ((torch.log2(x) - _LOW) * _PER_OCTAVE).floor()
    bins = bins[bins < BINS].long()
    counts: Array = torch.bincount(bins, minlength=BINS).double().numpy()
    return counts


def detectable(counts: Array) -> float | None:
    """The smallest relative scale error that changes `ENOUGH` codes; None if none up to 16 does.

    Within a bin the number of changed codes grows in proportion to the error.
    """
    total: Array = np.cumsum(counts)
    if total[-1] < ENOUGH:
        return None
    at = int(np.searchsorted(total, ENOUGH))
    before = float(total[at - 1]) if at else 0.0
    low = 0.0 if at == 0 else 2.0 ** (_LOW + at / _PER_OCTAVE)
    high = 2.0 ** (_LOW + (at + 1) / _PER_OCTAVE)
    return float(low + (high - low) * (ENOUGH - before) / float(counts[at]))
