"""What the index shows of a fleet by itself: byte duplicates, and adapters of one origin.

Adapters that started from one initialisation of A, or one from the other, keep fingerprints of A
whose cosine is near 1, whatever they were trained on; of two seeds it is near 0. That says nothing
of ΔW: a group here is a lineage, no group that could share an adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import TypeVar

import numpy as np

from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.types import Array

T = TypeVar("T")
COSINE = 0.9
_PROBES = 32  # rows to search from first
_FIRST, _ROUNDING = 64, 1e-5  # numbers of a row looked at first, and what float32 may lose
_MANY = 1 << 16  # pairs, 64 MB of each side
_BLOCK = 2048  # rows of a product, so that memory does not grow with the square of their number


def duplicates(pairs: Iterable[tuple[T, Hashable]]) -> list[tuple[T, ...]]:
    """What of (item, key) shares a key, in the order it comes in; items alone are left out."""
    found: defaultdict[Hashable, list[T]] = defaultdict(list)
    for item, key in pairs:
        found[key].append(item)
    return [tuple(items) for items in found.values() if len(items) > 1]


def byte_duplicates(fleet: Fleet) -> list[tuple[str, ...]]:
    """Tenants whose adapters are the same bytes."""
    return duplicates((r.tenant.name, r.content) for r in fleet.records if r.content)


def lineages(fleet: Fleet) -> list[tuple[str, ...]]:
    """Groups of tenants that are connected by fingerprints with a cosine of at least `COSINE`.

    A group that is one adapter and its byte duplicates is no lineage.
    """
    records = [record for record in fleet.records if record.status == "ok"]
    labels = components(fleet.starts(records), COSINE)
    groups = duplicates(
        (record, int(label)) for record, label in zip(records, labels, strict=True) if label >= 0
    )
    return [
        tuple(record.tenant.name for record in group)
        for group in groups
        if len({record.content for record in group}) > 1
    ]


def components(rows: Array, cosine: float, block: int = _BLOCK) -> Array:
    """Connected components of the graph whose edges are inner products of at least `cosine`.

    `rows` (N, k) float32 have norm 1, or 0: those are in none, -1. The result (N,) int64 labels
    each row by the first row of its component. Large components are found first, by a search from a
    few rows, after which nothing within them is looked at; the rest costs one product a pair.
    """
    found: list[Array] = []
    left = np.flatnonzero(np.einsum("ij,ij->i", rows, rows) > 0)
    for probe in range(_PROBES):
        if not len(left):
            break
        mine, left = _reached(rows, left, probe * len(left) // _PROBES, cosine, block)
        found.append(mine)
    if len(left):
        found += _blocked(rows, left, cosine, block)
    labels = np.full(len(rows), -1, np.int64)
    for mine in found:
        labels[mine] = mine.min()
    return labels


def _reached(
    rows: Array, left: Array, place: int, cosine: float, block: int
) -> tuple[Array, Array]:
    """The component of the row at a place in `left`, and what of `left` is not in it."""
    waiting, mine = [left[place : place + 1]], [left[place : place + 1]]
    left = np.delete(left, place)
    while waiting:
        seeds = rows[waiting.pop()].T
        parts = (left[start : start + block] for start in range(0, len(left), block))
        near = [(rows[part] @ seeds >= cosine).any(1) for part in parts]
        hit = np.concatenate([*near, np.zeros(0, bool)])
        new, left = left[hit], left[~hit]
        mine.append(new)
        waiting += [new[start : start + block] for start in range(0, len(new), block)]
    return np.concatenate(mine), left


def _pairs(mine: Array, other: Array, cosine: float) -> tuple[Array, Array]:
    """Pairs of rows with an inner product of at least `cosine`.

    ‖x − y‖² ≤ 2(1 − cosine) holds for the first numbers of both alone, which few other pairs pass.
    """
    x, y = mine[:, :_FIRST], other[:, :_FIRST]
    ones = np.ones((len(x), 1), np.float32), np.ones((len(y), 1), np.float32)
    half_x, half_y = (-(a * a).sum(1, keepdims=True) / 2 for a in (x, y))
    near = np.hstack([x, half_x, ones[0]]) @ np.hstack([y, ones[1], half_y]).T
    one, two = np.nonzero(near >= cosine - 1 - _ROUNDING)
    if len(one) > _MANY:
        return np.nonzero(mine @ other.T >= cosine)  # type: ignore[return-value]
    kept = np.einsum("ij,ij->i", mine[one], other[two]) >= cosine
    return one[kept], two[kept]


def _blocked(rows: Array, left: Array, cosine: float, block: int) -> list[Array]:
    """The components among `left`, by products of all its blocks with each other."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def joined(one: Array, other: Array, count: int) -> Array:
        graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(count, count))
        label: Array = connected_components(graph, directed=False)[1]
        return label

    edges = [np.zeros((2, 0), np.int64)]
    starts = range(0, len(left), block)
    for i in starts:
        mine = rows[left[i : i + block]]
        for j in (start for start in starts if start >= i):
            one, other = _pairs(mine, rows[left[j : j + block]], cosine)
            nodes, places = np.unique(np.concatenate([one + i, other + j]), return_inverse=True)
            label = joined(places[: len(one)], places[len(one) :], len(nodes))
            _, first = np.unique(label, return_index=True)
            edges.append(np.stack([nodes, nodes[first[label]]]))  # a star for each component
    one, other = np.concatenate(edges, 1)
    label = joined(one, other, len(left))
    order = np.argsort(label, kind="stable")
    cuts = np.flatnonzero(np.diff(label[order])) + 1
    return [left[part] for part in np.split(order, cuts)]
