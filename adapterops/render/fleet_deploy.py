"""A deployment as text: what is served and at what error, memory, flags, proposals."""

from __future__ import annotations

import shlex
from typing import Any

from adapterops.fleet.deploy.report import DeployReport, Proposal
from adapterops.render.tables import percent
from adapterops.render.text import count, drawn, grid, megabytes, safe

_SHOWN = 5
_WORDS = 40  # of a command line, after which it is cut


def page(report: DeployReport, *, verbose: bool) -> str:
    """The report of `deploy`; `verbose` lists every adapter and tenant."""

    def draw(console: Any) -> None:
        _head(console, report)
        _adapters(console, report, verbose)
        _tenants(console, report, verbose)
        _memory(console, report)
        _launch(console, report, verbose)
        for tenant, reason in list(report.left.items())[: None if verbose else _SHOWN]:
            console.print(f"not deployed: {safe(tenant)}: {safe(reason)}")
        for note in (*report.launch.notes, *report.notes):
            console.print(f"note: {safe(note)}")
        if report.proposals and report.memory.kind != "unknown":
            console.print("measured elsewhere, no promise for this fleet:")
            for found in report.published:
                console.print(f"  {safe(found['claim'])} ({safe(found['source'])})")

    return drawn(draw)


def _head(console: Any, report: DeployReport) -> None:
    served = count(len(report.routes), "tenant")
    what = f"{count(len(report.adapters), 'adapter')} for {served}, {megabytes(report.size)} MB"
    if report.files:
        console.print(f"[bold]{safe(report.output)}[/bold]  {report.engine}, {what}")
    else:
        console.print(
            f"[bold]{safe(report.output)}[/bold] would be {report.engine}, {what} (nothing written)"
        )
    for key, names in report.changes.items():
        if names:
            shown = ", ".join(names[:_SHOWN])
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            console.print(f"{key}: {shown}{more}")


def _adapters(console: Any, report: DeployReport, verbose: bool) -> None:
    shown = report.adapters if verbose else report.adapters[:_SHOWN]
    if not shown:
        return
    table = grid(
        "load order", "tenants", "traffic", "rank", "number format", "MB", "how", "changed"
    )
    for item in shown:
        table.add_row(
            safe(item.name or item.id),
            str(len(item.members)),
            f"{item.traffic:g}",
            str(item.rank),
            item.dtype,
            megabytes(item.size),
            item.how,
            percent(item.change),
        )
    console.print(table)
    if len(report.adapters) > len(shown):
        console.print(f"and {count(len(report.adapters) - len(shown), 'more adapter')}")


def _tenants(console: Any, report: DeployReport, verbose: bool) -> None:
    errors = sorted(report.tenants.items(), key=lambda pair: (-report.counted(pair[1]), pair[0]))
    changed = [pair for pair in errors if report.counted(pair[1]) > pair[1].floor]
    if changed:
        limit = "" if report.limit is None else f", the bound is {percent(report.limit)}"
        console.print(
            f"largest error of a tenant {percent(report.counted(changed[0][1]))} ({report.metric})"
            f"{limit}; {count(len(errors) - len(changed), 'tenant')} without any"
        )
    shown = errors if verbose else changed[:_SHOWN]
    if not shown:
        return
    table = grid("tenant", "error", "planned", "foreign", "known", "adapter")
    for tenant, item in shown:
        table.add_row(
            safe(tenant),
            percent(report.counted(item), item.floor),
            percent(item.planned, item.floor),
            percent(item.foreign, item.floor),
            item.known,
            item.adapter or "(base)",
        )
    console.print(table)
    if report.salted:
        console.print(f"{count(report.salted, 'tenant')} with a cache_salt of their own")


def _memory(console: Any, report: DeployReport) -> None:
    gpu = report.memory
    if gpu.kind == "unknown":
        console.print(f"GPU bytes: how {report.engine} allocates is not known")
        return
    before = _side(gpu.before, gpu.adapters_before, gpu.rank_before)
    after = _side(gpu.after, gpu.adapters_after, gpu.rank_after)
    console.print(f"GPU memory of adapters: {before} before, {after} now")
    for item in report.proposals:
        saved = "" if item.saves is None else f" and free {megabytes(item.saves)} MB of the GPU"
        held = "adapter holds" if len(item.errors) == 1 else "adapters hold"
        console.print(
            f"{len(item.errors)} {held} the fleet at {item.now}; at {item.rank} they lose at most "
            f"{percent(item.largest)}{saved}: --max-rank {item.rank}{_over(item, report.limit)}"
        )


def _over(item: Proposal, limit: float | None) -> str:
    """Whose bound a lower rank may break."""
    if not item.over or limit is None:
        return ""
    shown = ", ".join(map(safe, item.over[:_SHOWN]))
    more = f" and {len(item.over) - _SHOWN:,} more" if len(item.over) > _SHOWN else ""
    return f", which the bound of {limit:g} may forbid for {shown}{more}"


def _side(size: int | None, adapters: int, rank: int) -> str:
    if size is None:
        return "not known"
    return f"{megabytes(size)} MB ({count(adapters, 'adapter')}, rank {rank})"


def _launch(console: Any, report: DeployReport, verbose: bool) -> None:
    if not report.launch.command:
        return
    lines = [f"{key}={shlex.quote(value)}" for key, value in report.launch.environment.items()]
    words = [shlex.quote(word) for word in report.launch.command]
    rest = len(words) - _WORDS
    cut = rest > 0 and not verbose
    lines.append(" ".join(words[:_WORDS] if cut else words))
    console.print("start it with:")
    for line in lines:
        text = line if verbose or len(line) < 2000 else f"{line[:200]}…"
        console.print(f"  {safe(text)}")
    if cut:
        console.print(f"  … and {rest} more words, in adapterops.json")
