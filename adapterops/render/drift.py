"""The verdicts on a merged model, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterops.judging.chain import ChainReport, Figures
from adapterops.judging.forward import ForwardReport
from adapterops.judging.intruders import Intruders
from adapterops.judging.logits import Compared, LogitsReport
from adapterops.judging.report import DriftReport, TensorVerdict
from adapterops.render.tables import figure, percent
from adapterops.render.text import count, drawn, grid, safe

_WORST = 5
_WORDS = {"ok": "right", "failed": "WRONG", "undetermined": "undetermined"}


def page(report: DriftReport, *, verbose: bool) -> str:
    """The verdicts, what they rest on, and what else was asked for."""

    def draw(console: Any) -> None:
        if report.baked:
            _print_verdicts(console, report, verbose)
        if report.forward is not None:
            _print_forward(console, report.forward, verbose)
        if report.logits is not None:
            _print_logits(console, report.logits)
        if report.intruders is not None:
            _print_intruders(console, report.intruders, verbose)
        if report.chain is not None:
            _print_chain(console, report.chain)
        for note in report.notes:
            console.print(f"note: {safe(note)}")

    return drawn(draw)


def _print_verdicts(console: Any, report: DriftReport, verbose: bool) -> None:
    model = f": {report.model}" if report.model else ""
    console.print(
        f"[bold]{safe(report.baked)}[/bold]  implementation "
        f"[bold]{_WORDS[report.implementation]}[/bold]{safe(model)}; "
        f"representation {report.representation}"
    )
    total = report.total
    if total is not None:
        console.print(
            f"gain {figure(total.gain, 4)}, error inside {percent(total.subspace_error)}, "
            f"error {percent(total.error)}, unmoved {percent(total.swallowed)}, "
            f"‖ΔW‖ {figure(total.norm, 4)}"
        )
    if report.over_budget:
        console.print(f"the error inside is above --max-drift {report.max_drift:g}")
    for sentence in report.summary:
        console.print(safe(sentence))
    for finding in report.findings:
        sentence = f"{finding.name} {finding.text}"
        if (finding.fails or verbose) and sentence not in report.summary:
            console.print(safe(sentence))
    shown = list(report.tensors.items())
    if not verbose:
        failed = [item for item in shown if item[1].implementation == "failed"]
        shown = (failed or shown)[:_WORST]
    if shown:
        console.print(_tensors(dict(shown)))
    same = count(report.identical, "other tensor")
    converted = "".join(
        f", {number:,} converted from {safe(how)}" for how, number in report.converted.items()
    )
    console.print(f"{same} identical{converted}")
    if report.detectable is not None and report.implementation == "ok":
        console.print(f"a scale error of {percent(report.detectable)} would have shown")


def _tensors(tensors: Mapping[str, TensorVerdict]) -> Any:
    table = grid("tensor", "verdict", "gain", "error inside", "error", "unmoved", "how")
    for name, each in tensors.items():
        table.add_row(
            safe(name),
            _WORDS[each.implementation],
            figure(each.gain, 4),
            percent(each.subspace_error),
            percent(each.error),
            percent(each.swallowed),
            safe(each.cause.kind if each.cause else each.model),
        )
    return table


def _print_forward(console: Any, report: ForwardReport, verbose: bool) -> None:
    console.print(
        f"on the activations: error of the outputs {percent(report.to_change)} of what the "
        f"adapters change, {percent(report.to_output)} of the outputs "
        f"({count(len(report.modules), 'module')}, {len(report.without)} without activations)"
    )
    ordered = sorted(report.modules.items(), key=lambda item: -(item[1].to_change or 0.0))
    table = grid("module", "of the change", "of the output")
    for name, each in ordered[: None if verbose else _WORST]:
        table.add_row(safe(name), percent(each.to_change), percent(each.to_output))
    if ordered:
        console.print(table)


def _print_logits(console: Any, report: LogitsReport) -> None:
    for what, found in (("random tokens", report.random), ("plain text", report.text)):
        if found is not None:
            console.print(_logits(found, what, report.dtype))
    for note in report.notes:
        console.print(f"note: {safe(note)}")


def _logits(found: Compared, what: str, dtype: str) -> Any:
    table = grid(f"predictions, {what} ({found.positions:,})", "mean KL", "largest", "same first")
    for name, each in (
        ("merged, in float32", found.baked),
        (f"merged, in {dtype}", found.in_dtype),
        (f"unmerged, in {dtype}", found.floor),
    ):
        table.add_row(name, figure(each.kl), figure(each.largest), percent(each.top1))
    return table


def _print_intruders(console: Any, found: Mapping[str, Intruders], verbose: bool) -> None:
    total = sum(len(each.dims) for each in found.values())
    looked = sum(each.looked_at for each in found.values())
    dense = sum(each.cost == "eigh" for each in found.values())
    console.print(
        f"{count(total, 'intruder dimension')} among the first {looked:,} of "
        f"{count(len(found), 'weight')}; {dense:,} needed a full decomposition"
    )
    ordered = sorted(found.items(), key=lambda item: -len(item[1].dims))
    for name, each in ordered[: None if verbose else _WORST]:
        if each.dims:
            where = ", ".join(f"{dim.index} (σ {dim.sigma:.3g})" for dim in each.dims)
            console.print(f"  {safe(name)}: {where}")


def _print_chain(console: Any, report: ChainReport) -> None:
    table = grid(
        "adapters baked", "one by one: error", "inside", "gain", "at once: error", "growth"
    )
    for step in report.steps:
        one, all_ = step.sequential, step.at_once
        table.add_row(
            str(step.adapters),
            *_figures(one),
            percent(all_.relative_error),
            figure(step.growth),
        )
    console.print(table)
    if any(step.sequential.intruders is not None for step in report.steps):
        line = ", ".join(
            f"{step.sequential.intruders} ({step.at_once.intruders} at once)"
            for step in report.steps
        )
        console.print(f"intruder dimensions after each: {line}")


def _figures(found: Figures) -> list[str]:
    return [
        percent(found.relative_error),
        percent(found.subspace_error),
        figure(found.gain, 4),
    ]
