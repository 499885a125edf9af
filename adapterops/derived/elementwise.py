"""An elementwise rule over dense ΔWs, by rows: each a product of factors, or known by its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from adapterops.derived.grid import BLOCK_ROWS, OnGrid, voting
from adapterops.derived.rule import Rule, bits, damped
from adapterops.factors import Factors
from adapterops.geometry import beta
from adapterops.rules import streamed
from adapterops.rules.registry import Limits

if TYPE_CHECKING:
    from adapterops.derived.combination import Combination

Block = np.ndarray[Any, Any]
_TILE_COLUMNS = 2048  # blocks of eight adapters, and what a product packs, stay in a cache
_GROUPS = 32
LEAST_SAMPLED = 16 * _GROUPS
_MOST = 2.0**63  # of an entry: methods square it in float32


class Elementwise(OnGrid):
    """The matrix that a rule makes of others, entry by entry."""

    def __init__(self, made: Combination) -> None:
        rule = made.rule
        everyone = made.sides()
        self.own = voting(everyone, made.weights)
        sides, weights = [everyone[i] for i in self.own], made.weights[self.own]
        self._rows = [_rows(side) for side in _damped(rule, sides, weights)]
        sizes = np.array([one.beta for one in self._rows])
        super().__init__(made, sides, weights, float(np.abs(weights) @ sizes))
        if any(isinstance(one, _Product) and one.largest > _MOST for one in self._rows):
            self.check()
        labels = tuple(made.labels[i] for i in self.own)
        self._bits = None
        if "seed" in rule.method.needs:
            self._bits = partial(bits, rule.seed, labels, made.stem, self.shape[1])

    @property
    def limits(self) -> Limits:
        """The order statistics that the rule needs, of all entries; found once."""

        def find() -> Limits:
            rule = self.made.rule
            return streamed.find_limits(
                rule.method,
                self.blocks,
                math.prod(self.shape),
                self.weights,
                rule.arguments,
                self._bits,
                self._sample if self._is_sampled else None,
            )

        whole = self.made.whole
        return whole.known.of(self.own) if whole else self.made.once("limits", find)

    def blocks(self) -> Iterator[Block]:
        """(T, rows, columns) of those with a vote, from the first row to the last."""
        return (self._block(start) for start in range(0, self.shape[0], BLOCK_ROWS))

    @property
    def _is_sampled(self) -> bool:
        """Whether single entries are at hand, and enough of them."""
        return min(self.shape) >= LEAST_SAMPLED and all(
            isinstance(one, _Product) for one in self._rows
        )

    def _block(self, start: int) -> Block:
        """The block of the grid that begins at a row."""
        stop = min(start + BLOCK_ROWS, self.shape[0])
        X = np.empty((len(self._rows), stop - start, self.shape[1]), np.float32)
        for out, one in zip(X, self._rows, strict=True):
            one.into(out, start, stop)
        return X

    def _sample(self) -> Iterator[Block]:
        """Groups of entries (T, rows, columns), drawn by the shape, that together meet every row
        and column once. Their last bits may differ from those of the blocks.
        """
        drawn = np.random.Generator(np.random.Philox(key=math.prod(self.shape)))
        rows, columns = (drawn.permutation(size) for size in self.shape)
        for g in range(_GROUPS):
            i, j = rows[g::_GROUPS], columns[g::_GROUPS]
            pairs = (one for one in self._rows if isinstance(one, _Product))  # all, where sampled
            yield np.stack([one.left[i] @ one.right[:, j] for one in pairs])

    def _raw(self, start: int) -> Block:
        if not self._rows:
            return np.zeros((min(BLOCK_ROWS, self.shape[0] - start), self.shape[1]), np.float32)
        X = self._block(start)
        drawn = self._bits(start, start + X.shape[1]) if self._bits else None
        rule = self.made.rule
        found: Block = rule.method.function(X, self.weights, self.limits, drawn, **rule.arguments)
        return found


class _Rows(Protocol):
    """What gives the rows of an adapter in float32; `beta` is its β."""

    beta: float

    def into(self, out: Block, start: int, stop: int) -> None:
        """Write rows [start, stop)."""


class _Product:
    """Rows of B·A."""

    def __init__(self, factors: Factors) -> None:
        B, A = factors.B, factors.A
        sizes = np.abs(B).max(axis=0, initial=0.0), np.abs(A).max(axis=1, initial=0.0)
        self.beta = beta(factors)
        self.largest = float(sizes[0] @ sizes[1])  # a bound of the entries
        scale = _evened(*sizes)
        self.left = (B * scale).astype(np.float32)
        self.right = np.ascontiguousarray((A / scale[:, None]).astype(np.float32))

    def into(self, out: Block, start: int, stop: int) -> None:
        for at in range(0, out.shape[1], _TILE_COLUMNS):
            tile = slice(at, at + _TILE_COLUMNS)
            np.matmul(self.left[start:stop], self.right[:, tile], out=out[:, tile])


class _Read:
    """Rows of what is itself made by rows."""

    def __init__(self, operator: OnGrid) -> None:
        self._operator = operator
        self.beta = operator.beta(0.0)

    def into(self, out: Block, start: int, stop: int) -> None:
        out[...] = self._operator.single(start, stop)
        if not np.abs(out).max() <= _MOST:
            self._operator.check()


def _damped(
    rule: Rule, sides: Sequence[Factors | OnGrid], weights: Block
) -> Sequence[Factors | OnGrid]:
    """What --calibrate leaves of each: it takes factors."""
    if rule.calibrate != "pico" or not sides:
        return sides
    return damped(rule, [x.factors() if isinstance(x, OnGrid) else x for x in sides], weights)


def _rows(side: Factors | OnGrid) -> _Rows:
    return _Read(side) if isinstance(side, OnGrid) else _Product(side)


def _evened(left: Block, right: Block) -> Block:
    """Powers of two that make columns of B and rows of A alike, so that both fit float32."""
    both = (left > 0) & (right > 0)
    shift = np.zeros(len(both), np.int64)
    shift[both] = np.rint((np.log2(right[both]) - np.log2(left[both])) / 2)
    return np.ldexp(1.0, shift)
