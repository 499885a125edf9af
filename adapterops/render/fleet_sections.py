"""The sections of a fleet's page that are tables and lists without a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.summary.served import FATES, FleetReport
from adapterops.render import fleet_words
from adapterops.render.fleet_words import MEANINGS, cosines_of, kind_of, related_words
from adapterops.render.markup import percent, size, text
from adapterops.render.text import count

_NAMES = 200  # of a list: beyond, it says how many more there are
_GROUPS = 100
_FEW = 4


def fates(report: FleetReport) -> str:
    """One bar of all tenants by what serves them, and its key."""
    total = sum(report.fates.values()) or 1
    bars, keys = [], []
    for fate in FATES:
        number = report.fates[fate]
        if not number:
            continue
        bars.append(f'<i class="fate-{fate}" style="flex-grow:{number}"></i>')
        keys.append(
            f'<li><i class="fate-{fate}" aria-hidden="true"></i><b>{number:,}</b> '
            f"{escape(fleet_words.FATES[fate])} "
            f'<span class="quiet">{escape(percent(number / total))}</span></li>'
        )
    return (
        f'<div class="fates" aria-hidden="true">{"".join(bars)}</div>'
        f'<ul class="key">{"".join(keys)}</ul>'
    )


def estimates(report: FleetReport) -> str:
    """The points of the curve as a table."""
    rows = [
        (
            f"{point.max_error:g}",
            f"{point.adapters:,}",
            *map(percent, (point.largest, point.mean, point.foreign)),
            size(point.gpu),
        )
        for point in report.pareto
    ]
    here = (
        "this plan",
        f"{report.adapters:,}",
        *map(percent, (report.largest, report.mean, report.mean_foreign)),
        size(report.resident.after),
    )
    heads = ("--max-error", "adapters", "largest", "mean", "foreign", "GPU, all at once")
    return _table("Estimates by bound", heads, [*rows, here])


def ungrouped(report: FleetReport) -> str:
    """Why tenants are served by their own adapter alone."""
    if not report.alone:
        return "<p>Every tenant shares what serves it.</p>"
    ordered = sorted(report.alone.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return "".join(
        _listed(f"<b>{len(names):,}</b> {text(reason)}", names) for reason, names in ordered
    )


def excluded(report: FleetReport) -> str:
    """Tenants that nothing serves, with the reason."""
    if not report.excluded:
        return ""
    shown = list(report.excluded.items())[:_NAMES]
    rows = [(text(name), text(reason)) for name, reason in shown]
    more = len(report.excluded) - len(shown)
    rest = f'<p class="quiet">and {more:,} more, in the JSON report</p>' if more else ""
    table = _table("Tenants without an adapter", ("tenant", "reason"), rows, done=True, words=2)
    return (
        f"<h3>Not deployable</h3><p>{count(len(report.excluded), 'tenant')} without an adapter "
        f"that can be served; nothing was routed for them.</p>{table}{rest}"
    )


def related(report: FleetReport) -> str:
    """Related tenants, with the rate of false ones."""
    if not report.related:
        rate = escape(percent(report.discovery))
        return f"<p>No group stands out at a false discovery rate of {rate}.</p>"
    groups = [
        _listed(
            f"<b>{len(group.members):,}</b> by {kind_of(group)}, cosine {cosines_of(group)}"
            + (f", {group.grouped:,} share an adapter already" if group.grouped > 1 else ""),
            group.members,
        )
        for group in report.related[:_GROUPS]
    ]
    more = len(report.related) - len(groups)
    if more:
        groups.append(f'<p class="quiet">and {more:,} more groups, in the JSON report</p>')
    return f"<p>{escape(related_words(report))}</p>{''.join(groups)}"


def changes(report: FleetReport) -> str:
    """What the plan changed of the one before."""
    found = report.changes
    if found is None:
        return ""
    before, after = found["before"], found["after"]
    rows = [
        (
            name,
            f"{plan['tenants']:,}",
            f"{plan['adapters']:,}",
            size(plan["size"]),
            percent(plan["largest"]),
            percent(plan["mean"]),
        )
        for name, plan in (("before", before), ("now", after))
    ]
    heads = ("plan", "tenants", "adapters", "files", "largest error", "mean")
    moved = [f"{move['tenant']}: {move['before']} → {move['after']}" for move in found["moved"]]
    lists = [
        (moved, "tenants moved to another adapter"),
        (found["joined"], "tenants joined"),
        (found["left"], "tenants left"),
        (found["added"], "adapters are new"),
        (found["rebuilt"], "adapters were rebuilt"),
        (found["removed"], "adapters are no longer deployed"),
    ]
    said = (
        f"<p>{escape(percent(found['churn']))} of the tenants of both plans moved, "
        f"{escape(percent(found['churned_traffic']))} of their traffic.</p>"
    )
    inner = "".join(_listed(f"<b>{len(n):,}</b> {what}", n) for n, what in lists if n)
    table = _table("Before and now", heads, rows)
    return f'<section id="changes"><h2>Changes</h2>{said}{table}{inner}</section>'


def memory(report: FleetReport) -> str:
    """GPU bytes before and after, with the formula."""
    gpu, every = report.gpu, report.resident
    if gpu.kind == "unknown":
        return f"<p>How {escape(report.engine)} allocates adapters is not known.</p>"
    if gpu.after is None:
        return "<p>GPU bytes follow from the index, which could not be read.</p>"
    rows = [
        _side(f"at most {report.slots:,} at once", gpu, report.slots),
        _side("all at once", every, max(every.adapters_before, every.adapters_after)),
    ]
    heads = ("on one GPU", "before", "rank", "adapters", "now", "rank", "adapters")
    return (
        f"<p>By the formula of {escape(report.engine)}: {escape(gpu.formula)}. Before, every "
        "tenant has its own. The rank is what a slot is paid for.</p>"
        + _table("GPU memory of adapters", heads, rows)
    )


def _side(name: str, gpu: GpuBytes, slots: int) -> tuple[str, ...]:
    return (
        name,
        size(gpu.before),
        f"{gpu.rank_before}",
        f"{min(slots, gpu.adapters_before):,}",
        size(gpu.after),
        f"{gpu.rank_after}",
        f"{min(slots, gpu.adapters_after):,}",
    )


def notes(report: FleetReport) -> str:
    """What the words mean, what assign has added, and the notes."""
    words = "".join(
        f"<dt>{escape(word)}</dt><dd>{escape(said)}</dd>" for word, said in MEANINGS.items()
    )
    said = [*report.notes]
    if report.assigned:
        added = int(report.assigned.get("assigned", 0))
        hint = str(report.assigned.get("hint", ""))
        since = f"{count(added, 'tenant')} assigned since the plan was made"
        said.append(f"{since}; {hint}" if hint else since)
    listed = "".join(f"<li>{text(one)}</li>" for one in said)
    return f'<dl class="words">{words}</dl>' + (f'<ul class="notes">{listed}</ul>' if said else "")


def _listed(head: str, names: Sequence[str]) -> str:
    """A heading with its first names, opened to more of them; `head` is HTML already."""
    first = ", ".join(text(name) for name in names[:_FEW])
    if len(names) <= _FEW:
        return f'<div class="few">{head}<span class="names">{first}</span></div>'
    shown = "".join(f"<li>{text(name)}</li>" for name in names[:_NAMES])
    more = len(names) - _NAMES
    rest = f'<li class="quiet">and {more:,} more, in the JSON report</li>' if more > 0 else ""
    return (
        f'<details><summary>{head}<span class="names">{first}, …</span></summary>'
        f"<ul>{shown}{rest}</ul></details>"
    )


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    done: bool = False,
    words: int = 1,
) -> str:
    """A table whose first `words` columns are text; `done`: cells are HTML already."""
    kinds = ["words" if place < words else "" for place in range(len(heads))]
    top = "".join(
        f'<th scope="col" class="{kind}">{escape(head)}</th>'
        for head, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{cell if done else escape(cell)}</td>'
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
