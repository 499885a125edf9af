"""Similarities of a fleet as a map: cosines of ΔW and of output Grams, ordered by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.signing.sketch import deviation
from adapterops.fleet.types import Record

Array = np.ndarray[Any, Any]
Rows = tuple[tuple[float | None, ...], ...]

LARGEST = 256  # rows of a map: beyond, cells are smaller than what a screen shows


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosines between the tenants `names`, to 0.01, from sketches of `columns` numbers each.

    `sigma` is the standard deviation of an estimate of `delta`, at most, for the median tenant.

    `groups` are the ids of what serves them, and members of one group are side by side. `each` says
    what the rows are: all tenants that have a sketch; one tenant of each adapter, the one nearest
    to it; or those of the adapters that serve most. `total` is how many tenants there are. `delta`
    is of ΔW, `outputs` of ΔWΔWᵀ; None between tenants of different bases, and where one is zero.
    """

    each: Literal["tenants", "adapters", "largest"]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    total: int
    columns: int
    sigma: float
    delta: Rows
    outputs: Rows


def similarity(plan: Plan, index: Fleet, largest: int = LARGEST) -> Similarity | None:
    """The map of at most `largest` rows; None where fewer than two tenants have a sketch."""
    known = [r for r in index.records if r.row >= 0 and r.tenant.name in plan.served]
    each, chosen = _chosen(plan, known, largest)
    if len(chosen) < 2:
        return None
    aliases: Mapping[str, str] = plan.options.get("aliases") or {}
    bases = [aliases.get(record.base, record.base) for record in chosen]
    sketches, energies, _ = index.matrix(chosen)
    delta = _unit(sketches)
    outputs = _unit(index.outputs(chosen))
    groups = [plan.served[record.tenant.name].by for record in chosen]
    order = _order(plan, chosen, groups, bases, delta)
    names = tuple(chosen[row].tenant.name for row in order)
    kept = [bases[row] for row in order]
    return Similarity(
        each=each,
        names=names,
        groups=tuple(groups[row] for row in order),
        total=len(known),
        columns=delta.shape[1],
        sigma=float(np.median(deviation(energies, index.columns(chosen).side))),
        delta=_cosines(delta[order], kept),
        outputs=_cosines(outputs[order], kept),
    )


def _chosen(
    plan: Plan, known: Sequence[Record], largest: int
) -> tuple[Literal["tenants", "adapters", "largest"], list[Record]]:
    if len(known) <= largest:
        return "tenants", list(known)
    nearest: dict[str, Record] = {}
    for record in known:
        served = plan.served[record.tenant.name]
        best = nearest.get(served.by)
        if best is None or served.error < plan.served[best.tenant.name].error:
            nearest[served.by] = record
    sizes = {id: len(plan.representatives[id].members) for id in nearest}
    ids = sorted(nearest, key=lambda id: (-sizes[id], id))
    return ("adapters" if len(ids) <= largest else "largest"), [nearest[i] for i in ids[:largest]]


def _unit(vectors: Array) -> Array:
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: Array = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
    return unit


def _order(
    plan: Plan,
    records: Sequence[Record],
    groups: Sequence[str],
    bases: Sequence[str],
    delta: Array,
) -> list[int]:
    """Rows by base, then by group, groups that are alike side by side, nearest members first."""
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(bases, groups, strict=True)):
        members[key].append(row)
    order: list[int] = []
    for base in sorted(set(bases)):
        keys = sorted(key for key in members if key[0] == base)
        centres = _unit(np.stack([delta[members[key]].mean(0) for key in keys]))
        for place in _leaves(centres):
            rows = members[keys[place]]
            order += sorted(
                rows,
                key=lambda row: (
                    plan.served[records[row].tenant.name].error,
                    records[row].tenant.name,
                ),
            )
    return order


def _leaves(centres: Array) -> list[int]:
    """The leaves of an average-linkage tree, ordered so that neighbours are near."""
    if len(centres) < 3:
        return list(range(len(centres)))
    from scipy.cluster.hierarchy import leaves_list, linkage  # slow to import
    from scipy.spatial.distance import squareform

    away = 1.0 - centres @ centres.T
    np.fill_diagonal(away, 0.0)
    distances = np.maximum(squareform(away, checks=False), 0.0)
    return [int(x) for x in leaves_list(linkage(distances, "average", optimal_ordering=True))]


def _cosines(unit: Array, bases: Sequence[str]) -> Rows:
    values = np.clip(unit @ unit.T, -1.0, 1.0).round(2) + 0.0  # no -0.0
    there = (unit != 0).any(1)
    names = np.array(bases)
    same = (names[:, None] == names[None, :]) & there[:, None] & there[None, :]
    return tuple(
        tuple(value if good else None for value, good in zip(row, goods, strict=True))
        for row, goods in zip(values.tolist(), same.tolist(), strict=True)
    )
