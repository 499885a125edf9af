"""Which groups one average might serve where no original serves both, estimated from sketches.

Of n adapters equally far from each other the middle is √((n−1)/2n) of that distance from each: two
groups whose originals are up to twice the bound apart may still have an average within it. The
estimate leaves out what cutting the average to a rank loses; files decide.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from adapterops.fleet.grouping.enclosing import approaching
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.types import Array

_LARGEST = 128  # of adapters whose best average is sought; of more it is the plain one


@dataclass(frozen=True, slots=True)
class Middle:
    """What an average of some adapters gives each: `share` is the largest error over its bound,

    that of the best of them, or of the plain one if it is within all bounds.

    `center` is the one among those averaged whose own largest share is smallest.
    """

    share: float
    center: int


def middle(vectors: Vectors, bounds: Array, rows: Sequence[int], able: Array) -> Middle | None:
    """The best average of the `rows` that are `able` (k,) bool, for all `rows`.

    `bounds` (N,) are the largest errors of all N adapters, relative to each one's own. None where
    fewer than two are able, or no average is within all bounds.
    """
    place = np.asarray(rows)
    if np.count_nonzero(able) < 2:
        return None
    norms = vectors.norms[place]
    limits = bounds[place] * norms
    if not (limits > 0).all():
        return None
    scaled = vectors.sketches[place].astype(np.float64) * norms[:, None]
    own = np.einsum("nd,nd->n", scaled, scaled)
    squares = np.maximum(own[:, None] + own - 2 * (scaled @ scaled.T), 0.0)
    np.fill_diagonal(squares, 0.0)
    if (squares > (limits[:, None] + limits) ** 2).any():
        return None
    # In units of each one's bound, so that the largest share is what becomes smallest.
    scales = np.where(able, limits**-2.0, 0.0)
    share, least = _share(squares, limits, scales)
    if least > 1:
        return None
    if share > 1 and np.count_nonzero(able) <= _LARGEST:
        own = np.ix_(able, able)
        for weights in approaching(squares[own], limits[able]):
            fine = scales.copy()
            fine[able] *= weights
            share, least = _share(squares, limits, fine)
            if share <= 1 or least > 1:
                break
    if share > 1:
        return None
    alone = np.where(able, (np.sqrt(squares) / limits[:, None]).max(0), math.inf)
    return Middle(share, int(place[int(alone.argmin())]))


def _share(squares: Array, limits: Array, weights: Array) -> tuple[float, float]:
    """The largest share of a bound by the mean with these weights, and what no adapter is below.

    With weights λᵢ/εᵢ² the mean minimises Σλᵢ·(‖Dᵢ − X‖/εᵢ)², whose root over Σλ = 1 is at most the
    largest ‖Dᵢ − X‖/εᵢ of any X.
    """
    total = weights.sum()
    apart = squares @ (weights / total)
    own = 0.5 * float(weights @ apart) / total
    errors = np.maximum(apart - own, 0.0) / limits**2
    lower = own * total / float(np.sum(weights * limits**2))
    return math.sqrt(float(errors.max())), math.sqrt(lower)


@dataclass(frozen=True, slots=True)
class Union:
    """Groups, by their places, that one average may serve: all their members, ascending."""

    parts: tuple[int, ...]
    rows: tuple[int, ...]
    middle: Middle


def unions(
    groups: Mapping[int, Sequence[int]],
    near: Sequence[Collection[int]],
    estimate: Callable[[tuple[int, ...]], Middle | None],
    ceilings: Sequence[float],
) -> list[Union]:
    """Groups put together pair by pair, the pair with the smallest share first, while they may be.

    `groups` are members by place, `near` whom each place may be put together with, `ceilings` the
    largest share that each allows. Equal shares go to the smaller places.
    """
    live = {place: Union((place,), tuple(rows), Middle(0.0, -1)) for place, rows in groups.items()}
    around = {place: {other for other in near[place] if other in live} for place in live}
    limits = {place: ceilings[place] for place in live}
    numbers = count(len(near))
    heap: list[tuple[float, int, int, Union]] = []

    def push(one: int, other: int) -> None:
        rows = tuple(sorted({*live[one].rows, *live[other].rows}))
        best = estimate(rows)
        if best is not None and best.share <= min(limits[one], limits[other]):
            parts = tuple(sorted(live[one].parts + live[other].parts))
            heapq.heappush(heap, (best.share, one, other, Union(parts, rows, best)))

    for one in sorted(live):
        for other in sorted(around[one]):
            if one < other:
                push(one, other)
    while heap:
        _, one, other, both = heapq.heappop(heap)
        if one not in live or other not in live:
            continue
        new = next(numbers)
        del live[one], live[other]
        live[new] = both
        limits[new] = min(limits[one], limits[other])
        around[new] = {place for place in around[one] | around[other] if place in live}
        for place in sorted(around[new]):
            around[place].add(new)
            push(place, new)
    return sorted((one for one in live.values() if len(one.parts) > 1), key=lambda one: one.parts)


def neighbours(near: Candidates) -> list[set[int]]:
    """For each node of a graph the others that have an edge with it, in either direction."""
    found: list[set[int]] = [set() for _ in range(near.count)]
    for one, other in zip(near.centers().tolist(), near.members.tolist(), strict=True):
        if one != other:
            found[one].add(other)
            found[other].add(one)
    return found
