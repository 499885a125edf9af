"""Which entries of an adapter remain: those above a limit, between two, or drawn at random.

Each gives parts (t, z, least) for `votes`, one adapter at a time; X (T, rows, columns) is not
changed. Where entries tie with a limit of `limits.py` they are at or above it: kept by a lower
limit, dropped by an upper one.

Random methods keep an entry if its 16 bits are below t = round(p·2¹⁶), at least 1, and divide by
t/2¹⁶, the exact probability, so that the mean over seeds is the entry itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adapterops.arrays import Array, host, like, namespace
from adapterops.rules.limits import share
from adapterops.rules.votes import Part, least

LEVELS = 1 << 16


def kept(density: float, total: int, convention: str) -> int:
    """How many of `total` entries a density keeps: the nearest number, but one at least.

    mergekit rounds down, to one at least; PEFT rounds down.
    """
    if density >= 1:
        return total
    if convention == "adapterops":
        return max(1, share(density, total))
    return max(int(density * total), 1 if convention == "mergekit" else 0)


def middle(density: float, gamma: float, total: int, convention: str) -> tuple[int, int]:
    """Ranks of the lower and upper limit: the largest γ go, then the smallest until the density.

    What is kept counts: where γ + density > 1, fewer of the largest go.
    """
    if convention == "mergekit":
        keep = total if density >= 1 else int(density * total)
        top = int(gamma * total)
    else:
        keep, top = kept(density, total, convention), share(gamma, total)
    top = min(top, total - keep)
    return keep + top, top


def whole(X: Array) -> Iterator[Part]:
    """All entries."""
    for t in range(len(X)):
        yield t, X[t], least(X)


def above(X: Array, at: Array) -> Iterator[Part]:
    """Entries of size at[t, 0] or more. z is X[t] itself: `least` says what counts."""
    for t in range(len(X)):
        yield t, X[t], least(X, float(at[t, 0]))


def trimmed(X: Array, at: Array) -> Iterator[Part]:
    """Entries of size at[t, 0] or more, with at (T, 2) also below at[t, 1]; the others zero."""
    xp = namespace(X)
    sizes, mask = xp.empty_like(X[0]), xp.empty_like(X[0])
    for t in range(len(X)):
        row = at[t]
        xp.abs(X[t], out=sizes)
        xp.greater_equal(sizes, float(row[0]), out=mask)
        if len(row) > 1:
            mask *= xp.less(sizes, float(row[1]), out=sizes)
        mask *= X[t]
        yield t, mask, least(X)


def dropped(X: Array, draws: Array, density: float, rescale: bool) -> Iterator[Part]:
    """Entries drawn with probability t/2¹⁶ ≈ density, over t/2¹⁶ if `rescale`.

    Yu et al. 2023, Language models are super Mario, Drop And REscale; density is what is kept,
    their p what is dropped.
    """
    level = min(LEVELS, max(1, round(density * LEVELS)))
    xp = namespace(X)
    z = xp.empty_like(X[0])
    for t in range(len(X)):
        z[...] = draws[t]
        xp.less(z, level, out=z)
        z *= X[t]
        if rescale and level < LEVELS:
            z *= LEVELS / level
        yield t, z, least(X)


def ranked(X: Array, draws: Array, density: float, epsilon: float, rescale: bool) -> Iterator[Part]:
    """Entries drawn with t/2¹⁶ ≈ p, which grows from density − ε for the smallest of its row to
    density + ε for the largest, each over its own t/2¹⁶ if `rescale`.

    Deep et al. 2024, DELLA-Merging, MAGPRUNE. Sizes that tie are ranked by column. In a row of one
    entry p = density.
    """
    xp = namespace(X)
    z = xp.empty_like(X[0])
    columns = X.shape[-1]
    step = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    first = density - epsilon if columns > 1 else density
    for t in range(len(X)):
        levels = _ranks(X[t]) * (step * LEVELS) + first * LEVELS
        levels = xp.clip(xp.round(levels), 1, LEVELS)
        z[...] = draws[t]
        z[...] = z < levels
        z *= X[t]
        if rescale:
            z *= _like(LEVELS / levels, z)
        yield t, z, least(X)


def _ranks(X: Array) -> Array:
    """Places 0 … n − 1 in the ascending order of |X| in each row, (rows, n) float64.

    float32 sizes and columns make one integer, which sorts several times faster than a stable sort.
    """
    sizes = np.abs(host(X))
    columns = np.arange(sizes.shape[-1])
    if sizes.dtype == np.float32:
        keys = sizes.view(np.int32).astype(np.int64) << 32 | columns
        keys.sort(axis=-1)
        order = keys & 0xFFFFFFFF
    else:
        order = np.argsort(sizes, axis=-1, kind="stable")
    places = np.empty(sizes.shape)
    np.put_along_axis(places, order, columns[None].astype(np.float64), -1)
    return like(places, X)


def _like(array: Array, other: Array) -> Array:
    """The array in the other's type."""
    cast = namespace(other).empty_like(other)
    cast[...] = array
    return cast
