"""The one evaluator: a weighted sum of adapter files becomes a file with its certificate.

Plan on headers, choose the rank, run, certify, commit. Whatever fails before the commit leaves
nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adapterops import passes, ranks
from adapterops.casts import FORMATS
from adapterops.certificate import Figures, PlanReport, RankHint, Report, total
from adapterops.certify import certify
from adapterops.certify import notes as measured_notes
from adapterops.certify import warnings as measured_warnings
from adapterops.choosing import Choice, Known, check_size, choose_ranks
from adapterops.companions import side_files, write_companions
from adapterops.composed import method_of, recorded
from adapterops.errors import BudgetError, IncompatibleError, UsageError
from adapterops.extras import Extra, extras_by_name, plan_extras
from adapterops.files.header import Entry, encode_header, layout
from adapterops.files.output import PROVENANCE_KEY, stage
from adapterops.formats import kohya, peft
from adapterops.formats.model import AdapterFile
from adapterops.layout import Layout, output_path, plan_output, sidecar_name, weights_name
from adapterops.linalg import Spectrum
from adapterops.options import compute, parse_size
from adapterops.plan import Plan
from adapterops.prepare import (
    NAMES,
    Options,
    check_engine,
    dry_run,
    is_bounded,
    is_copy,
    is_exact,
    planned_for,
    provenance_of,
)
from adapterops.promises import (
    check_apart,
    check_cancellation,
    check_free,
    check_promises,
    check_sidecar,
)
from adapterops.ranks import Ranks
from adapterops.stream import Compute
from adapterops.target import kernel_warnings
from adapterops.writing import write

if TYPE_CHECKING:
    from adapterops.serving.legal import LegalForm

_RESERVE = 512
_CAP = 256  # directions of a dense change that are computed where no --max-rank says how many


def save_sum(
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    rank: int | Literal["same"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    ratio: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    allocate: Literal["uniform", "global"] = "uniform",
    ragged: bool = False,
    min_rank: int | None = None,
    max_rank: int | None = None,
    as_stored: bool = False,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    **options: Any,
) -> Report | PlanReport:
    """`save` with everything as keywords; `options` are the other fields of `Options`."""
    chosen = Ranks(
        rank=_plain(rank),
        energy=_plain(energy),
        max_error=_plain(max_error),
        size=None if size is None else parse_size(size, "--size"),
        ratio=_plain(ratio),
        sv_ratio=_plain(sv_ratio),
        sv_fro=_plain(sv_fro),
        sv_cumulative=_plain(sv_cumulative),
        allocate=allocate,
        ragged=ragged,
        floor=_plain(min_rank),
        ceiling=_plain(max_rank),
        as_stored=as_stored,
    )
    how = Options(os.fspath(out), chosen, **options)
    return save(files, weights, how, compute(device, memory, jobs))


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def save(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Report | PlanReport:
    """Write Σ wᵢΔWᵢ and return its certificate, or with `dry_run` the plan of it.

    Raises every error of `adapterops.errors`; nothing is written when it does.
    """
    try:
        return _save(inputs, weights, options, on)
    finally:
        for each in options.weighting.inputs.values():
            each.ref.source.close()
        for file in inputs:
            for source in file.sources:
                source.close()


def _save(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Report | PlanReport:
    options = replace(options, recorded=recorded(inputs, weights, options.recorded))
    method = method_of(inputs)
    plan, legal = planned_for(inputs, weights, options)
    inputs, weights = plan.inputs, plan.weights
    out, directory, notes = output_path(options.out, plan.dialect, NAMES[options.verb])
    check_apart(Path(os.path.realpath(out)), inputs)
    name = weights_name(plan.dialect) if directory else os.path.basename(out)
    final = check_free(
        out,
        directory=directory,
        overwrite=options.overwrite,
        made=lambda: provenance_of(inputs, weights, options, on),
    )
    if not directory:
        check_sidecar(final.with_name(sidecar_name(final)))
    extras, dropped = plan_extras(inputs, weights, options.extras, _extra_name(plan))
    if extras and plan.dialect != plan.inputs[0].dialect:
        raise IncompatibleError(
            f"--to {plan.dialect}: {extras[0].name!r} has no name in that dialect",
            hint="leave it out with --extras drop",
        )
    copy = is_copy(plan, options)
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
    provenance = provenance_of(inputs, weights, options, on)

    def form_at(chosen: Sequence[int]) -> tuple[Layout, dict[str, Entry], dict[str, str]]:
        at = plan.at(chosen)
        form = plan_output(at, renamed(extras, at), directory=directory, copy=copy)
        return form, layout(form.tensors), {**form.metadata, PROVENANCE_KEY: provenance.to_json()}

    if legal and not copy:  # before anything is read
        form = form_at([legal.rank_for(1) or 1] * len(plan.modules))[0]
        check_engine(legal, form, name, directory=directory, side_files=tuple(travelling))
    spectra: list[Spectrum] = []
    choice = Choice(tuple(module.columns for module in plan.modules))
    whole = 0.0
    if not copy or options.with_spectra:
        spectra, dense = _measured(plan, options, on)
        known: list[Spectrum | Figures] = [*spectra, *dense]
        whole = total([each.norm for each in known])
        if spectra:
            floor = total([each.floor for each in known])
            something = any(each.beta > 0 for each in known)
            check_cancellation(whole, floor, something, len(inputs))
    if not copy:

        def error_at(chosen: Sequence[int]) -> float:
            at = plan.at(chosen)
            with closing(passes.pieces(at, options.form, on, options.progress)) as pieces:
                sizes = {module.stem: module.weight for module in at.modules}
                lost = [piece.figures.in_metric(sizes[piece.stem])[1] for piece in pieces]
            return total([*lost, *(figures.total for figures in dense)])

        def bytes_at(chosen: Sequence[int]) -> int:
            return _file_size(*form_at(chosen)[1:])

        known_of = Known(
            plan,
            spectra,
            whole,
            bytes_at,
            error_at,
            form=legal,
            bounded=is_bounded(plan, options),
            exact=is_exact(plan),
        )
        choice = choose_ranks(options.ranks, known_of)
    plan = plan.at(choice.ranks)
    extras = renamed(extras, plan)
    form, entries, metadata = form_at(choice.ranks)
    size = _file_size(entries, metadata)
    hidden = [] if copy else kernel_warnings(plan.modules)
    warnings = [*plan.warnings, *options.weighting.notes, *hidden, *form.warnings, *left]
    if options.strict and warnings:
        raise IncompatibleError(f"--strict: {warnings[0]}")
    hints = _hints(plan, spectra, whole, legal)
    described = extras_by_name(extras, [*dropped, *options.left_out])
    if legal:
        notes += check_engine(legal, form, name, directory=directory, side_files=tuple(travelling))
    if options.dry_run:
        planned = dry_run(plan, out, size, described)
        return replace(
            planned,
            verb=options.verb,
            gap=choice.gap,
            hints=hints,
            notes=tuple(notes),
            warnings=tuple(warnings),
        )

    with stage(out, directory=directory, overwrite=options.overwrite) as target:
        writer = target.tensors(name, entries, size - _data_size(entries))
        figures, full = write(plan, form, extras, writer, copy, options.form, on, options.progress)
        report = certify(plan, figures, full, provenance, options.weighting.name)
        found = measured_warnings(plan, report)
        if options.strict and found:
            raise BudgetError(f"--strict: {found[0]}")
        report = replace(
            report,
            verb=options.verb,
            method=method,
            output=out,
            dialect=plan.dialect,
            size=size,
            gap=choice.gap,
            extras=described,
            hints=hints,
            spectra=_listed(plan, spectra) if options.with_spectra else {},
            notes=(*notes, *measured_notes(plan, report, copy)),
            warnings=(*warnings, *found),
        )
        check_promises(report, [*figures, *full], options.ranks.max_error)
        for file in inputs:
            for source in file.sources:
                source.check_unchanged()
        if any(module.dialect == "kohya" for module in plan.modules):
            digest, start = writer.data_sha256()
            metadata.update(kohya.model_hashes(entries, metadata, digest, start))
        writer.finish(metadata)
        write_companions(target, {**form.files, **travelling}, report, provenance)
    return report


def _measured(plan: Plan, options: Options, on: Compute) -> tuple[list[Spectrum], list[Figures]]:
    """Singular values and the figures of full deltas, where a choice or the user asks for them."""
    if not (options.ranks.needs_spectra or options.with_spectra):
        return [], []
    cap = options.ranks.ceiling or _CAP
    spectra = passes.spectra(plan, cap, on, options.progress)
    counted = options.weighting.name == "frobenius"
    return spectra, [delta.figures for delta in passes.dense(plan, on)] if counted else []


def _listed(plan: Plan, spectra: Sequence[Spectrum]) -> dict[str, tuple[float, ...]]:
    return {
        module.stem: tuple(spectrum.values.tolist())
        for module, spectrum in zip(plan.modules, spectra, strict=True)
    }


def renamed(extras: Sequence[Extra], plan: Plan) -> list[Extra]:
    """The extras by their names beside the modules that are written."""
    name = _extra_name(plan)
    return [replace(extra, name=name(extra.name)) for extra in extras]


def _extra_name(plan: Plan) -> Callable[[str], str]:
    """How the output's dialect names a tensor that is no factor."""
    if plan.dialect != "peft":
        return lambda name: name
    modules = {module.stem for module in (plan.written or plan.modules)}
    return lambda name: peft.extra_name(name, modules)


def _data_size(entries: dict[str, Entry]) -> int:
    return max((entry.end for entry in entries.values()), default=0)


def _file_size(entries: dict[str, Entry], metadata: dict[str, str]) -> int:
    """Bytes of the finished file: the header's reserve holds what is only known at the end."""
    header = len(encode_header(entries, metadata)) + _RESERVE
    return -(-header // 8) * 8 + _data_size(entries)


def _hints(
    plan: Plan, spectra: Sequence[Spectrum], whole: float, legal: LegalForm | None
) -> tuple[RankHint, ...]:
    """What each smaller standard rank would cost, where the singular values are known."""
    if not spectra:
        return ()
    tail = ranks.tails(spectra)
    smaller = {r for r in (*ranks.STANDARD, plan.input_rank) if r < min(plan.rank, len(tail))}
    if legal:
        smaller = {r for r in smaller if legal.rank_for(r) == r}
    return tuple(RankHint(r, float(tail[r]) / whole if whole else 0.0) for r in sorted(smaller))
