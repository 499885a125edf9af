"""A plan as text: what is shared, at what error, what is not and why."""

from __future__ import annotations

from typing import Any

from adapterops.fleet.plans.outcome import ClusterReport, Spread
from adapterops.render.fleet_words import cosines_of
from adapterops.render.tables import percent
from adapterops.render.text import count, drawn, grid, megabytes, safe

_GROUPS = 8
_RELATED = 5


def page(report: ClusterReport, *, verbose: bool) -> str:
    """The report of a plan."""

    def draw(console: Any) -> None:
        _print_head(console, report)
        if report.groups:
            console.print(_groups(report, verbose))
        if report.pareto:
            console.print(_pareto(report))
        _print_rest(console, report, verbose)

    return drawn(draw)


def _print_head(console: Any, report: ClusterReport) -> None:
    name = safe(report.output) if report.output else "a plan (nothing written)"
    console.print(
        f"[bold]{name}[/bold]  {count(report.tenants, 'tenant')} served by "
        f"{count(report.adapters, 'adapter')} ({report.before} different ones before), "
        f"{megabytes(report.size)} MB ({megabytes(report.size_before)} MB)"
    )
    bound = "" if report.max_error is None else f", none above {report.max_error:g}"
    if report.errors:
        console.print(f"error of those that share: {_spread(report.errors)}{bound}, verified")
    if report.foreign:
        console.print(f"of it foreign, others' training: {_spread(report.foreign)}")


def _spread(found: Spread) -> str:
    return (
        f"median {percent(found.median)}, 99th percentile {percent(found.high)}, "
        f"largest {percent(found.largest)}"
    )


def _groups(report: ClusterReport, verbose: bool) -> Any:
    shown = report.groups if verbose else report.groups[:_GROUPS]
    more = len(report.groups) - len(shown)
    title = f"largest groups ({more} more)" if more else "groups"
    table = grid(title, "tenants", "served by", "rank", "error", "foreign")
    for group in shown:
        names = ", ".join(map(safe, group.members[:2]))
        others = f", … {len(group.members) - 2} more" if len(group.members) > 2 else ""
        table.add_row(
            names + others,
            str(len(group.members)),
            group.kind,
            str(group.rank),
            percent(group.largest),
            percent(group.foreign),
        )
    return table


def _pareto(report: ClusterReport) -> Any:
    title = "if all might share, by originals (estimated)"
    table = grid(title, "adapters", "largest error", "mean", "foreign")
    seen = set()
    for point in report.pareto:
        if point.adapters in seen:
            continue
        seen.add(point.adapters)
        table.add_row(
            f"--max-error {point.max_error:g}",
            str(point.adapters),
            percent(point.largest),
            percent(point.mean),
            percent(point.foreign),
        )
    return table


def _print_rest(console: Any, report: ClusterReport, verbose: bool) -> None:
    for shared in report.groups if verbose else ():
        console.print(f"{safe(shared.members[0])}, … by {safe(shared.id)}: {safe(shared.reason)}")
    for reason, number in report.alone.items():
        console.print(f"{count(number, 'tenant')} alone: {safe(reason)}")
    if report.excluded:
        names = ", ".join(map(safe, list(report.excluded)[:3]))
        console.print(f"{count(len(report.excluded), 'tenant')} without an adapter: {names}")
    for group in report.related if verbose else report.related[:_RELATED]:
        console.print(
            f"related by {group.by}, cosine {cosines_of(group)}: "
            f"{', '.join(map(safe, group.members[:6]))}"
            + (f" and {len(group.members) - 6} more" if len(group.members) > 6 else "")
        )
    if report.related:
        console.print(
            f"{count(len(report.related), 'related group')}, of pairs that stand out at a nominal "
            f"false discovery rate of {report.discovery:g}: candidates for training together, not "
            "for sharing as they are"
        )
    for note in report.notes:
        console.print(f"note: {safe(note)}")
