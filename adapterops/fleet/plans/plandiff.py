"""What changes between two plans: tenants that move, adapters that come, go or are rebuilt.

Being served by another adapter, or by one whose content is new, costs a tenant its prefix cache and
the engine a load: that is the churn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapterops.certificate import plain
from adapterops.fleet.plans.plan import Plan, Representative


@dataclass(frozen=True, slots=True)
class Move:
    """A tenant that another adapter serves than before, with its error (`plan.Served`) by each.

    `before` and `after` are ids of representatives, `rebuilt` says that one of the same id has
    another content.
    """

    tenant: str
    before: str
    after: str
    error_before: float
    error_after: float
    traffic: float
    rebuilt: bool = False


@dataclass(frozen=True, slots=True)
class Totals:
    """A plan in figures: tenants, adapters deployed and their bytes, the largest and mean error."""

    tenants: int
    adapters: int
    size: int
    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """The way from one plan to another.

    `joined` and `left` are tenants that only one of them serves, `moved` those that both serve, by
    different adapters. `added`, `removed` and `rebuilt` are ids of representatives. `churn` is the
    share of the tenants of both plans that moved, `churned_traffic` that of their traffic.
    """

    before: Totals
    after: Totals
    joined: tuple[str, ...]
    left: tuple[str, ...]
    moved: tuple[Move, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    rebuilt: tuple[str, ...]
    churn: float
    churned_traffic: float

    @property
    def empty(self) -> bool:
        """Whether every tenant is served as before, by the same adapters."""
        parts = (self.joined, self.left, self.moved, self.added, self.removed, self.rebuilt)
        return not any(parts)

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON takes it."""
        found: dict[str, Any] = plain(self)
        return {"schema": "adapterops.plandiff/1", **found}


def diff(old: Plan, new: Plan) -> PlanDiff:
    """What `new` changes against `old`; names and ids are sorted."""
    common = sorted(old.served.keys() & new.served.keys())
    moves = tuple(move for name in common if (move := _move(name, old, new)) is not None)
    kept = old.representatives.keys() & new.representatives.keys()
    traffic = sum(new.served[name].traffic for name in common)
    moved = sum(move.traffic for move in moves)
    return PlanDiff(
        before=_totals(old),
        after=_totals(new),
        joined=_only(new.served, old.served),
        left=_only(old.served, new.served),
        moved=moves,
        added=_only(new.representatives, old.representatives),
        removed=_only(old.representatives, new.representatives),
        rebuilt=tuple(
            id for id in sorted(kept) if not _same(old.representatives[id], new.representatives[id])
        ),
        churn=len(moves) / len(common) if common else 0.0,
        churned_traffic=moved / traffic if traffic else 0.0,
    )


def _only(these: Iterable[str], those: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(these) - set(those)))


def _move(tenant: str, old: Plan, new: Plan) -> Move | None:
    was, now = old.served[tenant], new.served[tenant]
    rebuilt = was.by == now.by
    if rebuilt and _same(old.representatives[was.by], new.representatives[now.by]):
        return None
    return Move(tenant, was.by, now.by, was.error, now.error, now.traffic, rebuilt)


def _same(one: Representative, other: Representative) -> bool:
    """Whether who has loaded one need not load the other."""
    first, second = (
        "" if rep.kind == "base" else rep.content or rep.location or rep.path
        for rep in (one, other)
    )
    return first == second


def _totals(plan: Plan) -> Totals:
    errors = [item.error for item in plan.served.values()]
    return Totals(
        tenants=len(errors),
        adapters=sum(rep.kind != "base" for rep in plan.representatives.values()),
        size=sum(rep.size for rep in plan.representatives.values()),
        largest=max(errors, default=0.0),
        mean=sum(errors) / len(errors) if errors else 0.0,
    )
