"""The one evaluator: a weighted sum of adapter files becomes a file with its certificate.

Plan on headers, choose the rank, run, certify, commit. Whatever fails before the commit leaves
nothing behind.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adapterops import kernels, ranks
from adapterops.card import model_card
from adapterops.casts import FORMATS
from adapterops.certificate import PlanReport, RankHint, Report, total
from adapterops.certify import certify
from adapterops.certify import notes as measured_notes
from adapterops.errors import (
    BudgetError,
    IncompatibleError,
    NumericsError,
    OutputExistsError,
    UsageError,
)
from adapterops.extras import Extra, extras_by_name, plan_extras
from adapterops.files.header import Entry, encode_header, layout
from adapterops.files.output import (
    PROVENANCE_KEY,
    SIDECAR,
    Staging,
    TensorWriter,
    check_output,
    stage,
)
from adapterops.formats import kohya, peft
from adapterops.formats.model import AdapterFile
from adapterops.kernels import Piece
from adapterops.layout import Layout, output_path, plan_output, sidecar_name
from adapterops.linalg import Spectrum
from adapterops.options import compute, parse_size
from adapterops.plan import Module, Plan, align
from adapterops.provenance import Origin, Provenance, base_name, file_sha256
from adapterops.ranks import Ranks
from adapterops.stream import Compute, Job, run

_BATCH_BYTES = 256 << 20
_RESERVE = 512


@dataclass(frozen=True, slots=True)
class Options:
    """How a sum is written; `merge` documents each. `command(rank)` is the command for a rank."""

    out: str
    ranks: Ranks
    modules: str | None = None
    extras: str = "error"
    dtype: str = "keep"
    to: str | None = None
    overwrite: bool = False
    strict: bool = False
    dry_run: bool = False
    command: Callable[[int], str] | None = None
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
    modules: str | None = None,
    extras: str = "error",
    dtype: str = "keep",
    to: str | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    command: Callable[[int], str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report | PlanReport:
    """`save` with its options as keywords."""
    chosen = Ranks(rank, energy, max_error, None if size is None else parse_size(size, "--size"))
    options = Options(
        out=os.fspath(out),
        ranks=chosen,
        modules=modules,
        extras=extras,
        dtype=dtype,
        to=to,
        overwrite=overwrite,
        strict=strict,
        dry_run=dry_run,
        command=command,
        progress=progress,
    )
    return save(files, weights, options, compute(device, memory, jobs))


def save(
    inputs: Sequence[AdapterFile], weights: Sequence[float], options: Options, on: Compute
) -> Report | PlanReport:
    """Write Σ wᵢΔWᵢ and return its certificate, or with `dry_run` the plan of it.

    Raises every error of `adapterops.errors`; nothing is written when it does.
    """
    plan = align(inputs, weights, modules=options.modules, dtype=options.dtype, to=options.to)
    out, directory, notes = output_path(options.out, plan.dialect)
    _check_apart(Path(os.path.realpath(out)), inputs)
    check_output(out, directory=directory, overwrite=options.overwrite)
    extras, dropped = plan_extras(inputs, weights, options.extras)
    if extras and plan.dialect != plan.inputs[0].dialect:
        raise IncompatibleError(
            f"--to {plan.dialect}: {extras[0].name!r} has no name in that dialect",
            hint="leave it out with --extras drop",
        )
    copy = _is_copy(plan, options)
    if not copy:
        _check_size(plan, options.ranks)

    spectra: list[Spectrum] = []
    if options.ranks.needs_spectra and not copy:
        spectra = _spectra(plan, on, options)
    rank = plan.input_rank if copy else _choose(plan, extras, spectra, options, directory, on)
    form = plan_output(plan, rank, extras, directory=directory, copy=copy)
    warnings = [*plan.warnings, *form.warnings]
    if options.strict and warnings:
        raise IncompatibleError(f"--strict: {warnings[0]}")
    entries = layout(form.tensors)
    provenance = _provenance(plan, options, on)
    metadata = {**form.metadata, PROVENANCE_KEY: provenance.to_json()}
    size = _file_size(entries, metadata)
    hints = _hints(plan, spectra, rank, options) if not copy else ()
    described = extras_by_name(extras, dropped)
    if options.dry_run:
        planned = _planned(plan, options, size, rank, described)
        return replace(planned, hints=hints, notes=tuple(notes), warnings=tuple(warnings))

    with stage(out, directory=directory, overwrite=options.overwrite) as target:
        name = peft.WEIGHTS if directory else target.final.name
        writer = target.tensors(name, entries, size - _data_size(entries))
        pieces = _write(plan, form, extras, writer, copy, rank, on, options)
        report = certify(plan, pieces, rank, provenance)
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
        _check_promises(report, pieces, options)
        for file in inputs:
            _check_unchanged(file)
        if plan.dialect == "kohya":
            digest, start = writer.data_sha256()
            metadata.update(kohya.model_hashes(entries, metadata, digest, start))
        writer.finish(metadata)
        report = _companions(target, plan, form, report, provenance)
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


def _is_copy(plan: Plan, options: Options) -> bool:
    """One adapter with coefficient 1, nothing cut, no other format: its bytes are the result."""
    return (
        options.ranks == Ranks()
        and options.dtype == "keep"
        and plan.dialect == plan.inputs[0].dialect
        and len({part.input for module in plan.modules for part in module.parts}) == 1
        and all(
            len(module.parts) == 1 and module.parts[0].coefficient == module.parts[0].site.scale
            for module in plan.modules
        )
        and [weight for weight in plan.weights if weight] == [1.0]
        and all(module.columns for module in plan.modules)
        and not any(
            part.site.scale_from.startswith("--alpha") and plan.dialect != "peft"
            for module in plan.modules
            for part in module.parts
        )
    )


def _check_size(plan: Plan, chosen: Ranks) -> None:
    """Refuse a lossless result that would be larger than the dense deltas."""
    if chosen != Ranks() or plan.bound <= plan.input_rank:
        return
    if plan.parameters(plan.bound) >= plan.dense:
        raise UsageError(
            f"without a rank the result needs rank {plan.bound} and "
            f"{plan.parameters(plan.bound):,} numbers, the dense weight changes themselves have "
            f"{plan.dense:,}",
            hint="choose --rank N, --rank same or --energy E, or merge into the base with bake",
        )


def _jobs(
    plan: Plan, kernel: Callable[..., list[Any]], args: tuple[Any, ...], rank: int, on: Compute
) -> Iterator[Job[list[Any]]]:
    """One job per module on the CPU, one per batch of equal modules on a device."""
    groups: dict[Any, list[Module]] = defaultdict(list)
    for position, module in enumerate(plan.modules):
        alike = (module.shape, tuple(part.site.rank for part in module.parts))
        groups[position if on.device == "cpu" else alike].append(module)
    for members in groups.values():
        count = max(1, _BATCH_BYTES // max(1, kernels.peak(members[:1], rank)))
        for start in range(0, len(members), count):
            batch = tuple(members[start : start + count])
            yield Job(batch[0].stem, kernel, (batch, *args, on.device), kernels.peak(batch, rank))


def _spectra(plan: Plan, on: Compute, options: Options) -> list[Spectrum]:
    jobs = _jobs(plan, kernels.spectra, (), 0, on)
    return list(_watched(run(jobs, on), len(plan.modules), "singular values", options))


def _watched(
    results: Iterable[list[Any]], count: int, what: str, options: Options
) -> Iterator[Any]:
    done = 0
    for result in results:
        yield from result
        done += len(result)
        if options.progress:
            options.progress(what, done, count)


def _factors(plan: Plan, rank: int, on: Compute, options: Options) -> Iterator[Piece]:
    jobs = _jobs(plan, kernels.factors, (rank, plan.dtype), rank, on)
    return _watched(run(jobs, on), len(plan.modules), "merging", options)


def _choose(
    plan: Plan,
    extras: Sequence[Extra],
    spectra: Sequence[Spectrum],
    options: Options,
    directory: bool,
    on: Compute,
) -> int:
    chosen = options.ranks
    if chosen.rank is not None:
        return plan.input_rank if chosen.rank == "same" else int(chosen.rank)
    tail, full = ranks.tails(spectra), ranks.lossless(spectra)
    if chosen.energy is not None:
        return min(ranks.for_energy(tail, chosen.energy), full)
    if chosen.size is not None:
        return min(_largest_fitting(plan, extras, chosen.size, directory, options, on), full)
    if chosen.max_error is not None:
        return _within(plan, tail, full, chosen.max_error, options, on)
    return full


def _largest_fitting(
    plan: Plan, extras: Sequence[Extra], size: int, directory: bool, options: Options, on: Compute
) -> int:
    """The largest rank whose file has at most `size` bytes; size is exact, header included."""
    provenance = _provenance(plan, options, on).to_json()

    def bytes_at(rank: int) -> int:
        form = plan_output(plan, rank, extras, directory=directory, copy=False)
        return _file_size(layout(form.tensors), {**form.metadata, PROVENANCE_KEY: provenance})

    smallest = bytes_at(1)
    if smallest > size:
        raise BudgetError(
            f"--size {size}: the smallest adapter of rank 1 has {smallest} bytes",
            hint="leave modules out with --modules, or choose a narrower --dtype",
        )
    low, high = 1, max(plan.bound, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_at(middle) <= size else (low, middle - 1)
    return low


def _within(
    plan: Plan, tail: Any, full: int, max_error: float, options: Options, on: Compute
) -> int:
    """The smallest rank whose error as written, truncation and storage together, is allowed.

    Truncation alone gives a lower bound; from there each rank is tried as it would be written.
    """
    size = float(tail[0])
    rank = min(ranks.smallest(tail, max_error * size), full)
    while True:
        figures = [piece.figures for piece in _factors(plan, rank, on, options)]
        error = total([figure.total for figure in figures])
        if error <= max_error * size:
            return rank
        storage = total([figure.storage for figure in figures])
        if rank == full or storage > max_error * size:
            raise BudgetError(
                f"--max-error {max_error:g} cannot be met: storing the result as "
                f"{FORMATS[plan.dtype].name} alone costs {storage / size:.2g}",
                hint="add --dtype float32" if plan.dtype != "F32" else "allow a larger error",
            )
        room = (max_error * size) ** 2 - storage**2
        rank = min(max(rank + 1, ranks.smallest(tail, room**0.5)), full)


def _provenance(plan: Plan, options: Options, on: Compute) -> Provenance:
    jobs = [Job(file.path, file_sha256, (file.weights_file,), 1 << 22) for file in plan.inputs]
    hashes = run(jobs, on)
    origins = tuple(
        Origin(base_name(file.path), sha256, weight)
        for file, sha256, weight in zip(plan.inputs, hashes, plan.weights, strict=True)
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
    }
    return Provenance("merge", origins, recorded)


def _data_size(entries: dict[str, Entry]) -> int:
    return max((entry.end for entry in entries.values()), default=0)


def _file_size(entries: dict[str, Entry], metadata: dict[str, str]) -> int:
    """Bytes of the finished file: the header's reserve holds what is only known at the end."""
    header = len(encode_header(entries, metadata)) + _RESERVE
    return -(-header // 8) * 8 + _data_size(entries)


def _write(
    plan: Plan,
    form: Layout,
    extras: Sequence[Extra],
    writer: TensorWriter,
    copy: bool,
    rank: int,
    on: Compute,
    options: Options,
) -> list[Piece]:
    """Stream every tensor to its place; what is kept of a piece are its figures."""
    for extra in extras:
        writer.put(extra.name, extra.read())
    for name, data in form.constants.items():
        writer.put(name, data)
    if copy:
        jobs = (
            Job(module.stem, kernels.copied, (module,), kernels.peak([module], 0))
            for module in plan.modules
        )
        results: Iterator[Piece] = run(jobs, on)
        for module in plan.modules:
            site = module.parts[0].site
            if "alpha" in form.roles[module.stem]:
                writer.put(form.roles[module.stem]["alpha"], site.parts["alpha"].raw().data)
    else:
        results = _factors(plan, rank, on, options)
    kept = []
    for piece in results:
        names = form.roles[piece.stem]
        writer.put(names["B"], piece.B)
        writer.put(names["A"], piece.A)
        if piece.bias is not None:
            writer.put(names["bias"], piece.bias)
        kept.append(replace(piece, B=memoryview(b""), A=memoryview(b""), bias=None))
    by_stem = {piece.stem: piece for piece in kept}
    return [by_stem[module.stem] for module in plan.modules]


def _hints(
    plan: Plan, spectra: Sequence[Spectrum], rank: int, options: Options
) -> tuple[RankHint, ...]:
    """What each smaller standard rank would cost, where the singular values are known."""
    if not spectra:
        return ()
    tail = ranks.tails(spectra)
    smaller = {r for r in (*ranks.STANDARD, plan.input_rank) if r < min(rank, len(tail))}
    command = options.command or (lambda r: f"rank={r}")
    return tuple(
        RankHint(r, float(tail[r] / tail[0]) if tail[0] else 0.0, command(r))
        for r in sorted(smaller)
    )


def _check_promises(report: Report, pieces: Sequence[Piece], options: Options) -> None:
    floor = total([piece.figures.floor for piece in pieces])
    if report.norm <= floor and any(piece.figures.beta > 0 for piece in pieces):
        raise NumericsError(
            f"the inputs cancel: ‖ΔW‖ = {report.norm:.2g} is below the rounding noise {floor:.2g} "
            "of what went in"
        )
    bound = options.ranks.max_error
    if bound is not None and report.error > bound:
        raise BudgetError(f"the error as written is {report.error:.4g}, over --max-error {bound:g}")


def _check_unchanged(file: AdapterFile) -> None:
    next(iter(file.sites.values())).parts["A"].source.check_unchanged()


def _companions(
    target: Staging, plan: Plan, form: Layout, report: Report, provenance: Provenance
) -> Report:
    """Config, model card, tokenizer files and the sidecar with every measured figure."""
    for name, data in form.files.items():
        target.write(name, data)
    warnings = list(report.warnings)
    if target.directory:
        target.write("README.md", model_card(report).encode())
        for name in sorted({name for file in plan.inputs for name in file.side_files}):
            content = _agreed_side_file(plan.inputs, name)
            if content is None:
                warnings.append(f"{name} differs between the inputs and was left out")
            else:
                target.write(name, content)
    elif any(file.side_files for file in plan.inputs):
        names = sorted({name for file in plan.inputs for name in file.side_files})
        warnings.append(f"{', '.join(names)} beside the inputs do not fit into one file")
    report = replace(report, warnings=tuple(warnings))
    document = {
        **report.to_dict(),
        "output": base_name(report.output),
        "provenance": provenance.to_dict(),
    }
    name = SIDECAR if target.directory else sidecar_name(target.final)
    target.write(name, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _agreed_side_file(inputs: Sequence[AdapterFile], name: str) -> bytes | None:
    """A side file's bytes if all inputs that have it agree."""
    contents = {(Path(file.path) / name).read_bytes() for file in inputs if name in file.side_files}
    return contents.pop() if len(contents) == 1 else None


def _planned(
    plan: Plan, options: Options, size: int, rank: int, extras: Mapping[str, str]
) -> PlanReport:
    modules = {}
    for module in plan.modules:
        widths = [0] * len(plan.inputs)
        for part in module.parts:
            widths[part.input] = part.site.rank
        modules[module.stem] = (module.shape, tuple(widths))
    dtype = FORMATS[plan.dtype].name
    return PlanReport(options.out, plan.dialect, dtype, rank, size, modules, extras)
