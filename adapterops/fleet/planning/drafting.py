"""A plan while it is made: what serves whom, added group by group."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterops.errors import AdapterOpsError, ChangedError, FormatError
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.grouping.groups import Group, exact
from adapterops.fleet.grouping.sets import Sets, sketches
from adapterops.fleet.indexing.current import AGAIN, as_it_is
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.planning.entries import (
    BASE,
    average,
    base_of,
    original,
    served_by,
    served_by_base,
)
from adapterops.fleet.planning.represented import Represented
from adapterops.fleet.plans.ids import DIGITS, fresh
from adapterops.fleet.plans.plan import Metric, Plan, Point, Related, Representative, Served
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.replanning.staying import Stayed
from adapterops.fleet.representing.averaging import FILE, Average
from adapterops.fleet.types import Record, Signature
from adapterops.fleet.verifying.exact import Error
from adapterops.formats.names import DIRECTORIES

_DUPLICATES = "duplicates: the same to 0.001 of their change"
_ALONE = {
    "none": "nothing in the fleet is the same to 0.001; sharing more needs consent",
    "group": "nothing in its share group is near enough",
    "all": "nothing in the fleet is near enough",
}


class Draft:
    """What serves whom so far. `root` is where PLAN is made, `below` the folder of its adapters."""

    def __init__(self, fleet: Fleet, consent: Consent, root: Path, below: str) -> None:
        self.fleet = fleet
        self.served: dict[str, Served] = {}
        self.apart = 0
        self.stayed: list[Representative] = []
        self._consent = consent
        self.root = root
        self._below = below
        self._reps: dict[str, Representative] = {}
        self._excluded: dict[str, str] = {}
        self._parts: list[Sketched] = []
        self._notes: list[str] = []
        self._warnings: list[str] = []

    @property
    def adapters(self) -> int:
        """How many are deployed so far."""
        return sum(rep.kind != "base" for rep in self._reps.values())

    @property
    def bound_to_others(self) -> set[str]:
        """Tenants whose own files must stay what they were compared as."""
        shared = [rep for rep in self._reps.values() if rep.kind != "original"]
        return {name for rep in shared for name in (*rep.members, *rep.holds)}

    def note(self, text: str) -> None:
        """Something the plan should say."""
        self._notes.append(text)

    def add_stayed(self, stayed: Iterable[Stayed], sketches: Iterable[Sketched]) -> None:
        """Representatives of an earlier plan that stay, with all whom they serve, and sketches."""
        for one in stayed:
            rep = one.representative
            if rep.kind in ("original", "medoid"):
                rep = replace(rep, kind="original" if rep.members == rep.holds else "medoid")
            self._reps[rep.id] = rep
            for record in one.records:
                same = record.content == rep.content
                reason = "its own bytes" if same else "shares, as before"
                if rep.members == (record.tenant.name,) and same:
                    reason = self._before(record, rep)
                name = record.tenant.name
                self.served[name] = served_by(rep.id, record, one.errors[name], reason)
            self.stayed.append(rep)
        self._parts += sketches

    def _before(self, record: Record, rep: Representative) -> str:
        private = self._consent.policy.rule(record.tenant.name).private
        return "private" if private else rep.reason

    def add_others(self, stale: Collection[str], *, strict: bool) -> list[Record]:
        """Who cannot be compared: no-ops, kinds that only serve themselves, broken files.

        The result are the other records, without those whose names are in `stale`.
        """
        able: list[Record] = []
        none: list[Record] = []
        for record in self.fleet.records:
            private = self._consent.policy.rule(record.tenant.name).private
            if record.status == "broken":
                if strict:
                    raise FormatError(record.reason, path=record.tenant.path)
                self._excluded[record.tenant.name] = record.reason
            elif record.tenant.name in stale:
                self.apart += 1
            elif record.status == "no-op" and not private:
                none.append(record)
            elif record.status in ("no-op", "ineligible"):
                self._alone(record, "private" if private else f"not compared: {record.reason}")
                self.apart += 1
            else:
                able.append(record)
        if none:
            self._reps[BASE] = base_of(none)
            self.served |= {record.tenant.name: served_by_base(record) for record in none}
        return able

    def add_stale(self, versions: Mapping[str, str], *, strict: bool, allow_pickle: bool) -> None:
        """Those whose files are not as indexed, each served by its own as it is now.

        `versions` are theirs now, "" for who is gone. Raises ChangedError if `strict`.
        """
        for record in self.fleet.records:
            name = record.tenant.name
            if name not in versions or record.status == "broken":
                continue
            what = "changed" if versions[name] else "is gone"
            said = f"{what} since it was indexed"
            if strict:
                raise ChangedError(said, path=record.tenant.path, hint=AGAIN)
            self._warnings.append(f"{name} {said}: {AGAIN}")
            now = as_it_is(record, versions[name], self.fleet.seed, allow_pickle=allow_pickle)
            if now.status == "broken":
                self._excluded[name] = now.reason if versions[name] else said
            else:
                self._alone(now, f"{said}: {AGAIN}")

    def _alone(self, record: Record, reason: str) -> Representative:
        """A tenant that its own adapter serves."""
        rep = original(record, reason, self._reps)
        self._reps[rep.id] = rep
        self.served[record.tenant.name] = served_by(rep.id, record, exact(record), reason)
        return rep

    def add_groups(
        self,
        each: Sets,
        groups: Iterable[Represented],
        failed: Mapping[int, AdapterOpsError],
    ) -> None:
        """A partition's groups with what serves them; averages move into PLAN.

        `failed` are the nodes whose files could not be read again.
        """
        for node, error in failed.items():
            name = each.nodes[node].records[0].tenant.name
            self._warnings.append(f"{name} could not be compared: {error.message}")
        kept = [self._add_group(each, one.group, one.average) for one in groups]
        self._parts += sketches(each, self.fleet, self._consent, kept)

    def _add_group(
        self, each: Sets, group: Group, made: Average | None
    ) -> tuple[Representative, Signature | None, int]:
        center = each.nodes[group.center].records[0]
        if len(group.errors) == 1 and len(each.nodes[group.center].records) == 1:
            return self._alone(center, self._why_alone(each, center)), None, group.center
        reason = made.chosen.reason if made else _DUPLICATES
        new = made.signature if made else None
        errors = {node: group.errors[node] for node in sorted(group.errors)}
        if made and new:
            names = {each.nodes[node].records[0].tenant.name: node for node in errors}
            checked = {names[name]: error for name, error in made.chosen.errors.items()}
            errors = {node: error for node, error in checked.items() if isinstance(error, Error)}
            rep = self._published(each, sorted(errors), center, made, new.content)
        else:
            bound = made.chosen.bound if made else None
            rep = replace(original(center, reason, self._reps), kind="medoid", bound=bound)
        members = []
        for node, error in errors.items():
            for record in each.nodes[node].records:
                own = exact(record) if record is center and new is None else error
                name, same = record.tenant.name, record.content == rep.content
                why = "its own bytes" if same else "shares"
                self.served[name] = served_by(rep.id, record, own, why)
                members.append(name)
        self._reps[rep.id] = replace(rep, members=tuple(sorted(members)))
        return self._reps[rep.id], new, group.center

    def _published(
        self, each: Sets, nodes: Sequence[int], like: Record, made: Average, content: str
    ) -> Representative:
        """An average, moved to where PLAN has its adapters."""
        id = fresh(content[:DIGITS], self._reps)
        place = self.root / self._below / id
        place.parent.mkdir(exist_ok=True)
        made.folder.rename(place)
        holds = [
            record.tenant.name
            for node in nodes
            if each.nodes[node].records[0].tenant.name in made.chosen.holds
            for record in each.nodes[node].records
        ]
        inside = "" if like.dialect in DIRECTORIES else f"/{FILE}"
        return average(made, content, f"{self._below}/{id}{inside}", holds, like, id)

    def _why_alone(self, each: Sets, record: Record) -> str:
        rule = self._consent.policy.rule(record.tenant.name)
        if rule.private:
            return "private"
        if len(each.nodes) == 1:
            return f"the only one of its kind: {each.partition.why}"
        allow = self._consent.allow_sharing
        if allow == "group" and not rule.share_group:
            return _ALONE["none"]
        return _ALONE[allow]

    def sketched(self) -> list[Sketched]:
        """All sketches."""
        return self._parts

    def plan(
        self,
        *,
        max_error: float,
        metric: Metric,
        options: Mapping[str, Any],
        discovery: float,
        pareto: tuple[Point, ...],
        gain: Mapping[str, Any],
        related: tuple[Related, ...],
    ) -> Plan:
        """The whole plan."""
        records = self.fleet.records
        # What was not read has no content: it is like nothing else.
        own = {record.tenant.name: record.content or record.tenant.name for record in records}
        sizes = {own[r.tenant.name]: r.size for r in records if r.status != "broken"}
        served = {own[r.tenant.name] for r in records if r.status in ("ok", "ineligible")}
        before = {"adapters_before": len(served), "bytes_before": sum(sizes.values())}
        return Plan(
            fleet=os.path.abspath(self.fleet.path),
            seed=self.fleet.seed,
            max_error=max_error,
            metric=metric,
            options={**options, **before},
            served={name: _in(metric, item) for name, item in sorted(self.served.items())},
            representatives=dict(sorted(self._reps.items())),
            excluded=dict(sorted(self._excluded.items())),
            related=related,
            discovery=discovery,
            pareto=pareto,
            gain=gain,
            notes=tuple(self._notes),
            warnings=tuple(self._warnings),
        )


def _in(metric: Metric, item: Served) -> Served:
    """With the figure that is bounded also where nothing had to be measured."""
    own = metric != "frobenius" and item.error == 0.0
    return replace(item, measured=0.0) if own else item
