"""Large families of near copies: a few of each may serve, or every pair would be an edge.

Twenty thousand copies of one adapter are 4·10⁸ pairs, and any of them could serve the others. So of
a family, tenants that are all within a small distance of some `_SERVERS` of them, which are so of
each other, only those may serve: with the smallest tenants first, in the way of leader clustering
(Hartigan 1975, ch. 3). What one of the others could serve, they serve too, but for what is at the
very edge of its reach.
"""

from __future__ import annotations

import numpy as np

from adapterops.fleet.types import Array

FAMILY = 64  # so many near copies and fewer are left as they are
_SERVERS = 8  # more than verification tries for any tenant
_APART = 8.0  # times nearer than the least bound are near copies


def nearness(least: float, floor: float) -> float:
    """How near copies are, where the least bound of anybody is `least`.

    At most 1/8 of it, or `floor`, up to which another's adapter is a tenant's own.
    """
    return min(least, max(floor, least / _APART))


def servers(
    rows: Array, norms: Array, ids: Array, alike: Array, crowded: Array, distance: float
) -> Array:
    """Who may serve, bool (N,): all but those of large families whom a few stand for.

    `rows` (N, k) float32 are of adapters of norm 1, sorted by `norms` (N,); `ids` (N,) are what
    ties go by and `alike` (N,) what members of a family have in common, below 0 for who is in none.
    Only those of `crowded` (N,) bool are looked at. Distances are over the norm of a server.
    """
    serve = np.ones(len(norms), bool)
    left = crowded & (alike >= 0)
    places = np.flatnonzero(left)
    for first in places[np.argsort(ids[places], kind="stable")]:
        if not left[first]:
            continue
        left[first] = False
        reach = norms[first] * (1 + np.array([-1, 1]) * distance)
        low, high = np.searchsorted(norms, reach)
        around = low + np.flatnonzero(left[low:high] & (alike[low:high] == alike[first]))
        family = _within(rows, norms, int(first), around, distance)
        chosen = [int(first)]
        while len(family) >= FAMILY and len(chosen) < _SERVERS:
            chosen.append(int(family[np.argmin(ids[family])]))
            family = _within(rows, norms, chosen[-1], family[family != chosen[-1]], distance)
        if len(family) >= FAMILY:
            serve[family] = left[family] = left[chosen] = False
    return serve


def _within(rows: Array, norms: Array, center: int, places: Array, distance: float) -> Array:
    """Those of `places` that are so near to one."""
    scales = (norms[places] / norms[center]).astype(np.float32)
    apart = rows[places] * scales[:, None] - rows[center]
    return np.asarray(places[np.einsum("nk,nk->n", apart, apart) <= distance**2])
