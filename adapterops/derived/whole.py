"""What a method has to know of all modules of some adapters together, where that is its scope.

One pass over the modules for Gram methods; for limits as many as `rules.limits` takes, each module
being made again in every one: nothing of a module is kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterops.derived.rule import Known, Rule, beside_limits, coefficients
from adapterops.errors import AdapterOpsError
from adapterops.rules import limits, streamed
from adapterops.rules.registry import Limits

if TYPE_CHECKING:
    from adapterops.derived.combination import Combination

Matrix = np.ndarray[Any, Any]


class Whole:
    """The `Combination`s of all modules; what the method has to know of them is found once."""

    def __init__(self, rule: Rule, weights: Matrix) -> None:
        self._rule, self._weights = rule, weights
        self.modules: list[Combination] = []
        self._known: Known | None = None
        self._failed: AdapterOpsError | None = None
        self._lock = threading.RLock()

    @property
    def known(self) -> Known:
        """Coefficients of a Gram method, limits of an elementwise one. Raises what these raise."""
        with self._lock:
            if self._failed:
                raise self._failed
            if self._known is None:
                try:
                    self._known = self._found()
                except AdapterOpsError as error:
                    self._failed = error
                    raise
            return self._known

    def _found(self) -> Known:
        if self._rule.method.signature == "gram":
            return Known(shares=self._shares())
        return Known(limits=self._limits())

    @cached_property
    def peak(self) -> int:
        """Bytes that finding it needs at most."""
        count, bits = len(self._weights), 32 if self._rule.is_dense else 64
        total = sum(math.prod(made.shape) for made in self.modules)
        tables = limits.peak(count, total, bits, sampled=False) if self._rule.method.ranked else 0
        return max(made.alone for made in self.modules) + tables

    @property
    def near(self) -> int | None:
        """How many entries of all modules lie beside a limit, once these are known."""
        found = self._known.limits if self._known else None
        return None if found is None else beside_limits(found)

    def _shares(self) -> Matrix:
        G = sum(made.gram() for made in self.modules)
        return coefficients(self._rule, np.asarray(G), self._weights)

    def _limits(self) -> Limits:
        if self._rule.is_dense:
            total = sum(math.prod(made.shape) for made in self.modules)
        else:
            total = sum(block[0].size for block in self._blocks())
        rule, count = self._rule, len(self._weights)
        if not total:  # nobody has an entry anywhere
            return Limits(np.zeros((count, 1)), np.zeros((count, 1), np.int64))
        return streamed.find_limits(rule.method, self._blocks, total, self._weights, rule.arguments)

    def _blocks(self) -> Iterator[Matrix]:
        """Entries of all adapters (T, rows, columns): zeros of those without a vote."""
        for made in self.modules:
            own, blocks = made.entries()
            for block in blocks:
                everyone = np.zeros((len(self._weights), *block.shape[1:]), block.dtype)
                everyone[own] = block
                yield everyone
