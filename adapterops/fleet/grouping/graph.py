"""Who may serve whom: a directed graph over tenants, by estimated distance.

An edge from j to i says that the adapter of j may serve tenant i: ‖D_i − D_j‖ is estimated at
`distance` times ‖D_i‖. Distances are relative to the member's own norm, so the graph is not
symmetric. Everyone has an edge to itself, of distance 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from adapterops.fleet.types import Array

Allowed = Callable[[int, Array], Array]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The edges by centre: those of j are [starts[j], starts[j + 1]), sorted by member.

    `starts` (N + 1,) int64, `members` int32 and `distances` float32, one for each edge.
    """

    starts: Array
    members: Array
    distances: Array

    @property
    def count(self) -> int:
        """N."""
        return len(self.starts) - 1

    def row(self, center: int) -> tuple[Array, Array]:
        """Whom a centre may serve, ascending, and how far off."""
        own = slice(self.starts[center], self.starts[center + 1])
        return self.members[own], self.distances[own]

    def centers(self) -> Array:
        """The centre of each edge."""
        return np.repeat(np.arange(self.count, dtype=np.int32), np.diff(self.starts))

    def kept(self, mask: Array) -> Candidates:
        """The graph with some of its edges, and all those of a tenant to itself."""
        centers = self.centers()
        mask = mask | (centers == self.members)
        counts = np.bincount(centers[mask], minlength=self.count)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return Candidates(starts, self.members[mask], self.distances[mask])

    def within(self, radius: float | Array) -> Candidates:
        """The edges up to a distance: one for all, or (N,) each member's own."""
        limits = np.broadcast_to(np.asarray(radius, np.float64), (self.count,))
        return self.kept(self.distances <= limits[self.members])

    def permitted(self, allowed: Allowed) -> Candidates:
        """The edges for which `allowed(center, members)` is true."""
        mask = np.ones(len(self.members), bool)
        for center in np.flatnonzero(np.diff(self.starts) > 1):
            own = slice(self.starts[center], self.starts[center + 1])
            mask[own] = allowed(int(center), self.members[own])
        return self.kept(mask)

    def without(self, pairs: Iterable[tuple[int, int]]) -> Candidates:
        """The graph with edges (centre, member) struck out: those that verification refused."""
        listed = np.array(sorted(set(pairs)), np.int64).reshape(-1, 2)
        codes = listed[:, 0] * self.count + listed[:, 1]
        own = self.centers().astype(np.int64) * self.count + self.members
        return self.kept(~np.isin(own, codes))


def graph(count: int, centers: Array, members: Array, distances: Array) -> Candidates:
    """The graph of these edges, each given once, and one from everyone to itself."""
    everyone = np.arange(count)
    apart = centers != members
    centers = np.concatenate([centers[apart], everyone], dtype=np.int32, casting="unsafe")
    members = np.concatenate([members[apart], everyone], dtype=np.int32, casting="unsafe")
    none = np.zeros(count, np.float32)
    distances = np.concatenate([distances[apart], none], dtype=np.float32, casting="unsafe")
    order = np.lexsort((members, centers))
    starts = np.concatenate([[0], np.cumsum(np.bincount(centers, minlength=count))])
    return Candidates(starts, members[order], distances[order])
