"""What other bounds would give: adapters against errors, estimated from sketches alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.plans.plan import Point
from adapterops.fleet.types import Array

GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


def pareto(
    graphs: Sequence[Candidates],
    norms: Sequence[Array],
    grid: Sequence[float] = GRID,
    alone: int = 0,
) -> tuple[Point, ...]:
    """For each bound of `grid` the number of adapters that greedy covers leave, and the errors.

    `graphs` reach at least to the largest bound, `norms` are ‖D_i‖ (N,) of each, in the terms that
    distances are in; `alone` is the number of adapters besides. `largest` and `mean` are over all
    tenants of the graphs, and so is the mean `foreign`: with δ = ‖C − D‖/‖D‖ and ν = ‖C‖/‖D‖,
    g = (1 + ν² − δ²)/2 and foreign² = δ² − (1 − g)².
    """
    points = []
    for bound in grid:
        adapters, errors, foreign = alone, [np.zeros(0)], [np.zeros(0)]
        for graph, sizes in zip(graphs, norms, strict=True):
            for group in greedy_cover(graph.within(bound)):
                adapters += 1
                squares = group.distances.astype(np.float64) ** 2
                own = sizes[group.members]
                ratio = np.divide(sizes[group.center], own, out=np.ones(len(own)), where=own > 0)
                missing = (1 - ratio**2 + squares) / 2
                errors.append(np.sqrt(squares))
                foreign.append(np.sqrt(np.maximum(squares - missing**2, 0.0)))
        every = np.concatenate(errors)
        count = max(len(every), 1)
        points.append(
            Point(
                max_error=bound,
                adapters=adapters,
                largest=float(every.max(initial=0.0)),
                mean=float(every.sum() / count),
                foreign=float(np.concatenate(foreign).sum() / count),
            )
        )
    return tuple(points)
