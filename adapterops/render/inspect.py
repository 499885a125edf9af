"""An inspection as a page, many as one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterops.inspection.report import FamilyInfo, Inspection, ScaleInfo, TensorInfo, summary
from adapterops.inspection.spectra import SHARES, percent
from adapterops.inspection.stems import natural
from adapterops.render.spectrum import print_spectrum
from adapterops.render.text import count, drawn, grid, printable, safe

_WIDTH = 10_000  # off a terminal nothing is gained by squeezing columns
_EXTRAS = 12
_NOTES = 3


def page(found: Inspection, *, verbose: bool = False) -> str:
    """Everything about one adapter, as text; colours only on a terminal."""

    def draw(console: Any) -> None:
        console.print(f"[bold]{safe(found.path)}[/bold]  {_headline(found)}")
        for name, text in _facts(found):
            console.print(f"{name:<15}{safe(text)}")
        if found.families:
            console.print(_modules(found.families))
        if verbose and found.modules:
            console.print(_single(found))
        for title, tensors in (
            ("extras", found.extras),
            ("full deltas", found.deltas),
            ("not read", found.unread),
        ):
            if tensors:
                console.print(_tensors(title, tensors, len(tensors) if verbose else _EXTRAS))
        if found.spectrum:
            print_spectrum(console, found.spectrum, verbose=verbose)
        if found.output:
            console.print(f"drawn: {safe(found.output)}" + (" (before)" if found.skipped else ""))
        for note in found.notes:
            console.print(f"note: {safe(note)}")
        for problem in found.problems:
            console.print(f"merge would refuse this: {safe(_told(problem))}")

    return drawn(draw, _WIDTH)


def table(adapters: Sequence[Inspection], failed: int) -> str:
    """One line per adapter and a summary; `failed` could not be read.

    Plain text: no library draws ten thousand rows in time.
    """
    spectrum = any(adapter.spectrum for adapter in adapters)
    heads = ["adapter", "dialect", "kind", "rank", "scale", "modules", "MB"]
    right = [False, False, False, True, True, True, True]
    if spectrum:
        heads, right = [*heads, "‖ΔW‖", "rank 90 %", "99 %", "99.9 %"], [*right, *4 * [True]]
    rows = [_line(adapter, spectrum) for adapter in adapters]
    heads += ["base", "remark"]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in (heads, *rows):
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, [*right, False, False], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_totals(adapters, failed)])


def _headline(found: Inspection) -> str:
    parts = [_dialects(found), _kinds(found), _rank(found)]
    counted = count(found.module_count, "module")
    return ", ".join([*(part for part in parts if part), counted, f"{found.size / 1e6:.3g} MB"])


def _facts(found: Inspection) -> Iterable[tuple[str, str]]:
    """What the page says in a line each."""
    if found.base:
        yield "base", found.base
    for index, scale in enumerate(found.scales[:_NOTES]):
        yield "" if index else "scale", _scale(scale, found.module_count)
    if len(found.scales) > _NOTES:
        yield "", f"and {len(found.scales) - _NOTES} more (-v)"
    yield "number format", ", ".join(found.dtypes)
    yield "parameters", _parameters(found)
    if len(found.kinds) > 1:
        each = (f"{kind} {count:,}" for kind, count in found.kind_parameters.items())
        yield "", "; ".join(each)
    if found.config_file:
        yield "config", found.config_file
    if found.side_files:
        yield "beside it", ", ".join(found.side_files)
    if found.provenance:
        yield "made by", _maker(found.provenance)


def _parameters(found: Inspection) -> str:
    text = f"{found.parameters:,}"
    if found.adapted:
        part = percent(found.parameters / found.adapted)
        text += f": {part} of the {_millions(found.adapted)} in the weights it changes"
    if found.base_parameters:
        part = percent(found.parameters / found.base_parameters)
        text += f", {part} of the {_millions(found.base_parameters)} in the base"
    return text


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _maker(made: Mapping[str, Any]) -> str:
    inputs = made.get("inputs")
    listed = inputs if isinstance(inputs, list) else []
    names = [str(item.get("name")) for item in listed if isinstance(item, dict)]
    shown = ", ".join(names[:_NOTES]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"adapterops {made.get('version')}, {made.get('verb')} of {shown}"


def _scale(scale: ScaleInfo, modules: int) -> str:
    value = "unknown" if scale.scale is None else _value(scale.scale)
    some = "" if scale.modules == modules else f" for {count(scale.modules, 'module')}"
    return f"{value}{some}" + (f", {scale.origin}" if scale.origin else "")


def _modules(found: Sequence[FamilyInfo]) -> Any:
    """Modules by type; columns that would say nothing are left out."""
    cells: list[tuple[str, list[str]]] = [
        ("modules", [safe(family.name) for family in found]),
        ("count", [str(family.modules) for family in found]),
        ("where", [family.where for family in found]),
        ("missing", [family.missing for family in found]),
        ("kind", [", ".join(family.kinds) for family in found]),
        ("shape", [", ".join(map(_shape, family.shapes[:_NOTES])) for family in found]),
        ("rank", [_several(family.ranks) for family in found]),
        ("trained", [_several(family.dims) for family in found]),
        ("scale", [", ".join(map(_value, family.scales[:_NOTES])) for family in found]),
        ("parameters", [f"{family.parameters:,}" for family in found]),
    ]
    columns = dict(cells)
    silent = {name for name in ("where", "missing") if not any(columns[name])}
    silent |= {"kind"} if len(set(columns["kind"])) == 1 else set()
    silent |= {"trained"} if columns["trained"] == columns["rank"] else set()
    shown = [name for name, _ in cells if name not in silent]
    rows = grid(*shown)
    for row in zip(*(columns[name] for name in shown), strict=True):
        rows.add_row(*row)
    return rows


def _shape(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _value(scale: float | None) -> str:
    return "?" if scale is None else f"{scale:.4g}"


def _single(found: Inspection) -> Any:
    rows = grid("module", "dialect", "kind", "shape", "rank", "trained", "scale", "from")
    for stem in sorted(found.modules, key=natural):
        module = found.modules[stem]
        rows.add_row(
            safe(stem),
            module.dialect,
            module.kind,
            _shape(module.shape),
            str(module.rank),
            str(module.dim),
            _value(module.scale),
            safe(module.scale_from),
        )
    return rows


def _tensors(title: str, found: Sequence[TensorInfo], most: int) -> Any:
    rows = grid(title, "tensors", "parameters", "MB", "number format")
    for item in found[:most]:
        rows.add_row(
            safe(item.name),
            str(item.tensors),
            f"{item.parameters:,}",
            f"{item.bytes / 1e6:.3g}",
            ", ".join(item.dtypes),
        )
    rest = found[most:]
    if rest:
        rows.add_row(
            f"and {len(rest)} more (-v)",
            str(sum(item.tensors for item in rest)),
            f"{sum(item.parameters for item in rest):,}",
            f"{sum(item.bytes for item in rest) / 1e6:.3g}",
            "",
        )
    return rows


def _line(adapter: Inspection, spectrum: bool) -> list[str]:
    cells = [
        printable(adapter.path),
        _dialects(adapter),
        _kinds(adapter),
        _several(adapter.ranks),
        _scales(adapter),
        str(adapter.module_count),
        f"{adapter.size / 1e6:.3g}",
    ]
    if spectrum:
        measured = adapter.spectrum
        cells.append(f"{measured.norm:.4g}" if measured else "")
        enough = measured.enough if measured else ()
        cells += [str(item.rank) for item in enough] or [""] * len(SHARES)
    return [*cells, printable(adapter.base or ""), _remark(adapter)]


def _remark(adapter: Inspection) -> str:
    """The most important thing about an adapter that the other columns do not say."""
    if adapter.problems:
        return f"merge would refuse this: {printable(_told(adapter.problems[0]))}"
    parts = []
    if adapter.skipped:
        parts.append("drawn before")
    if adapter.deltas:
        parts.append(count(sum(item.tensors for item in adapter.deltas), "full delta"))
    if adapter.extras:
        parts.append(count(sum(item.tensors for item in adapter.extras), "extra"))
    notes = (note.removeprefix(f"{adapter.path}: ") for note in adapter.notes[:1])
    return "; ".join([*parts, *map(printable, notes)])


def _totals(adapters: Sequence[Inspection], failed: int) -> list[str]:
    counts = summary(adapters)
    text = [count(len(adapters), "adapter"), f"{counts['bytes'] / 1e6:.4g} MB"]
    if failed:
        text.append(f"{failed} could not be read")
    if counts["unmergeable"]:
        text.append(f"{counts['unmergeable']} could not be merged")
    lines = ["", ", ".join(text)]
    for name in ("dialects", "kinds", "ranks", "bases"):
        each = [f"{printable(value)} ({number})" for value, number in counts[name].items()]
        more = f" and {len(each) - 8} more" if len(each) > 8 else ""
        if each:
            lines.append(f"{name}: {', '.join(each[:8])}{more}")
    return lines


def _dialects(found: Inspection) -> str:
    return "+".join(found.dialects) or found.dialect


def _kinds(found: Inspection) -> str:
    return "+".join(found.kinds)


def _rank(found: Inspection) -> str:
    if not found.ranks:
        return ""
    columns, trained = _several(found.ranks), _several(found.dims)
    return f"rank {columns}" + ("" if columns == trained else f" (trained rank {trained})")


def _several(values: Iterable[int]) -> str:
    found = sorted(set(values))
    if len(found) > 3:
        return f"{found[0]}–{found[-1]}"
    return ", ".join(map(str, found))


def _scales(found: Inspection) -> str:
    values = list(dict.fromkeys(_value(item.scale) for item in found.scales))
    return ", ".join(values[:2]) + (" …" if len(values) > 2 else "")


def _told(problem: Mapping[str, Any]) -> str:
    module = f"module {problem['module']}: " if problem["module"] else ""
    hint = f"; {problem['hint']}" if problem["hint"] else ""
    return f"{module}{problem['message']}{hint}"
