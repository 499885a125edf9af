"""Elementwise methods on matrices that are only seen as blocks of rows.

Limits first, each in as many passes as `limits.py` takes, then sums over all entries where the
method takes any, then the method block by block. Nothing of the size of a matrix is held. Blocks
have to be the same in every pass, bit for bit (one size of block, one number of threads), or what
lies at a limit may count on either side of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from adapterops.arrays import Array, host, like
from adapterops.rules.brackets import Blocks
from adapterops.rules.limits import limits
from adapterops.rules.registry import Limits, Method

# Rows [start, stop) of the random bits of every adapter, (T, stop − start, columns) uint16.
Draws = Callable[[int, int], np.ndarray[Any, Any]]


def find_limits(
    method: Method,
    blocks: Blocks,
    total: int,
    w: Array,
    values: Mapping[str, Any],
    draws: Draws | None = None,
    sample: Blocks | None = None,
) -> Limits:
    """What the method has to know of whole matrices of `total` entries.

    `blocks()` gives (T, rows, columns) from the first row to the last, `sample()` groups of entries
    that are together like the whole, if they are at hand; `values` are those of `Method.values`.
    Raises NumericsError for entries that are not finite.
    """
    ranked = method.ranked
    if ranked is None:
        return Limits(np.zeros((1, 0)), np.zeros((1, 0), np.int64))
    ranks, measure = ranked.ranks(total, **values), ranked.measure
    at, near = np.zeros((1, 0)), np.zeros((1, 0), np.int64)
    if ranks:

        def measured(given: Blocks) -> Blocks:
            return given if measure is None else lambda: (measure(X, w) for X in given())

        some = None if sample is None else measured(sample)
        selected = limits(measured(blocks), total, ranks, some)
        at, near = selected.values, selected.near
    return Limits(at, near, _totals(method, blocks, at, w, values, draws))


def merged(
    method: Method,
    blocks: Blocks,
    limits: Limits,
    w: Array,
    values: Mapping[str, Any],
    draws: Draws | None = None,
) -> Iterator[Array]:
    """The rows of the result, block by block, of the type of the blocks."""
    for X, bits in _with_bits(blocks, draws):
        yield method.function(X, w, limits, bits, **values)


def _totals(
    method: Method,
    blocks: Blocks,
    at: Array,
    w: Array,
    values: Mapping[str, Any],
    draws: Draws | None,
) -> Array | None:
    """Sums over all entries: of float64 sums of rows, exactly rounded, so that blocks of any size
    give the same.
    """
    if method.ranked is None or method.ranked.totals is None:
        return None
    rows = []
    for X, bits in _with_bits(blocks, draws):
        sums = method.ranked.totals(X, w, at, bits, **values)
        if sums is None:
            return None
        rows.append(host(sums))
    whole = np.concatenate(rows, axis=-1)
    return np.array([[math.fsum(entry) for entry in each] for each in whole])


def _with_bits(blocks: Blocks, draws: Draws | None) -> Iterator[tuple[Array, Array | None]]:
    start = 0
    for X in blocks():
        stop = start + X.shape[1]
        yield X, None if draws is None else like(draws(start, stop), X)
        start = stop
