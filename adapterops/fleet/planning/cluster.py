"""From an index to a plan: groups, what serves each, and every tenant's verified error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from adapterops.activations import Activations, open_activations
from adapterops.errors import BudgetError, MemoryLimitError, UsageError
from adapterops.files.output import SIDECAR, Staging, check_output, stage
from adapterops.files.scratch import scratch
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.grouping.budget import least_bound, remembered
from adapterops.fleet.grouping.candidates import edges
from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.graph import Candidates, graph
from adapterops.fleet.grouping.groups import Compare, Group, Grouped, exact, verified_groups
from adapterops.fleet.grouping.outlook import GRID, pareto
from adapterops.fleet.grouping.partition import partitions
from adapterops.fleet.grouping.sets import Sets, set_of
from adapterops.fleet.indexing.current import check_still, stale
from adapterops.fleet.indexing.opened import Fleet, open_fleet
from adapterops.fleet.planning.drafting import Draft
from adapterops.fleet.plans.outcome import ClusterReport, outcome
from adapterops.fleet.plans.plan import Metric, Plan, Point, Related
from adapterops.fleet.plans.plandiff import diff
from adapterops.fleet.plans.planfile import REPRESENTATIVES, plan_folder, read_plan, write_plan
from adapterops.fleet.plans.standing import carry
from adapterops.fleet.relating.related import By, related
from adapterops.fleet.replanning.staying import exchanged, kept_sketches, staying, without
from adapterops.fleet.representing.representative import KINDS, choose
from adapterops.fleet.types import Array
from adapterops.fleet.verifying.exact import Error, compare_groups
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, checked; `aliases` are names of one and the same base."""

    max_error: float | None
    max_adapters: int | None
    metric: Metric
    activations: str | None
    aliases: Mapping[str, str]
    consent: Consent
    representative: Literal["best", "medoid", "mean", "minimax"]
    rank: int | Literal["same"]
    dtype: str
    discovery: float
    previous: str | None
    overwrite: bool
    strict: bool
    allow_pickle: bool
    dry_run: bool

    def recorded(self, fleet: Fleet) -> dict[str, Any]:
        """What the plan says of how it was made."""
        return {
            "max_adapters": self.max_adapters,
            "representative": self.representative,
            "rank": self.rank,
            "dtype": self.dtype,
            "activations": self.activations,
            "aliases": dict(self.aliases),
            "removed": sorted(fleet.removed),
            **self.consent.to_dict(),
        }


def plan_fleet(
    path: str, out: str, options: Options, on: Compute, progress: Progress | None
) -> ClusterReport:
    """Plan the fleet at `path`, write PLAN at `out`, and say what came of it."""
    check_output(out, directory=True, overwrite=options.overwrite)
    fleet = open_fleet(path)
    known = {record.tenant.name for record in fleet.records}
    options.consent.policy.check(known | fleet.removed | fleet.vanished)
    if not fleet.records:
        raise UsageError(f"{path} has no tenants", hint="fill it with: adapterops index")
    inputs = None if options.activations is None else open_activations(options.activations)
    previous = None if options.previous is None else read_plan(options.previous)
    if previous is not None and previous.seed != fleet.seed:
        raise UsageError(
            f"{options.previous} was planned with seed {previous.seed}, the index has {fleet.seed}",
            hint="only plans of the same seed go on: plan without --previous",
        )
    with _target(out, options, on) as place:
        draft = Draft(fleet, options.consent, place.root, REPRESENTATIVES)
        plan = _planned(draft, options, previous, inputs, on, progress)
        changes = {} if previous is None else diff(previous, plan).to_dict()
        report = outcome(plan, "" if options.dry_run else out, changes)
        if isinstance(place, Staging):
            if options.previous is not None:
                stays = [rep for rep in draft.stayed if not rep.location]
                carry(plan_folder(options.previous), stays, place)
            write_plan(place, plan, draft.sketched())
            _write_sidecar(place, report)
    return report


def _write_sidecar(staging: Staging, report: ClusterReport) -> None:
    """What lists the files of the plan, so that --overwrite may replace it."""
    files = [path for path in staging.root.rglob("*") if path.is_file()]
    names = sorted(str(file.relative_to(staging.root)) for file in files)
    document = {**report.to_dict(), "files": names}
    text = msgspec.json.format(msgspec.json.encode(document), indent=1)
    staging.write(SIDECAR, [text, b"\n"])


@dataclass(frozen=True, slots=True)
class _Nowhere:
    """Where representatives are written that nobody asked to keep."""

    root: Path


@contextmanager
def _target(out: str, options: Options, on: Compute) -> Iterator[Staging | _Nowhere]:
    if options.dry_run:
        # Other machines see the folder that PLAN would be in, not this one's TMPDIR.
        with scratch(Path(os.path.abspath(out)).parent if on.spread else None) as folder:
            yield _Nowhere(folder)
        return
    with stage(out, directory=True, overwrite=options.overwrite) as staging:
        yield staging


def _planned(
    draft: Draft,
    options: Options,
    previous: Plan | None,
    inputs: Activations | None,
    on: Compute,
    progress: Progress | None,
) -> Plan:
    fleet, consent, strict = draft.fleet, options.consent, options.strict
    changed = stale(fleet, [record for record in fleet.records if record.status != "broken"])
    able = draft.add_others(changed, strict=strict)
    parts = partitions(replace(fleet, records=tuple(able)), options.aliases, consent)
    sets = [set_of(part, consent) for part in parts]
    compare: Compare = remembered(
        partial(compare_groups, on=on, activations=inputs, allow_pickle=options.allow_pickle)
    )
    value = _error if inputs is None else _measured

    def candidates(each: Sets, bound: float) -> Candidates:
        found = edges(*each.vectors(fleet), each.bounds(bound), on)
        return found.permitted(each.permissions.allowed)

    def grouped(each: Sets, graph: Candidates | None, bound: float) -> Grouped:
        if len(each.nodes) == 1:
            return Grouped((Group(0, {0: exact(each.nodes[0].records[0])}),), 0, {})
        graph = graph or candidates(each, bound)
        return verified_groups(each.nodes, graph, each.bounds(bound), compare, value)

    if options.max_error is not None:
        bound, found = options.max_error, [grouped(each, None, options.max_error) for each in sets]
    else:
        assert options.max_adapters is not None
        wide = [candidates(each, GRID[-1]) for each in sets]
        bound, found = least_bound(sets, wide, options.max_adapters, draft.apart, grouped)
    everyone = sets
    if previous is not None and options.previous is not None:
        stayed = staying(options.previous, previous, fleet, parts, consent, bound, compare, value)
        placed = {name for one in stayed for name in one.errors}
        alone = [record for record in able if record.tenant.name not in placed]
        fresh = [
            (groups, [node.records for node in each.nodes])
            for each, groups in zip(sets, found, strict=True)
        ]
        stayed = without(stayed, exchanged(stayed, previous, alone, fresh))
        placed = {name for one in stayed for name in one.errors}
        draft.add_stayed(stayed, kept_sketches(options.previous, stayed))
        rest = [
            replace(part, records=tuple(r for r in part.records if r.tenant.name not in placed))
            for part in parts
        ]
        sets = [set_of(part, consent) for part in rest if part.records]
        found = [grouped(each, None, bound) for each in sets]
    make = partial(
        choose,
        rank=options.rank,
        kinds=KINDS if options.representative == "best" else (options.representative,),
        dtype=options.dtype,
        activations=inputs,
        allow_pickle=options.allow_pickle,
    )
    done, total = 0, sum(len(each.nodes) for each in sets)
    for each, groups in zip(sets, found, strict=True):
        draft.add_set(each, groups, each.bounds(bound), make, value, on)
        done += len(each.nodes)
        if progress:
            progress("adapters", done, total)
    draft.add_stale(changed, strict=strict, allow_pickle=options.allow_pickle)
    check_still(fleet, draft.bound_to_others - changed.keys())
    if options.max_adapters is not None and draft.adapters > options.max_adapters:
        raise BudgetError(
            f"{draft.adapters} adapters are needed to stay close to {options.previous}",
            hint=f"give --max-adapters {draft.adapters}, or plan without --previous",
        )
    points, gain = _outlook(draft, everyone, bound, on)
    return draft.plan(
        max_error=bound,
        metric=options.metric,
        options=options.recorded(fleet),
        discovery=options.discovery,
        pareto=points,
        gain=gain,
        related=_related(draft, everyone, options, on),
    )


def _outlook(
    draft: Draft, sets: Sequence[Sets], bound: float, on: Compute
) -> tuple[tuple[Point, ...], Mapping[str, Any]]:
    """What other bounds would give if all within each partition might share, and this one."""
    widest = max(bound, GRID[-1])
    several = [each for each in sets if len(each.nodes) > 1]
    single = [each.norms for each in sets if len(each.nodes) == 1]
    try:
        graphs = [edges(*each.vectors(draft.fleet), widest, on) for each in several]
    except MemoryLimitError as error:
        draft.note(f"other bounds were not estimated: {error.message}")
        return (), {}
    norms = [each.norms for each in several]
    if single:  # who can be compared with nobody
        none = np.zeros(0, np.int64)
        graphs.append(graph(len(single), none, none, np.zeros(0)))
        norms.append(np.concatenate(single))
    groups = sum(len(greedy_cover(each.within(bound))) for each in graphs)
    gain = {"max_error": bound, "adapters": groups + draft.apart, "estimated": True}
    return pareto(graphs, norms, alone=draft.apart), gain


def _error(found: Error) -> float:
    return found.error


def _measured(found: Error) -> float:
    if found.measured is None:  # inputs say nothing of it: only the same is certain
        return 0.0 if found.error == 0.0 else math.inf
    return found.measured


def _related(
    draft: Draft, sets: Sequence[Sets], options: Options, on: Compute
) -> tuple[Related, ...]:
    fleet = draft.fleet
    listed: list[Related] = []
    for each in sets:
        if len(each.nodes) < 2:
            continue
        records = [node.records[0] for node in each.nodes]
        names = [record.tenant.name for record in records]
        served = {name: draft.served[name].by for name in names}
        sketches = fleet.matrix(records)[0]
        norms = np.linalg.norm(sketches, axis=1, keepdims=True)
        delta = np.divide(sketches, norms, out=sketches, where=norms > 0)
        # What one initialisation makes alike are inputs: outputs start at zero.
        kinds: tuple[tuple[By, Array, Array | None], ...] = (
            ("delta", delta, fleet.starts(records)),
            ("outputs", fleet.outputs(records), None),
        )
        for by, vectors, starts in kinds:
            found, note = related(
                names, vectors, by, served, on, starts=starts, q=options.discovery, seed=fleet.seed
            )
            listed += found
            if note and len(sets) == 1:
                draft.note(f"related tenants by {by}: {note}")
    return tuple(listed)
