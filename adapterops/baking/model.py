"""A whole model baked: planned, predicted, written file by file, judged, and only then named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapterops.baking.figures import Drift
from adapterops.baking.kernel import Rounding
from adapterops.baking.planning import (
    Job,
    Options,
    check_prediction,
    check_result,
    planned,
    provenance_of,
)
from adapterops.baking.provenance import base_record, history_of, plan_hash
from adapterops.baking.report import BakeReport, representation_warnings, tensor_drift, total_of
from adapterops.baking.rest import Place, write_rest
from adapterops.baking.run import Tally
from adapterops.baking.shards import Shard, copied_bytes
from adapterops.baking.writing import write_shard
from adapterops.basemodel import BaseModel
from adapterops.casts import format_name
from adapterops.errors import FileError, Interrupted
from adapterops.files.output import check_room, stage
from adapterops.files.publish import complete
from adapterops.files.resumable import Resumed, resumable
from adapterops.formats.model import AdapterFile
from adapterops.provenance import Provenance
from adapterops.rounding.exact import Counts
from adapterops.stream import Compute, megabytes
from adapterops.undoing.folder import file_id
from adapterops.undoing.saving import saved, write_undo
from adapterops.undoing.undo import SUFFIX, FileId

Progress = Callable[[str, int, int], None]
_UNDO = 0.1  # of what changes: as much as undo files take at most, as a rule


def bake_model(
    base: BaseModel,
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    out: str,
    options: Options,
    on: Compute,
    progress: Progress | None = None,
) -> BakeReport:
    """Write `base` with Σ wᵢΔWᵢ of `inputs`, rebased already, to `out`.

    Raises what `mapping.changes` raises; BudgetError where `max_drift` is not met, NumericsError
    for NaN, infinities and overflow, FileError. Nothing appears under the final name then.
    """
    job = planned(base, inputs, weights, out, options, on)
    check_prediction(job)
    if options.dry_run:
        return _report(job, {}, [])
    record = base_record(base, hashed=options.hash or options.reversible)
    made = provenance_of(job, record, on)
    history = history_of(base)
    with _staged(job, plan_hash(made, record)) as place:
        tallies, resumed = _write_shards(job, place, record, made, on, progress)
        report = replace(_report(job, tallies, resumed), history=history)
        check_result(job, report)
        for source in (source for file in job.inputs for source in file.sources):
            source.check_unchanged()
        names = write_rest(job, place, report, made, record)
    undo = tuple(name for name in names if name.endswith(SUFFIX))
    return replace(report, files=tuple(names), undo=undo)


@contextmanager
def _staged(job: Job, plan: str) -> Iterator[Place]:
    """The place for the output; an interruption says what is kept of it."""
    if not job.is_directory:
        with stage(job.final, directory=False, overwrite=job.options.overwrite) as staging:
            yield staging
        return
    kept = 0
    try:
        with resumable(job.final, plan=plan, overwrite=job.options.overwrite) as resumed:
            try:
                yield resumed
            finally:
                kept = sum(_record(resumed, shard) is not None for shard in job.shards)
    except FileError as error:
        if error.path and f".{Path(job.final).name}." in error.path:  # where it was staged
            error.path = job.final
        raise
    except KeyboardInterrupt:
        if not kept or complete():
            raise
        raise Interrupted(
            f"interrupted; {kept} of {len(job.shards)} files of weights are kept",
            path=job.final,
            hint="the same command goes on from there",
        ) from None


def _write_shards(
    job: Job,
    place: Place,
    record: Mapping[str, Any],
    made: Provenance,
    on: Compute,
    progress: Progress | None,
) -> tuple[dict[str, Tally], list[str]]:
    """Every file of weights; what became of the changes, and which files were there already."""
    options = job.options
    rounding = Rounding(options.round, "F32", options.seed)
    tick = megabytes(sum(shard.size for shard in job.shards), progress)
    tallies: dict[str, Tally] = {}
    there: list[str] = []
    waiting = [shard for shard in job.shards if _record(place, shard) is None]
    changed = sum(shard.size - copied_bytes(shard) for shard in waiting)
    more = int(_UNDO * changed) if options.reversible else 0
    check_room(Path(job.final), sum(shard.size for shard in waiting) + more)

    for shard, source in zip(job.shards, record["files"], strict=True):
        kept = _record(place, shard)
        if kept is not None:
            tallies |= {name: _tally(item) for name, item in kept["tensors"].items()}
            there.append(shard.name)
            tick(shard.size)
            continue
        name = shard.name if job.is_directory else Path(job.final).name
        path = place.path(name)
        found = write_shard(shard, path, rounding, on, link=options.link, tick=tick)
        if options.reversible and not shard.untouched:
            undo = place.path(name + SUFFIX)
            undo.unlink(missing_ok=True)  # of a run that was stopped before the next line
            ids = (FileId(source["name"], source["bytes"], source["sha256"]), file_id(path))
            write_undo(undo, shard.source, path, saved(shard), made.inputs, ids, on)
        if isinstance(place, Resumed):
            tensors = {tensor: _plain(tally) for tensor, tally in found.items()}
            if options.reversible and not shard.untouched:
                place.done(name + SUFFIX, {})
            place.done(shard.name, {"tensors": tensors})
        tallies |= found
    return tallies, there


def _record(place: Place, shard: Shard) -> Mapping[str, Any] | None:
    return place.finished(shard.name) if isinstance(place, Resumed) else None


def _plain(tally: Tally) -> dict[str, Any]:
    return {"drift": asdict(tally.drift), "counts": asdict(tally.counts)}


def _tally(item: Mapping[str, Any]) -> Tally:
    return Tally(Drift(**item["drift"]), Counts(**item["counts"]))


def _report(job: Job, tallies: Mapping[str, Tally], resumed: Sequence[str]) -> BakeReport:
    found, options = job.changes, job.options
    targets = [found.targets[name] for name in tallies]
    dtypes = {options.dtype or target.ref.dtype for target in found.targets.values()}
    tensors = {
        target.name: tensor_drift(target, tallies[target.name], options.dtype or target.ref.dtype)
        for target in targets
    }
    changed = {name: item for name, item in tensors.items() if item.norm}
    worst = sorted(changed, key=lambda name: -(changed[name].subspace_error or 0.0))
    total = total_of([tally.drift for tally in tallies.values()])
    counts = sum((tally.counts for tally in tallies.values()), Counts())
    size = sum(shard.size for shard in job.shards)
    return BakeReport(
        output=job.final,
        base=job.base.path,
        adapters=tuple(
            (file.path, weight) for file, weight in zip(job.inputs, job.weights, strict=True)
        ),
        rounding=options.round,
        dtype=" and ".join(sorted(map(format_name, dtypes))),
        total=total,
        predicted=job.predicted,
        tensors={name: changed[name] for name in worst},
        counts=counts,
        values=tuple(found.values),
        added=tuple(
            name
            for name in (*found.targets, *found.values, *found.copies)
            if name not in job.base.tensors
        ),
        unchanged=tuple(name for name in tensors if name not in changed),
        dropped=found.dropped,
        modules=found.modules,
        left_out=found.left_out,
        copied=sum(copied_bytes(shard) for shard in job.shards),
        size=size,
        resumed=len(resumed),
        warnings=tuple(representation_warnings(total or job.predicted, dtypes, options.round)),
        notes=(*found.notes, *job.said),
    )
