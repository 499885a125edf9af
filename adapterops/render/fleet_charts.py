"""The charts of a fleet's page as inline SVG: adapters against errors, and every tenant's error.

Colours are classes of the page's style sheet, so that both schemes and paper have their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape

from adapterops.fleet.summary.served import FleetReport
from adapterops.render.markup import percent, size

_WIDTH, _HEIGHT = 480.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 46.0, 44.0
_DRAWN = 400  # points of the curve of tenants
_SIGNS = {"largest": "circle", "mean": "square", "foreign": "diamond"}

Scale = Callable[[float], float]


def ticks(high: float, count: int = 6) -> list[float]:
    """Round numbers from 0 up to `high`: 1, 2 or 5 times a power of ten apart."""
    if not high > 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / count))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * count >= high * (1 - 1e-9))
    return [i * step for i in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def tradeoff(report: FleetReport) -> str:
    """Adapters against the largest, mean and foreign error, with GPU bytes above.

    The lines are the plan's estimates of other bounds, the rings this plan as verified.
    """
    points: dict[int, tuple[float, float, float]] = {}
    for point in sorted(report.pareto, key=lambda point: (point.adapters, point.largest)):
        points.setdefault(point.adapters, (point.largest, point.mean, point.foreign))
    here = (report.largest, report.mean, report.mean_foreign)
    widest = max([report.adapters, report.before, *points], default=1) * 1.04
    tallest = max([0.0, *here, *(value for found in points.values() for value in found)])
    tallest = tallest * 1.08 or 0.01
    across, up = _scales(widest, tallest)
    parts = [_axes(across, up, widest, tallest, "adapters deployed")]
    parts.append(_memory_axis(report, across, widest))
    for place, (name, sign) in enumerate(_SIGNS.items()):
        line = [(across(count), up(values[place])) for count, values in sorted(points.items())]
        parts.append(_line(line, f"line {name}"))
        for (x, y), (count, values) in zip(line, sorted(points.items()), strict=True):
            said = f"{count:,} adapters: {name} error {percent(values[place])}, estimated"
            parts.append(_sign(sign, x, y, f"sign {name}", said))
        said = f"this plan, {report.adapters:,} adapters: {name} error {percent(here[place])}"
        parts.append(_ring(across(report.adapters), up(here[place]), f"ring {name}", said))
    x = across(report.adapters)
    # The curve falls to the right, so that left of it there is room.
    anchor, beside = ("end", -12) if x > _LEFT + 80 else ("start", 12)
    parts.append(_label(x + beside, up(report.largest) + 4, "this plan", "label title", anchor))
    label = (
        f"Estimated error against the number of adapters, from {min(points, default=0):,} to "
        f"{max(points, default=0):,} adapters; this plan has {report.adapters:,}, its largest "
        f"error is {percent(report.largest)}"
    )
    return _svg(label, parts)


def spread(report: FleetReport) -> str:
    """Every tenant's error, largest first, and the foreign part of it, under the bound."""
    ordered = sorted(report.served.values(), key=lambda item: -report.counted(item))
    count = len(ordered)
    step = max(1, math.ceil(count / _DRAWN))
    kept = [*range(0, count, step), count] if count else []
    tallest = max([report.largest, report.max_error or 0.0, *(x.foreign for x in ordered)]) * 1.08
    tallest = tallest or 0.01
    across, up = _scales(max(count, 1), tallest)
    parts = [_axes(across, up, max(count, 1), tallest, "tenants, largest error first")]
    for name, values in (
        ("largest", [report.counted(item) for item in ordered]),
        ("foreign", [item.foreign for item in ordered]),
    ):
        stairs: list[tuple[float, float]] = []
        for first, last in itertools.pairwise(kept):
            # The largest of the tenants that one step stands for: none is drawn too low.
            y = up(max(values[first:last]))
            stairs += [(across(first), y), (across(last), y)]
        if name == "largest":
            parts.append(_line(stairs, "line largest"))
        elif stairs:
            parts.append(_area(stairs, up(0.0), "area foreign"))
    if report.max_error is not None:
        y = up(report.max_error)
        right = _WIDTH - _RIGHT
        parts.append(f'<path class="bound" d="M{_LEFT:.1f} {y:.1f}H{right:.1f}"/>')
        said = f"bound {percent(report.max_error)}"
        parts.append(_label(right, y - 6, said, "label strong", "end"))
    label = f"Errors of {count:,} tenants, the largest {percent(report.largest)}" + (
        "" if report.max_error is None else f", under the bound of {percent(report.max_error)}"
    )
    return _svg(label, parts)


def _scales(widest: float, tallest: float) -> tuple[Scale, Scale]:
    room, rise = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return (
        lambda value: _LEFT + room * value / widest,
        lambda value: _HEIGHT - _BOTTOM - rise * value / tallest,
    )


def _axes(across: Scale, up: Scale, widest: float, tallest: float, title: str) -> str:
    low, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in ticks(tallest):
        y = up(value)
        parts.append(f'<path class="grid" d="M{_LEFT:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(_label(_LEFT - 8, y + 4, percent(value), "label", "end"))
    for value in ticks(widest):
        if value == int(value):
            parts.append(_label(across(value), low + 18, f"{value:,.0f}", "label", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT:.1f} {low:.1f}H{right:.1f}"/>')
    parts.append(_label((_LEFT + right) / 2, _HEIGHT - 8, title, "label title", "middle"))
    return "".join(parts)


def _memory_axis(report: FleetReport, across: Scale, widest: float) -> str:
    """GPU bytes of so many adapters at once, along the upper edge."""
    found = report.resident
    if not found.after or not found.adapters_after:
        return ""
    each = found.after / found.adapters_after
    parts = [_label(_LEFT, 14, "GPU memory, all of them at once", "label title", "start")]
    parts.append(f'<path class="axis" d="M{_LEFT:.1f} {_TOP - 6:.1f}H{_WIDTH - _RIGHT:.1f}"/>')
    for value in ticks(widest * each, 5):
        x = across(value / each)
        parts.append(f'<path class="axis" d="M{x:.1f} {_TOP - 6:.1f}v-4"/>')
        if value:
            anchor = "end" if x > _WIDTH - _RIGHT - 24 else "middle"
            parts.append(_label(x, _TOP - 14, size(value), "label", anchor))
    return "".join(parts)


def _svg(label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _label(x: float, y: float, said: str, kind: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(said)}</text>'


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{path}"/>' if points else ""


def _area(points: Sequence[tuple[float, float]], floor: float, kind: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{path}V{floor:.1f}H{points[0][0]:.1f}Z"/>'


def _sign(sign: str, x: float, y: float, kind: str, said: str) -> str:
    title = f"<title>{escape(said)}</title>"
    if sign == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
    if sign == "square":
        path = f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6Z"
    else:
        path = f"M{x:.1f} {y - 4.2:.1f}l4.2 4.2l-4.2 4.2l-4.2 -4.2Z"
    return f'<path class="{kind}" d="{path}">{title}</path>'


def _ring(x: float, y: float, kind: str, said: str) -> str:
    title = f"<title>{escape(said)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="7">{title}</circle>'
