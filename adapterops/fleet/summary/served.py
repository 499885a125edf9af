"""A plan summed up for people: who is served by what, at which error and memory, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterops.certificate import plain
from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.outcome import Spread, outcome
from adapterops.fleet.plans.plan import Plan, Point, Related, Representative, Served, figure
from adapterops.fleet.summary.map import Similarity, similarity
from adapterops.fleet.summary.memory import Memory, memory
from adapterops.serving.model import Engine
from adapterops.serving.zeros import BaseShapes

# What serves a tenant: an adapter that the plan wrote, an original that serves others too, its own
# adapter, the base model alone, nothing.
Fate = Literal["new", "shared", "own", "base", "none"]
FATES: tuple[Fate, ...] = ("new", "shared", "own", "base", "none")


@dataclass(frozen=True, slots=True)
class Tenant:
    """How one tenant is served: `plan.Served`, its fate and the kind of what serves it."""

    fate: Fate
    kind: str
    by: str
    error: float
    measured: float | None
    missing: float
    foreign: float
    cosine: float
    worst: tuple[str, float]
    traffic: float
    norm: float
    rank: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Trade:
    """One point of the curve of adapters against errors, estimated from sketches.

    `gpu` are the bytes of all adapters on one GPU at once, None where the formula is not known.
    """

    max_error: float
    adapters: int
    largest: float
    mean: float
    foreign: float
    gpu: int | None


@dataclass(frozen=True, slots=True)
class FleetReport:
    """A plan in figures; `plan` and `fleet` are paths, all errors relative to the tenant's own ΔW.

    `adapters` are deployed for `tenants`, which had `before` different ones. `size` and
    `size_before` are bytes of files. `gpu` is memory with at most `slots` adapters on the GPU of
    `engine`, `resident` with all at once. `fates` counts tenants by how they are served. `errors`
    and `foreign` are over those that another's or a new adapter serves, `mean` and `mean_foreign`
    over all. `alone` names those that their own adapter serves by the reason, `excluded` those that
    nothing serves. `changes` is a `plandiff` document, None where no previous plan is known.
    `assigned` counts what `assign` added since the plan was made.
    """

    plan: str
    fleet: str
    bases: tuple[str, ...]
    seed: int
    max_error: float | None
    metric: str
    allow_sharing: str
    tenants: int
    adapters: int
    before: int
    size: int
    size_before: int
    engine: str
    slots: int
    gpu: GpuBytes
    resident: GpuBytes
    fates: Mapping[str, int]
    errors: Spread | None
    foreign: Spread | None
    mean: float
    mean_foreign: float
    largest: float
    served: Mapping[str, Tenant]
    representatives: Mapping[str, Representative]
    alone: Mapping[str, tuple[str, ...]]
    excluded: Mapping[str, str]
    related: tuple[Related, ...]
    discovery: float
    pareto: tuple[Trade, ...]
    gain: Mapping[str, Any]
    similarity: Similarity | None
    changes: Mapping[str, Any] | None
    assigned: Mapping[str, Any]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    schema = "adapterops.fleet-report/1"

    def counted(self, item: Tenant) -> float:
        """The error of a tenant in the plan's metric."""
        return figure(item, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found: dict[str, Any] = plain(self)
        return {"schema": self.schema, **found}

    @property
    def groups(self) -> tuple[Representative, ...]:
        """What is deployed, those that serve most first."""
        found = [rep for rep in self.representatives.values() if rep.kind != "base"]
        return tuple(sorted(found, key=lambda rep: (-len(rep.members), rep.id)))

    def error_of(self, rep: Representative, figure: Callable[[Tenant], float]) -> float:
        """The largest of a figure over the tenants that an adapter serves."""
        return max((figure(self.served[name]) for name in rep.members), default=0.0)


def summary(
    plan: Plan,
    path: str,
    index: Fleet | None,
    engine: Engine,
    *,
    slots: int,
    base: BaseShapes | None = None,
    changes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> FleetReport:
    """Sum a plan up; without an index there is no map of similarities and little about memory."""
    whole = outcome(plan, path, {})
    served = {name: _tenant(item, plan.representatives[item.by]) for name, item in _all(plan)}
    counts = Counter(item.fate for item in served.values())
    counts["none"] = len(plan.excluded)
    used = memory(plan, index, engine, slots, base)
    alone: dict[str, list[str]] = {reason: [] for reason in whole.alone}
    for name, item in served.items():
        if item.fate == "own":
            alone.setdefault(item.reason, []).append(name)
    notes = [*plan.notes, *used.notes]
    found = None if index is None else similarity(plan, index)
    if index is not None and found is None:
        notes.append("similarities are not shown: fewer than two tenants have a sketch")
    return FleetReport(
        plan=path,
        fleet=plan.fleet,
        bases=tuple(sorted({rep.base for rep in plan.representatives.values() if rep.base})),
        seed=plan.seed,
        max_error=plan.max_error,
        metric=plan.metric,
        allow_sharing=whole.allow_sharing,
        tenants=whole.tenants,
        adapters=whole.adapters,
        before=whole.before,
        size=whole.size,
        size_before=whole.size_before,
        engine=engine.name,
        slots=slots,
        gpu=used.gpu,
        resident=used.resident,
        fates={fate: counts[fate] for fate in FATES},
        errors=whole.errors,
        foreign=whole.foreign,
        mean=_mean([item.error for item in served.values()]),
        mean_foreign=_mean([item.foreign for item in served.values()]),
        largest=max((figure(item, plan.metric) for item in served.values()), default=0.0),
        served=served,
        representatives=plan.representatives,
        alone={reason: tuple(names) for reason, names in alone.items()},
        excluded=plan.excluded,
        related=plan.related,
        discovery=plan.discovery,
        pareto=tuple(_trade(point, used) for point in plan.pareto),
        gain=plan.gain,
        similarity=found,
        changes=changes,
        assigned=plan.assigned,
        warnings=(*plan.warnings, *_stale(plan, index), *warnings),
        notes=tuple(notes),
    )


def _all(plan: Plan) -> list[tuple[str, Served]]:
    return sorted(plan.served.items())


def _tenant(item: Served, rep: Representative) -> Tenant:
    fate: Fate = "shared"
    if rep.kind == "base":
        fate = "base"
    elif len(rep.members) == 1 and rep.location:
        fate = "own"
    elif not rep.location:
        fate = "new"
    return Tenant(
        fate=fate,
        kind=rep.kind,
        by=item.by,
        error=item.error,
        measured=item.measured,
        missing=item.missing,
        foreign=item.foreign,
        cosine=item.cosine,
        worst=item.worst,
        traffic=item.traffic,
        norm=item.norm,
        rank=item.rank,
        size=item.size,
        reason=item.reason,
    )


def _trade(point: Point, used: Memory) -> Trade:
    gpu = used.of(point.adapters)
    return Trade(point.max_error, point.adapters, point.largest, point.mean, point.foreign, gpu)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _stale(plan: Plan, index: Fleet | None) -> list[str]:
    """What the index says now that the plan does not know."""
    if index is None:
        return []
    records = {record.tenant.name: record for record in index.records}
    gone = sorted(name for name in plan.served if name in index.removed)
    held = sorted(
        rep.id for rep in plan.representatives.values() if index.removed.intersection(rep.holds)
    )
    moved = [n for n, item in plan.served.items() if n in records and records[n].norm != item.norm]
    unknown = records.keys() - plan.served.keys() - plan.excluded.keys()
    said = []
    if gone or held:
        said.append(
            f"off-boarded since the plan was made: {len(gone)} of the tenants that it serves; "
            f"{len(held)} of its adapters hold weights of such: plan again"
        )
    if moved:
        said.append(f"their adapters have changed since the plan was made: {_some(moved)}")
    if unknown:
        said.append(f"in the index, but not in the plan: {_some(unknown)}")
    return said


def _some(names: Collection[str]) -> str:
    more = len(names) - 1
    return min(names) + (f" and {more:,} more" if more else "")
