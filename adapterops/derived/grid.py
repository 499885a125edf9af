"""Matrices that a rule makes, by their rows, a few at a time, nothing held.

Rows are computed in float32 on one grid of blocks, whatever range is asked for: a GEMM's last bits
depend on its shape, and an entry at a limit must fall on the same side every time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterops.errors import NumericsError
from adapterops.factors import Factors
from adapterops.formats.kinds import split
from adapterops.rules import modify

if TYPE_CHECKING:
    from adapterops.derived.combination import Combination

Block = np.ndarray[Any, Any]
BLOCK_ROWS = 16


class OnGrid(ABC):
    """A `Combination` as an `operators.Operator`.

    `sides` are what of its sources counts, with their `weights`; `beta` is Σ|wᵢ|βᵢ of these.
    """

    transposed = False

    def __init__(
        self, made: Combination, sides: Sequence[Factors | OnGrid], weights: Block, beta: float
    ) -> None:
        self.made, self.sides, self.weights = made, sides, weights
        self.shape = made.shape
        self._beta = beta
        self._last: tuple[int, Block] | None = None

    @abstractmethod
    def _raw(self, start: int) -> Block:
        """The block that begins at this row of the grid, in float32, before --match-norm."""

    def single(self, start: int, stop: int) -> Block:
        """Rows [start, stop) in float32: what the rule is, exactly."""
        if start == stop:
            return np.zeros((0, self.shape[1]), np.float32)
        first = start - start % BLOCK_ROWS
        rows = np.concatenate([self._kept(at) for at in range(first, stop, BLOCK_ROWS)])
        rows = rows[start - first : stop - first]
        factor = self._factor
        if factor != 1.0:
            rows *= np.float32(factor)
        return rows

    def rows(self, start: int, stop: int) -> Block:
        """The same in float64."""
        return self.single(start, stop).astype(np.float64)

    def noise(self, start: int, stop: int) -> float:
        """0: it was rounded to no format."""
        return 0.0

    def beta(self, norm: float) -> float:
        """Σ|wᵢ|βᵢ of what it is made from, or the norm where rescaling made it larger."""
        return max(self._beta, norm)

    def check(self) -> None:
        """Raise the NumericsError of entries that are not finite, for its sources are."""
        raise NumericsError(
            "its entries are too large for float32",
            module=self.made.stem,
            hint="is an alpha or a weight wrong?",
        )

    def norm(self) -> float:
        """‖·‖_F, from all rows."""
        starts = range(0, self.shape[0], BLOCK_ROWS)
        return _norm(self.single(i, min(i + BLOCK_ROWS, self.shape[0])) for i in starts)

    def any(self) -> bool:
        """Whether some entry is not 0; the first block mostly tells."""
        return any(self._raw(i).any() for i in range(0, self.shape[0], BLOCK_ROWS))

    def factors(self) -> Factors:
        """The matrix and an identity, in float64."""
        return Factors(*split(self.rows(0, self.shape[0])))

    @property
    def _factor(self) -> float:
        """What --match-norm multiplies the result by; found once."""
        to = self.made.rule.match_norm
        if to is None:
            return 1.0

        def find() -> float:
            size = _norm(self._raw(start) for start in range(0, self.shape[0], BLOCK_ROWS))
            norms = np.array([side.norm() for side in self.sides])
            return modify.norm_factor(size, norms, self.weights, to)

        return self.made.once("factor", find)

    def _kept(self, start: int) -> Block:
        """`_raw`, kept until another block is asked for: ranges seldom end where the grid's do."""
        last = self._last  # threads may share the operator: each looks at one pair
        if last is None or last[0] != start:
            last = self._last = (start, self._raw(start))
        return last[1]


def voting(sides: Sequence[Factors | OnGrid], weights: Block) -> list[int]:
    """Indices of those that have a say in an elementwise rule: neither weight nor norm is 0."""
    return [i for i, side in enumerate(sides) if weights[i] != 0 and not _is_zero(side)]


def _is_zero(side: Factors | OnGrid) -> bool:
    return not side.any() if isinstance(side, OnGrid) else not side.rank or side.norm() == 0


def _norm(blocks: Iterator[Block]) -> float:
    return math.sqrt(math.fsum(float(np.square(x, dtype=np.float64).sum()) for x in blocks))
