"""A fleet's report as one HTML page that needs nothing else: no network, no other file.

The texts and charts stand in the page; tables and maps are drawn by its own script from data in it.
A Content-Security-Policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template

import adapterops
from adapterops.fleet.summary.served import FleetReport
from adapterops.render.fleet_charts import spread, tradeoff
from adapterops.render.fleet_embedded import ROWS, columns
from adapterops.render.fleet_sections import (
    changes,
    estimates,
    excluded,
    fates,
    memory,
    notes,
    related,
    ungrouped,
)
from adapterops.render.fleet_words import headline, lead, map_rows, sharing
from adapterops.render.markup import data, digest, percent, size, text


def page(report: FleetReport, *, rows: int = ROWS) -> str:
    """The page; of tables at most `rows` rows are in it, and it says so."""
    script = _asset("fleet_map.js") + _asset("fleet_page.js")
    found = columns(report, rows)
    return Template(_asset("fleet_page.html")).substitute(
        title=f"{escape(headline(report))} · {text(report.plan)}",
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=_asset("fleet_page.css"),
        script=script,
        data=data(found),
        plan=text(report.plan),
        headline=escape(headline(report)),
        lead="".join(f"<p>{escape(said)}</p>" for said in lead(report)),
        sharing="".join(f"<p>{escape(said)}</p>" for said in sharing(report)),
        warnings="".join(f'<p class="warning">{text(said)}</p>' for said in report.warnings),
        measures=_measures(report),
        fates=fates(report),
        tradeoff=_tradeoff(report),
        spread=spread(report),
        spread_note=escape(_spread_note(report)),
        estimates=estimates(report) if report.pareto else "",
        adapters_note=_cut(
            len(found["adapters"]["id"]), found["adapter_total"], "adapters", "that serve most"
        ),
        tenants_note=_cut(
            len(found["tenants"]["name"]),
            found["tenant_total"],
            "tenants",
            "with the largest errors",
        ),
        ungrouped=ungrouped(report) + excluded(report),
        related=related(report),
        similarity=_similarity(report),
        changes=changes(report),
        memory=memory(report),
        notes=notes(report),
        version=escape(adapterops.__version__),
    )


def _asset(name: str) -> str:
    return files("adapterops.render").joinpath(name).read_text(encoding="utf-8")


def _measures(report: FleetReport) -> str:
    """The figures that count, each with what it was."""
    gpu, bound = report.resident, report.max_error
    found = [
        _measure("Adapters", f"{report.adapters:,}", report.adapters, report.before, "{} before"),
        _measure("Files", size(report.size), report.size, report.size_before, "{} before"),
    ]
    if gpu.after is not None and gpu.before is not None:
        name = "GPU memory, all at once"
        found.append(_measure(name, size(gpu.after), gpu.after, gpu.before, "{} before"))
    said = "{} is the bound" if bound is not None else "no bound"
    found.append(
        _measure("Largest error", percent(report.largest), report.largest, bound or 0.0, said)
    )
    return f'<dl class="measures">{"".join(found)}</dl>'


def _measure(name: str, said: str, now: float, whole: float, beside: str) -> str:
    """A figure, and a bar of its share of `whole`, which `beside` names."""
    share = min(100 * now / whole, 100.0) if whole else 0.0
    spelled = f"{whole:,}" if isinstance(now, int) else percent(whole)
    if name != "Adapters" and isinstance(now, int):
        spelled = size(whole)
    return (
        f'<div class="measure"><dt>{escape(name)}</dt><dd class="now">{escape(said)}</dd>'
        f'<dd class="was"><span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i>'
        f"</span>{escape(beside.format(spelled))}</dd></div>"
    )


def _spread_note(report: FleetReport) -> str:
    if report.errors is None:
        return "Nobody is served by another adapter than their own: every error is 0."
    found = report.errors
    return (
        f"Of those that share: median {percent(found.median)}, 99th percentile "
        f"{percent(found.high)}, largest {percent(found.largest)}."
    )


def _tradeoff(report: FleetReport) -> str:
    if not report.pareto:
        return '<p class="empty">Other bounds were not estimated for this plan.</p>'
    return tradeoff(report)


def _similarity(report: FleetReport) -> str:
    if report.similarity is None:
        return '<p class="empty">There is no map: the index could not be read.</p>'
    maps = "".join(
        f'<figure><figcaption>{title}</figcaption><canvas class="map" data-of="{key}" tabindex="0" '
        f'role="img" aria-label="Cosines of {title} between {len(report.similarity.names):,} '
        'tenants; arrow keys move from pair to pair" aria-describedby="pair"></canvas></figure>'
        for key, title in (("delta", "ΔW"), ("outputs", "output Grams ΔW ΔWᵀ"))
    )
    return (
        f"<p>{escape(map_rows(report))} A square of strong colour is a group of alike "
        'tenants; frames are those that share an adapter.</p><div class="pair">'
        f'{maps}</div><p id="pair" class="readout" aria-live="polite">Point at a cell, or '
        "focus a map and press the arrow keys.</p>"
        '<div class="scale"><span>−1</span><canvas id="scale" width="201" height="10" '
        'aria-hidden="true"></canvas><span>1</span></div>'
    )


def _cut(shown: int, total: int, what: str, which: str) -> str:
    if shown == total:
        return ""
    return (
        f'<p class="note">{total:,} {what} are too many for one page: these are the {shown:,} '
        f"{which}. All are in the JSON report.</p>"
    )
