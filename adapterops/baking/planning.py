"""What a bake will do, decided before a tensor is written; and what it must not lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterops.baking.beside import Carried, carried
from adapterops.baking.kernel import Round, Rounding
from adapterops.baking.predict import MARGIN, predict
from adapterops.baking.provenance import provenance
from adapterops.baking.report import BakeReport, Total, total_of
from adapterops.baking.shards import Shard, plan_shards
from adapterops.basemodel import BaseModel
from adapterops.casts import format_name
from adapterops.changes.mapping import changes
from adapterops.changes.targets import Changes
from adapterops.composed import recorded
from adapterops.errors import BudgetError, NumericsError
from adapterops.extras import Policy
from adapterops.files import checkpoint
from adapterops.files.output import check_output, check_outside, resolved
from adapterops.formats.model import AdapterFile, leaves
from adapterops.prepare import origins_of
from adapterops.provenance import Provenance, given_alphas, given_labels
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute
from adapterops.undoing.record import NAME


@dataclass(frozen=True, slots=True)
class Options:
    """How to bake, checked by the verb; `dtype` None keeps each tensor's own.

    `residual` identifies the model of that option, `combined` is what records the merge method.
    """

    round: Round = "exact"
    seed: int = 0
    dtype: str | None = None
    modules: str | None = None
    extras: Policy = "error"
    max_drift: float | None = None
    link: bool = False
    reversible: bool = False
    residual: str | None = None
    combined: Mapping[str, Any] = field(default_factory=dict)
    hash: bool = False
    overwrite: bool = False
    strict: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is decided before a tensor is written."""

    base: BaseModel
    inputs: Sequence[AdapterFile]
    weights: Sequence[float]
    options: Options
    changes: Changes
    shards: Sequence[Shard]
    beside: Sequence[Carried]
    said: Sequence[str]
    is_directory: bool
    final: str
    predicted: Total | None


def planned(
    base: BaseModel,
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    out: str,
    options: Options,
    on: Compute,
) -> Job:
    """Everything that `bake_model` needs to know; a sample of the rows is read.

    Raises what it raises, but for what only the whole shows.
    """
    resolved(out)  # or UsageError
    given = Path(base.path)
    is_directory = given.is_dir() or checkpoint.is_index(given)
    final = out if is_directory or out.endswith(".safetensors") else f"{out}.safetensors"
    folder = given.parent if checkpoint.is_index(given) else given
    origins, shares = leaves(inputs, weights)
    options = replace(options, combined=recorded(inputs, weights, options.combined))
    mine = (path for file in origins for path in (file.path, *file.weights_files))
    check_outside(final, (folder, *base.files, *mine))
    check_output(final, directory=is_directory, overwrite=options.overwrite)
    found = changes(base, inputs, weights, modules=options.modules, extras=options.extras)
    shards = plan_shards(base, found, options.dtype)
    beside, said = carried(base, origins, found, options.dtype)
    if is_directory and (folder / NAME).is_file():
        said = [*said, f"undo files of {base.name} stay there: keep it to unbake further back"]
    rounding = Rounding(options.round, "F32", options.seed)
    with exact_arithmetic():
        drifts = predict(found.targets.values(), rounding, options.dtype, on)
    return Job(
        base=base,
        inputs=origins,
        weights=shares,
        options=options,
        changes=found,
        shards=shards,
        beside=beside,
        said=said,
        is_directory=is_directory,
        final=final,
        predicted=total_of(drifts),
    )


def provenance_of(job: Job, record: Mapping[str, Any], on: Compute) -> Provenance:
    """What decides the result's bytes; `record` is the base's, see `base_record`."""
    options = job.options
    drawn = options.round == "stochastic" or options.combined.get("seed") is not None
    return provenance(
        record,
        origins_of(job.inputs, job.weights, on),
        {
            **options.combined,
            "round": options.round,
            "seed": options.seed if drawn else None,
            "dtype": format_name(options.dtype) if options.dtype else None,
            "modules": options.modules,
            "extras": None if options.extras == "error" else options.extras,
            "reversible": options.reversible or None,
            "residual": options.residual,
            "alpha": given_alphas(job.inputs) or None,
            "labels": given_labels(job.inputs),
        },
    )


def check_prediction(job: Job) -> None:
    """Stop before anything is written where the sample leaves no doubt."""
    limit, total = job.options.max_drift, job.predicted
    if limit is None or total is None or (total.subspace_error or 0.0) <= MARGIN * limit:
        return
    raise _over(total, limit, "a sample of 1 % of the rows predicts", job.options)


def check_result(job: Job, report: BakeReport) -> None:
    """Refuse, with nothing named yet, what loses more than was allowed or warns under --strict."""
    limit, total = job.options.max_drift, report.total
    if limit is not None and total is not None and (total.subspace_error or 0.0) > limit:
        raise _over(total, limit, "it has", job.options)
    if job.options.strict and report.warnings:
        raise NumericsError(f"--strict: {report.warnings[0]}")


def _over(total: Total, limit: float, who: str, options: Options) -> BudgetError:
    way = "" if options.round == "compensated" else "--round compensated, "
    return BudgetError(
        f"--max-drift {limit:g}: {who} a total error of {total.subspace_error:.4g} where the "
        f"adapters act (gain {total.gain:.4g})",
        hint=f"{way}--dtype float32, or serve the adapters unmerged",
    )
