"""What compress, convert and extract did, as text: a page for one adapter, a line each for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adapterops.certificate import PlanReport, Report
from adapterops.render.tables import (
    percent,
    print_errors,
    print_modules,
    print_plan,
    print_rest,
)
from adapterops.render.text import count, drawn, grid, megabytes, printable, safe
from adapterops.verbs.results import ManyReport, Result

_NAMES = 4
_METRICS = {
    "relative": "relative to the norms of the weights it changes",
    "activation": "on the inputs that the activations describe",
}


def page(report: Report | PlanReport, *, verbose: bool, command: Callable[[int], str]) -> str:
    """The certificate of one adapter; `command(rank)` is the command for another rank."""

    def draw(console: Any) -> None:
        if isinstance(report, PlanReport):
            print_plan(console, report)
            _print_ranks(console, report, sorted({k for k in report.ranks.values() if k}))
        else:
            _print_report(console, report, verbose)
        print_rest(console, report, command, "another rank would cost:")

    return drawn(draw)


def table(report: ManyReport) -> str:
    """One line per adapter and a summary.

    Plain text: no library draws ten thousand rows in time.
    """
    heads = ["adapter", "dialect", "rank", "parameters", "MB", "error"]
    metric = any(_in_metric(result) for result in report.results)
    heads += ["metric"] if metric else []
    rows = [[*heads, "remark"], *(_line(result, metric) for result in report.results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 or index == len(heads) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*(lines if report.results else []), *_totals(report)])


def _print_report(console: Any, report: Report, verbose: bool) -> None:
    adapters = report.inputs if report.verb != "extract" else ()
    before = adapters[0] if len(adapters) == 1 else None
    ranks = sorted({module.rank for module in report.modules.values() if module.rank})
    modules = count(len(report.modules) - len({*report.dropped} & {*report.modules}), "module")
    if before is None:
        console.print(
            f"[bold]{safe(report.output)}[/bold]  {report.dialect}, rank {_span(ranks)}, "
            f"{report.dtype}, {report.parameters:,} parameters, {megabytes(report.size)} MB, "
            f"{modules}"
        )
    else:
        console.print(f"[bold]{safe(report.output)}[/bold]  {modules}")
        rows = grid("", "dialect", "rank", "parameters", "MB", "number format")
        rows.add_row(
            "before",
            before.dialect,
            str(before.rank),
            f"{report.parameters_before:,}",
            megabytes(report.size_before),
            before.dtype,
        )
        rows.add_row(
            "after",
            report.dialect,
            _span(ranks),
            f"{report.parameters:,}",
            megabytes(report.size),
            report.dtype,
        )
        console.print(rows)
    whole = "the difference" if report.verb == "extract" else "the adapter"
    print_errors(console, report, whole)
    if report.metric != "frobenius":
        meant = _METRICS.get(report.metric, report.metric)
        console.print(f"error {percent(report.metric_error)} {meant}")
    _print_ranks(console, report, ranks)
    print_modules(console, report, verbose)


def _print_ranks(console: Any, report: Report | PlanReport, ranks: Sequence[int]) -> None:
    """How ranks that differ were spent, and who got none."""
    if report.gap == 0.0:
        console.print("no choice of ranks with as many parameters has a smaller error")
    elif report.gap is not None:
        console.print(
            f"no choice of ranks with as many parameters has an error smaller by {_gap(report.gap)}"
        )
    if isinstance(report, PlanReport) and len(ranks) > 1:
        console.print(f"ranks by module: {_span(ranks)}")
    if report.dropped:
        names = safe(", ".join(report.dropped[:_NAMES]))
        more = len(report.dropped) - _NAMES
        console.print(
            f"at rank 0, left out: {count(len(report.dropped), 'module')}, {names}"
            + (f" and {more} more" if more > 0 else "")
        )


def _gap(gap: float) -> str:
    return f"more than {percent(gap)}"


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return "0"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def _in_metric(result: Result) -> bool:
    return bool(result.certificate.get("metric", "frobenius") != "frobenius")


def _line(result: Result, metric: bool) -> list[str]:
    found = result.certificate
    before = max((x["rank"] for x in result.listed("inputs") if "rank" in x), default=None)
    error = result.number("error")
    floor = (result.number("floor") or 0.0) / (result.number("norm") or 1.0)
    cells = [
        printable(result.path),
        str(found.get("dialect", "")),
        _change(before, result.number("rank"), "d"),
        _change(result.number("parameters_before"), result.number("parameters"), ",d"),
        _sizes(result.number("size_before"), result.number("size")),
        percent(error, floor),
    ]
    cells += [percent(result.number("metric_error"))] if metric else []
    return [*cells, _remark(result)]


def _change(before: float | None, after: float | None, form: str) -> str:
    told = [f"{value:{form}}" for value in (before, after) if value is not None]
    return " → ".join(told) or "–"


def _sizes(before: float | None, after: float | None) -> str:
    return " → ".join(megabytes(size) for size in (before, after) if size is not None) or "–"


def _remark(result: Result) -> str:
    """What the other columns do not say."""
    schema = str(result.certificate.get("schema", ""))
    parts = ["done before"] if result.skipped else []
    parts += ["nothing written"] if schema.endswith("-plan/1") else []
    dropped = len(result.listed("dropped"))
    parts += [f"{count(dropped, 'module')} at rank 0"] if dropped else []
    warnings = result.listed("warnings")
    parts += [count(len(warnings), "warning")] if warnings else []
    return "; ".join(parts)


def _totals(report: ManyReport) -> list[str]:
    counts = report.summary()
    sizes = _sizes(counts["size_before"], counts["size"])
    text = [count(counts["adapters"], "adapter")]
    text += [f"{sizes} MB"] if counts["size"] is not None else []
    if counts["worst_error"] is not None:
        text.append(
            f"largest error {percent(counts['worst_error'])} ({printable(counts['worst'])})"
        )
    text += [f"{counts['skipped']:,} done before"] if counts["skipped"] else []
    text += [f"{counts['failed']:,} failed"] if counts["failed"] else []
    return ["", ", ".join(text)] if report.results else [", ".join(text)]
