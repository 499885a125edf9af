"""Adapters before a merge, as text: sizes, pairs, ranks, what methods would keep, a suggestion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterops.analysis.report import (
    AnalysisReport,
    Conflict,
    Extreme,
    ModuleAnalysis,
    Overlap,
    PairAnalysis,
)
from adapterops.render.text import count, drawn, grid, safe

_WIDTH = 10_000  # off a terminal nothing is gained by squeezing columns
_WORST = 5
_PAIRS = 15  # shown without -v


def page(report: AnalysisReport, *, verbose: bool = False) -> str:
    """The whole report as text; colours only on a terminal. `verbose`: every pair and module."""

    def draw(console: Any) -> None:
        console.print(_inputs(report))
        _pairs(console, report, verbose)
        _ranks(console, report)
        console.print(_candidates(report))
        _failed(console, report)
        _modules(console, report, verbose)
        for note in report.notes:
            console.print(f"note: {safe(note)}")
        if report.left_out:
            console.print(f"{count(report.left_out, 'module')} left out by --modules")
        _suggestion(console, report)

    return drawn(draw, _WIDTH)


def _inputs(report: AnalysisReport) -> Any:
    rows = grid("", "adapter", "weight", "share", "‖ΔW‖", "rank", "scale", "modules", "dominates")
    rows.columns[1].justify = "left"
    for index, one in enumerate(report.inputs):
        low, high = one.scales or (None, None)
        scale = "–" if low is None else f"{low:g}" if low == high else f"{low:g} to {high:g}"
        rows.add_row(
            str(index + 1),
            safe(one.name),
            f"{one.weight:.3g}",
            _number(one.share, 2),
            "zero" if one.zero else f"{one.norm:.4g}",
            str(one.rank),
            scale,
            str(one.modules),
            str(one.dominates) if one.dominates else "",
        )
    return rows


def _pairs(console: Any, report: AnalysisReport, verbose: bool) -> None:
    ordered = sorted(report.pairs, key=lambda pair: -abs(pair.cosine))
    shown = report.pairs if verbose or len(ordered) <= _PAIRS else ordered[:_PAIRS]
    rows = grid(
        "pair", "cosine", "by module", "B overlap", "A overlap", "signs differ", "by mass", "start"
    )
    for pair in shown:
        rows.add_row(
            f"{pair.first + 1} {pair.second + 1}",
            f"{pair.cosine:.3f}",
            _span(pair.lowest, pair.highest),
            _overlap(pair.columns),
            _overlap(pair.rows),
            *_conflict(pair.conflict),
            _number(pair.start, 2),
        )
    console.print(rows)
    if len(shown) < len(report.pairs):
        console.print(
            f"the {len(shown)} of the largest cosines of {len(report.pairs)} pairs; -v: all"
        )
    console.print(
        "overlap: 0 to 1, in brackets that of random spaces; signs: 50 % is chance; start: cosine "
        "of the A factors as stored"
    )
    if len(report.inputs) > 2 and report.conflict:
        by_count, by_mass = _conflict(report.conflict)
        chance = 100 * (1 - 2.0 ** (1 - len(report.inputs)))
        console.print(
            f"any two differ in sign: {by_count} of the entries, {by_mass} by mass (chance "
            f"{chance:.3g} % where all {len(report.inputs)} change them)"
        )
    for pair in shown:
        console.print(f"{_named(report, pair)}: {safe(pair.text)}")


def _named(report: AnalysisReport, pair: PairAnalysis) -> str:
    return " and ".join(safe(report.inputs[i].name) for i in (pair.first, pair.second))


def _ranks(console: Any, report: AnalysisReport) -> None:
    if not report.needed:
        said = "is zero up to rounding" if report.norm <= report.floor else "is cut by no rank"
        console.print(f"the weighted sum {said}")
        return
    rows = grid("weighted sum at rank", *(str(hint.rank) for hint in report.hints))
    if report.hints:
        rows.add_row("error", *(_percent(hint.error) for hint in report.hints))
        console.print(rows)
    wants = ", ".join(f"{one.rank} for {_percent(one.within)}" for one in report.needed)
    console.print(
        f"‖ΔW‖ {report.norm:.4g}; rank needed: {wants}; {report.lossless} loses nothing (storage "
        "apart)"
    )


def _candidates(report: AnalysisReport) -> Any:
    rows = grid("method", *(f"keeps of {i + 1}" for i in range(len(report.inputs))), "‖ΔW‖/mean")
    for one in report.candidates:
        if not one.note:
            kept = (_number(value, 3) for value in one.retention)
            rows.add_row(one.name, *kept, _number(one.size, 3))
    return rows


def _failed(console: Any, report: AnalysisReport) -> None:
    for one in report.candidates:
        if one.note:
            console.print(f"{one.name}: {safe(one.note)}")


def _modules(console: Any, report: AnalysisReport, verbose: bool) -> None:
    if verbose:
        console.print(_table("module", report.modules))
        return
    if not report.modules:
        return
    lowest = sorted(report.modules.items(), key=lambda item: _lowest(item[1]))
    console.print(_table("lowest cosines", dict(lowest[:_WORST])))


def _lowest(one: ModuleAnalysis) -> float:
    """The lowest cosine of two adapters that both change the module."""
    both = [x for x, y in zip(one.cosines, one.columns, strict=True) if y is not None]
    return min(both, default=1.0)


def _table(title: str, modules: Mapping[str, ModuleAnalysis]) -> Any:
    rows = grid(title, "shape", "shares", "cosines", "B overlap", "A overlap", "signs", "1 % rank")
    for stem, one in modules.items():
        rows.add_row(
            safe(stem),
            "x".join(map(str, one.shape)),
            _list(one.shares, 2),
            _range(one.cosines),
            _range(one.columns),
            _range(one.rows),
            "–" if one.conflict is None else _percent(one.conflict),
            str(one.rank),
        )
    return rows


def _suggestion(console: Any, report: AnalysisReport) -> None:
    found = report.suggestion
    if found.command:
        console.print(f"[bold]to begin with:[/bold] {safe(found.command)}")
    for reason in found.reasons:
        console.print(f"  {safe(reason)}")
    for what, command in found.others:
        console.print(f"{safe(what)}: {safe(command)}")


def _span(low: Extreme | None, high: Extreme | None) -> str:
    if low is None or high is None:
        return "–"
    return f"{low.value:.3f} to {high.value:.3f}"


def _overlap(found: Overlap | None) -> str:
    return "–" if found is None else f"{found.overlap:.3f} ({found.expected:.3f})"


def _conflict(found: Conflict | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    return (
        f"{100 * found.count:.1f} ± {100 * found.count_error:.1f} %",
        f"{100 * found.mass:.1f} ± {100 * found.mass_error:.1f} %",
    )


def _list(values: Sequence[float | None], digits: int) -> str:
    return "/".join(_number(value, digits) for value in values)


def _range(values: Sequence[float | None]) -> str:
    """The smallest and the largest over the pairs."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low} to {high}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
