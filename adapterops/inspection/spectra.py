"""How much of an adapter each rank holds: singular values, stable rank, energy.

Modules are orthogonal to each other, so squared singular values add up over the adapter. A uniform
rank k keeps the k largest of every module (Eckart & Young 1936); the share of Σσ² that it keeps is
its energy e, the relative error that it leaves √(1 − e).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops import ranks
from adapterops.linalg import Spectrum

SHARES = (0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Enough:
    """The smallest rank that keeps `energy` of Σσ², and the relative error that it leaves."""

    energy: float
    rank: int
    error: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What a rank keeps: its share of Σσ², and the relative error that it leaves."""

    rank: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """The singular values of one module's ΔW, descending.

    `norm` is ‖ΔW‖_F, `floor` the rounding noise of its singular values, `rank` how many lie above
    it, `columns` those of its factors. `stable_rank` is ‖ΔW‖_F²/‖ΔW‖₂², None where ΔW is zero;
    `enough` is empty then.
    """

    values: tuple[float, ...]
    norm: float
    floor: float
    rank: int
    columns: int
    stable_rank: float | None
    enough: tuple[Enough, ...]


@dataclass(frozen=True, slots=True)
class SpectrumReport:
    """The whole adapter: `kept` by uniform rank, the ranks that are `enough`, and its modules.

    `curve` is the relative error at uniform rank 0, 1, 2, …; `kept` picks ranks from it. `columns`
    is the largest number of columns of a module, `rank` the largest numerical rank; `conclusion`
    says in a sentence what a smaller rank would cost. Full deltas, which no rank cuts, are not in.
    """

    norm: float
    columns: int
    rank: int
    curve: tuple[float, ...]
    kept: tuple[Kept, ...]
    enough: tuple[Enough, ...]
    conclusion: str
    modules: Mapping[str, ModuleSpectrum]


def report(stems: Sequence[str], spectra: Sequence[Spectrum]) -> SpectrumReport:
    """Figures of an adapter from the singular values of its modules."""
    tail = ranks.tails(spectra)
    columns = max((spectrum.columns for spectrum in spectra), default=0)
    rank = max((spectrum.rank for spectrum in spectra), default=0)
    kept = tuple(_kept(tail, k) for k in shown_ranks(columns, len(tail) - 1))
    modules = {stem: _module(spectrum) for stem, spectrum in zip(stems, spectra, strict=True)}
    return SpectrumReport(
        norm=float(tail[0]),
        columns=columns,
        rank=rank,
        curve=tuple(map(float, tail / tail[0] if tail[0] > 0 else 0.0 * tail)),
        kept=kept,
        enough=_enough(tail),
        conclusion=_conclusion(tail, columns, rank),
        modules=modules,
    )


def shown_ranks(columns: int, most: int) -> list[int]:
    """1, 2, 4, … and the number of columns, at most `most`."""
    powers = {1 << power for power in range(max(columns, 1).bit_length())}
    return sorted(k for k in {*powers, columns} if 0 < k <= most)


def _module(spectrum: Spectrum) -> ModuleSpectrum:
    values = spectrum.values
    largest = float(values[0]) if len(values) else 0.0
    return ModuleSpectrum(
        values=tuple(map(float, values)),
        norm=spectrum.norm,
        floor=spectrum.floor,
        rank=spectrum.rank,
        columns=spectrum.columns,
        stable_rank=(spectrum.norm / largest) ** 2 if largest > spectrum.floor else None,
        enough=_enough(ranks.tails([spectrum])) if largest > spectrum.floor else (),
    )


def _kept(tail: np.ndarray[Any, Any], rank: int) -> Kept:
    error = float(tail[rank] / tail[0]) if tail[0] > 0 else 0.0
    return Kept(rank, 1.0 - error * error, error)


def _enough(tail: np.ndarray[Any, Any]) -> tuple[Enough, ...]:
    if not tail[0] > 0:
        return ()
    found = ((share, ranks.for_energy(tail, share, float(tail[0]))) for share in SHARES)
    return tuple(Enough(share, k, float(tail[k] / tail[0])) for share, k in found)


def _conclusion(tail: np.ndarray[Any, Any], columns: int, rank: int) -> str:
    """What half of the rank would cost, or that less than all is there at all."""
    if not tail[0] > 0 or rank == 0:
        return "every module is zero: the adapter changes nothing"
    if rank == 1:
        return "no module has a rank above 1"
    half = max(1, rank // 2)
    kept = _kept(tail, half)
    begin = "" if rank == columns else f"no module has a rank above {rank}; "
    lost = f"rank {half} would lose {percent(kept.error)}"
    return f"{begin}half of the rank holds {share(kept.energy)} of the energy: {lost}"


def percent(value: float) -> str:
    """A relative error in per cent, two digits."""
    return f"{100 * value:.2g} %"


def share(energy: float) -> str:
    """A share in per cent, rounded down: what is not all never reads as all."""
    shown = math.floor(1e4 * energy) / 100
    return f"{shown:g} %" if shown < 99.99 or energy >= 1 else "> 99.99 %"
