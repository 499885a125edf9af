"""A comparison as text: the verdict, what it rests on, the modules that differ most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.difference.report import (
    Angles,
    DiffReport,
    Extras,
    ModuleDifference,
    PairDifference,
)
from adapterops.render.text import count, drawn, grid, safe

_WIDTH = 10_000  # off a terminal nothing is gained by squeezing columns
_WORST = 5
_NAMES = 3
_EVIDENCE = {
    "distance": ("‖A−B‖", "rounding allows"),
    "factor": ("factor", ""),
    "residual": ("‖B−cA‖", "rounding allows"),
    "smallest": ("smallest factor", ""),
    "largest": ("largest factor", ""),
    "norm": ("‖ΔW‖", "floor"),
    "cosine": ("cosine of ΔW", "threshold"),
    "shared_rows": ("overlap of the row spaces (A)", "threshold"),
    "shared_columns": ("of the column spaces (B)", ""),
}


def comparison(report: DiffReport, *, verbose: bool = False) -> str:
    """The whole report as text; colours only on a terminal. `verbose`: every module and name."""

    def draw(console: Any) -> None:
        console.print(_inputs(report))
        if report.pair is None:
            _matrices(console, report)
        else:
            _pair(console, report.pair, verbose)
        if report.left_out:
            console.print(f"{count(report.left_out, 'module')} left out by --modules")

    return drawn(draw, _WIDTH)


def share(value: float | None, floor: float | None = 0.0) -> str:
    """A fraction in per cent, a dash where it is undefined, a bound where it is noise."""
    if value is None:
        return "–"
    if value == 0.0 or value > (floor or 0.0):
        return f"{100 * value:.3g} %"
    return f"< {100 * (floor or 0.0):.1g} %"


def _inputs(report: DiffReport) -> Any:
    """What is compared; of two, A and B."""
    rows = grid("", "adapter", "dialect", "number format", "rank", "modules", "‖ΔW‖")
    rows.columns[1].justify = "left"
    for index, item in enumerate(report.inputs):
        rows.add_row(
            "AB"[index] if report.pair else str(index + 1),
            safe(item.name),
            item.dialect,
            item.dtype,
            str(item.rank),
            str(item.modules),
            "zero" if item.zero else f"{item.norm:.4g}",
        )
    return rows


def _matrices(console: Any, report: DiffReport) -> None:
    """Distances and cosines, rows and columns numbered as the inputs are."""
    numbers = [str(index + 1) for index in range(len(report.inputs))]
    rows = grid("‖row−column‖/‖row‖", *numbers)
    for number, values, floors in zip(numbers, report.distance, report.floor, strict=True):
        rows.add_row(number, *map(share, values, floors))
    console.print(rows)
    rows = grid("cosine", *numbers)
    for number, cosines in zip(numbers, report.cosine, strict=True):
        rows.add_row(number, *(f"{value:.4f}" for value in cosines))
    console.print(rows)
    if any(item.zero for item in report.inputs):
        console.print("a zero adapter has no relative distance, and its cosine is 0")


def _pair(console: Any, pair: PairDifference, verbose: bool) -> None:
    console.print(f"[bold]{safe(pair.verdict.text)}[/bold]")
    told = []
    for name, figure in pair.verdict.evidence.items():
        what, against = _EVIDENCE[name]
        bound = "" if figure.threshold is None else f" ({against} {figure.threshold:.3g})"
        noise = name in ("distance", "residual") and 0.0 < figure.value <= pair.floor
        told.append(f"{what} {f'< {pair.floor:.1g}' if noise else f'{figure.value:.4g}'}{bound}")
    console.print(f"because: {', '.join(told)}")
    if pair.verdict.caveat:
        console.print(f"note: {safe(pair.verdict.caveat)}")
    console.print(
        f"distance {share(pair.relative, _relative_floor(pair))} of ‖A‖, cosine {pair.cosine:.4f}"
        + (f", B is closest to {pair.ratio:.4g}·A" if pair.ratio and abs(pair.cosine) > 0.1 else "")
    )
    for line in _spreads(pair):
        console.print(line)
    limit = None if verbose else _NAMES
    for letter, names in (("A", pair.only_a), ("B", pair.only_b)):
        if names:
            console.print(
                f"only in {letter} (zero in the other): {count(len(names), 'module')}, "
                f"{safe(_some(names, limit))}"
            )
    _extras(console, pair.extras, limit)
    if pair.deltas:
        rows = grid("full delta", "‖A‖", "‖B‖", "distance", "cosine")
        for name, delta in pair.deltas.items():
            floor = delta.floor / delta.norms[0] if delta.norms[0] else 0.0
            rows.add_row(
                safe(name),
                f"{delta.norms[0]:.4g}",
                f"{delta.norms[1]:.4g}",
                share(delta.relative, floor),
                f"{delta.cosine:.4f}",
            )
        console.print(rows)
    ordered = sorted(pair.modules.items(), key=lambda item: -item[1].distance)
    if verbose:
        console.print(_modules("module", pair.modules))
    elif pair.distance > pair.floor:
        console.print(_modules("largest differences", dict(ordered[:_WORST])))


def _relative_floor(x: PairDifference | ModuleDifference) -> float:
    return x.floor / x.norms[0] if x.norms[0] else 0.0


def _spreads(pair: PairDifference) -> Iterable[str]:
    """Mean and extremes over the modules that both have."""
    found = pair.spread
    if not found:
        return
    relative, cosine = found["relative"], found["cosine"]
    yield (
        f"by module: distance {share(relative.mean)} on average, at most {share(relative.largest)};"
        f" cosine {cosine.mean:.4f} on average, at least {cosine.smallest:.4f}"
    )
    doubts = [(module.columns.floor, module.rows.floor) for module in pair.modules.values()]
    texts = []
    for name, floor in zip(("columns", "rows"), map(max, zip(*doubts, strict=True)), strict=True):
        mean, largest = (_degree(x, floor) for x in (found[name].mean, found[name].largest))
        texts.append(f"between the {name[:-1]} spaces {mean} on average, at most {largest}")
    yield f"largest angle {'; '.join(texts)}"


def _extras(console: Any, extras: Extras, limit: int | None) -> None:
    if extras.equal:
        console.print(f"extras (heads, biases, token rows): {len(extras.equal)} equal to the bit")
    for title, names in (
        ("extras that differ", extras.differ),
        ("extras only in A", extras.only_a),
        ("extras only in B", extras.only_b),
    ):
        if names:
            console.print(f"{title}: {len(names)}, {safe(_some(names, limit))}")


def _modules(title: str, modules: Mapping[str, ModuleDifference]) -> Any:
    rows = grid(
        title, "shape", "ranks", "‖A‖", "‖B‖", "distance", "cosine", "column angles", "row angles"
    )
    for stem, module in modules.items():
        rows.add_row(
            safe(stem),
            "x".join(map(str, module.shape)),
            "/".join(map(str, module.ranks)),
            *("zero" if z else f"{n:.4g}" for n, z in zip(module.norms, module.zero, strict=True)),
            share(module.relative, _relative_floor(module)),
            f"{module.cosine:.4f}",
            _degrees(module.columns),
            _degrees(module.rows),
        )
    return rows


def _degrees(angles: Angles) -> str:
    """The smallest and the largest angle."""
    if not angles.degrees:
        return "–"
    low, high = (_degree(angles.degrees[index], angles.floor) for index in (0, -1))
    return low if low == high else f"{low} to {high}"


def _degree(value: float, floor: float) -> str:
    return f"{value:.3g}°" if value == 0.0 or value > floor else f"< {floor:.1g}°"


def _some(names: tuple[str, ...], limit: int | None) -> str:
    shown = names if limit is None else names[:limit]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
