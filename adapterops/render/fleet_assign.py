"""What became of new tenants, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from adapterops.fleet.replanning.assigning import AssignedInfo, AssignReport
from adapterops.fleet.replanning.joining import Fate
from adapterops.render.tables import percent
from adapterops.render.text import count, drawn, grid, safe

_SHOWN = 20
_FATES: dict[Fate, str] = {
    "kept": "served as before",
    "joined": "joined an adapter that was there",
    "alone": "served by their own adapter",
    "base": "served by the base model itself",
    "failed": "could not be assigned",
}


def page(report: AssignReport, *, verbose: bool) -> str:
    """The report of `assign`. `verbose`: every tenant, however many."""

    def draw(console: Any) -> None:
        name = safe(report.output) if report.output else "a plan (nothing written)"
        console.print(
            f"[bold]{name}[/bold]  {count(report.tenants, 'tenant')} served by "
            f"{count(report.adapters, 'adapter')}"
        )
        fates = Counter(item.fate for item in report.assigned)
        told = [f"{fates[fate]:,} {text}" for fate, text in _FATES.items() if fates[fate]]
        console.print(f"{', '.join(told)}; bound {report.max_error:g}, verified")
        console.print(_table(report, None if verbose else _SHOWN))

    return drawn(draw)


def _table(report: AssignReport, limit: int | None) -> Any:
    rows = grid("tenant", "how", "by", "error", "foreign", "worst module", "why")
    for column in (2, 5, 6):
        rows.columns[column].justify = "left"
    for item in report.assigned[:limit]:
        rows.add_row(
            safe(item.tenant),
            item.fate,
            safe(item.by or "–"),
            percent(item.error),
            percent(item.foreign),
            _worst(item),
            safe(item.reason),
        )
    more = len(report.assigned) - len(report.assigned[:limit])
    if more:
        rows.add_row(f"and {more:,} more", *[""] * 6)
    return rows


def _worst(item: AssignedInfo) -> str:
    if item.worst is None or not item.worst[0]:
        return ""
    return f"{percent(item.worst[1])} {safe(item.worst[0])}"
