"""What changes between two plans as text: totals, adapters that come and go, tenants that move."""

from __future__ import annotations

from typing import Any

from adapterops.fleet.plans.plandiff import PlanDiff, Totals
from adapterops.render.tables import percent
from adapterops.render.text import count, drawn, grid, megabytes, safe

_SHOWN = 20
_NAMES = 5


def changes(diff: PlanDiff, *, verbose: bool = False) -> str:
    """The whole difference as text. `verbose`: every tenant and every adapter."""

    def draw(console: Any) -> None:
        if diff.empty:
            console.print("every tenant is served as before, by the same adapters")
            return
        console.print(_totals(diff.before, diff.after))
        limit = None if verbose else _NAMES
        for title, names in (
            ("tenants that joined", diff.joined),
            ("tenants that left", diff.left),
            ("new adapters", diff.added),
            ("adapters no longer deployed", diff.removed),
            ("adapters rebuilt", diff.rebuilt),
        ):
            if names:
                console.print(f"{title}: {len(names):,}, {_some(names, limit)}")
        if diff.moved:
            console.print(
                f"{count(len(diff.moved), 'tenant')} moved to another adapter: "
                f"{percent(diff.churn)} of those in both plans, {percent(diff.churned_traffic)} "
                "of their traffic"
            )
            console.print(_moves(diff, None if verbose else _SHOWN))

    return drawn(draw)


def _totals(before: Totals, after: Totals) -> Any:
    rows = grid("plan", "tenants", "adapters", "MB", "largest error", "mean error")
    for name, item in (("before", before), ("after", after)):
        rows.add_row(
            name,
            f"{item.tenants:,}",
            f"{item.adapters:,}",
            megabytes(item.size),
            percent(item.largest),
            percent(item.mean),
        )
    return rows


def _moves(diff: PlanDiff, limit: int | None) -> Any:
    """Tenants that moved, those with the largest error first."""
    rows = grid("tenant", "from", "to", "error before", "after")
    rows.columns[2].justify = "left"
    ordered = sorted(diff.moved, key=lambda move: (-move.error_after, move.tenant))
    for move in ordered[:limit]:
        rows.add_row(
            safe(move.tenant),
            safe(move.before),
            "rebuilt" if move.rebuilt else safe(move.after),
            percent(move.error_before),
            percent(move.error_after),
        )
    if len(ordered) > len(ordered[:limit]):
        rows.add_row(f"and {len(ordered) - len(ordered[:limit]):,} more", "", "", "", "")
    return rows


def _some(names: tuple[str, ...], limit: int | None) -> str:
    shown = names[:limit]
    more = len(names) - len(shown)
    return safe(", ".join(shown)) + (f" and {more:,} more" if more else "")
