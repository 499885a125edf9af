"""From an index to a plan: groups, what serves each, and every tenant's verified error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from adapterops.activations import Activations, open_activations
from adapterops.batch import workers
from adapterops.batch.processes import processes
from adapterops.errors import AdapterOpsError, BudgetError, MemoryLimitError, UsageError
from adapterops.files.output import SIDECAR, Staging, check_output, stage
from adapterops.files.scratch import scratch
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.grouping.budget import least_bound, remembered
from adapterops.fleet.grouping.candidates import edges
from adapterops.fleet.grouping.covering import Measured, candidates, covered, measured
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.groups import Compare, Grouped
from adapterops.fleet.grouping.outlook import GRID
from adapterops.fleet.grouping.partition import partitions
from adapterops.fleet.grouping.sets import Sets, set_of
from adapterops.fleet.grouping.unions import neighbours
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.indexing.current import check_still, stale
from adapterops.fleet.indexing.opened import Fleet, open_fleet
from adapterops.fleet.planning.drafting import Draft
from adapterops.fleet.planning.prospect import outlook, relations
from adapterops.fleet.planning.represented import (
    FARTHEST,
    Making,
    Represented,
    joined,
    represented,
)
from adapterops.fleet.plans.outcome import ClusterReport, outcome
from adapterops.fleet.plans.plan import Metric, Plan, figure
from adapterops.fleet.plans.plandiff import diff
from adapterops.fleet.plans.planfile import REPRESENTATIVES, plan_folder, read_plan, write_plan
from adapterops.fleet.plans.standing import carry
from adapterops.fleet.replanning.staying import kept_sketches, staying
from adapterops.fleet.representing.averaging import averages
from adapterops.fleet.representing.representative import KINDS, choose
from adapterops.fleet.verifying.exact import compare_groups
from adapterops.stream import Compute, one_blas_thread

_MANY = 1000  # adapters whose headers keep the interpreter busier than their numbers

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
        with _wide(on, fleet, inputs) as many:
            plan = _planned(draft, options, previous, inputs, many, progress)
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


@contextmanager
def _wide(on: Compute, fleet: Fleet, inputs: Activations | None) -> Iterator[Compute]:
    """`on`, with processes of this machine where there are so many adapters that they pay."""
    many = len(fleet.records) >= _MANY and inputs is None
    if not many or on.spread or on.device != "cpu" or on.threads < 2 or not workers.available():
        yield on
        return
    with processes(on.threads) as spread:
        yield replace(on, spread=spread, share=on.memory // on.threads)


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
    value = partial(figure, metric=options.metric)

    vectors = measured(fleet, inputs, on, allow_pickle=options.allow_pickle)

    def grouped(each: Sets, graph: Candidates | None, bound: float) -> Grouped:
        return covered(each, vectors, graph, bound, on, compare, value)

    if options.max_error is not None:
        bound, found = options.max_error, [grouped(each, None, options.max_error) for each in sets]
    else:
        assert options.max_adapters is not None
        wide = [candidates(each, vectors(each), GRID[-1], on, least=GRID[0]) for each in sets]
        bound, found = least_bound(sets, wide, options.max_adapters, draft.apart, grouped)
    everyone = sets
    if previous is not None and options.previous is not None:
        fresh = [
            (groups, [node.records for node in each.nodes])
            for each, groups in zip(sets, found, strict=True)
        ]
        stayed, rest = staying(
            options.previous,
            previous,
            fleet,
            parts,
            fresh,
            consent,
            bound,
            options.metric,
            compare,
            value,
        )
        draft.add_stayed(stayed, kept_sketches(options.previous, stayed))
        sets = [set_of(part, consent) for part in rest]
        found = [grouped(each, None, bound) for each in sets]
    make = partial(
        choose,
        rank=options.rank,
        kinds=KINDS if options.representative == "best" else (options.representative,),
        dtype=options.dtype,
        activations=inputs,
        allow_pickle=options.allow_pickle,
    )
    write = partial(averages, seed=fleet.seed, make=make, value=value, on=on)
    # A budget is met by originals; averages then lower the errors, not the number.
    join = options.max_adapters is None and options.representative != "medoid"
    # What other bounds would give is found while other processes make averages.
    with one_blas_thread():
        beside = ThreadPoolExecutor(1)
        try:
            ahead = beside.submit(outlook, everyone, vectors, bound, draft.apart, on)
            how = Making(bound, value, compare, write)
            _represent(draft, sets, found, vectors, join, how, on, progress)
            points, gain, note = ahead.result()
        finally:
            beside.shutdown(wait=False, cancel_futures=True)
    if note:
        draft.note(note)
    draft.add_stale(changed, strict=strict, allow_pickle=options.allow_pickle)
    check_still(fleet, draft.bound_to_others - changed.keys())
    if options.max_adapters is not None and draft.adapters > options.max_adapters:
        raise BudgetError(
            f"{draft.adapters} adapters are needed to stay close to {options.previous}",
            hint=f"give --max-adapters {draft.adapters}, or plan without --previous",
        )
    listed, notes = relations(fleet, everyone, draft.served, options.discovery, on)
    for note in notes:
        draft.note(note)
    return draft.plan(
        max_error=bound,
        metric=options.metric,
        options=options.recorded(fleet),
        discovery=options.discovery,
        pareto=points,
        gain=gain,
        related=listed,
    )


def _represent(
    draft: Draft,
    sets: Sequence[Sets],
    found: Sequence[Grouped],
    vectors: Measured,
    join: bool,
    how: Making,
    on: Compute,
    progress: Progress | None,
) -> None:
    """Add every partition's groups to the draft with what serves them; if `join`, fewer of them."""
    done, total = 0, sum(len(each.nodes) for each in sets)
    for each, groups in zip(sets, found, strict=True):
        with scratch(draft.root) as work:
            served, failed = [Represented(group, None) for group in groups.groups], groups.failed
            if join and len(served) > 1:
                served, more = _joined(draft, each, vectors(each), groups, how, on, work)
                failed = {**failed, **more}
            best = represented(each, served, how, work)
            draft.add_groups(each, best, failed)
        done += len(each.nodes)
        if progress:
            progress("adapters", done, total)


def _joined(
    draft: Draft,
    each: Sets,
    vectors: Vectors,
    found: Grouped,
    how: Making,
    on: Compute,
    work: Path,
) -> tuple[list[Represented], dict[int, AdapterOpsError]]:
    """The groups of a partition, those joined that one average may serve; whose files failed."""
    alone = [Represented(group, None) for group in found.groups if group.center in found.failed]
    groups = [group for group in found.groups if group.center not in found.failed]
    bounds = each.bounds(how.bound)
    rows = np.array([group.center for group in groups], np.int64)
    reach = np.minimum(2 * bounds[rows], FARTHEST)
    try:
        near = (
            edges(vectors.rows(rows), reach, on)
            .within(reach)
            .permitted(
                lambda center, members: each.permissions.allowed(int(rows[center]), rows[members])
            )
        )
    except MemoryLimitError as error:
        draft.note(f"averages that join groups were not looked for: {error.message}")
        return [Represented(group, None) for group in found.groups], {}
    both, failed = joined(each, groups, neighbours(near), vectors, how, work)
    return sorted([*alone, *both], key=lambda one: one.group.center), failed
