"""What `assign` reports: what serves each newcomer, at what error, how far the plan drifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterops.certificate import plain
from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.replanning.joining import Assigned, Fate


@dataclass(frozen=True, slots=True)
class AssignedInfo:
    """One newcomer; errors as `plan.Served` defines them, None for one that failed.

    `by` is the id and `path` the route of what serves it, `before` the id of what did.
    """

    tenant: str
    fate: Fate
    by: str
    path: str | None
    before: str
    error: float | None
    measured: float | None
    missing: float | None
    foreign: float | None
    cosine: float | None
    worst: tuple[str, float] | None
    reason: str


@dataclass(frozen=True, slots=True)
class AssignReport:
    """The result of `assign`, sorted by tenant.

    `max_error` is the bound that held, in the plan's metric. `drift` are the plan's counters since
    it was made (`drifted.counters`), with a hint where planning again may pay.
    """

    output: str
    plan: str
    tenants: int
    adapters: int
    max_error: float
    metric: str
    assigned: tuple[AssignedInfo, ...]
    drift: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def failed(self) -> int:
        """How many could not be assigned."""
        return sum(item.fate == "failed" for item in self.assigned)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        found: dict[str, Any] = plain(self)
        return {"schema": "adapterops.assign/1", **found}


def assign_report(
    old: str, new: Plan, output: str, limit: float, found: Sequence[Assigned], warnings: list[str]
) -> AssignReport:
    """The report of a plan made from the plan at `old`."""
    return AssignReport(
        output=output,
        plan=old,
        tenants=len(new.served),
        adapters=sum(rep.kind != "base" for rep in new.representatives.values()),
        max_error=limit,
        metric=new.metric,
        assigned=tuple(_info(item, new) for item in found),
        drift=new.assigned,
        warnings=tuple(warnings),
    )


def _info(item: Assigned, plan: Plan) -> AssignedInfo:
    served = item.served
    if served is None:
        nothing = (None,) * 6
        return AssignedInfo(item.tenant, item.fate, "", None, item.before, *nothing, item.reason)
    rep = plan.representatives[served.by]
    return AssignedInfo(
        tenant=item.tenant,
        fate=item.fate,
        by=served.by,
        path=None if rep.kind == "base" else rep.path,
        before=item.before,
        error=served.error,
        measured=served.measured,
        missing=served.missing,
        foreign=served.foreign,
        cosine=served.cosine,
        worst=served.worst,
        reason=item.reason,
    )
