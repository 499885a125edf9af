"""Singular values, energy by rank and stable ranks as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from adapterops.inspection.spectra import SHARES, ModuleSpectrum, SpectrumReport, percent, share
from adapterops.inspection.stems import families, natural
from adapterops.render.text import grid, safe

_VALUES = 8


def print_spectrum(console: Any, found: SpectrumReport, *, verbose: bool) -> None:
    """What the ranks of an adapter hold, on a rich console; `verbose`: module by module."""
    console.print(f"‖ΔW‖ {found.norm:.4g}; {found.conclusion}")
    if found.kept:
        rows = grid("at uniform rank", *(str(kept.rank) for kept in found.kept))
        rows.add_row("energy kept", *(share(kept.energy) for kept in found.kept))
        rows.add_row("relative error", *(percent(kept.error) for kept in found.kept))
        console.print(rows)
    for enough in found.enough:
        bound = percent((1 - enough.energy) ** 0.5)
        console.print(
            f"{100 * enough.energy:g} % of the energy (an error of at most {bound}): "
            f"rank {enough.rank}, error {percent(enough.error)}"
        )
    if verbose:
        console.print(_single(found))
        return
    names = tuple(found.modules)
    rows = grid(
        "modules",
        "count",
        "‖ΔW‖",
        "stable rank",
        *(f"rank {100 * x:g} %" for x in SHARES),
        "full rank",
    )
    for family in families(names):
        members = [found.modules[names[position]] for position in family.members]
        rows.add_row(safe(family.name), str(len(members)), *_pooled(members))
    console.print(rows)


def _pooled(members: Sequence[ModuleSpectrum]) -> list[str]:
    """Figures of several modules: the norm of all, else the median and what it lies between."""
    norm = sum(module.norm**2 for module in members) ** 0.5
    stable = [module.stable_rank for module in members if module.stable_rank is not None]
    enough = [
        [module.enough[index].rank for module in members if module.enough]
        for index in range(len(SHARES))
    ]
    full = [module.rank for module in members]
    return [
        f"{norm:.4g}",
        _spread(stable, ".3g"),
        *(_spread(x, "g") for x in enough),
        _spread(full),
    ]


def _spread(values: Sequence[float], form: str = "g") -> str:
    if not values:
        return "–"
    middle, low, high = statistics.median(values), min(values), max(values)
    if low == high:
        return f"{middle:{form}}"
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def _single(found: SpectrumReport) -> Any:
    rows = grid(
        "module", "‖ΔW‖", "stable rank", *(f"rank {100 * x:g} %" for x in SHARES), "full rank", "σ"
    )
    for stem in sorted(found.modules, key=natural):
        module = found.modules[stem]
        shown = " ".join(f"{value:.3g}" for value in module.values[:_VALUES])
        rows.add_row(
            safe(stem),
            f"{module.norm:.4g}",
            "–" if module.stable_rank is None else f"{module.stable_rank:.3g}",
            *([str(enough.rank) for enough in module.enough] or ["–"] * len(SHARES)),
            str(module.rank),
            shown + (" …" if len(module.values) > _VALUES else ""),
        )
    return rows
