"""The one evaluator: a weighted sum of adapter files becomes a file with its certificate.

Plan on headers, choose the rank, run, certify, commit. Whatever fails before the commit leaves
nothing behind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapterops import passes, ranks
from adapterops.align import align
from adapterops.casts import FORMATS, format_name
from adapterops.certificate import Figures, PlanReport, RankHint, Report, total
from adapterops.certify import certify
from adapterops.certify import notes as measured_notes
from adapterops.choose import check_size, choose_rank
from adapterops.companions import side_files, write_companions
from adapterops.errors import (
    BudgetError,
    IncompatibleError,
    NumericsError,
    OutputExistsError,
    UsageError,
)
from adapterops.extras import extras_by_name, plan_extras
from adapterops.files.header import Entry, encode_header, layout
from adapterops.files.output import (
    PROVENANCE_KEY,
    check_output,
    is_our_sidecar,
    stage,
)
from adapterops.formats import kohya, peft
from adapterops.formats.model import AdapterFile
from adapterops.formats.names import DIRECTORIES
from adapterops.layout import Layout, output_path, plan_output, sidecar_name, weights_name
from adapterops.linalg import Spectrum
from adapterops.options import compute, parse_size
from adapterops.plan import Plan
from adapterops.provenance import Origin, Provenance, file_sha256, given_alphas, labels
from adapterops.ranks import Ranks
from adapterops.stream import Compute
from adapterops.target import kernel_warnings
from adapterops.writing import write

_RESERVE = 512


@dataclass(frozen=True, slots=True)
class Options:
    """How a sum is written; `merge` documents each."""

    out: str
    ranks: Ranks
    modules: str | None = None
    extras: str = "error"
    dtype: str = "keep"
    to: str | None = None
    overwrite: bool = False
    strict: bool = False
    dry_run: bool = False
    progress: Callable[[str, int, int], None] | None = None


def save_sum(
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    rank: int | Literal["same"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    **options: Any,
) -> Report | PlanReport:
    """`save` with everything as keywords; `options` are the other fields of `Options`."""
    rank = rank.item() if isinstance(rank, np.integer) else rank
    chosen = Ranks(rank, energy, max_error, None if size is None else parse_size(size, "--size"))
    how = Options(os.fspath(out), chosen, **options)
    return save(files, weights, how, compute(device, memory, jobs))


def save(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Report | PlanReport:
    """Write Σ wᵢΔWᵢ and return its certificate, or with `dry_run` the plan of it.

    Raises every error of `adapterops.errors`; nothing is written when it does.
    """
    try:
        return _save(inputs, weights, options, on)
    finally:
        for file in inputs:
            file.source.close()


def _save(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Report | PlanReport:
    plan = align(inputs, weights, modules=options.modules, dtype=options.dtype, to=options.to)
    out, directory, notes = output_path(options.out, plan.dialect)
    _check_apart(Path(os.path.realpath(out)), inputs)
    final = check_output(out, directory=directory, overwrite=options.overwrite)
    if not directory:
        _check_sidecar(final.with_name(sidecar_name(final)))
    extras, dropped = plan_extras(inputs, weights, options.extras, _extra_name(plan))
    if extras and plan.dialect != plan.inputs[0].dialect:
        raise IncompatibleError(
            f"--to {plan.dialect}: {extras[0].name!r} has no name in that dialect",
            hint="leave it out with --extras drop",
        )
    copy = _is_copy(plan, options)
    if copy:
        plan = replace(plan, dtype=plan.live[0].dtype)
    elif plan.dtype not in FORMATS:
        raise UsageError(
            f"{inputs[0].path} is stored as {plan.dtype}, which is not written",
            hint="choose --dtype float16, bfloat16 or float32",
        )
    travelling, left = side_files(inputs, directory)
    if not copy:
        check_size(plan, options.ranks)
    provenance = _provenance(plan, options, on)

    def form_at(rank: int) -> tuple[Layout, dict[str, Entry], dict[str, str]]:
        form = plan_output(plan, rank, extras, directory=directory, copy=copy)
        return form, layout(form.tensors), {**form.metadata, PROVENANCE_KEY: provenance.to_json()}

    spectra: list[Spectrum] = []
    rank, whole = plan.input_rank, 0.0
    if not copy:
        if options.ranks.needs_spectra:
            spectra = passes.spectra(plan, on, options.progress)
            dense = [delta.figures for delta in passes.dense(plan, on)]
            known: list[Spectrum | Figures] = [*spectra, *dense]
            whole = total([each.norm for each in known])
            _check_cancellation(
                whole, total([each.floor for each in known]), any(each.beta > 0 for each in known)
            )
        rank = choose_rank(
            plan,
            options.ranks,
            spectra,
            whole,
            lambda k: _file_size(*form_at(k)[1:]),
            lambda k: [
                *dense,
                *(piece.figures for piece in passes.pieces(plan, k, on, options.progress)),
            ],
        )
    form, entries, metadata = form_at(rank)
    size = _file_size(entries, metadata)
    hidden = [] if copy else kernel_warnings(plan.modules)
    warnings = [*plan.warnings, *hidden, *form.warnings, *left]
    if options.strict and warnings:
        raise IncompatibleError(f"--strict: {warnings[0]}")
    hints = _hints(plan, spectra, whole, rank)
    described = extras_by_name(extras, dropped)
    if options.dry_run:
        planned = _planned(plan, out, size, rank, described)
        return replace(planned, hints=hints, notes=tuple(notes), warnings=tuple(warnings))

    with stage(out, directory=directory, overwrite=options.overwrite) as target:
        name = weights_name(plan.dialect) if directory else target.final.name
        writer = target.tensors(name, entries, size - _data_size(entries))
        figures, dense = write(plan, form, extras, writer, copy, rank, on, options.progress)
        report = certify(plan, figures, dense, rank, provenance)
        report = replace(
            report,
            output=out,
            dialect=plan.dialect,
            size=size,
            extras=described,
            hints=hints,
            notes=(*notes, *measured_notes(plan, report, copy)),
            warnings=tuple(warnings),
        )
        _check_promises(report, [*figures, *dense], options)
        for file in inputs:
            file.source.check_unchanged()
        if any(module.dialect == "kohya" for module in plan.modules):
            digest, start = writer.data_sha256()
            metadata.update(kohya.model_hashes(entries, metadata, digest, start))
        writer.finish(metadata)
        write_companions(target, {**form.files, **travelling}, report, provenance)
    return report


def _check_apart(final: Path, inputs: Sequence[AdapterFile]) -> None:
    """The output must not be an input, nor a directory that holds one."""
    for file in inputs:
        for path in (file.path, file.weights_file):
            real = Path(os.path.realpath(path))
            if real == final or final in real.parents:
                raise OutputExistsError(
                    f"the output is or contains the input {path}",
                    path=os.fspath(final),
                    hint="choose another name; inputs are never changed",
                )


def _extra_name(plan: Plan) -> Callable[[str], str]:
    """How the output's dialect names a tensor that is no factor."""
    if plan.dialect != "peft":
        return lambda name: name
    modules = {module.stem for module in plan.modules}
    return lambda name: peft.extra_name(name, modules)


def _check_sidecar(path: Path) -> None:
    """A file that happens to be called like our sidecar is not replaced."""
    if path.exists() and not is_our_sidecar(path):
        raise OutputExistsError(
            "exists, was not written by adapterops, and is where the certificate would go",
            path=os.fspath(path),
            hint="choose another name for the output",
        )


def _is_copy(plan: Plan, options: Options) -> bool:
    """One adapter with coefficient 1, nothing cut, no other format: its bytes are the result."""
    return (
        options.ranks == Ranks()
        and options.dtype == "keep"
        and plan.dialect == plan.inputs[0].dialect
        and all(
            len(module.parts) == 1
            and module.parts[0].coefficient == module.parts[0].site.scale
            and (module.parts[0].site.kind == "lora" or plan.dialect not in DIRECTORIES)
            for module in plan.modules
        )
        and not any(delta.factors for delta in plan.deltas)
        and plan.whole_tensors
        and [weight for weight in plan.weights if weight] == [1.0]
        and all(module.columns for module in plan.modules)
        and not any(
            part.site.alpha_given and part.site.dialect not in DIRECTORIES
            for module in plan.modules
            for part in module.parts
        )
    )


def _provenance(plan: Plan, options: Options, on: Compute) -> Provenance:
    names = labels([file.path for file in plan.inputs])
    hashes = passes.sha256s(plan, on)
    origins = tuple(
        Origin(name, sha256, weight, file_sha256(file.config_file) if file.config_file else None)
        for file, name, sha256, weight in zip(plan.inputs, names, hashes, plan.weights, strict=True)
    )
    chosen = options.ranks
    recorded = {
        "rank": chosen.rank,
        "energy": chosen.energy,
        "max_error": chosen.max_error,
        "size": chosen.size,
        "modules": options.modules,
        "extras": None if options.extras == "error" else options.extras,
        "dtype": None if options.dtype == "keep" else options.dtype,
        "to": options.to,
        "alpha": given_alphas(plan.inputs) or None,
    }
    return Provenance("merge", origins, recorded)


def _data_size(entries: dict[str, Entry]) -> int:
    return max((entry.end for entry in entries.values()), default=0)


def _file_size(entries: dict[str, Entry], metadata: dict[str, str]) -> int:
    """Bytes of the finished file: the header's reserve holds what is only known at the end."""
    header = len(encode_header(entries, metadata)) + _RESERVE
    return -(-header // 8) * 8 + _data_size(entries)


def _hints(
    plan: Plan, spectra: Sequence[Spectrum], whole: float, rank: int
) -> tuple[RankHint, ...]:
    """What each smaller standard rank would cost, where the singular values are known."""
    if not spectra:
        return ()
    tail = ranks.tails(spectra)
    smaller = {r for r in (*ranks.STANDARD, plan.input_rank) if r < min(rank, len(tail))}
    return tuple(RankHint(r, float(tail[r]) / whole if whole else 0.0) for r in sorted(smaller))


def _check_promises(report: Report, figures: Sequence[Figures], options: Options) -> None:
    _check_cancellation(report.norm, report.floor, any(figure.beta > 0 for figure in figures))
    bound = options.ranks.max_error
    noise = report.floor / report.norm if report.norm else 0.0
    if bound is not None and report.error + noise > bound:
        raise BudgetError(
            f"the error as written is {report.error:.4g}, measured to within {noise:.2g}: "
            f"--max-error {bound:g} cannot be promised"
        )


def _check_cancellation(norm: float, floor: float, something: bool) -> None:
    """Refuse a sum of which nothing is left but rounding noise."""
    if something and norm <= floor:
        raise NumericsError(
            f"the inputs cancel: ‖ΔW‖ = {norm:.2g} is below the rounding noise {floor:.2g} of what "
            "went in",
            hint="are two of the inputs the same adapter with opposite weights?",
        )


def _planned(plan: Plan, out: str, size: int, rank: int, extras: Mapping[str, str]) -> PlanReport:
    modules = {}
    for module in plan.modules:
        widths = [0] * len(plan.inputs)
        for part in module.parts:
            widths[part.input] = part.site.rank
        modules[module.stem] = (module.shape, tuple(widths))
    for delta in plan.deltas:
        shape = (delta.shape[0], math.prod(delta.shape[1:])) if delta.shape else (1, 1)
        modules[delta.name] = (shape, tuple([0] * len(plan.inputs)))
    dtype = format_name(plan.dtype)
    return PlanReport(out, plan.dialect, dtype, rank, size, modules, extras)
