"""A plan while it is made: what serves whom, added group by group."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterops.errors import ChangedError, FormatError
from adapterops.files.scratch import scratch
from adapterops.fleet.consent.policy import NEAR_EXACT, Consent
from adapterops.fleet.grouping.groups import Group, Grouped, Value, exact
from adapterops.fleet.grouping.sets import Sets, sketches
from adapterops.fleet.indexing.current import AGAIN, as_it_is
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.ids import DIGITS, fresh
from adapterops.fleet.plans.plan import Metric, Plan, Point, Related, Representative, Served
from adapterops.fleet.plans.planfile import Sketched
from adapterops.fleet.replanning.staying import Stayed
from adapterops.fleet.representing.averaging import FILE, Asked, Average, Make, averages
from adapterops.fleet.types import Array, Record, Signature
from adapterops.fleet.verifying.exact import Error
from adapterops.formats.names import DIRECTORIES
from adapterops.stream import Compute

_BASE = "base"
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
        self._root = root
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
                self._serve(record, rep.id, one.errors[record.tenant.name], reason)
            self.stayed.append(rep)
        self._parts += sketches

    def _before(self, record: Record, rep: Representative) -> str:
        private = self._consent.policy.rule(record.tenant.name).private
        return "private" if private else rep.reason

    def add_others(self, stale: Collection[str], *, strict: bool) -> list[Record]:
        """Who cannot be compared: no-ops, kinds that only serve themselves, broken files.

        The result are the other records, without those whose names are in `stale`.
        """
        able = []
        for record in self.fleet.records:
            private = self._consent.policy.rule(record.tenant.name).private
            if record.status == "broken":
                self._exclude(record, record.reason, strict)
            elif record.tenant.name in stale:
                self.apart += 1
            elif record.status == "no-op" and not private:
                self._add_no_op(record)
            elif record.status in ("no-op", "ineligible"):
                self._alone(record, "private" if private else f"not compared: {record.reason}")
                self.apart += 1
            else:
                able.append(record)
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

    def _exclude(self, record: Record, reason: str, strict: bool) -> None:
        if strict:
            raise FormatError(reason, path=record.tenant.path)
        self._excluded[record.tenant.name] = reason

    def _add_no_op(self, record: Record) -> None:
        name = record.tenant.name
        rep = self._reps.get(_BASE) or Representative(
            _BASE, "base", "", base=record.base, reason="the base model itself: their change is 0"
        )
        self._reps[_BASE] = replace(rep, members=(*rep.members, name))
        self.served[name] = Served(
            _BASE,
            traffic=record.tenant.traffic,
            size=record.size,
            rank=record.rank,
            reason="its change is zero",
        )

    def _alone(self, record: Record, reason: str) -> Representative:
        """A tenant that its own adapter serves."""
        rep = self._original(record, reason)
        self._reps[rep.id] = rep
        self._serve(record, rep.id, exact(record), reason)
        return rep

    def _original(self, record: Record, reason: str) -> Representative:
        return Representative(
            self._fresh_id(record.content),
            "original",
            record.tenant.path,
            record.tenant.location,
            members=(record.tenant.name,),
            holds=(record.tenant.name,),
            rank=record.rank,
            size=record.size,
            dtype=record.dtype,
            dialect=record.dialect,
            base=record.base,
            content=record.content,
            reason=reason,
        )

    def _fresh_id(self, content: str) -> str:
        """The start of a content's hash, with a number where private duplicates share it."""
        return fresh(content[:DIGITS], self._reps)

    def _serve(self, record: Record, id: str, error: Error, reason: str) -> None:
        self.served[record.tenant.name] = Served(
            by=id,
            error=error.error,
            missing=error.missing,
            foreign=error.foreign,
            cosine=error.cosine,
            worst=error.worst,
            measured=error.measured,
            traffic=record.tenant.traffic,
            norm=record.norm,
            rank=record.rank,
            size=record.size,
            reason=reason,
        )

    def add_set(
        self, each: Sets, found: Grouped, bounds: Array, make: Make, value: Value, on: Compute
    ) -> None:
        """The verified groups of a partition, each with the best representative."""
        for node, error in found.failed.items():
            name = each.nodes[node].records[0].tenant.name
            self._warnings.append(f"{name} could not be compared: {error.message}")
        wide = [group for group in found.groups if _differ(group, value)]
        asked = [self._asked(each, group, bounds) for group in wide]
        kept: list[tuple[Representative, Signature | None, int]] = []
        with ExitStack() as stack:
            made: Iterator[Average] = iter(())
            if asked:
                inside = stack.enter_context(scratch(self._root))
                made = averages(asked, inside, self.fleet.seed, make, value, on)
            for group in found.groups:
                average = next(made) if _differ(group, value) else None
                kept.append(self._add_group(each, group, average))
        self._parts += sketches(each, self.fleet, self._consent, kept)

    def _asked(self, each: Sets, group: Group, bounds: Array) -> Asked:
        rows = np.array(sorted(group.errors))
        records = [each.nodes[row].record for row in rows]
        names = [record.tenant.name for record in records]
        able = each.permissions.blend(rows)
        allowed = [name for name, yes in zip(names, able, strict=True) if yes]
        limits = dict(zip(names, bounds[rows].tolist(), strict=True))
        errors = dict(zip(names, (group.errors[row] for row in rows), strict=True))
        return Asked(each.nodes[group.center].record, records, allowed, limits, errors)

    def _add_group(
        self, each: Sets, group: Group, made: Average | None
    ) -> tuple[Representative, Signature | None, int]:
        center = each.nodes[group.center]
        if len(group.errors) == 1 and len(center.records) == 1:
            record = center.records[0]
            return self._alone(record, self._why_alone(each, record)), None, group.center
        errors = {node: group.errors[node] for node in sorted(group.errors)}
        reason = made.chosen.reason if made else _DUPLICATES
        new = made.signature if made else None
        if made and new:
            names = {each.nodes[node].records[0].tenant.name: node for node in errors}
            checked = {names[name]: error for name, error in made.chosen.errors.items()}
            errors = {node: error for node, error in checked.items() if isinstance(error, Error)}
        rep = self._representative(each, group, made, reason)
        members = []
        for node, error in errors.items():
            for record in each.nodes[node].records:
                own = exact(record) if record is center.records[0] and new is None else error
                same = record.content == rep.content
                self._serve(record, rep.id, own, "its own bytes" if same else f"shares: {reason}")
                members.append(record.tenant.name)
        self._reps[rep.id] = replace(rep, members=tuple(sorted(members)))
        return self._reps[rep.id], new, group.center

    def _representative(
        self, each: Sets, group: Group, made: Average | None, reason: str
    ) -> Representative:
        center = each.nodes[group.center].records[0]
        bound = made.chosen.bound if made else None
        if made is None or made.signature is None:
            return replace(self._original(center, reason), kind="medoid", members=(), bound=bound)
        chosen, new = made.chosen, made.signature
        id = self._fresh_id(new.content)
        inside = "" if center.dialect in DIRECTORIES else f"/{FILE}"
        place = self._root / self._below / id
        place.parent.mkdir(exist_ok=True)
        made.folder.rename(place)
        twins = [
            record.tenant.name
            for node in each.nodes
            if node.records[0].tenant.name in chosen.holds
            for record in node.records
        ]
        return Representative(
            id,
            chosen.kind,
            f"{self._below}/{id}{inside}",
            holds=tuple(sorted(twins)),
            rank=chosen.rank,
            size=chosen.size,
            dtype=chosen.dtype,
            dialect=center.dialect,
            base=center.base,
            content=new.content,
            bound=bound,
            reason=reason,
        )

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
        sizes = {record.content: record.size for record in records if record.status != "broken"}
        served = {record.content for record in records if record.status in ("ok", "ineligible")}
        before = {
            "adapters_before": len(served),
            "bytes_before": sum(sizes.values()),
        }
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


def _differ(group: Group, value: Value) -> bool:
    """Whether a group's members are more than duplicates."""
    return len(group.errors) > 1 and max(map(value, group.errors.values())) > NEAR_EXACT


def _in(metric: Metric, item: Served) -> Served:
    """With the figure that is bounded also where nothing had to be measured."""
    own = metric != "frobenius" and item.error == 0.0
    return replace(item, measured=0.0) if own else item
