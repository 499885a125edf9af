"""New tenants, and new versions of tenants' adapters, in a plan that otherwise stays as it is.

Sketches propose the three nearest representatives that consent allows, exact errors decide, and who
is within the bound of none of them is served by its own adapter, which may then serve later ones.
Nobody else moves: the weights of a representative and its other members stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from adapterops.errors import AdapterOpsError, IncompatibleError
from adapterops.fleet.consent.policy import NEAR_EXACT, Consent
from adapterops.fleet.plans.plan import Plan, Representative, Served, figure
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.replanning.joining import (
    Added,
    Assigned,
    Fate,
    Newcomer,
    joined,
    merged,
    singleton,
    sketch_of,
)
from adapterops.fleet.replanning.nearest import Searched, nearest, reach, searched
from adapterops.fleet.replanning.sticky import place
from adapterops.fleet.verifying.exact import Error

CANDIDATES = 3
KIND = 3  # parts of a key that are no consent, which is asked of the tenants themselves
Verify = Callable[[Representative, Sequence[str]], Mapping[str, Error | AdapterOpsError]]
Representatives = Mapping[str, Representative]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The plan with everybody in it, its sketches, and what became of each, sorted by tenant."""

    plan: Plan
    sketched: tuple[Sketched, ...]
    assigned: tuple[Assigned, ...]


def limit_of(plan: Plan) -> float:
    """The error that the plan allows: its bound, or, planned by number, the largest that it has."""
    if plan.max_error is not None:
        return plan.max_error
    return max((figure(item, plan.metric) for item in plan.served.values()), default=0.0)


def assign(
    plan: Plan,
    sketched: Sequence[Sketched],
    newcomers: Iterable[Newcomer],
    consent: Consent,
    verify: Verify,
) -> Assignment:
    """The plan with `newcomers` assigned; `verify` gives the exact errors of serving tenants.

    A tenant of the plan is first verified against what serves it now. Raises IncompatibleError for
    a new version in the place of a file that serves others.
    """
    known = {item.tenant.name: item for item in newcomers}
    known = {name: known[name] for name in sorted(known)}
    _check_replaced(plan, known)
    pool = [searched(part) for part in sketched]
    judge = _Judge(plan, consent, verify, limit_of(plan))
    fates = {name: _unsketched(item, plan, consent) for name, item in known.items()}
    asking = {name: known[name] for name, fate in fates.items() if fate is None}
    offers = {
        name: _offers(judge, plan.representatives, pool, item) for name, item in asking.items()
    }
    placed = place(offers, partial(judge.judged, plan.representatives, asking))
    for name, (_, served) in placed.found.items():
        fates[name] = judge.taken(name, served)
    added: list[Added] = []
    made: dict[str, Representative] = {}
    parts: list[Searched] = []
    taken = set(plan.representatives)
    for name in placed.rest:
        item, own = asking[name], _own(plan, name)
        among = {name: _offers(judge, made, parts, item)}
        later = place(among, partial(judge.judged, made, asking)).found
        if name in later:
            fates[name] = judge.taken(name, later[name][1])
            continue
        rep = singleton(item, taken - {own} if own else taken)
        sketch = sketch_of(rep.id, item)
        added.append(Added(rep, sketch))
        made[rep.id] = rep
        taken.add(rep.id)
        parts = parts if sketch is None else grown(parts, sketch)
        fates[name] = judge.alone(item, rep.id)
    found = tuple(fate for fate in fates.values() if fate is not None)
    return Assignment(*joined(plan, sketched, found, added), found)


def grown(parts: Sequence[Searched], more: Sketched) -> list[Searched]:
    """The parts with a further one; no two of a kind are of about one size, so they stay few."""
    kind = (more.key, more.layout)
    alike = [one for one in parts if (one.part.key, one.part.layout) == kind]
    rest = [one for one in parts if (one.part.key, one.part.layout) != kind]
    while alike and len(alike[-1].part.ids) <= len(more.ids):
        [more] = merged([alike.pop().part, more])
    return [*rest, *alike, searched(more)]


@dataclass(frozen=True, slots=True)
class _Judge:
    """Exact errors decide; `missed` is the nearest of those that were over a tenant's bound."""

    plan: Plan
    consent: Consent
    verify: Verify
    limit: float
    missed: dict[str, tuple[float, str]] = field(default_factory=dict)

    def judged(
        self,
        representatives: Representatives,
        items: Mapping[str, Newcomer],
        asked: Sequence[tuple[str, Sequence[str]]],
    ) -> Iterator[dict[str, Served | None]]:
        """How each tenant is served by a representative, None for who may not be; by id in turn."""
        for id, names in asked:
            rep = representatives[id]
            errors = self.verify(rep, names)
            yield {name: self._one(items[name], rep, errors[name]) for name in names}

    def _one(
        self, item: Newcomer, rep: Representative, error: Error | AdapterOpsError
    ) -> Served | None:
        if isinstance(error, AdapterOpsError):
            return None
        name, id = item.tenant.name, rep.id
        same = item.signature.content == rep.content
        reason = "its own bytes" if same else "shares an adapter that was there"
        served = _served(self.plan, item, id, error, reason)
        off = figure(served, self.plan.metric)
        exact = self.consent.may_differ(name) or error.error <= NEAR_EXACT
        if exact and off <= self.limit:
            return served
        self.missed[name] = min(self.missed.get(name, (off, id)), (off, id))
        return None

    def taken(self, name: str, served: Served) -> Assigned:
        """One whom a representative serves."""
        before = _before(self.plan, name)
        fate: Fate = "kept" if before == served.by else "joined"
        return Assigned(name, fate, before, served, served.reason)

    def alone(self, item: Newcomer, id: str) -> Assigned:
        """One whom its own adapter serves, and why."""
        name, found = item.tenant.name, item.signature
        if self.consent.policy.rule(name).private:
            reason = detail = "private"
        elif found.status != "ok":
            reason = detail = found.reason
        else:
            may = self.consent.may_differ(name)
            reason = "nothing that may serve it is near enough" if may else "no duplicate of it"
            far, nearest_id = self.missed.get(name, (math.inf, ""))
            detail = f"{reason}: {nearest_id} is {far:.3g} away" if math.isfinite(far) else reason
        served = _served(self.plan, item, id, None, reason)
        before = _before(self.plan, name)
        return Assigned(name, "kept" if before == id else "alone", before, served, detail)


def _served(plan: Plan, item: Newcomer, by: str, error: Error | None, reason: str) -> Served:
    found, old = item.signature, plan.served.get(item.tenant.name)
    own = Served(
        by,
        traffic=item.tenant.traffic if old is None else old.traffic,
        norm=found.norm,
        rank=found.rank,
        size=found.size,
        reason=reason,
        location=item.tenant.location,
    )
    if error is None:
        return own
    return replace(
        own,
        error=error.error,
        missing=error.missing,
        foreign=error.foreign,
        cosine=error.cosine,
        worst=error.worst,
        measured=error.measured,
    )


def _before(plan: Plan, name: str) -> str:
    return plan.served[name].by if name in plan.served else ""


def _own(plan: Plan, name: str) -> str:
    """The id of the representative that serves a tenant and nobody else, "" if none does."""
    id = _before(plan, name)
    return id if id and plan.representatives[id].members == (name,) else ""


def _check_replaced(plan: Plan, known: Mapping[str, Newcomer]) -> None:
    """Refuse a new version in the place of a file that others are served by as it was."""
    places = {item.tenant.location: item for item in known.values()}
    for rep in plan.representatives.values():
        item = places.get(rep.location) if rep.location else None
        if item is None or item.signature.content == rep.content:
            continue
        others = [name for name in rep.members if name != item.tenant.name]
        if others:
            raise IncompatibleError(
                f"this file is what serves {len(others)} other tenants ({min(others)!r} first), "
                "and it has changed since that was planned",
                path=item.tenant.path,
                hint="run index again and plan again: cluster FLEET --previous PLAN -o PLAN2",
            )


def _unsketched(item: Newcomer, plan: Plan, consent: Consent) -> Assigned | None:
    """What becomes of one whom the base model serves, or that cannot be served; else None."""
    name, found = item.tenant.name, item.signature
    before = _before(plan, name)
    if found.status == "broken":
        return Assigned(name, "failed", before, None, found.reason)
    if found.status != "no-op" or consent.policy.rule(name).private:
        return None
    reason = "its change is zero"
    id = next((id for id, rep in plan.representatives.items() if rep.kind == "base"), "base")
    fate: Fate = "kept" if before == id else "base"
    return Assigned(name, fate, before, _served(plan, item, id, None, reason), reason)


def _offers(
    judge: _Judge,
    representatives: Representatives,
    pool: Iterable[Searched],
    item: Newcomer,
) -> list[str]:
    """Ids to verify against: what serves the tenant now, then the nearest that may serve it.

    Its own former file is none of them where it serves nobody else.
    """
    name, plan, consent = item.tenant.name, judge.plan, judge.consent
    if item.signature.status != "ok" or consent.policy.rule(name).private:
        return []
    limit = reach(plan.metric, judge.limit)
    if not consent.may_differ(name):
        limit = min(limit, NEAR_EXACT)
    current, own = _before(plan, name), _own(plan, name)

    def usable(id: str) -> bool:
        return id != own and _may(representatives.get(id), name, consent)

    near = sorted(
        (found.estimate, found.id)
        for among in pool
        if among.part.key[:KIND] == item.key[:KIND]
        for found in nearest(among, item.signature, limit, usable)
    )
    first = [current] if usable(current) else []
    return list(dict.fromkeys(first + [id for _, id in near[:CANDIDATES]]))


def _may(rep: Representative | None, name: str, consent: Consent) -> bool:
    """Whether all whose weights a representative holds may serve a tenant."""
    return (
        rep is not None
        and rep.kind != "base"
        and all(consent.may_be_served_by(name, server) for server in rep.holds)
    )
