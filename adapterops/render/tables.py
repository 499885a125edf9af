"""Reports as tables for people."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapterops.certificate import ModuleReport, PlanReport, Report

_WORST = 5
_WIDTH = 140  # off a terminal nothing is gained by squeezing columns


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number, or a dash where it is undefined."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None, floor: float = 0.0) -> str:
    """A fraction in per cent, a dash where it is undefined, a bound where it is rounding noise."""
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if value == 0.0 or value > floor else f"< {100 * floor:.1g} %"


def print_merge(
    report: Report | PlanReport, *, verbose: bool, command: Callable[[int], str]
) -> None:
    """The certificate of a merge on stdout; `command(rank)` is the command for a rank."""
    terminal = sys.stdout.isatty()
    console = Console(
        emoji=False,
        file=io.StringIO(),
        force_terminal=terminal,
        highlight=False,
        soft_wrap=True,
        width=shutil.get_terminal_size().columns if terminal else _WIDTH,
    )
    _print(console, report, verbose, command)
    sys.stdout.write(console.file.getvalue())  # type: ignore[attr-defined]
    sys.stdout.flush()


def _print(
    console: Console, report: Report | PlanReport, verbose: bool, command: Callable[[int], str]
) -> None:
    if isinstance(report, PlanReport):
        _print_plan(console, report)
    else:
        _print_report(console, report, verbose)
    for name, fate in report.extras.items():
        if fate == "dropped":
            console.print(f"left out: {escape(name)}")
    for fate in ("copied", "averaged"):
        count = list(report.extras.values()).count(fate)
        if count:
            console.print(f"extras (heads, biases, token rows): {count} tensors {fate}")
    if report.hints:
        console.print("a smaller rank would cost:")
        for hint in report.hints:
            console.print(
                f"  rank {hint.rank:<4} error {percent(hint.error):<9} {escape(command(hint.rank))}"
            )
    for note in report.notes:
        console.print(f"note: {escape(note)}")


def _print_plan(console: Console, plan: PlanReport) -> None:
    console.print(
        f"[bold]{escape(plan.output)}[/bold] would be {plan.dialect}, rank {plan.rank}, "
        f"{plan.dtype}, {plan.size / 1e6:.3g} MB, {len(plan.modules)} modules (nothing written)"
    )


def _print_report(console: Console, report: Report, verbose: bool) -> None:
    console.print(
        f"[bold]{escape(report.output)}[/bold]  {report.dialect}, rank {report.rank}, "
        f"{report.dtype}, {report.size / 1e6:.3g} MB, {len(report.modules)} modules"
    )
    floor = report.floor / report.norm if report.norm else 0.0
    console.print(
        f"error {percent(report.error, floor)} of the exact sum (rank "
        f"{percent(report.truncation, floor)}, number format {percent(report.storage, floor)}), "
        f"‖ΔW‖ {figure(report.norm, 4)}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("input")
    for name in ("weight", "rank", "‖ΔW‖", "share", "retained"):
        table.add_column(name, justify="right")
    for item in report.inputs:
        table.add_row(
            escape(item.name),
            f"{item.weight:g}",
            str(item.rank),
            figure(item.norm, 4),
            percent(item.share),
            figure(item.retention, 4),
        )
    console.print(table)
    ordered = sorted(report.modules.items(), key=lambda item: -(item[1].error or 0.0))
    shown = ordered if verbose else ordered[:_WORST]
    if shown and (verbose or report.truncation > 0):
        console.print(_modules(dict(shown), "module" if verbose else "worst modules"))
    if report.subnormal:
        console.print(f"{report.subnormal} numbers fell below the normal range of {report.dtype}")


def _modules(modules: dict[str, ModuleReport], title: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for name in ("shape", "rank", "‖ΔW‖", "cut", "stored", "error", "route"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, module in modules.items():
        floor = module.floor / module.norm if module.norm else 0.0
        norm = figure(module.norm, 4) if module.norm > module.floor else f"< {module.floor:.1g}"
        table.add_row(
            escape(name),
            "x".join(map(str, module.shape)),
            str(module.rank),
            norm,
            percent(module.truncation, floor),
            percent(module.storage, floor),
            percent(module.error, floor),
            module.route,
        )
    return table
