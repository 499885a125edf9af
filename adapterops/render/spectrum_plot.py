"""The spectrum of an adapter as a picture: error by rank, singular values, stable rank by layer.

The same inspection and the same matplotlib give the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from adapterops.inspection.report import Inspection
from adapterops.inspection.spectra import SHARES, ModuleSpectrum, SpectrumReport
from adapterops.inspection.stems import Family, families
from adapterops.provenance import base_name
from adapterops.render.plots import CHART, shorten
from adapterops.render.text import printable

Axes = Any  # matplotlib's, which is imported when something is drawn
Figure = Any

_SHOWN = 8  # families with a colour and a name of their own: those of the largest norm
_SMALLEST = 1e-8


def spectrum_figure(found: Inspection) -> Figure:
    """The figure of an inspection that has a spectrum; matplotlib must be there."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as New

    assert found.spectrum is not None
    grouped = _grouped(found.spectrum)
    with rc_context(CHART):
        figure = New(figsize=(13, 4.2), layout="constrained")
        curve, values, layers = figure.subplots(1, 3)
        _draw_curve(curve, found.spectrum)
        _draw_values(values, grouped)
        _draw_stable(layers, grouped)
        name = printable(base_name(found.path))
        figure.suptitle(f"{name}: {found.spectrum.conclusion}", fontsize=10)
    return figure


def _grouped(found: SpectrumReport) -> list[tuple[Family, list[ModuleSpectrum]]]:
    """Families of modules that are not zero, the largest norm first."""
    names = tuple(stem for stem, module in found.modules.items() if module.stable_rank is not None)
    groups = [
        (family, [found.modules[names[position]] for position in family.members])
        for family in families(names)
    ]
    return sorted(groups, key=lambda group: (-sum(m.norm**2 for m in group[1]), group[0].name))


def _draw_curve(axes: Axes, found: SpectrumReport) -> None:
    """Relative error of the whole adapter at a uniform rank, above the shares of the energy."""
    shown = [(rank, 100 * error) for rank, error in enumerate(found.curve) if error > _SMALLEST]
    axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, color="C0") if shown else None
    axes.set(yscale="log", xlabel="uniform rank", ylabel="relative error, %")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("what a smaller rank loses", fontsize=9)
    for share in SHARES:
        error = 100 * (1 - share) ** 0.5
        axes.axhline(error, color="0.5", linestyle="--", linewidth=0.8)
        text = f"{100 * share:g} % of the energy"
        axes.annotate(
            text, (0.99, error), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_values(axes: Axes, grouped: Sequence[tuple[Family, list[ModuleSpectrum]]]) -> None:
    """σ_k/σ_1: the median of a family's modules, and what they lie between."""
    for index, (family, members) in enumerate(grouped[:_SHOWN]):
        length = min(len(module.values) for module in members)
        columns = [
            sorted(module.values[k] / module.values[0] for module in members) for k in range(length)
        ]
        columns = [column for column in columns if column[-1] > _SMALLEST]
        ranks = range(1, len(columns) + 1)
        low = [max(column[0], _SMALLEST) for column in columns]
        middle = [max(statistics.median(column), _SMALLEST) for column in columns]
        axes.plot(ranks, middle, marker=".", color=f"C{index}", label=_label(family.name))
        axes.fill_between(
            ranks, low, [column[-1] for column in columns], color=f"C{index}", alpha=0.12
        )
    axes.set(yscale="log", xlabel="k", ylabel="σₖ / σ₁")
    axes.set_title("singular values: median, lowest to highest", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if grouped:
        axes.legend(title=f"the largest {_SHOWN}" if len(grouped) > _SHOWN else None)


def _draw_stable(axes: Axes, grouped: Sequence[tuple[Family, list[ModuleSpectrum]]]) -> None:
    """Stable rank by layer, where modules are numbered by one index; else how often which."""
    lined = [group for group in grouped[:_SHOWN] if group[0].name.count("*") == 1]
    if lined:
        for family, members in lined:
            layers = [index[0] for index in family.indices]
            color = f"C{[group[0] for group in grouped].index(family)}"
            axes.plot(layers, _stable(members), marker=".", color=color)
        axes.set(xlabel="layer", ylabel="stable rank")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.hist([value for _, members in grouped for value in _stable(members)], bins=20)
        axes.set(xlabel="stable rank", ylabel="modules")
    axes.set_title("stable rank ‖ΔW‖_F² / ‖ΔW‖₂²", fontsize=9)


def _stable(members: Sequence[ModuleSpectrum]) -> list[float]:
    return [module.stable_rank for module in members if module.stable_rank is not None]


def _label(name: str) -> str:
    """A family's name; a leading _ would hide it from the legend."""
    return shorten(name, 43, end=28 / 43).lstrip("_")
