"""From a candidate graph to groups in which every member's error is verified.

Greedy takes groups by estimated distances; the files of each pair it uses are compared exactly.
Whoever is over their bound is evicted, the edge is struck out, and the cover goes on for those who
were: to another adapter that is kept, or to a new one. After a few rounds the rest are alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from adapterops.errors import AdapterOpsError
from adapterops.fleet.consent.policy import NEAR_EXACT, Permissions
from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.types import Array, Record
from adapterops.fleet.verifying.exact import Error, Result

_ROUNDS = 3
Compare = Callable[[Sequence[tuple[str, Sequence[str]]]], Iterable[list[Result]]]
Value = Callable[[Error], float]


@dataclass(frozen=True, slots=True)
class Node:
    """Byte duplicates that consent does not tell apart, sorted by tenant: one of them for all."""

    records: tuple[Record, ...]

    @property
    def record(self) -> Record:
        """The first, with the traffic of all."""
        first = self.records[0]
        if len(self.records) == 1:
            return first
        traffic = sum(record.tenant.traffic for record in self.records)
        return replace(first, tenant=replace(first.tenant, traffic=traffic))


@dataclass(slots=True)
class Group:
    """Nodes that the original of `center` may serve, each with its verified error."""

    center: int
    errors: dict[int, Error] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Verified groups, sorted by centre; `refused` counts pairs that were over a bound or failed.

    `failed` are nodes whose files could not be read again, with what was said.
    """

    groups: tuple[Group, ...]
    refused: int
    failed: Mapping[int, AdapterOpsError]


def nodes_of(records: Sequence[Record], permissions: Permissions) -> list[Node]:
    """Records, sorted by tenant, as nodes; byte duplicates are one where each may serve the others.

    Row i of `permissions` is record i's.
    """
    alike: defaultdict[tuple[object, ...], list[Record]] = defaultdict(list)
    for row, record in enumerate(records):
        free = permissions.serves[row] and permissions.limits[row] < 0 and record.content
        key: tuple[object, ...] = (row,)
        if free:
            lists = tuple(map(int, permissions.named.get(row, ())))
            key = record.content, bool(permissions.differs[row]), lists
        alike[key].append(record)
    return [Node(tuple(found)) for found in alike.values()]


def verified_groups(
    nodes: Sequence[Node],
    graph: Candidates,
    bounds: Array,
    compare: Compare,
    value: Value,
    *,
    groups: Iterable[Group] = (),
    todo: Array | None = None,
) -> Grouped:
    """Cover all nodes, or `todo` (N,) bool, going on from `groups` that are there.

    `graph` holds only edges that consent permits, `bounds` (N,) the largest error of each node;
    `value` is the figure of an error that is bounded.
    """
    kept = {group.center: group for group in groups}
    owner = {member: center for center, group in kept.items() for member in group.errors}
    left = np.ones(len(nodes), bool) if todo is None else todo.copy()
    failed: dict[int, AdapterOpsError] = {}
    refused = 0
    for last in [False] * _ROUNDS + [True]:
        if last:  # nobody but oneself is left to be tried
            graph = graph.kept(np.zeros(len(graph.members), bool))
        cover = greedy_cover(graph, todo=left, chosen=sorted(kept))
        others = {each.center: [int(m) for m in each.members if m != each.center] for each in cover}
        asked = [(center, members) for center, members in others.items() if members]
        files = [
            (_file(nodes[center]), [_file(nodes[member]) for member in members])
            for center, members in asked
        ]
        struck: list[tuple[int, int]] = []
        left = np.zeros(len(nodes), bool)
        for center in others.keys() - kept.keys():
            if center in owner:  # who serves others serves itself as well
                del kept[owner[center]].errors[center]
            kept[center] = Group(center, {center: exact(nodes[center].records[0])})
            owner[center] = center
        compared = compare(files) if files else ()
        for (center, members), results in zip(asked, compared, strict=True):
            for member, result in zip(members, results, strict=True):
                if isinstance(result, AdapterOpsError):
                    failed[center if _is_about(result, nodes[center]) else member] = result
                elif fits(result, float(bounds[member]), value):
                    kept[center].errors[member] = result
                    owner[member] = center
                    continue
                struck.append((center, member))
                left[member] = True
        refused += len(struck)
        left[list(failed)] = False
        if not left.any():
            break
        graph = graph.without(struck)
        if failed:
            out = np.isin(np.arange(len(nodes)), list(failed))
            graph = graph.kept(~(out[graph.centers()] | out[graph.members]))
    for member in failed:
        kept.setdefault(member, Group(member, {member: exact(nodes[member].records[0])}))
    return Grouped(tuple(kept[center] for center in sorted(kept)), refused, failed)


def fits(found: Error, bound: float, value: Value) -> bool:
    """Whether a tenant may be served with this error.

    Who consents to no more than a duplicate gets one in ΔW too, whatever `value` is in terms of.
    """
    return value(found) <= bound and (bound > NEAR_EXACT or found.error <= bound)


def exact(record: Record) -> Error:
    """What a tenant gets who is served by its own bytes."""
    return Error(0.0, 0.0, 0.0, 1.0, ("", 0.0), None, record.norm, 0.0)


def _file(node: Node) -> str:
    return node.records[0].tenant.location


def _is_about(error: AdapterOpsError, node: Node) -> bool:
    """Whether it is the node's own file that something is wrong with."""
    return f"{error.path}/".startswith(f"{_file(node)}/")
