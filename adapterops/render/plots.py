"""Pictures: the matrix of N adapters, and how any figure is saved.

matplotlib is imported when something is drawn, never before. The same report and the same
matplotlib give the same bytes: no days, no versions, no random ids.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from typing import Any

from adapterops.difference.report import DiffReport
from adapterops.errors import UsageError
from adapterops.files.output import check_output, stage
from adapterops.render.text import printable

Figure = Any  # matplotlib's
Rows = Sequence[Sequence[float | None]]

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "adapterops",  # else ids in an SVG are random
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 9,
}
CHART: dict[Any, Any] = {  # curves on axes
    **STYLE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 7,
}
_WRITTEN_OUT = 16  # adapters up to which each cell shows its number
_CELL = 0.42  # inches
_LABEL = 28
_FAR = 2.0  # beyond, norms are apart, and their ratio would swallow the colours


def check_picture(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a picture that could not be saved before the work for it is done.

    Raises UsageError for another ending than .svg or .png and without matplotlib,
    OutputExistsError, FileError.
    """
    _kind(path)
    _library()
    check_output(path, directory=False, overwrite=overwrite)


def save_figure(
    figure: Figure,
    path: str | os.PathLike[str],
    *,
    description: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a figure as .svg or .png, by its name: complete under that name, or not at all.

    `description` goes into the picture's metadata. Raises as `check_picture` does.
    """
    kind = _kind(path)
    metadata: dict[str, str | None] = {"Date" if kind == "svg" else "Software": None}
    if description:
        metadata["Description"] = description
    data = io.BytesIO()
    with _library().rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in scripts the font lacks
        figure.savefig(data, format=kind, dpi=150, metadata=metadata)
    with stage(path, directory=False, overwrite=overwrite, main=False) as target:
        target.write(target.final.name, [data.getvalue()])


def matrix_figure(report: DiffReport) -> Figure:
    """Relative distances and cosines of all adapters as two coloured squares.

    Raises UsageError without matplotlib.
    """
    from matplotlib.figure import Figure as New

    count = len(report.inputs)
    side = min(max(count * _CELL, 2.0), 16.0)
    with _library().rc_context(STYLE):
        figure = New(figsize=(2 * side + 3.5, side + 1.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [shorten(item.name, _LABEL) for item in report.inputs]
        far = max((x for row in report.distance for x in row if x is not None), default=0.0)
        title = "‖row − column‖ / ‖row‖"
        colours = "viridis_r", 0.0, min(far, _FAR) or 1.0
        _square(left, title, report.distance, report.floor, names, colours)
        _square(right, "cosine", report.cosine, None, names, ("RdBu", -1.0, 1.0))
        right.set_yticklabels([])
    return figure


def _square(
    axes: Any,
    title: str,
    values: Rows,
    floors: Rows | None,
    names: Sequence[str],
    colours: tuple[str, float, float],
) -> None:
    """One matrix as coloured cells, with the numbers where there is room for them."""
    name, low, high = colours
    numbers = [[float("nan") if x is None else x for x in row] for row in values]
    image = axes.imshow(numbers, cmap=name, vmin=low, vmax=high, interpolation="nearest")
    image.set_cmap(image.cmap.with_extremes(bad="0.8"))
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_title(title, fontsize=9)
    size = min(9.0, 16 * 72 * 0.8 / len(names))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) > _WRITTEN_OUT:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = text_colour(image.cmap(image.norm(numbers[i][j])))
            text = _number(value, floors[i][j] if floors else None)
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)


def _number(value: float | None, floor: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value <= 0.0 or value > (floor or 0.0) else f"< {floor:.0e}"


def shorten(name: str, length: int, *, end: float = 0.5) -> str:
    """A name as text; of one longer than `length`, its beginning and, for that share, its end."""
    text = printable(name)
    tail = round(end * length)
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def text_colour(cell: tuple[float, float, float, float]) -> str:
    """White on a dark cell (RGBA), black on a light one."""
    red, green, blue, _ = cell
    return "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "k"


def _kind(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    kind = os.path.splitext(name)[1].lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UsageError(f"{name}: pictures are .svg or .png")
    return kind


def _library() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "pictures need matplotlib", hint="pip install 'adapterops[report]'"
        ) from None
    return matplotlib
