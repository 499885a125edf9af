"""What a plan says beside what it serves: other bounds, and tenants that resemble each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adapterops.errors import MemoryLimitError
from adapterops.fleet.grouping.candidates import edges
from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.covering import Measured
from adapterops.fleet.grouping.graph import graph
from adapterops.fleet.grouping.outlook import GRID, pareto
from adapterops.fleet.grouping.sets import Sets
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.plan import Point, Related, Served
from adapterops.fleet.relating.related import Part, related
from adapterops.stream import Compute


def outlook(
    sets: Sequence[Sets], vectors: Measured, bound: float, apart: int, on: Compute
) -> tuple[tuple[Point, ...], Mapping[str, Any], str]:
    """What other bounds would give if all within each partition might share, and this one.

    `apart` are the adapters besides. Where there are too many pairs a note says so.
    """
    widest = max(bound, GRID[-1])
    several = [each for each in sets if len(each.nodes) > 1]
    single = [each.norms for each in sets if len(each.nodes) == 1]
    try:
        graphs = [edges(vectors(each), widest, on, least=GRID[0]) for each in several]
    except MemoryLimitError as error:
        return (), {}, f"other bounds were not estimated: {error.message}"
    norms = [vectors(each).norms for each in several]
    if single:  # who can be compared with nobody
        none = np.zeros(0, np.int64)
        graphs.append(graph(len(single), none, none, np.zeros(0)))
        norms.append(np.concatenate(single))
    groups = sum(len(greedy_cover(each.within(bound))) for each in graphs)
    gain = {"max_error": bound, "adapters": groups + apart, "estimated": True}
    return pareto(graphs, norms, alone=apart), gain, ""


def relations(
    fleet: Fleet,
    sets: Sequence[Sets],
    served: Mapping[str, Served],
    discovery: float,
    on: Compute,
) -> tuple[tuple[Related, ...], list[str]]:
    """Tenants of these partitions that stand out, by whom they are `served`, and notes."""
    several = [each for each in sets if len(each.nodes) > 1]

    def parts() -> Iterator[Part]:
        for each in several:
            records = [node.records[0] for node in each.nodes]
            names = [record.tenant.name for record in records]
            yield Part("delta", names, fleet.sketches(records), fleet.starts(records))
            # What one initialisation makes alike are inputs: outputs start at zero.
            yield Part("outputs", names, fleet.outputs(records))

    by = {name: item.by for name, item in served.items()}
    listed, notes = related(parts(), by, on, q=discovery, seed=fleet.seed)
    single = len(sets) == 1  # of several, which of them has too few tenants is of no interest
    texts = (
        f"related tenants by {kind}: {note}"
        for kind, note in zip(("delta", "outputs") * len(several), notes, strict=True)
        if note and (single or note.startswith("more than"))
    )
    return listed, list(dict.fromkeys(texts))
