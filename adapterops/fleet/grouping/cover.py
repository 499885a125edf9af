"""Which adapters to keep: greedy set cover of the candidate graph.

Greedy weighted set cover (Chvátal 1979, A greedy heuristic for the set-covering problem) where each
adapter weighs 1, as their number is what is to be small, and one that is kept already weighs 0. It
keeps at most H(n) = 1 + 1/2 + … + 1/n times as many as the optimum, n the largest number of tenants
that one adapter may serve; on the graph as it is given, before verification strikes edges out.
Gains only shrink while the cover grows, so they are brought up to date when they come up (Minoux
1978, accelerated greedy). Equal gains go to the smaller tenant.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from adapterops.errors import BudgetError
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.types import Array


@dataclass(frozen=True, slots=True)
class Group:
    """Members (k,) int64, ascending, that the adapter of `center` serves, and how far off."""

    center: int
    members: Array
    distances: Array


def greedy_cover(
    graph: Candidates,
    *,
    todo: Array | None = None,
    chosen: Iterable[int] = (),
) -> list[Group]:
    """Groups that cover the tenants `todo` (N,) bool, everyone if None, sorted by centre.

    `chosen` are kept already: a cover is continued by giving its centres and whom they failed to
    serve. Each of `todo` goes to the nearest centre that may serve it, and a new centre serves
    its own tenant, whether that was to be covered or not. A chosen centre is listed where it gets
    members.
    """
    left = np.ones(graph.count, bool) if todo is None else todo.copy()
    wanted = left.copy()
    kept = sorted(set(chosen))
    for center in kept:
        left[graph.row(center)[0]] = False
    picked = _needed(graph, _picked(graph, left), wanted, kept)
    wanted[picked] = True
    return _assigned(graph, sorted({*kept, *picked}), wanted)


def _picked(graph: Candidates, left: Array) -> list[int]:
    """Centres in the order that greedy takes them; `left` is used up."""
    gains = np.add.reduceat(left[graph.members].astype(np.int64), graph.starts[:-1])
    heap = [(-int(gains[center]), int(center)) for center in np.flatnonzero(gains)]
    heapq.heapify(heap)
    picked = []
    while heap:
        stale, center = heapq.heappop(heap)
        members = graph.row(center)[0]
        gain = int(np.count_nonzero(left[members]))
        if not gain:
            continue
        key = (-gain, center)
        if key[0] != stale and heap and key > heap[0]:
            heapq.heappush(heap, key)
            continue
        left[members] = False
        picked.append(center)
    return picked


def _needed(
    graph: Candidates, picked: Sequence[int], wanted: Array, kept: Iterable[int]
) -> list[int]:
    """The centres without those, last first, whose members all have another centre."""
    times = np.zeros(graph.count, np.int64)
    for center in (*kept, *picked):
        times[graph.row(center)[0]] += 1
    needed = []
    for center in reversed(picked):
        members = graph.row(center)[0]
        if (times[members[wanted[members]]] > 1).all():
            times[members] -= 1
        else:
            needed.append(center)
    return needed


def _assigned(graph: Candidates, centers: Sequence[int], wanted: Array) -> list[Group]:
    nearest = np.full(graph.count, np.inf, np.float32)
    owner = np.full(graph.count, -1, np.int64)
    for center in centers:
        members, distances = graph.row(center)
        closer = wanted[members] & (distances < nearest[members])
        nearest[members[closer]] = distances[closer]
        owner[members[closer]] = center
    own = [center for center in centers if wanted[center]]
    owner[own], nearest[own] = own, 0.0
    order = np.argsort(owner, kind="stable")
    firsts = np.searchsorted(owner[order], [*centers, graph.count])
    groups = []
    for center, first, last in zip(centers, firsts[:-1], firsts[1:], strict=True):
        members = order[first:last]
        if len(members):
            groups.append(Group(center, members, nearest[members]))
    return groups


@dataclass(frozen=True, slots=True)
class Budget:
    """The least estimated error at which so few adapters suffice, and the groups by graph."""

    max_error: float
    groups: tuple[list[Group], ...]

    @property
    def adapters(self) -> int:
        """How many are kept."""
        return sum(map(len, self.groups))


def for_budget(graphs: Sequence[Candidates], adapters: int) -> Budget:
    """Cover partitions by at most so many adapters together, at the least largest distance.

    The bound is bisected over the distances that occur; each graph must hold all the edges that may
    be used. Raises BudgetError where even all edges leave more adapters.
    """

    def covered(radius: float) -> Budget:
        return Budget(radius, tuple(greedy_cover(graph.within(radius)) for graph in graphs))

    radii = np.unique(np.concatenate([np.zeros(1), *(graph.distances for graph in graphs)]))
    low, high = 0, len(radii) - 1
    best = covered(float(radii[high]))
    if best.adapters > adapters:
        raise BudgetError(
            f"{sum(graph.count for graph in graphs)} tenants cannot be served by {adapters} "
            f"adapters: {best.adapters} are left where each may be off by {radii[high]:.3g}",
            hint=f"give --max-adapters {best.adapters} or more",
        )
    while low < high:
        middle = (low + high) // 2
        found = covered(float(radii[middle]))
        if found.adapters <= adapters:
            best, high = found, middle
        else:
            low = middle + 1
    return best
