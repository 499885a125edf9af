"""A fleet's report as Markdown: for a repository, an issue or a mail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.summary.served import FATES, FleetReport
from adapterops.render.fleet_words import (
    FATES as SERVED,
)
from adapterops.render.fleet_words import (
    MEANINGS,
    cosines_of,
    headline,
    kind_of,
    lead,
    related_words,
    sharing,
)
from adapterops.render.markup import percent, size
from adapterops.render.text import count, printable

ROWS = 1000  # tenants: beyond, what shows Markdown gives up
_NAMES = 50
_GROUPS = 50
_SIGNS = re.compile(r"[\\`*_\[\]#|~]")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "$": "&#36;"})
_TEXT = {"kind", "worst module", "by", "why"}


def plain(value: str) -> str:
    """A name or message as Markdown text: nothing in it is markup, HTML or a link."""
    return _SIGNS.sub(r"\\\g<0>", printable(value)).translate(_ENTITIES)


def document(report: FleetReport) -> str:
    """The whole report; of more than `ROWS` tenants those with the largest errors."""
    parts = [f"# Fleet: {headline(report)}", f"Plan {plain(report.plan)}."]
    parts += [*lead(report), *sharing(report)]
    parts += [f"> {plain(warning)}" for warning in report.warnings]
    parts += [_figures(report), _fates(report)]
    if report.pareto:
        parts += ["## What sharing costs, estimated as if all might share", _estimates(report)]
    parts += ["## Adapters deployed", _adapters(report)]
    parts += ["## Tenants", *_tenants(report)]
    parts += ["## Not grouped, and why", *_ungrouped(report)]
    parts += ["## Related tenants", *_related(report)]
    if report.changes is not None:
        parts += ["## Changes", _changes(report)]
    parts += ["## Terms", "\n".join(f"- {word}: {said}" for word, said in MEANINGS.items())]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {plain(note)}" for note in report.notes)]
    return "\n\n".join(part.replace("\u202f", " ") for part in parts) + "\n"


def _figures(report: FleetReport) -> str:
    bound = "–" if report.max_error is None else f"bound {percent(report.max_error)}"
    rows = [
        ("adapters", f"{report.before:,}", f"{report.adapters:,}"),
        ("files", size(report.size_before), size(report.size)),
        (f"GPU memory, {report.slots} at once", *_gpu(report.gpu)),
        ("GPU memory, all at once", *_gpu(report.resident)),
        ("largest error", bound, percent(report.largest)),
    ]
    return _table(("", "before", "now"), rows)


def _gpu(found: GpuBytes) -> tuple[str, str]:
    return size(found.before), size(found.after)


def _fates(report: FleetReport) -> str:
    return "\n".join(
        f"- {count(report.fates[fate], 'tenant')} served by {SERVED[fate]}"
        for fate in FATES
        if report.fates[fate]
    )


def _estimates(report: FleetReport) -> str:
    rows = [
        (
            f"{point.max_error:g}",
            f"{point.adapters:,}",
            *map(percent, (point.largest, point.mean, point.foreign)),
            size(point.gpu),
        )
        for point in report.pareto
    ]
    rows.append(
        (
            "this plan, verified",
            f"{report.adapters:,}",
            *map(percent, (report.largest, report.mean, report.mean_foreign)),
            size(report.resident.after),
        )
    )
    heads = ("bound", "adapters", "largest", "mean", "foreign", "GPU, all at once")
    return _table(heads, rows)


def _adapters(report: FleetReport) -> str:
    shared = [rep for rep in report.groups if len(rep.members) > 1]
    alone = report.adapters - len(shared)
    rows = [
        (
            plain(rep.id),
            rep.kind,
            f"{len(rep.members):,}",
            f"{rep.rank}",
            size(rep.size),
            percent(report.error_of(rep, report.counted)),
            percent(report.error_of(rep, lambda item: item.foreign)),
            plain(rep.reason),
        )
        for rep in shared[:ROWS]
    ]
    heads = ("adapter", "kind", "tenants", "rank", "size", "largest error", "foreign", "why")
    said = f"{count(alone, 'adapter')} besides serve one tenant each."
    return f"{_table(heads, rows)}\n\n{said}" if rows else said


def _tenants(report: FleetReport) -> list[str]:
    ordered = sorted(report.served.items(), key=lambda pair: (-report.counted(pair[1]), pair[0]))
    rows = [
        (
            plain(name),
            percent(report.counted(item)),
            percent(item.missing),
            percent(item.foreign),
            f"{item.cosine:.4g}",
            f"{percent(item.worst[1])} {plain(item.worst[0])}".rstrip(),
            item.kind,
            plain(item.by),
            plain(item.reason),
        )
        for name, item in ordered[:ROWS]
    ]
    heads = ("tenant", "error", "missing", "foreign", "cosine", "worst module", "kind", "by", "why")
    more = len(ordered) - len(rows)
    cut = [f"{more:,} more have smaller errors; the JSON report has all."] if more else []
    return [_table(heads, rows), *cut] if rows else ["None is served."]


def _ungrouped(report: FleetReport) -> list[str]:
    lines = [
        f"- {count(len(names), 'tenant')}, {plain(reason)}: {_some(names)}"
        for reason, names in report.alone.items()
    ]
    lines += [
        f"- not deployable: {plain(name)}: {plain(reason)}"
        for name, reason in list(report.excluded.items())[:ROWS]
    ]
    return ["\n".join(lines)] if lines else ["Every tenant shares what serves it."]


def _related(report: FleetReport) -> list[str]:
    if not report.related:
        return [f"None stand out at a false discovery rate of {percent(report.discovery)}."]
    lines = [
        f"- by {kind_of(group)}, cosine {cosines_of(group)}: {_some(group.members)}"
        for group in report.related[:_GROUPS]
    ]
    return [related_words(report), "\n".join(lines)]


def _changes(report: FleetReport) -> str:
    found = report.changes or {}
    rows = [
        (name, *(f"{plan[key]:,}" for key in ("tenants", "adapters")), percent(plan["largest"]))
        for name, plan in (("before", found["before"]), ("now", found["after"]))
    ]
    lines = [
        f"- {len(found[key]):,} {what}: {_some(found[key])}"
        for key, what in (
            ("joined", "tenants joined"),
            ("left", "tenants left"),
            ("added", "adapters are new"),
            ("rebuilt", "adapters were rebuilt"),
            ("removed", "adapters are no longer deployed"),
        )
        if found[key]
    ]
    moved = [move["tenant"] for move in found["moved"]]
    if moved:
        share = percent(found["churn"])
        lines.append(f"- {len(moved):,} tenants moved to another adapter, {share}: {_some(moved)}")
    table = _table(("plan", "tenants", "adapters", "largest error"), rows)
    return "\n\n".join([table, *(["\n".join(lines)] if lines else [])])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(plain, names[:_NAMES]))
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES:,} more"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if i == 0 or head in _TEXT else "---:" for i, head in enumerate(heads)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
