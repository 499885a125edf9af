"""An elementwise rule over dense ΔWs as an operator: its rows, a few at a time, nothing held.

Rows are computed in float32 on one grid of blocks, whatever range is asked for: a GEMM's last bits
depend on its shape, and an entry at a limit must fall on the same side every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterops.derived.rule import bits, calibrated, counted
from adapterops.errors import NumericsError
from adapterops.geometry import beta
from adapterops.rules import modify, streamed
from adapterops.rules.registry import Limits

if TYPE_CHECKING:
    from adapterops.derived.combination import Combination

Block = np.ndarray[Any, Any]
BLOCK_ROWS = 64
_GROUPS = 32
_LEAST_SAMPLED = 16 * _GROUPS
_MOST = 2.0**63  # of an entry: methods square it in float32


class Elementwise:
    """The matrix that a rule makes of others, entry by entry: an `operators.Operator`."""

    transposed = False

    def __init__(self, made: Combination) -> None:
        self._made, self._rule = made, made.rule
        self.shape = made.shape
        members, weights, labels, _ = counted(
            made.members(), made.weights, made.labels, np.zeros(len(made.sources))
        )
        self._weights = weights
        self._norms = np.array([one.norm() for one in members])
        if self._rule.calibrate == "pico" and members:
            members = calibrated(members, weights)
        sizes = [beta(one) for one in members]
        self._beta = float(np.abs(weights) @ np.array(sizes))
        if any(_largest(one.B, one.A) > _MOST for one in members):
            self.check()
        scales = [_evened(one.B, one.A) for one in members]
        self._left = [
            (one.B * scale).astype(np.float32) for one, scale in zip(members, scales, strict=True)
        ]
        self._right = [
            np.ascontiguousarray((one.A / scale[:, None]).astype(np.float32))
            for one, scale in zip(members, scales, strict=True)
        ]
        self._last: tuple[int, Block] | None = None
        self._bits = None
        if "seed" in self._rule.method.needs:
            self._bits = partial(bits, self._rule.seed, tuple(labels), made.stem, self.shape[1])

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
        """Raise NumericsError where it is not finite, for its sources are."""
        raise NumericsError(
            "its entries are too large for float32",
            module=self._made.stem,
            hint="is an alpha or a weight wrong?",
        )

    @property
    def limits(self) -> Limits:
        """The order statistics that the rule needs, of all entries; found once."""
        with self._made.lock:
            if "limits" not in self._made.known:
                self._made.known["limits"] = streamed.find_limits(
                    self._rule.method,
                    self._blocks,
                    math.prod(self.shape),
                    self._weights,
                    dict(self._rule.values),
                    self._bits,
                    self._sample if min(self.shape) >= _LEAST_SAMPLED else None,
                )
            found = self._made.known["limits"]
        assert isinstance(found, Limits)
        return found

    @property
    def _factor(self) -> float:
        """What --match-norm multiplies the result by; found once."""
        to = self._rule.match_norm
        if to is None:
            return 1.0
        with self._made.lock:
            if "factor" not in self._made.known:
                blocks = (self._raw(start) for start in range(0, self.shape[0], BLOCK_ROWS))
                squares = math.fsum(float(np.square(x, dtype=np.float64).sum()) for x in blocks)
                self._made.known["factor"] = modify.norm_factor(
                    math.sqrt(squares), self._norms, self._weights, to
                )
            found = self._made.known["factor"]
        assert isinstance(found, float)
        return found

    def _block(self, start: int) -> Block:
        """(T, rows, columns) of the block of the grid that begins at a row."""
        stop = min(start + BLOCK_ROWS, self.shape[0])
        X = np.empty((len(self._left), stop - start, self.shape[1]), np.float32)
        for t, (left, right) in enumerate(zip(self._left, self._right, strict=True)):
            np.matmul(left[start:stop], right, out=X[t])
        return X

    def _blocks(self) -> Iterator[Block]:
        return (self._block(start) for start in range(0, self.shape[0], BLOCK_ROWS))

    def _kept(self, start: int) -> Block:
        """`_raw`, kept until another block is asked for: ranges seldom end where the grid's do."""
        last = self._last  # threads may share the operator: each looks at one pair
        if last is None or last[0] != start:
            last = self._last = (start, self._raw(start))
        return last[1]

    def _sample(self) -> Iterator[Block]:
        """Groups of entries (T, rows, columns), drawn by the shape, that together meet every row
        and column once. Their last bits may differ from those of the blocks.
        """
        drawn = np.random.Generator(np.random.Philox(key=math.prod(self.shape)))
        rows, columns = (drawn.permutation(size) for size in self.shape)
        for g in range(_GROUPS):
            i, j = rows[g::_GROUPS], columns[g::_GROUPS]
            pairs = zip(self._left, self._right, strict=True)
            yield np.stack([B[i] @ A[:, j] for B, A in pairs])

    def _raw(self, start: int) -> Block:
        """The block of the result that begins at this row of the grid, before --match-norm."""
        if not self._left:
            return np.zeros((min(BLOCK_ROWS, self.shape[0] - start), self.shape[1]), np.float32)
        X = self._block(start)
        drawn = self._bits(start, start + X.shape[1]) if self._bits else None
        found: Block = self._rule.method.function(
            X, self._weights, self.limits, drawn, **dict(self._rule.values)
        )
        return found


def _largest(B: Block, A: Block) -> float:
    """A bound of the entries of B·A."""
    return float(np.abs(B).max(axis=0, initial=0.0) @ np.abs(A).max(axis=1, initial=0.0))


def _evened(B: Block, A: Block) -> Block:
    """Powers of two that make columns of B and rows of A alike, so that both fit float32."""
    sizes = np.abs(B).max(axis=0, initial=0.0), np.abs(A).max(axis=1, initial=0.0)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    shift = np.zeros(len(both), np.int64)
    shift[both] = np.rint((np.log2(sizes[1][both]) - np.log2(sizes[0][both])) / 2)
    return np.ldexp(1.0, shift)
