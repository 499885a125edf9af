"""What a merge method makes of several adapters' entries, as rows of a stored tensor."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from adapterops.changes.pieces import Piece
from adapterops.formats.model import Site
from adapterops.operators import KINDS

Block = np.ndarray[Any, Any]


class Ruled:
    """ΔW of a site that is known by its rows, as the part of a stored matrix that a piece is.

    Where the matrix is stored as (in, out) it is made whole, in float32, for rows of it are columns
    of ΔW.
    """

    def __init__(self, site: Site, piece: Piece) -> None:
        self._site, self._piece = site, piece
        self._operator = KINDS[site.kind](site)

    def rows(self, start: int, stop: int) -> Block:
        """Rows [start, stop) of the stored matrix in float64, 0 where the piece has none."""
        piece = self._piece
        values = np.zeros((stop - start, piece.matrix[1]))
        mine = range(piece.matrix[0])[piece.rows]
        first, last = (
            min(max(0, -(-(edge - mine.start) // mine.step)), len(mine)) for edge in (start, stop)
        )
        if first < last:
            place = slice(mine[first] - start, mine[last - 1] - start + 1, mine.step)
            values[place, piece.columns] = self._part(first, last)
        return values

    def _part(self, first: int, last: int) -> Block:
        """Rows first … last of the piece, of those of ΔW (turned: of its transpose) that it is."""
        piece, (m, n) = self._piece, self._site.shape
        outputs, inputs = (
            range(m)[piece.outputs or slice(None)],
            range(n)[piece.inputs or slice(None)],
        )
        if piece.turned:
            return self._whole[np.ix_(outputs, inputs[first:last])].T.astype(np.float64)
        rows = outputs[first:last]
        block = self._operator.rows(rows[0], rows[-1] + 1)
        return np.asarray(block[:: rows.step][:, list(inputs)])

    @cached_property
    def _whole(self) -> Block:
        return self._operator.single(0, self._site.shape[0])


def peak(site: Site, piece: Piece) -> int:
    """Bytes that `Ruled` holds at most."""
    return (site.made.peak if site.made else 0) + 4 * math.prod(site.shape) * piece.turned
