"""A partition ready for grouping, and the sketches of what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapterops.fleet.consent.policy import Consent, Permissions
from adapterops.fleet.grouping.groups import Node, nodes_of
from adapterops.fleet.grouping.partition import Partition
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.plan import Representative
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.signing.sketch import smaller
from adapterops.fleet.types import Array, Layout, Record, Signature


@dataclass(frozen=True, eq=False, slots=True)
class Sets:
    """A partition ready for grouping: its nodes, their consent, norms. Each is equal to itself."""

    partition: Partition
    nodes: tuple[Node, ...]
    permissions: Permissions
    norms: Array

    @property
    def firsts(self) -> list[Record]:
        """One record of each node."""
        return [node.records[0] for node in self.nodes]

    def bounds(self, max_error: float) -> Array:
        """The largest error that each node consents to, (N,)."""
        return self.permissions.bounds(max_error)

    def alike(self) -> Array:
        """(N,) equal where nodes may serve and be served by the same others, -1 for who may not."""
        found = self.permissions
        numbers: dict[tuple[object, ...], int] = {}
        result = np.full(len(self.nodes), -1)
        for row in np.flatnonzero(found.serves & (found.limits < 0)):
            key = (
                int(found.group[row]),
                bool(found.differs[row]),
                tuple(map(int, found.named.get(int(row), ()))),
            )
            result[row] = numbers.setdefault(key, len(numbers))
        return result


def set_of(part: Partition, consent: Consent) -> Sets:
    """A partition's nodes."""
    records = part.records
    nodes = nodes_of(records, consent.permissions([record.tenant.name for record in records]))
    first = [node.records[0].tenant.name for node in nodes]
    norms = np.array([node.records[0].norm for node in nodes])
    return Sets(part, tuple(nodes), consent.permissions(first), norms)


def placed(found: Signature, onto: Layout) -> Array:
    """A signature's sketch over the modules of another layout, (L·p²,) float32, as `_over` gives.

    One that changes nothing is zero.
    """
    if found.layout is None:
        return np.zeros(len(onto.stems) * onto.side**2, np.float32)
    row: Array = _over(found.sketch.astype(np.float32)[None], found.layout, onto)[0]
    return row


def _over(rows: Array, own: Layout, onto: Layout) -> Array:
    """Sketches (N, ...) of one layout over the modules of another of no larger side, (N, L·p²).

    Modules that are not in the other are left out, those that it has alone are zero.
    """
    if own == onto:
        return rows.reshape(len(rows), -1)
    blocks = smaller(rows.reshape(len(rows), -1, own.side, own.side), onto.side)
    out = np.zeros((len(rows), len(onto.stems), onto.side, onto.side), np.float32)
    index = {stem: place for place, stem in enumerate(own.stems)}
    both = [(index[stem], place) for place, stem in enumerate(onto.stems) if stem in index]
    out[:, [place for _, place in both]] = blocks[:, [mine for mine, _ in both]]
    return out.reshape(len(rows), -1)


def _union(layouts: Sequence[Layout]) -> Layout:
    """The modules of all these, which agree in shape, at the smallest side."""
    shapes = {s: shape for one in layouts for s, shape in zip(one.stems, one.shapes, strict=True)}
    stems = tuple(sorted(shapes))
    return Layout(stems, tuple(shapes[s] for s in stems), min(one.side for one in layouts))


def sketches(
    each: Sets,
    fleet: Fleet,
    consent: Consent,
    kept: Sequence[tuple[Representative, Signature | None, int]],
) -> list[Sketched]:
    """The sketches of those of a partition's representatives that others may be served by.

    With each comes the signature of its file if that is new, and the node that it is made around.
    """
    able = [item for item in kept if all(consent.may_represent(name) for name in item[0].holds)]
    if not able:
        return []
    records = [each.nodes[place].records[0] for _, _, place in able]
    columns = fleet.columns(records)
    own = Layout(columns.stems, columns.shapes, columns.side)
    # An average changes what any of its members does: more than the original in its middle.
    shape = _union([own, *(new.layout for _, new, _ in able if new and new.layout)])
    rows = _over(fleet.sketches(records), own, shape)
    norms = np.array([record.norm for record in records])
    for row, (_, new, _) in enumerate(able):
        if new is not None:
            rows[row], norms[row] = placed(new, shape), new.norm
    ids = tuple(rep.id for rep, _, _ in able)
    return [Sketched(each.partition.key, ids, shape, norms, rows)]
