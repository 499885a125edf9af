"""Dense changes that adapters hold: full deltas, and what a LoRA adds to a bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.changes.pieces import Piece
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref, Site
from adapterops.rebased.dora import stored

Block = np.ndarray[Any, Any]


class FullDelta:
    """A dense change in a file (`.diff`), read by rows, of a piece of a stored matrix."""

    def __init__(self, ref: Ref, piece: Piece) -> None:
        rows = math.prod(ref.shape[:1]) if len(ref.shape) > 1 else 1
        self._ref = replace(ref, shape=(rows, math.prod(ref.shape) // max(1, rows)))
        self._piece = piece

    def rows(self, start: int, stop: int) -> Block:
        """Rows [start, stop) of the stored matrix in float64, 0 where the delta has none.

        Raises NumericsError, naming the tensor, for NaN or infinities.
        """
        values = np.zeros((stop - start, self._piece.matrix[1]))
        first = self._piece.rows.start
        low, high = max(start, first), min(stop, self._piece.rows.stop)
        if low < high:
            part = stored(self._ref, low - first, high - first)
            wrong = casts.count_nonfinite(part)
            if wrong:
                raise NumericsError(
                    f"values of {self._ref.name} are NaN or infinite: {wrong} of {part.size} here",
                    path=self._ref.source.path,
                    hint="the file is damaged or the training diverged; --modules leaves it out",
                )
            values[low - start : high - start, self._piece.columns] = part
        return values


class BiasShift:
    """What a module adds to a bias, a row of `width` numbers.

    `places` are numbers of the bias and the module's outputs that belong there, None for all.
    """

    def __init__(
        self, site: Site, places: Sequence[tuple[slice, slice | None]], width: int
    ) -> None:
        self._site = site
        self._places = tuple(places)
        self._width = width

    def rows(self, start: int, stop: int) -> Block:
        """The row in float64, the scale left out."""
        values = np.zeros((1, self._width))
        bias = np.asarray(self._site.bias())
        for columns, outputs in self._places:
            values[0, columns] = bias[outputs or slice(None)]
        return values[start:stop]
