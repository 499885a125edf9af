"""Certificates as tables for people: of a merge, and the parts that other verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from adapterops.certificate import ModuleReport, PlanReport, Report
from adapterops.render.text import drawn, safe

_WORST = 5


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number, or a dash where it is undefined."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None, floor: float = 0.0) -> str:
    """A fraction in per cent, a dash where it is undefined, a bound where it is rounding noise."""
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if value == 0.0 or value > floor else f"< {100 * floor:.1g} %"


def page(report: Report | PlanReport, *, verbose: bool, command: Callable[[int], str]) -> str:
    """The certificate of a merge; `command(rank)` is the command for a rank."""

    def draw(console: Any) -> None:
        if isinstance(report, PlanReport):
            print_plan(console, report)
        else:
            _print_report(console, report, verbose)
        print_rest(console, report, command, "a smaller rank would cost:")

    return drawn(draw)


def print_rest(
    console: Any, report: Report | PlanReport, command: Callable[[int], str], title: str
) -> None:
    """What stands below the tables of every verb: extras, other ranks, notes."""
    for name, fate in report.extras.items():
        if fate == "dropped":
            console.print(f"left out: {safe(name)}")
    for fate in ("copied", "averaged"):
        count = list(report.extras.values()).count(fate)
        if count:
            console.print(f"extras (heads, biases, token rows): {count} tensors {fate}")
    if report.hints:
        console.print(title)
        for hint in report.hints:
            console.print(
                f"  rank {hint.rank:<4} error {percent(hint.error):<9} {safe(command(hint.rank))}"
            )
    for note in report.notes:
        console.print(f"note: {safe(note)}")


def print_plan(console: Any, plan: PlanReport) -> None:
    """What would be written."""
    console.print(
        f"[bold]{safe(plan.output)}[/bold] would be {plan.dialect}, rank {plan.rank}, "
        f"{plan.dtype}, {plan.size / 1e6:.3g} MB, {len(plan.modules)} modules (nothing written)"
    )


def print_errors(console: Any, report: Report, whole: str) -> None:
    """The error as written and its two parts, relative to `whole`."""
    floor = report.floor / report.norm if report.norm else 0.0
    console.print(
        f"error {percent(report.error, floor)} of {whole} (rank "
        f"{percent(report.truncation, floor)}, number format {percent(report.storage, floor)}), "
        f"‖ΔW‖ {figure(report.norm, 4)}"
    )


def print_modules(console: Any, report: Report, verbose: bool) -> None:
    """The modules with the largest errors, all with `verbose`, and what the format cannot hold."""
    ordered = sorted(report.modules.items(), key=lambda item: -(item[1].error or 0.0))
    shown = ordered if verbose else ordered[:_WORST]
    if shown and (verbose or report.truncation > 0):
        measured = report.metric != "frobenius"
        console.print(_modules(dict(shown), "module" if verbose else "worst modules", measured))
    if report.subnormal:
        console.print(f"{report.subnormal} numbers fell below the normal range of {report.dtype}")


def _exact(report: Report) -> str:
    """What errors are relative to."""
    if report.verb == "calc":
        return "what the expression is"
    return "the exact sum" if report.method == "linear" else f"what {report.method} makes of them"


def _print_report(console: Any, report: Report, verbose: bool) -> None:
    console.print(
        f"[bold]{safe(report.output)}[/bold]  {report.dialect}, rank {report.rank}, "
        f"{report.dtype}, {report.size / 1e6:.3g} MB, {len(report.modules)} modules"
    )
    print_errors(console, report, _exact(report))
    table = Table(box=None, pad_edge=False)
    table.add_column("input")
    for name in ("weight", "rank", "‖ΔW‖", "share", "retained"):
        table.add_column(name, justify="right")
    for item in report.inputs:
        table.add_row(
            safe(item.name),
            figure(item.weight, 6),
            str(item.rank),
            figure(item.norm, 4),
            percent(item.share),
            figure(item.retention, 4),
        )
    console.print(table)
    print_modules(console, report, verbose)


def _modules(modules: Mapping[str, ModuleReport], title: str, measured: bool) -> Table:
    """Errors by module; `measured`: in a metric too."""
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    metric = ("metric",) if measured else ()
    for name in ("shape", "rank", "‖ΔW‖", "cut", "stored", "error", *metric, "route"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, module in modules.items():
        floor = module.floor / module.norm if module.norm else 0.0
        norm = figure(module.norm, 4) if module.norm > module.floor else f"< {module.floor:.1g}"
        errors = [module.truncation, module.storage, module.error]
        errors += [module.metric_error] if measured else []
        table.add_row(
            safe(name),
            "x".join(map(str, module.shape)),
            str(module.rank),
            norm,
            *(percent(value, floor) for value in errors),
            module.route,
        )
    return table
