"""Planning again beside an earlier plan: who stays with the adapter that served them.

What of the earlier plan may stand is offered first to its own members, then to whoever is near it;
files are compared anew, for any of them may have changed. Tenants for whom a fresh plan would save
enough adapters are let go (`sticky.exchanges`), and everybody who is left is covered afresh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.grouping.groups import Compare, Grouped, Value, exact, fits
from adapterops.fleet.grouping.partition import Partition
from adapterops.fleet.grouping.vectors import delta_vectors
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.ids import DIGITS
from adapterops.fleet.plans.plan import Metric, Plan, Representative
from adapterops.fleet.plans.planfile import Sketched, located, read_sketches
from adapterops.fleet.replanning.assign import CANDIDATES, KIND
from adapterops.fleet.replanning.nearest import Near, nearest_of_all, reach, searched
from adapterops.fleet.replanning.sticky import exchanges, offers_of, place, survivors
from adapterops.fleet.types import Layout, Record
from adapterops.fleet.verifying.exact import Error


@dataclass(frozen=True, slots=True)
class Stayed:
    """A representative of the earlier plan that stands, its members' verified errors, its sketch.

    `records` are the members, sorted by tenant.
    """

    representative: Representative
    records: tuple[Record, ...]
    errors: Mapping[str, Error]


# A partition's verified groups with the records of each of its nodes.
Fresh = tuple[Grouped, Sequence[Sequence[Record]]]


def staying(
    folder: str,
    previous: Plan,
    fleet: Fleet,
    parts: Sequence[Partition],
    fresh: Sequence[Fresh],
    consent: Consent,
    bound: float,
    metric: Metric,
    compare: Compare,
    value: Value,
) -> tuple[list[Stayed], list[Partition]]:
    """What stays of `previous`, a plan at `folder`, with whom it serves; who is to be covered anew.

    `fresh` are the groups of a plan that keeps nothing: where it serves enough adapters less, its
    groups are taken (`sticky.exchanges`). `bound` is in terms of `metric`, which `value` gives the
    figure of.
    """
    found = _standing(folder, previous, fleet, parts, consent, bound, metric, compare, value)
    placed = {name for one in found for name in one.errors}
    everyone = [record for part in parts for record in part.records]
    alone = [record for record in everyone if record.tenant.name not in placed]
    found = _without(found, _exchanged(found, previous, alone, fresh))
    placed = {name for one in found for name in one.errors}
    rest = [
        replace(part, records=tuple(r for r in part.records if r.tenant.name not in placed))
        for part in parts
    ]
    return found, [part for part in rest if part.records]


def _standing(
    folder: str,
    previous: Plan,
    fleet: Fleet,
    parts: Sequence[Partition],
    consent: Consent,
    bound: float,
    metric: Metric,
    compare: Compare,
    value: Value,
) -> list[Stayed]:
    """The representatives of an earlier plan that may stand, and whom they may serve."""
    records = {record.tenant.name: record for part in parts for record in part.records}
    contents = {name: record.content for name, record in records.items()}
    survival = survivors(previous, contents, consent, fleet.removed)
    survival = replace(survival, kept={id: _moved(x, records) for id, x in survival.kept.items()})
    limit = reach(metric, bound)
    near = _near(folder, fleet, parts, consent, limit, survival.kept)

    def verify(asked: Sequence[tuple[str, Sequence[str]]]) -> Iterator[dict[str, Error | None]]:
        others = [
            [name for name in names if records[name].content != survival.kept[id].content]
            for id, names in asked
        ]
        reps = [survival.kept[id] for id, _ in asked]
        files = [
            (located(folder, rep.location, rep.path), [records[n].tenant.location for n in names])
            for rep, names in zip(reps, others, strict=True)
            if names
        ]
        compared = iter(compare(files) if files else ())
        for (_, names), rest in zip(asked, others, strict=True):
            found: dict[str, Error | None] = {name: exact(records[name]) for name in names}
            for name, result in zip(rest, next(compared) if rest else (), strict=True):
                found[name] = None
                if isinstance(result, Error) and fits(result, consent.bound(name, bound), value):
                    found[name] = result
            yield found

    placed = place(offers_of(survival, near, consent), verify)
    members: defaultdict[str, dict[str, Error]] = defaultdict(dict)
    for name, (id, error) in placed.found.items():
        members[id][name] = error
    return [
        Stayed(
            replace(survival.kept[id], members=tuple(sorted(errors)), bound=None),
            tuple(records[name] for name in sorted(errors)),
            errors,
        )
        for id, errors in sorted(members.items())
    ]


def _moved(rep: Representative, records: Mapping[str, Record]) -> Representative:
    """An original, where its tenant's file is now."""
    if rep.kind not in ("original", "medoid"):
        return rep
    tenant = records[rep.holds[0]].tenant
    return replace(rep, path=tenant.path, location=tenant.location)


def _near(
    folder: str,
    fleet: Fleet,
    parts: Sequence[Partition],
    consent: Consent,
    limit: float,
    kept: Mapping[str, Representative],
) -> dict[str, list[str]]:
    """The nearest representatives by tenant that may serve it, from sketches."""
    pool = [searched(part) for part in read_sketches(folder)]
    found = {}
    for part in parts:
        able = [r for r in part.records if not consent.policy.rule(r.tenant.name).private]
        if not able:
            continue
        columns, vectors = fleet.columns(able), delta_vectors(fleet, able)
        own = Layout(columns.stems, columns.shapes, columns.side)
        limits = np.array([consent.bound(record.tenant.name, limit) for record in able])
        hits: list[list[Near]] = [[] for _ in able]
        for among in pool:
            if among.part.key[:KIND] == part.key[:KIND]:
                usable = np.array([id in kept for id in among.part.ids], bool)
                more = nearest_of_all(among, own, vectors, limits, usable)
                hits = [one + other for one, other in zip(hits, more, strict=True)]
        for record, near in zip(able, hits, strict=True):
            name = record.tenant.name
            near.sort(key=lambda hit: (hit.estimate, hit.id))
            may = (hit.id for hit in near if _may(kept[hit.id], name, consent))
            found[name] = list(islice(may, CANDIDATES))
    return found


def _may(rep: Representative, name: str, consent: Consent) -> bool:
    return all(consent.may_be_served_by(name, server) for server in rep.holds)


def _exchanged(
    stayed: Sequence[Stayed],
    previous: Plan,
    alone: Sequence[Record],
    fresh: Sequence[Fresh],
) -> set[str]:
    """The tenants whose groups are worth taking apart.

    `alone` are those that nothing of the earlier plan serves, `fresh` the verified groups of a plan
    that keeps nothing, with the records of each of their nodes.
    """
    before = {name: item.by for name, item in previous.served.items()}
    sticky = {name: one.representative.id for one in stayed for name in one.errors}
    sticky |= {record.tenant.name: record.content[:DIGITS] for record in alone}
    other: dict[str, str] = {}
    for grouped, nodes in fresh:
        for group in grouped.groups:
            label = nodes[group.center][0].content[:DIGITS]
            for node in group.errors:
                other |= {record.tenant.name: label for record in nodes[node]}
    common = sticky.keys() & other.keys()
    return exchanges(
        before, {name: sticky[name] for name in common}, {name: other[name] for name in common}
    )


def _without(stayed: Sequence[Stayed], names: set[str]) -> list[Stayed]:
    """What stays when these tenants do not.

    A representative of nobody goes, and one of a single tenant unless it is that one's own change:
    his own adapter costs as much and is exact.
    """
    kept = []
    for one in stayed:
        errors = {name: error for name, error in one.errors.items() if name not in names}
        records = tuple(record for record in one.records if record.tenant.name in errors)
        if len(errors) > 1 or any(found.error == 0.0 for found in errors.values()):
            rep = replace(one.representative, members=tuple(sorted(errors)))
            kept.append(Stayed(rep, records, errors))
    return kept


def kept_sketches(folder: str, stayed: Sequence[Stayed]) -> list[Sketched]:
    """The sketches of a plan's representatives that stay."""
    ids = {one.representative.id for one in stayed}
    found = []
    for part in read_sketches(folder):
        rows = [row for row, id in enumerate(part.ids) if id in ids]
        if rows:
            names = tuple(part.ids[row] for row in rows)
            found.append(
                replace(part, ids=names, norms=part.norms[rows], sketches=part.sketches[rows])
            )
    return found
