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
from adapterops.fleet.types import Array, Layout, Signature


@dataclass(frozen=True, slots=True)
class Sets:
    """A partition ready for grouping: its nodes, their consent, norms."""

    partition: Partition
    nodes: tuple[Node, ...]
    permissions: Permissions
    norms: Array

    def vectors(self, fleet: Fleet) -> tuple[Array, Array, Array, int]:
        """Sketches, norms, energies and side of the nodes, as `candidates.edges` takes them."""
        records = [node.records[0] for node in self.nodes]
        sketches, energies, _ = fleet.matrix(records)
        return sketches, self.norms, energies, fleet.columns(records).side

    def bounds(self, max_error: float) -> Array:
        """The largest error that each node consents to, (N,)."""
        return self.permissions.bounds(max_error)


def set_of(part: Partition, consent: Consent) -> Sets:
    """A partition's nodes."""
    records = part.records
    nodes = nodes_of(records, consent.permissions([record.tenant.name for record in records]))
    first = [node.records[0].tenant.name for node in nodes]
    norms = np.array([node.records[0].norm for node in nodes])
    return Sets(part, tuple(nodes), consent.permissions(first), norms)


def placed(found: Signature, onto: Layout) -> Array:
    """A signature's sketch over the modules of another layout, (L·p²,) float32.

    Modules that it changes beyond them are left out; none does that was made of the layout's own.
    """
    assert found.layout is not None
    blocks = smaller(found.sketch.astype(np.float32), onto.side)
    index = {stem: place for place, stem in enumerate(found.layout.stems)}
    out = np.zeros((len(onto.stems), onto.side, onto.side), np.float32)
    for place, stem in enumerate(onto.stems):
        if stem in index:
            out[place] = blocks[index[stem]]
    return out.reshape(-1)


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
    rows, _, stems = fleet.matrix(records)
    shape = Layout(stems, columns.shapes, columns.side)
    norms = np.array([record.norm for record in records])
    for row, (_, new, _) in enumerate(able):
        if new is not None:
            rows[row], norms[row] = placed(new, shape), new.norm
    ids = tuple(rep.id for rep, _, _ in able)
    return [Sketched(each.partition.key, ids, shape, norms, rows)]
