"""Merge methods as a table, one of them as a page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from adapterops.render.text import drawn, safe
from adapterops.verbs.methods import MethodInfo, ParameterInfo

_LOOKS_AT = {
    "gram": "inner products of the adapters",
    "core": "singular vectors",
    "elements": "entries",
    "factors": "factors",
}
_NEEDS = {
    "activations": "inputs of every adapter's modules (--activations)",
    "seed": "random bits (--seed)",
}


def table(methods: Sequence[MethodInfo]) -> str:
    """Every method: what it does, after whom, with which parameters."""

    def draw(console: Any) -> None:
        from rich.table import Table

        rows = Table(box=None, pad_edge=False)
        rows.add_column("method", no_wrap=True)
        rows.add_column("adapters", no_wrap=True)
        rows.add_column("what it does, after whom", overflow="fold", ratio=3)
        rows.add_column("parameters", overflow="fold", ratio=2)
        for one in methods:
            given = ", ".join(_assigned(each) for each in one.parameters)
            what = f"{safe(one.summary)}\n[dim]{safe(one.reference)}[/dim]"
            rows.add_row(one.name, _count(one), what, safe(given))
        console.print(rows)
        console.print("adapterops methods NAME says more of one.")

    return drawn(draw)


def page(one: MethodInfo) -> str:
    """All of one method, and a command to start from."""

    def draw(console: Any) -> None:
        console.print(f"[bold]{one.name}[/bold]  {safe(one.summary)}")
        for title, text in _facts(one):
            console.print(f"{title:<12}{safe(text)}")
        if one.parameters:
            console.print(_parameters(one.parameters))
        console.print(f"for example: {safe(_example(one))}")

    return drawn(draw)


def _facts(one: MethodInfo) -> Iterator[tuple[str, str]]:
    yield "reference", one.reference
    yield "adapters", _count(one)
    yield "looks at", _LOOKS_AT[one.signature]
    if one.spaces:
        yield "space", f"{', '.join(one.spaces)} (--space)"
    for name in one.needs:
        yield "needs", _NEEDS[name]
    for kind, listed in (("law", one.laws), ("breaks", one.breaks)):
        for name, meaning in listed.items():
            yield kind, f"{name}: {meaning}"


def _parameters(parameters: Sequence[ParameterInfo]) -> Any:
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    for name in ("parameter", "default", "allowed", "meaning"):
        rows.add_column(name, overflow="fold", no_wrap=name in ("parameter", "default"))
    for one in parameters:
        default = "required" if one.default is None else _text(one.default)
        rows.add_row(one.name, default, safe(one.range), safe(one.meaning))
    return rows


def _count(one: MethodInfo) -> str:
    if one.most is None:
        return f"{one.least} or more"
    return f"{one.least}" if one.most == one.least else f"{one.least} to {one.most}"


def _assigned(one: ParameterInfo) -> str:
    return one.name if one.default is None else f"{one.name}={_text(one.default)}"


def _text(value: object) -> str:
    """A value as `--param` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _example(one: MethodInfo) -> str:
    """A command with two adapters, and the first parameter spelled out."""
    words = ["adapterops", "merge", "a", "b", "-w", "0.5,0.5", "-m", one.name]
    for parameter in one.parameters[:1]:
        default = "16" if parameter.default is None else _text(parameter.default)
        words += ["--param", f"{parameter.name}={default}"]
    if one.spaces:  # entries of ΔW itself are of full rank: they need a rank, or bake
        words += ["--space", "knots"]
    if "activations" in one.needs:
        words += ["--activations", "a.safetensors", "--activations", "b.safetensors"]
    return shlex.join([*words, "-o", "merged"])
