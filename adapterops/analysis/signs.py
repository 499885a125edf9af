"""In how many entries adapters differ in sign, from a sample of entries.

Entries (i, j) are drawn with replacement by raw Philox bits, keyed by seed and module: i is
⌊m·x/2³²⌋ of 32 bits x, which is uniform to m/2³². An entry of ΔW = B·A is a product of a row and a
column, so nothing dense is formed. A module with no more entries than the sample is looked at
whole. Shares over several modules are ratios of estimated sums, Σ_l N_l·mean(c_l) /
Σ_l N_l·mean(v_l) with N_l entries in module l; their error is that of the linearised ratio (Cochran
1977, Sampling techniques, section 6.8, modules as strata).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from adapterops.analysis.report import Conflict
from adapterops.rules.draws import draws

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Signs:
    """Means over a module's sample of c, v, c² and v², (4, 2, P + 1).

    The second axis is the weight of an entry: 1, and its mass. v is that weight where at least two
    adapters change the entry, c where they differ in sign besides; P pairs, then all together.
    """

    total: int
    drawn: int
    means: Array

    @property
    def whole(self) -> bool:
        """Whether the sample is all entries there are."""
        return self.drawn == self.total


def entries(seed: int, module: str, shape: tuple[int, int], count: int) -> tuple[Array, Array]:
    """Rows and columns (s,) of the entries to look at: all of them, or `count` drawn."""
    m, n = shape
    if m * n <= count:
        rows, columns = np.divmod(np.arange(m * n), max(n, 1))
        return rows, columns
    bits = draws(seed, "entries", module, 0, count, 4).astype(np.uint64)
    low, high = (bits[:, k] | bits[:, k + 1] << np.uint64(16) for k in (0, 2))
    i, j = (x * np.uint64(size) >> np.uint64(32) for x, size in ((low, m), (high, n)))
    return i.astype(np.intp), j.astype(np.intp)


def signs(values: Array, weights: Array, total: int) -> Signs:
    """The means of a sample of `total` entries: `values` (T, s) of the adapters, weights (T,)."""
    scaled = values * weights[:, None]
    sizes, sides = np.abs(scaled), np.sign(scaled).astype(np.int8)
    pairs = list(combinations(range(len(values)), 2))
    means = np.zeros((4, 2, len(pairs) + 1))
    for k, (i, j) in enumerate(pairs):
        product = sides[i] * sides[j]
        means[:, :, k] = _means(product != 0, product < 0, sizes[i] + sizes[j])
    some = np.count_nonzero(sides, axis=0) > 1
    apart = sides.min(axis=0, initial=0) * sides.max(axis=0, initial=0) < 0
    means[:, :, -1] = _means(some, apart, sizes.sum(axis=0))
    return Signs(total, values.shape[1], means)


def _means(counted: Array, apart: Array, mass: Array) -> Array:
    if not len(counted):
        return np.zeros((4, 2))
    columns = []
    for weight in (np.ones(len(mass)), mass):
        v, c = weight * counted, weight * apart
        columns.append([c.mean(), v.mean(), (c * c).mean(), (v * v).mean()])
    return np.array(columns).T


def conflict(parts: Sequence[Signs], pair: int) -> Conflict | None:
    """The share over modules for a pair by number, -1 for all; None where nothing can differ."""
    figures = [_share(parts, kind, pair) for kind in (0, 1)]
    if figures[0] is None or figures[1] is None:
        return None
    drawn = sum(part.drawn for part in parts if part.means[1, 0, pair])
    return Conflict(*figures[0], *figures[1], drawn)


def _share(parts: Sequence[Signs], kind: int, pair: int) -> tuple[float, float] | None:
    """The ratio of the estimated sums and its standard error.

    An estimate of the variance from s entries cannot see what is rarer than 1/s: each module's
    share counts as uncertain by that much at least.
    """
    means = [[float(x) for x in part.means[:, kind, pair]] for part in parts]
    whole = math.fsum(part.total * v for part, (_, v, _, _) in zip(parts, means, strict=True))
    if whole <= 0.0:
        return None
    apart = math.fsum(part.total * c for part, (c, _, _, _) in zip(parts, means, strict=True))
    share, variance = apart / whole, 0.0
    for part, (c, v, c2, v2) in zip(parts, means, strict=True):
        if part.whole or part.drawn < 2:
            continue
        # e = c − share·v, and c·v = c², for c is v or 0.
        spread = max(c2 * (1 - 2 * share) + share**2 * v2 - (c - share * v) ** 2, 0.0)
        rare = (v / part.drawn) ** 2
        variance += part.total**2 * (spread / (part.drawn - 1) + rare)
    return share, math.sqrt(variance) / whole
