"""What a compression lost, as a picture: error by rank, error by size, module by module.

The same numbers and the same matplotlib give the same bytes. Colours are told apart without seeing
red and green: Okabe and Ito's for lines, one hue growing darker for cells.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapterops.render.curves import Compression, Curve, by_module, spent, thinned, uniform
from adapterops.render.heat_map import draw_maps, height
from adapterops.render.layers import arrange
from adapterops.render.plots import CHART, shorten

Axes = Any  # matplotlib's, which is imported when something is drawn
Figure = Any

_UNIFORM, _GLOBAL, _KEPT = "#0072B2", "#D55E00", "black"
_WIDTH, _HEIGHT, _EMPTY = 13.0, 4.0, 0.9  # inches; of the curves, and of a line instead
_HIGHEST = 140.0  # per cent
_SMALLEST = 1e-8  # below, an error in float64 is rounding
_POINTS = 500  # of a curve; one with more is smooth to the eye
_LINEAR = 8  # ranks up to which the axis is linear and begins at 0
_TITLE = 150
_METRICS = {
    "frobenius": "relative error, %",
    "relative": "error relative to ‖W‖, of the whole, %",
    "activation": "error on activations, relative, %",
}
_LEGEND: dict[str, Any] = {
    "loc": "lower left",
    "markerscale": 0.7,
    "frameon": True,
    "framealpha": 0.8,
    "edgecolor": "none",
}
_STAR: dict[str, Any] = {"marker": "*", "markersize": 15, "linestyle": "", "zorder": 5}


def compression_figure(found: Compression) -> Figure:
    """The figure of a compression; matplotlib must be there."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as New

    grid, whole = arrange(found.stems), uniform(found)
    curves = whole.parameters[-1] > 0 and whole.errors[0] > 0
    above, below = _HEIGHT if curves else _EMPTY, height(grid)
    with rc_context(CHART):
        figure: Figure = New(figsize=(_WIDTH, above + below), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(above, below))
        if curves:
            _draw_curves(upper, found, whole)
        else:
            why = "every module is zero" if found.stems else "no module has factors"
            upper.text(0.5, 0.4, f"{why}: no rank loses anything", ha="center")
        draw_maps(lower, found, grid)
        figure.suptitle(shorten(found.title, _TITLE), fontsize=10)
    return figure


def _draw_curves(figure: Figure, found: Compression, whole: Curve) -> None:
    """Two panels that share the axis of errors."""
    by_rank, by_size = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    low = _lowest(found, whole)
    for axes in (by_rank, by_size):
        axes.set_yscale("log")
        axes.set_ylim(low, _HIGHEST)
    _draw_ranks(by_rank, found, whole)
    _draw_sizes(by_size, found, whole)
    _scale(by_rank.yaxis, low, _HIGHEST)


def _lowest(found: Compression, whole: Curve) -> float:
    """Where the error axis ends, in per cent: what matters stands above it."""
    last = whole.errors[: max(3 * len(whole.errors) // 4, 2)]
    seen = [x for x in (found.error, *last[last > _SMALLEST][-1:]) if x > _SMALLEST]
    low = min(seen, default=0.01) / 4
    near = [found.storage / 3] if low / 10 < found.storage / 3 < low else []
    return 100 * max(min(low, *near, 0.1), _SMALLEST)


def _scale(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, as many as it has room for."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _draw_ranks(axes: Axes, found: Compression, whole: Curve) -> None:
    """Error, and so energy, of the whole adapter and of its modules at a uniform rank."""
    modules = by_module(found)
    ranks = np.arange(len(whole.errors))
    low, middle, high = 100 * np.maximum(modules, _SMALLEST)
    axes.fill_between(
        ranks, low, high, color=_UNIFORM, alpha=0.15, linewidth=0, label="10–90 % of the modules"
    )
    axes.plot(ranks, middle, color=_UNIFORM, linewidth=1, linestyle=":", label="median module")
    _plot(axes, ranks, whole.errors, label="whole adapter")
    _shade(axes, found)
    _mark_rank(axes, found)
    last = max(len(ranks) - 1, 1)
    if last > _LINEAR:
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(0.9, 0.8 * (found.mean_rank or 1.0)), 1.1 * last)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(-0.2, last + 0.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="uniform rank", ylabel=_METRICS[found.metric])
    axes.set_title("what each rank would lose", fontsize=9)
    axes.legend(**_LEGEND)
    energies = axes.secondary_yaxis("right")
    halves = [0.5] if axes.get_ylim()[0] > 1.0 else []  # else there is no room for it
    lost = [1.0, *halves, *(10.0**-nines for nines in range(1, 9))]
    energies.set_yticks(
        [100 * math.sqrt(share) for share in lost], [f"{100 - 100 * share:.8g}" for share in lost]
    )
    energies.minorticks_off()
    energies.set_ylabel("energy kept, %")


def _mark_rank(axes: Axes, found: Compression) -> None:
    """The rank that was chosen: one, or what the modules' ranks lie between."""
    error = 100 * max(found.error, _SMALLEST)
    lowest, highest = min(found.kept), max(found.kept)
    if lowest == highest:
        label = f"kept: rank {highest}, error {_percent(found.error)}"
        axes.axvline(highest, color=_KEPT, linewidth=0.8)
    else:
        label = f"kept: ranks {lowest}–{highest}, error {_percent(found.error)}, at the mean rank"
        axes.plot([lowest, highest], [error] * 2, color=_KEPT, linewidth=0.8, marker="|")
    axes.plot([found.mean_rank], [error], color=_KEPT, label=label, **_STAR)


def _draw_sizes(axes: Axes, found: Compression, whole: Curve) -> None:
    """Error by size: one rank for all modules, and directions spent where they save most."""
    best, parameters = spent(found), found.parameters
    unit, size = _unit(found, whole)
    if parameters > 0:
        kept, error = parameters * size, _percent(found.error)
        axes.axvline(kept, color=_KEPT, linewidth=0.8)
        label = f"kept: {kept:.3g} {unit}, {parameters:,} parameters, error {error}"
        axes.plot([kept], [100 * max(found.error, _SMALLEST)], color=_KEPT, label=label, **_STAR)
    x, rank = _sizes(whole, size), whole.point(parameters)
    fits = f"rank {rank} fits this size, {_percent(whole.errors[rank])}"
    label = f"one rank: {fits if rank else 'none fits this size'}"
    _plot(axes, x, whole.errors, label=label, drawstyle="steps-post")
    drawn = thinned(best, _POINTS)
    error = _percent(min(best.errors[best.point(parameters)], whole.errors[rank]))
    axes.plot(
        _sizes(drawn, size),
        100 * np.maximum(drawn.errors, _SMALLEST),
        color=_GLOBAL,
        drawstyle="steps-post" if drawn is best else "default",
        label=f"ranks by module (--allocate global): at most {error} at this size",
    )
    _shade(axes, found)
    _name_ranks(axes, x, whole.errors)
    axes.set_xlabel(f"size of the factors, {unit} ({found.width} bytes a number, {found.dtype})")
    axes.set_title("what each size would lose", fontsize=9)
    axes.tick_params(labelleft=True)
    axes.legend(**_LEGEND)


def _unit(found: Compression, whole: Curve) -> tuple[str, float]:
    """Name and parameters' share of the unit that sizes are given in."""
    small = whole.parameters[-1] * found.width < 1e6
    return ("kB", found.width / 1e3) if small else ("MB", found.width / 1e6)


def _sizes(curve: Curve, size: float) -> Any:
    """As a logarithmic axis takes them: NaN for 0."""
    return np.where(curve.parameters > 0, curve.parameters, np.nan) * size


def _percent(value: float) -> str:
    """An error in per cent, three digits."""
    return f"{100 * value:.3g} %"


def _shade(axes: Axes, found: Compression) -> None:
    """Below this the number format lets no error fall."""
    if found.storage > 0:
        low, top = axes.get_ylim()[0], 100 * found.storage
        where = "" if top > low else " (below)"
        label = f"storage in {found.dtype} alone: {_percent(found.storage)}{where}"
        style = {"color": "0.5", "alpha": 0.18, "linewidth": 0}
        axes.axhspan(min(low, top) / 2, top, label=label, **style)


def _plot(axes: Axes, x: Any, errors: Any, *, label: str, **style: Any) -> None:
    """The curve of one rank for all modules, from rank 0 on, with dots at the powers of two."""
    y, dots = 100 * np.maximum(errors, _SMALLEST), _powers(len(errors))
    style = {"color": _UNIFORM, "marker": "o", "markersize": 4, "markevery": dots, **style}
    axes.plot(x, y, label=label, **style)


def _powers(end: int) -> list[int]:
    """1, 2, 4, … below `end`."""
    return [1 << power for power in range(end.bit_length()) if 1 << power < end]


def _name_ranks(axes: Axes, sizes: Any, errors: Any) -> None:
    """The axis of sizes, and the powers of two beside their dots as far as these are in sight."""
    for rank in _powers(len(errors)):
        axes.annotate(
            f"r={rank}",
            (sizes[rank], 100 * max(errors[rank], _SMALLEST)),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color=_UNIFORM,
            annotation_clip=True,
        )
    low, high = sizes[1] / 4, 1.15 * sizes[-1]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _scale(axes.xaxis, low, high)
