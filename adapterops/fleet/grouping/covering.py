"""A partition covered by verified groups, also where few of a family of near copies may serve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from adapterops.activations import Activations
from adapterops.fleet.grouping.candidates import edges
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.groups import Compare, Group, Grouped, Value, exact, verified_groups
from adapterops.fleet.grouping.responses import response_vectors
from adapterops.fleet.grouping.sets import Sets
from adapterops.fleet.grouping.vectors import Vectors, delta_vectors
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.types import Array
from adapterops.stream import Compute

Measured = Callable[[Sets], Vectors]
_WORTH = 0.9  # of those searched again, the largest share that may be left for another time


def measured(
    fleet: Fleet, activations: Activations | None, on: Compute, *, allow_pickle: bool = False
) -> Measured:
    """The vectors of partitions in the terms of a plan's bound, made once for each."""

    def made(each: Sets) -> Vectors:
        if activations is None:
            return delta_vectors(fleet, each.firsts)
        return response_vectors(fleet, each.firsts, activations, on, allow_pickle=allow_pickle)

    return cache(made)


def candidates(
    each: Sets,
    vectors: Vectors,
    max_error: float,
    on: Compute,
    *,
    among: Array | None = None,
    least: float = math.inf,
) -> Candidates:
    """The permitted edges of a partition, or `among` these nodes (k,), numbered as they are given.

    `least` is the least bound that they are asked for, if it is less than `max_error`.
    """
    places = np.arange(len(each.nodes)) if among is None else among
    own = vectors if among is None else vectors.rows(places)
    bounds = each.bounds(max_error)[places]
    found = edges(own, bounds, on, alike=each.alike()[places], least=least)

    def allowed(center: int, members: Array) -> Array:
        return each.permissions.allowed(int(places[center]), places[members])

    return found.permitted(allowed)


def covered(
    each: Sets,
    vectors: Measured,
    graph: Candidates | None,
    max_error: float,
    on: Compute,
    compare: Compare,
    value: Value,
) -> Grouped:
    """The verified groups of a partition at a bound, from its permitted edges if they are known.

    Who is left alone although others might have served it, and may serve nobody in the graph, is
    one of a family of which few may: those are tried again among themselves, as long as that finds
    enough of them others.
    """
    if len(each.nodes) == 1:
        return Grouped((Group(0, {0: exact(each.nodes[0].records[0])}),), 0, {})
    own = vectors(each)
    graph = candidates(each, own, max_error, on) if graph is None else graph
    bounds = each.bounds(max_error)
    found = verified_groups(each.nodes, graph, bounds, compare, value)
    silent, before = _silent(graph), math.inf
    while True:
        alone = {group.center for group in found.groups if len(group.errors) == 1}
        places = np.array(sorted(alone & set(silent.tolist()) - found.failed.keys()), np.int64)
        if len(places) < 2 or len(places) > _WORTH * before:
            return replace(found, failed={**own.failed, **found.failed})
        before = len(places)
        again = candidates(each, own, max_error, on, among=places)
        nodes = [each.nodes[place] for place in places]
        more = verified_groups(nodes, again, bounds[places], compare, value)
        found = _exchanged(found, more, places)
        silent = places[_silent(again)]


def _silent(graph: Candidates) -> Array:
    """Who might be served by others, and may serve nobody."""
    given = np.bincount(graph.members, minlength=graph.count)
    return np.flatnonzero((np.diff(graph.starts) == 1) & (given > 1))


def _exchanged(found: Grouped, more: Grouped, places: Array) -> Grouped:
    """`more`, whose nodes are `places`, in the place of the groups that these were alone in."""
    again = set(places.tolist())
    groups = [group for group in found.groups if group.center not in again]
    groups += [
        Group(int(places[group.center]), {int(places[n]): e for n, e in group.errors.items()})
        for group in more.groups
    ]
    return Grouped(
        tuple(sorted(groups, key=lambda group: group.center)),
        found.refused + more.refused,
        {**found.failed, **{int(places[node]): error for node, error in more.failed.items()}},
    )
