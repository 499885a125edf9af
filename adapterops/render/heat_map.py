"""Modules as coloured cells, before and after: rows are layers, columns kinds of module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterops.render.curves import Compression, enough
from adapterops.render.layers import Grid, without_common_start
from adapterops.render.plots import shorten, text_colour

Array = np.ndarray[Any, Any]
Axes = Any  # matplotlib's
Figure = Any

ENERGY = 0.99
_RANKS, _ERRORS = "YlGnBu", "YlOrRd"
_NUMBERED = 96  # cells of a map up to which each shows its number
_NUMBERED_COLUMNS = 12
_LINED = 2500  # cells up to which white lines part them
_DRAWN = 4000  # cells up to which they bear signs, and an SVG holds them as shapes
_NAMED_ROWS = 40
_LABEL = 30
_AROUND = 1.0  # inches above and below the cells
_CHARACTER = 0.065  # inches, of a name
_ABREAST = 50  # characters


def height(grid: Grid) -> float:
    """Inches for the maps of this grid, titles and names of columns included."""
    names = _column_names(grid)
    turned = _CHARACTER * max(map(len, names), default=0) if _turned(names) else 0.0
    return _cells_height(grid) + _AROUND + turned


def _cells_height(grid: Grid) -> float:
    count = len(grid.rows)
    return min(max(0.24 * min(count, 16), 0.085 * count), 9.0)


def _column_names(grid: Grid) -> list[str]:
    return [shorten(name, _LABEL) for name in grid.columns]


def _turned(names: Sequence[str]) -> bool:
    """Whether names of columns do not fit side by side."""
    return max(map(len, names), default=0) * len(names) > _ABREAST


def draw_maps(figure: Figure, found: Compression, grid: Grid) -> None:
    """Rank that holds 99 % of the energy, rank kept, relative error: three maps, one grid."""
    if not found.stems:
        return
    before = [float(enough(values, ENERGY)) for values in found.spectra.values()]
    kept = [float(rank) for rank in found.kept]
    errors = [_error(found, stem) for stem in found.stems]
    out = [rank == 0 for rank in found.kept]
    largest = max(1.0, *before, *kept)
    cut = [error for error, left in zip(errors, out, strict=True) if not left and error == error]
    worst = max(cut, default=0.0) or 1.0
    first, second, third = figure.subplots(1, 3, sharex=True, sharey=True)
    nobody = [False] * len(out)
    ranks = draw_map(first, grid, before, nobody, (_RANKS, largest))
    draw_map(second, grid, kept, out, (_RANKS, largest))
    shown = draw_map(third, grid, errors, out, (_ERRORS, worst))
    first.set_title(f"before: rank that holds {100 * ENERGY:g} % of the energy", fontsize=9)
    second.set_title("after: rank kept", fontsize=9)
    third.set_title("after: relative error, %", fontsize=9)
    name_rows(first, grid)
    bar = figure.colorbar(ranks, ax=[first, second], pad=0.01, aspect=30, label="rank")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=third, pad=0.02, aspect=30, label="relative error, %")
    undefined = any(error != error for error in errors)
    signs = [("×", "left out (rank 0)", any(out)), ("–", "zero, no relative error", undefined)]
    marked = len(grid.rows) * grid.width <= _DRAWN
    said = [f"{sign} {text}" if marked else text for sign, text, used in signs if used]
    figure.supxlabel(f"grey: {', '.join(said)}" if said else "", fontsize=8)


def _error(found: Compression, stem: str) -> float:
    """Per cent; NaN where it is undefined."""
    error = found.errors.get(stem)
    return float("nan") if error is None else 100 * error


def draw_map(
    axes: Axes,
    grid: Grid,
    values: Sequence[float],
    out: Sequence[bool],
    colours: tuple[str, float],
    lowest: float = 0.0,
) -> Any:
    """One map: cells coloured from `lowest` to a largest value, numbers where there is room.

    NaN and what is `out` are grey and bear signs.
    """
    from matplotlib import colormaps

    (name, largest), grey = colours, lowest - 1.0
    count = len(grid.rows), grid.width
    table = np.full(count, np.nan)
    for (row, column), value, left in zip(grid.places, values, out, strict=True):
        table[row, column] = grey if left or value != value else value
    cells = count[0] * count[1]
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(table),
        cmap=colormaps[name].with_extremes(under="0.87"),
        vmin=lowest,
        vmax=largest,
        edgecolors="white",
        linewidth=0.6 if cells <= _LINED else 0.0,
        rasterized=cells > _DRAWN,
    )
    axes.set_ylim(count[0], 0)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    numbered = cells <= _NUMBERED and count[1] <= _NUMBERED_COLUMNS
    for (row, column), value, left in zip(grid.places, values, out, strict=True):
        if numbered and not left and value == value:
            colour = text_colour(mesh.cmap(mesh.norm(value)))
            middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column + 0.5, row + 0.5, f"{value:.3g}", color=colour, **middle)
    if cells <= _DRAWN:
        side = min(5.0, max(1.5, 36 * _cells_height(grid) / max(count[0], 1)))
        gone = [place for place, left in zip(grid.places, out, strict=True) if left]
        none = [
            p for p, x, left in zip(grid.places, values, out, strict=True) if x != x and not left
        ]
        for places, marker in ((gone, "x"), (none, "_")):
            x, y = ([place[axis] + 0.5 for place in places] for axis in (1, 0))
            axes.scatter(x, y, s=side**2, marker=marker, color="0.35", linewidths=0.7)
    _name_columns(axes, grid)
    return mesh


def _name_columns(axes: Axes, grid: Grid) -> None:
    if not any(grid.columns):
        axes.set_xticks([])
        axes.set_xlabel("modules in order, line by line" if grid.ordered else "modules of a layer")
        return
    names = _column_names(grid)
    axes.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    axes.tick_params(axis="x", rotation=90 if _turned(names) else 0)


def name_rows(axes: Axes, grid: Grid) -> None:
    """Numbers where all rows are of one kind, names where there is room, else names of groups."""
    heads = list(dict.fromkeys(grid.heads))
    if len(heads) == 1 and len(grid.rows) > 1:
        every = -(-len(grid.rows) // _NAMED_ROWS)
        ticks = range(0, len(grid.rows), every)
        names = [row.removeprefix(heads[0]).strip("._:/") or row for row in grid.rows]
        axes.set_ylabel(shorten(heads[0], _LABEL))
    elif len(grid.rows) <= _NAMED_ROWS:
        ticks = range(len(grid.rows) if any(grid.rows) else 0)
        names = list(without_common_start(grid.rows))
    else:
        starts = [i for i, head in enumerate(grid.heads) if i == 0 or head != grid.heads[i - 1]]
        ends = [*starts[1:], len(grid.rows)]
        short = without_common_start([grid.heads[start] for start in starts])
        axes.set_yticks(
            [(a + b) / 2 for a, b in zip(starts, ends, strict=True)],
            [shorten(name, _LABEL) for name in short],
            fontsize=7,
        )
        return
    labels = [shorten(names[i] or "others", _LABEL) for i in ticks]
    axes.set_yticks([i + 0.5 for i in ticks], labels, fontsize=7)
