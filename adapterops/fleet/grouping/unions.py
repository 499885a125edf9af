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
_NEAREST = 16  # others that each is tried with: all of a loose crowd would be its square


@dataclass(frozen=True, slots=True)
class Middle:
    """What an average of some adapters gives each of them.

    `share` is the largest error over its bound: by the plain average if that is within all bounds,
    else by the best. `center` is the one among those averaged, the nearest to the average where
    they are many, whose own largest share is smallest.
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
    points = vectors.sketches[place].astype(np.float64) * norms[:, None]
    own = np.flatnonzero(able)
    # In units of each one's bound, so that the largest share is what becomes smallest.
    scales = np.where(able, limits**-2.0, 0.0)
    apart, least = _apart(points, limits, scales)
    if (apart > limits).any() and least <= 1 and len(own) <= _LARGEST:
        squares = _squares(points[own], points[own])
        if (squares > np.add.outer(limits[own], limits[own]) ** 2).any():
            return None
        for weights in approaching(squares, limits[own]):
            fine = scales.copy()
            fine[own] *= weights
            apart, least = _apart(points, limits, fine)
            if (apart <= limits).all() or least > 1:
                break
    if (apart > limits).any():
        return None
    few = np.sort(own[np.argsort(apart[own], kind="stable")[:_LARGEST]])
    alone = (np.sqrt(_squares(points, points[few])) / limits[:, None]).max(0)
    return Middle(float((apart / limits).max()), int(place[few[alone.argmin()]]))


def _squares(some: Array, others: Array) -> Array:
    """‖xᵢ − yⱼ‖² of rows."""
    one, two = (np.einsum("nd,nd->n", rows, rows) for rows in (some, others))
    return np.asarray(np.maximum(one[:, None] + two - 2 * (some @ others.T), 0.0))


def _apart(points: Array, limits: Array, weights: Array) -> tuple[Array, float]:
    """How far the mean with these weights is from each, and what no largest share is below.

    With weights λᵢ/εᵢ² the mean minimises Σλᵢ·(‖Dᵢ − X‖/εᵢ)², whose root over Σλ = 1 is at most the
    largest ‖Dᵢ − X‖/εᵢ of any X.
    """
    away = points - (weights @ points) / weights.sum()
    squares = np.einsum("nd,nd->n", away, away)
    lower = float(weights @ squares) / float(np.sum(weights * limits**2))
    return np.sqrt(squares), math.sqrt(lower)


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
    together: Callable[[tuple[int, ...], tuple[int, ...]], bool] = lambda some, others: True,
) -> list[Union]:
    """Groups put together pair by pair, the pair with the smallest share first, while they may be.

    `groups` are members by place, `near` whom each place may be put together with, `ceilings` the
    largest share that each allows. `together` says whether some places may come together with
    others. Equal shares go to the smaller places.
    """
    live = {place: Union((place,), tuple(rows), Middle(0.0, -1)) for place, rows in groups.items()}
    around = {place: {other for other in near[place] if other in live} for place in live}
    limits = {place: ceilings[place] for place in live}
    numbers = count(len(near))
    heap: list[tuple[float, int, int, Union]] = []

    def push(one: int, other: int) -> None:
        if not together(live[one].parts, live[other].parts):
            return
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
    """For each node of a graph the nearest that have an edge with it, and whose nearest it is."""
    centers, apart = near.centers(), near.centers() != near.members
    one, other = centers[apart], near.members[apart]
    one, other = np.concatenate([one, other]), np.concatenate([other, one])
    order = np.lexsort((other, np.tile(near.distances[apart], 2), one))
    cuts = np.cumsum(np.bincount(one, minlength=near.count))[:-1]
    found: list[set[int]] = [set() for _ in range(near.count)]
    for place, others in enumerate(np.split(other[order], cuts)):
        for nearest in list(dict.fromkeys(others.tolist()))[:_NEAREST]:
            found[place].add(nearest)
            found[nearest].add(place)
    return found
