"""A fleet's report as text, and as a file: one page of HTML, Markdown or JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from adapterops.errors import UsageError
from adapterops.files.output import check_output, resolved, stage
from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.summary.served import FATES, FleetReport
from adapterops.render import fleet_words, markup
from adapterops.render.tables import percent
from adapterops.render.text import count, drawn, grid, megabytes, safe

_TENANTS = 12
_ADAPTERS = 8
_GROUPS = 5
_NAMES = 4
_KINDS = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".json": "json"}


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a file that could not be written before the work for it is done.

    Raises UsageError for another ending than .html, .md or .json, OutputExistsError, FileError.
    """
    resolved(path)
    _kind(path)
    check_output(path, directory=False, overwrite=overwrite)


def save(report: FleetReport, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a report, in the form that the name's ending says: complete, or not at all.

    Raises as `check_file` does.
    """
    kind = _kind(path)
    if kind == "html":
        from adapterops.render import fleet_html

        said = fleet_html.page(report)
    elif kind == "md":
        from adapterops.render import fleet_markdown

        said = fleet_markdown.document(report)
    else:
        document = report.to_dict()
        said = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    with stage(path, directory=False, overwrite=overwrite) as target:
        target.write(target.final.name, [said.encode()])


def page(report: FleetReport, *, verbose: bool = False) -> str:
    """The report as text; `verbose`: every tenant and every adapter."""

    def draw(console: Any) -> None:
        for said in (*fleet_words.lead(report), *fleet_words.sharing(report)):
            console.print(safe(said.replace("\u202f", " ")))
        console.print(
            f"files: {megabytes(report.size)} MB, {megabytes(report.size_before)} MB before"
        )
        console.print(
            f"GPU memory of adapters: {_gpu(report.gpu)} with {report.slots} at once, "
            f"{_gpu(report.resident)} with all"
        )
        for fate in FATES:
            if report.fates[fate]:
                served = count(report.fates[fate], "tenant")
                console.print(f"{served} served by {fleet_words.FATES[fate]}")
        _print_adapters(console, report, verbose)
        _print_tenants(console, report, verbose)
        _print_rest(console, report, verbose)

    return drawn(draw)


def _gpu(found: GpuBytes) -> str:
    if found.after is None:
        return "not known"
    return f"{markup.size(found.after)} ({markup.size(found.before)} before)".replace("\u202f", " ")


def _print_adapters(console: Any, report: FleetReport, verbose: bool) -> None:
    groups = [rep for rep in report.groups if verbose or len(rep.members) > 1]
    shown = groups if verbose else groups[:_ADAPTERS]
    if not shown:
        return
    more = len(groups) - len(shown)
    title = f"adapter ({more} more that share)" if more else "adapter"
    table = grid(title, "kind", "tenants", "rank", "MB", "largest error", "foreign")
    for rep in shown:
        table.add_row(
            rep.id,
            rep.kind,
            f"{len(rep.members):,}",
            f"{rep.rank}",
            megabytes(rep.size),
            percent(report.error_of(rep, report.counted)),
            percent(report.error_of(rep, lambda item: item.foreign)),
        )
    console.print(table)


def _print_tenants(console: Any, report: FleetReport, verbose: bool) -> None:
    ordered = sorted(report.served.items(), key=lambda pair: (-report.counted(pair[1]), pair[0]))
    shown = [pair for pair in ordered if verbose or report.counted(pair[1]) > 0]
    more = len(ordered) - _TENANTS
    if not verbose:
        shown = shown[:_TENANTS]
    if not shown:
        return
    title = "tenant" if verbose or more <= 0 else f"largest errors ({more:,} more tenants)"
    table = grid(title, "error", "missing", "foreign", "cosine", "worst", "kind", "by")
    for name, item in shown:
        table.add_row(
            safe(name),
            percent(report.counted(item)),
            percent(item.missing),
            percent(item.foreign),
            f"{item.cosine:.4g}",
            f"{percent(item.worst[1])} {safe(item.worst[0])}".rstrip(),
            item.kind,
            item.by,
        )
    console.print(table)


def _print_rest(console: Any, report: FleetReport, verbose: bool) -> None:
    for reason, names in report.alone.items():
        console.print(f"{count(len(names), 'tenant')} alone, {safe(reason)}: {_some(names)}")
    for name, reason in list(report.excluded.items())[: None if verbose else _NAMES]:
        console.print(f"without an adapter: {safe(name)}: {safe(reason)}")
    for group in report.related[: None if verbose else _GROUPS]:
        console.print(
            f"related by {fleet_words.kind_of(group)}, cosine {fleet_words.cosines_of(group)}: "
            f"{_some(group.members)}"
        )
    if report.related:
        console.print(safe(fleet_words.related_words(report).replace("\u202f", " ")))
    if report.changes is not None:
        found = report.changes
        console.print(
            f"since the plan before: {count(len(found['moved']), 'tenant')} moved "
            f"({percent(found['churn'])}), {len(found['joined'])} joined, {len(found['left'])} left"
        )
    for note in report.notes:
        console.print(f"note: {safe(note)}")


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(safe, names[:_NAMES]))
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES:,} more"


def _kind(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    kind = _KINDS.get(os.path.splitext(name)[1].lower())
    if kind is None:
        raise UsageError(f"{name}: reports are .html, .md or .json")
    return kind
