"""Adapters before a merge, module by module: five maps on one grid of layers and kinds.

The same report and the same matplotlib give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterops.analysis.report import AnalysisReport, ModuleAnalysis
from adapterops.render.heat_map import draw_map, height, name_rows
from adapterops.render.layers import arrange
from adapterops.render.plots import CHART, shorten

Figure = Any  # matplotlib's, which is imported when something is drawn
_WIDTH, _TITLE = 16.0, 170
_NAN = float("nan")


def analysis_figure(report: AnalysisReport) -> Figure:
    """Shares, cosines, conflict of signs and overlaps; matplotlib must be there.

    Of more than two adapters: the largest share, the lowest cosine and the largest overlaps.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as New

    grid = arrange(list(report.modules))
    with rc_context(CHART):
        figure: Figure = New(figsize=(_WIDTH, height(grid) + 0.6), layout="constrained")
        names = ", ".join(one.name for one in report.inputs)
        figure.suptitle(shorten(names, _TITLE), fontsize=10)
        if not report.modules:
            figure.text(0.5, 0.4, "no module has factors", ha="center")
            return figure
        every = figure.subplots(1, len(_MAPS), sharex=True, sharey=True)
        nobody = [False] * len(report.modules)
        two = len(report.inputs) == 2
        for axes, (title, many, value, colours, lowest) in zip(every, _MAPS, strict=True):
            values = [value(one) for one in report.modules.values()]
            shown = draw_map(axes, grid, values, nobody, colours, lowest)
            axes.set_title(title if two else many, fontsize=9)
            figure.colorbar(shown, ax=axes, pad=0.02, aspect=30)
        name_rows(every[0], grid)
        if any(not _live(one) for one in report.modules.values()):
            figure.supxlabel("grey: no two adapters change the module", fontsize=8)
    return figure


def _live(one: ModuleAnalysis) -> bool:
    return any(value is not None for value in one.columns)


def _share(one: ModuleAnalysis) -> float:
    """That of the first of two adapters; of more, the largest."""
    known = [x for x in one.shares if x is not None]
    if not known:
        return _NAN
    return known[0] if len(known) == 2 else max(known)


def _cosine(one: ModuleAnalysis) -> float:
    both = [x for x, y in zip(one.cosines, one.columns, strict=True) if y is not None]
    return min(both, default=_NAN)


def _conflict(one: ModuleAnalysis) -> float:
    return _NAN if one.conflict is None else 100 * one.conflict


def _most(values: Sequence[float | None]) -> float:
    return max((x for x in values if x is not None), default=_NAN)


# title of two adapters, of more, value, colours with their end, and where they begin
_MAPS: Sequence[tuple[str, str, Any, tuple[str, float], float]] = (
    ("share of the first", "largest share", _share, ("PuOr", 1.0), 0.0),
    ("cosine", "lowest cosine", _cosine, ("RdBu", 1.0), -1.0),
    ("signs differ, %", "signs differ, %", _conflict, ("RdBu_r", 100.0), 0.0),
    (
        "overlap of the B side",
        "largest overlap of the B sides",
        lambda one: _most(one.columns),
        ("YlGnBu", 1.0),
        0.0,
    ),
    (
        "overlap of the A side",
        "largest overlap of the A sides",
        lambda one: _most(one.rows),
        ("YlGnBu", 1.0),
        0.0,
    ),
)
