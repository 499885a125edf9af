"""A plan with tenants that join it or change what serves them; everybody else as before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from adapterops.fleet.plans.ids import DIGITS, fresh
from adapterops.fleet.plans.plan import Plan, Representative, Served
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.types import Layout, Signature, Tenant

Fate = Literal["kept", "joined", "alone", "base", "failed"]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A tenant with the signature of its new adapter; `key` is that of its partition."""

    tenant: Tenant
    signature: Signature
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """What became of one: `kept` by what served it, `joined` another, `alone` with its own adapter,
    on the `base` itself, or `failed`; `before` is the id of what served it, "" if nothing did.

    `served` is None for one that failed: if the plan has the tenant, it is served as before.
    """

    tenant: str
    fate: Fate
    before: str
    served: Served | None
    reason: str


@dataclass(frozen=True, slots=True)
class Added:
    """A representative that was not there; without a sketch none can join it."""

    representative: Representative
    sketched: Sketched | None


def singleton(item: Newcomer, taken: Collection[str]) -> Representative:
    """The representative that is a tenant's own adapter, with an id that is not `taken`."""
    found, name = item.signature, item.tenant.name
    return Representative(
        id=fresh(found.content[:DIGITS], taken),
        kind="original",
        path=item.tenant.path,
        location=item.tenant.location,
        members=(name,),
        holds=(name,),
        rank=found.rank,
        size=found.size,
        dtype=found.dtype,
        dialect=found.dialect,
        base=found.base,
        content=found.content,
        reason="assigned",
    )


def sketch_of(id: str, item: Newcomer) -> Sketched | None:
    """The sketch of a newcomer as a plan keeps it; None if there is none."""
    found = item.signature
    if found.layout is None or found.status != "ok":
        return None
    row = found.sketch.astype(np.float32).reshape(1, -1)
    return Sketched(item.key, (id,), found.layout, np.array([found.norm]), row)


def joined(
    plan: Plan, sketched: Iterable[Sketched], found: Iterable[Assigned], added: Sequence[Added]
) -> tuple[Plan, tuple[Sketched, ...]]:
    """The plan and its sketches with these in it; representatives that serve nobody are gone."""
    served, excluded = dict(plan.served), dict(plan.excluded)
    for item in found:
        if item.served is not None:
            served[item.tenant] = item.served
            excluded.pop(item.tenant, None)
        elif item.tenant not in served:
            excluded[item.tenant] = item.reason
    new = {one.representative.id: one.representative for one in added}
    representatives = {**plan.representatives, **new}
    members: dict[str, set[str]] = {}
    for item in found:
        if item.served is None:
            continue
        before, now = plan.served.get(item.tenant), item.served.by
        if now not in representatives:
            representatives[now] = Representative(now, "base", "", reason="no adapter at all")
        for id in {now, *([before.by] if before else [])}:
            members.setdefault(id, set(representatives[id].members)).discard(item.tenant)
        members[now].add(item.tenant)
    for id, names in members.items():
        representatives[id] = _with(representatives[id], tuple(sorted(names)))
    gone = {id for id, names in members.items() if not names}
    for id in gone:
        del representatives[id]
    old = (_without(part, gone | new.keys()) for part in sketched)
    parts = merged([*old, *(one.sketched for one in added if one.sketched)])
    made = replace(plan, served=served, excluded=excluded, representatives=representatives)
    return made, parts


def _with(rep: Representative, members: tuple[str, ...]) -> Representative:
    """The representative of these members; a proven bound was one of its former members."""
    if members == rep.members:
        return rep
    if rep.kind in ("original", "medoid"):
        rep = replace(rep, kind="original" if members == rep.holds else "medoid")
    return replace(rep, members=members, bound=None)


def _without(part: Sketched, ids: Collection[str]) -> Sketched:
    """The part without these representatives."""
    if not any(id in part.ids for id in ids):
        return part
    here = np.array([id not in ids for id in part.ids], bool)
    kept = tuple(id for id in part.ids if id not in ids)
    return replace(part, ids=kept, norms=part.norms[here], sketches=part.sketches[here])


def merged(sketched: Iterable[Sketched]) -> tuple[Sketched, ...]:
    """One part for each key and layout, none that is empty."""
    alike: defaultdict[tuple[tuple[str, ...], Layout], list[Sketched]] = defaultdict(list)
    for part in sketched:
        if part.ids:
            alike[part.key, part.layout].append(part)
    return tuple(
        parts[0]
        if len(parts) == 1
        else replace(
            parts[0],
            ids=tuple(id for part in parts for id in part.ids),
            norms=np.concatenate([part.norms for part in parts]),
            sketches=np.vstack([part.sketches for part in parts]),
        )
        for parts in alike.values()
    )
