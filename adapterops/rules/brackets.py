"""Exact order statistics in one pass over blocks, where a sample says about where they lie.

The limit of a sample, give or take what the limits of its parts say of its error, is a bracket. One
pass counts what lies above the bracket and keeps what lies inside, of which the limit is a known
one. Where it is outside after all, or the bracket is wide, nothing is found, and the radix
selection of `limits.py` has to do it: the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from adapterops.arrays import Array, host

Matrix = np.ndarray[Any, Any]
Blocks = Callable[[], Iterator[Array]]

NEAR = 2.0**-20  # rounding in the products that make the entries may move what is so near a limit
_WIDER = 2.0**-10  # relative; what is within NEAR of a limit has to lie inside too
_SHARE = 32  # no more than one entry of so many is kept
_CACHED = 1 << 16  # entries looked at in one go


def peak(count: int, total: int, bits: int) -> int:
    """Bytes that `bracketed` needs at most, of a limit for each of so many matrices."""
    return count * (total // _SHARE) * (bits // 8) * 2


def bracketed(
    blocks: Blocks, sample: Blocks, total: int, ranks: Sequence[int]
) -> tuple[Matrix, Matrix] | None:
    """Limits (S, K) of the ranks, each within 1 … total − 1, and how many entries are near each.

    `sample()` gives groups of entries, (S, rows, columns) like blocks, together like the whole.
    None where that did not help, or where an entry is not finite.
    """
    low, high = _between(sample, total, ranks)
    found = [
        [_Inside(*ends) for ends in zip(*each, strict=True)] for each in zip(low, high, strict=True)
    ]
    room = len(low) * len(ranks) * (total // _SHARE)
    for block in blocks():
        for matrix, each in zip(host(block), found, strict=True):
            step = max(1, _CACHED // max(1, matrix.shape[1]))
            for start in range(0, len(matrix), step):
                sizes = np.abs(matrix[start : start + step])
                if not sizes.max(initial=0) < np.inf:
                    return None
                for one in each:
                    room -= one.take(sizes)
        if room < 0:
            return None
    chosen = [[one.limit(k) for one, k in zip(each, ranks, strict=True)] for each in found]
    if any(one is None for each in chosen for one in each):
        return None
    both = np.array(chosen, np.float64)
    return both[..., 0], both[..., 1].astype(np.int64)


def _between(sample: Blocks, total: int, ranks: Sequence[int]) -> tuple[Matrix, Matrix]:
    """The ends (S, K) of the brackets: one standard error of the mean over independent groups.

    Groups that together meet all rows and columns err by far less than independent ones.
    """
    groups = [np.abs(host(group)).reshape(len(group), -1) for group in sample()]
    shares = [k / total for k in ranks]
    each = np.array([_at(group, shares) for group in groups], np.float64)
    error = each.std(axis=0) / np.sqrt(len(each))
    whole = np.concatenate(groups, axis=1)
    middle = _within(whole, shares, each.min(axis=0), each.max(axis=0))
    low, high = (middle - error) * (1 - _WIDER), (middle + error) * (1 + _WIDER)
    return low.astype(whole.dtype), high.astype(whole.dtype)


def _within(sizes: Matrix, shares: Sequence[float], low: Matrix, high: Matrix) -> Matrix:
    """`_at` where that lies from `low` to `high` (S, K), mostly from the few entries between."""
    found = np.empty(low.shape)
    for (s, at), least in np.ndenumerate(low):
        row = sizes[s]
        some = row[(row >= least) & (row <= high[s, at])]
        whole = _place(len(row), shares[at])
        place = whole - int(np.count_nonzero(row < least))
        if not 0 <= place < len(some):  # groups of unequal size, or entries that are not finite
            some, place = row, whole
        found[s, at] = np.partition(some, place)[place]
    return found


def _at(sizes: Matrix, shares: Sequence[float]) -> Matrix:
    """What these shares of the entries (S, n) lie above, (S, K)."""
    places = [_place(sizes.shape[1], share) for share in shares]
    return np.asarray(np.partition(sizes, places, axis=1)[:, places])


def _place(count: int, share: float) -> int:
    """Where, ascending, the smallest of a share of so many entries is."""
    return min(count - 1, max(0, count - round(share * count)))


class _Inside:
    """The entries of one matrix from `low` to below `high`, and how many are no smaller."""

    def __init__(self, low: Any, high: Any) -> None:
        self._low, self._high = low, high
        self._above = 0
        self._kept: list[Matrix] = []

    def take(self, sizes: Matrix) -> int:
        """Look at some entries; how many of them were kept."""
        above = sizes >= self._high
        inside = sizes >= self._low
        inside ^= above
        self._above += int(np.count_nonzero(above))
        self._kept.append(sizes.reshape(-1)[np.flatnonzero(inside)])
        return len(self._kept[-1])

    def limit(self, k: int) -> tuple[float, int] | None:
        """The k-th largest of all, and how many are within NEAR of it; None if not inside."""
        kept = np.concatenate(self._kept)
        place = len(kept) - (k - self._above)
        if not 0 <= place < len(kept):
            return None
        value = float(np.partition(kept, place)[place])
        if value * (1 - NEAR) < self._low or value * (1 + NEAR) >= self._high:
            return None
        return value, int((np.abs(kept.astype(np.float64) - value) <= NEAR * value).sum())
