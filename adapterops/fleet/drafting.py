"""A plan while it is made: what serves whom, added group by group."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adapterops.errors import FormatError
from adapterops.fleet.exact import Error
from adapterops.fleet.grouping import Group, Grouped, exact
from adapterops.fleet.opened import Fleet
from adapterops.fleet.plan import Metric, Plan, Point, Related, Representative, Served
from adapterops.fleet.planfile import Sketched
from adapterops.fleet.policy import NEAR_EXACT, Consent
from adapterops.fleet.representative import Chosen
from adapterops.fleet.sets import Sets, placed
from adapterops.fleet.signature import signature
from adapterops.fleet.staying import Stayed
from adapterops.fleet.types import Array, Layout, Record, Signature

Make = Callable[..., Chosen]
Value = Callable[[Error], float]

_DIGITS = 12
_BASE = "base"
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

    def add_others(self, *, strict: bool) -> None:
        """Who cannot be compared: no-ops, kinds that only serve themselves, broken files."""
        for record in self.fleet.records:
            private = self._consent.policy.rule(record.tenant.name).private
            if record.status == "no-op" and not private:
                self._add_no_op(record)
            elif record.status in ("no-op", "ineligible"):
                self._alone(record, "private" if private else f"not compared: {record.reason}")
                self.apart += 1
            elif record.status == "broken":
                self._exclude(record, record.reason, strict)

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
        rep = Representative(
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
        self._reps[rep.id] = rep
        self._serve(record, rep.id, exact(record), reason)
        return rep

    def _fresh_id(self, content: str) -> str:
        """The start of a content's hash, with a number where private duplicates share it."""
        wanted, number, found = content[:_DIGITS], 1, content[:_DIGITS]
        while found in self._reps:
            number += 1
            found = f"{wanted}-{number}"
        return found

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

    def add_set(self, each: Sets, found: Grouped, bounds: Array, make: Make, value: Value) -> None:
        """The verified groups of a partition, each with the best representative."""
        for node, error in found.failed.items():
            name = each.nodes[node].records[0].tenant.name
            self._warnings.append(f"{name} could not be compared: {error.message}")
        kept: list[tuple[Representative, Signature | None, int]] = []
        for group in found.groups:
            kept.append(self._add_group(each, group, bounds, make, value))
        self._parts += self._sketches(each, kept)

    def _add_group(
        self, each: Sets, group: Group, bounds: Array, make: Make, value: Value
    ) -> tuple[Representative, Signature | None, int]:
        nodes = [each.nodes[member] for member in sorted(group.errors)]
        center = each.nodes[group.center]
        if len(nodes) == 1 and len(center.records) == 1:
            record = center.records[0]
            return self._alone(record, self._why_alone(each, record)), None, group.center
        made, new = None, None
        if len(nodes) > 1 and max(map(value, group.errors.values())) > NEAR_EXACT:
            made, new = self._average(each, group, bounds, make, value)
        errors = {node: group.errors[node] for node in sorted(group.errors)}
        reason = "duplicates: the same to 0.001 of their change"
        if made is not None:
            reason = made.reason
            names = {each.nodes[node].records[0].tenant.name: node for node in errors}
            checked = {names[name]: error for name, error in made.errors.items()}
            errors = {n: e for n, e in checked.items() if isinstance(e, Error)} if new else errors
        rep = self._representative(each, group, made, new, reason)
        members = []
        for node, error in errors.items():
            for record in each.nodes[node].records:
                own = exact(record) if record is center.records[0] and new is None else error
                same = record.content == rep.content
                self._serve(record, rep.id, own, "its own bytes" if same else f"shares: {reason}")
                members.append(record.tenant.name)
        self._reps[rep.id] = replace(rep, members=tuple(sorted(members)))
        return self._reps[rep.id], new, group.center

    def _average(
        self, each: Sets, group: Group, bounds: Array, make: Make, value: Value
    ) -> tuple[Chosen | None, Signature | None]:
        """What `make` makes of a group, and its signature where a file was written for it."""
        rows = np.array(sorted(group.errors))
        records = [each.nodes[row].record for row in rows]
        able = each.permissions.blend(rows)
        allowed = [record.tenant.name for record, yes in zip(records, able, strict=True) if yes]
        center = each.nodes[group.center].record
        folder = self._root / self._below / f"new-{len(self._reps)}"
        folder.parent.mkdir(exist_ok=True)
        if center.dialect != "peft":
            folder.mkdir()
        out = folder if center.dialect == "peft" else folder / "adapter.safetensors"
        made = make(center, records, out=out, allowed=allowed, max_error=float(bounds[rows].min()))
        if not made.path:
            shutil.rmtree(folder, ignore_errors=True)
            return made, None
        limits = {
            record.tenant.name: bounds[row] for record, row in zip(records, rows, strict=True)
        }
        over = [
            name
            for name, error in made.errors.items()
            if not isinstance(error, Error) or value(error) > limits[name]
        ]
        if over:
            shutil.rmtree(folder)
            self._notes.append(
                f"an average of {len(records)} tenants was over the bound of {over[0]}: an "
                "original serves them"
            )
            return None, None
        found = signature(made.path, self.fleet.seed)
        folder.rename(folder.with_name(self._fresh_id(found.content)))
        return made, found

    def _representative(
        self, each: Sets, group: Group, made: Chosen | None, new: Signature | None, reason: str
    ) -> Representative:
        center = each.nodes[group.center].records[0]
        if made is None or new is None:
            return Representative(
                self._fresh_id(center.content),
                "medoid",
                center.tenant.path,
                center.tenant.location,
                holds=(center.tenant.name,),
                rank=center.rank,
                size=center.size,
                dtype=center.dtype,
                dialect=center.dialect,
                base=center.base,
                content=center.content,
                bound=None if made is None else made.bound,
                reason=reason,
            )
        id = self._fresh_id(new.content)
        inside = "" if center.dialect == "peft" else "/adapter.safetensors"
        twins = [
            record.tenant.name
            for node in each.nodes
            if node.records[0].tenant.name in made.holds
            for record in node.records
        ]
        return Representative(
            id,
            made.kind,
            f"{self._below}/{id}{inside}",
            holds=tuple(sorted(twins)),
            rank=made.rank,
            size=made.size,
            dtype=made.dtype,
            dialect=center.dialect,
            base=center.base,
            content=new.content,
            bound=made.bound,
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

    def _sketches(
        self, each: Sets, kept: Sequence[tuple[Representative, Signature | None, int]]
    ) -> list[Sketched]:
        """The sketches of a partition's representatives that others may be served by."""
        able = [
            (rep, new, place)
            for rep, new, place in kept
            if all(self._consent.may_represent(name) for name in rep.holds)
        ]
        if not able:
            return []
        records = [each.nodes[place].records[0] for _, _, place in able]
        columns = self.fleet.columns(records)
        sketches, _, stems = self.fleet.matrix(records)
        shape = Layout(stems, columns.shapes, columns.side)
        norms = np.array([record.norm for record in records])
        for row, (_, new, _) in enumerate(able):
            if new is not None:
                sketches[row], norms[row] = placed(new, shape), new.norm
        ids = tuple(rep.id for rep, _, _ in able)
        return [Sketched(each.partition.key, ids, shape, norms, sketches)]

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
            served=dict(sorted(self.served.items())),
            representatives=dict(sorted(self._reps.items())),
            excluded=dict(sorted(self._excluded.items())),
            related=related,
            discovery=discovery,
            pareto=pareto,
            gain=gain,
            notes=tuple(self._notes),
            warnings=tuple(self._warnings),
        )
