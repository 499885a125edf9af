"""What planning reports: how many adapters serve how many tenants, and at what error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.certificate import plain
from adapterops.fleet.plans.plan import Plan, Point, Related, figure


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over all tenants that another adapter than their own serves."""

    median: float
    high: float
    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One adapter that serves several tenants; `largest` is the largest error in the metric."""

    id: str
    kind: str
    members: tuple[str, ...]
    rank: int
    largest: float
    foreign: float
    reason: str


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The result of `cluster`, or with `dry_run` what it would be.

    `adapters` are deployed for `tenants`; `before` is how many different ones there were, byte
    duplicates counted once. `size_before` and `size` are bytes of their files. `errors` and
    `foreign` are over the tenants that another's or a new adapter serves, None where none are.
    `alone` counts why tenants are served by their own adapter, `changes` what another plan changed.
    """

    output: str
    fleet: str
    tenants: int
    adapters: int
    before: int
    size: int
    size_before: int
    max_error: float | None
    metric: str
    allow_sharing: str
    errors: Spread | None
    foreign: Spread | None
    groups: tuple[GroupInfo, ...]
    alone: Mapping[str, int]
    excluded: Mapping[str, str]
    related: tuple[Related, ...]
    discovery: float
    pareto: tuple[Point, ...]
    gain: Mapping[str, Any]
    changes: Mapping[str, Any]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        found: dict[str, Any] = plain(self)
        return {"schema": "adapterops.cluster/1", **found}


def outcome(plan: Plan, output: str, changes: Mapping[str, Any]) -> ClusterReport:
    """The report of a plan."""
    reps = plan.representatives
    shared = [
        item for item in plan.served.values() if item.error > 0 or len(reps[item.by].members) > 1
    ]
    groups = [rep for rep in reps.values() if len(rep.members) > 1 and rep.kind != "base"]
    own = {rep.id for rep in reps.values() if len(rep.members) == 1 and rep.kind != "base"}
    alone = Counter(item.reason for item in plan.served.values() if item.by in own)
    return ClusterReport(
        output=output,
        fleet=plan.fleet,
        tenants=len(plan.served),
        adapters=sum(rep.kind != "base" for rep in reps.values()),
        before=int(plan.options["adapters_before"]),
        size=sum(rep.size for rep in reps.values()),
        size_before=int(plan.options["bytes_before"]),
        max_error=plan.max_error,
        metric=plan.metric,
        allow_sharing=str(plan.options["allow_sharing"]),
        errors=_spread([figure(item, plan.metric) for item in shared]),
        foreign=_spread([item.foreign for item in shared]),
        groups=tuple(
            GroupInfo(
                rep.id,
                rep.kind,
                rep.members,
                rep.rank,
                max(figure(plan.served[name], plan.metric) for name in rep.members),
                max(plan.served[name].foreign for name in rep.members),
                rep.reason,
            )
            for rep in sorted(groups, key=lambda rep: (-len(rep.members), rep.id))
        ),
        alone=dict(alone.most_common()),
        excluded=plan.excluded,
        related=plan.related,
        discovery=plan.discovery,
        pareto=plan.pareto,
        gain=plan.gain,
        changes=changes,
        warnings=plan.warnings,
        notes=plan.notes,
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    median, high = np.quantile(array, [0.5, 0.99])
    return Spread(float(median), float(high), float(array.max()), float(array.mean()))
