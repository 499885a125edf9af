"""What baking did, as text: what became of the change, in all and where most of it was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterops.baking.report import BakeReport, TensorDrift, Total
from adapterops.render.tables import figure, percent
from adapterops.render.text import count, drawn, grid, megabytes, safe

_WORST = 5


def page(report: BakeReport, *, verbose: bool) -> str:
    """The report of a bake."""

    def draw(console: Any) -> None:
        _print_head(console, report)
        if report.total or report.predicted:
            _print_totals(console, report)
        shown = dict(list(report.tensors.items())[: None if verbose else _WORST])
        if shown:
            console.print(_tensors(shown, "tensor" if verbose else "worst tensors"))
        _print_rest(console, report)

    return drawn(draw)


def _print_head(console: Any, report: BakeReport) -> None:
    changed = count(len(report.tensors), "tensor")
    what = f"{report.dtype}, {megabytes(report.size)} MB"
    if not report.files:
        console.print(f"[bold]{safe(report.output)}[/bold] would be {what} (nothing written)")
        return
    console.print(
        f"[bold]{safe(report.output)}[/bold]  {what}, {changed} changed by "
        f"{count(report.modules, 'module')}, {megabytes(report.copied)} MB copied as they are"
    )
    if report.resumed:
        console.print(f"{count(report.resumed, 'file')} of weights were finished before")


def _print_totals(console: Any, report: BakeReport) -> None:
    table = grid("", "gain", "error inside", "error", "unmoved", "‖ΔW‖")
    for name, total in (("written", report.total), ("predicted", report.predicted)):
        if total is not None and (name == "written" or not report.total):
            table.add_row(name, *_figures(total))
    console.print(table)
    counts = report.counts
    if report.rounding == "exact" and (counts.double or counts.exact):
        console.print(
            f"correctly rounded: {counts.single:,} elements decided in float32, "
            f"{counts.double:,} in float64, {counts.exact:,} exactly"
        )


def _figures(found: Total | TensorDrift) -> list[str]:
    return [
        figure(found.gain, 4),
        percent(found.subspace_error),
        percent(found.error),
        percent(found.swallowed),
        figure(found.norm, 4),
    ]


def _tensors(tensors: Mapping[str, TensorDrift], title: str) -> Any:
    table = grid(title, "gain", "error inside", "error", "unmoved", "‖ΔW‖")
    for name, item in tensors.items():
        table.add_row(safe(name), *_figures(item))
    return table


def _print_rest(console: Any, report: BakeReport) -> None:
    for names, what in (
        (report.values, "given the adapters' values"),
        (report.added, "added"),
        (report.unchanged, "unchanged, as the change is zero"),
        (report.dropped, "left out"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.print(f"{what}: {', '.join(map(safe, names[:3]))}{more}")
    if report.undo:
        console.print(f"unbake restores the base from {', '.join(map(safe, report.undo[:3]))}")
    if report.history:
        console.print(f"the base was baked {count(len(report.history), 'time')} before")
    for note in report.notes:
        console.print(f"note: {safe(note)}")
