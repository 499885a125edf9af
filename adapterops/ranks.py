"""Choosing the output's uniform rank from the modules' singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adapterops.errors import UsageError
from adapterops.linalg import Spectrum

# What serving engines allocate (vLLM 0.33.0, `max_lora_rank`).
STANDARD = (1, 8, 16, 32, 64, 128, 256, 320, 512)


_TARGETS = ("rank", "energy", "max_error", "size", "ratio")
_KOHYA = ("sv_ratio", "sv_fro", "sv_cumulative")


@dataclass(frozen=True, slots=True)
class Ranks:
    """How ranks are chosen: at most one target; none of them means nothing is cut.

    `energy` is the share of Σσ² to keep, `max_error` the relative error as written, `size` bytes of
    the weights file, `ratio` the share of the inputs' parameters: all of the whole adapter, which
    gets one uniform rank. Without a target, `as_stored` keeps every column, also those that add
    nothing. `ragged` applies the target to each module by itself, `allocate` "global"
    spends directions over all modules where they save most. `floor` and `ceiling` bound every
    module's rank.

    sd-scripts' rules are of each module by itself (`networks/resize_lora.py`): `sv_ratio` keeps
    σ > σ₁/x, `sv_fro` the fewest with Σσ² ≥ x²·total, `sv_cumulative` the fewest with Σσ ≥ x·total;
    the ceiling caps what they say.
    """

    rank: int | Literal["same"] | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None
    ratio: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    allocate: Literal["uniform", "global"] = "uniform"
    ragged: bool = False
    floor: int | None = None
    ceiling: int | None = None
    as_stored: bool = False

    def __post_init__(self) -> None:
        given = [name for name in (*_TARGETS, *_KOHYA) if getattr(self, name) is not None]
        if len(given) > 1:
            shown = [f"--{name.replace('_', '-')}" for name in given]
            raise UsageError(f"{' and '.join(shown)} both choose the rank; give one of them")
        if self.rank not in (None, "same") and not _is_count(self.rank):
            raise UsageError(f"--rank {self.rank}: expected a whole number from 1 on, or same")
        for name in ("energy", "max_error", "ratio", "sv_fro", "sv_cumulative"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: expected a number above 0, at most 1"
                )
        if self.sv_ratio is not None and not 1.0 <= self.sv_ratio < math.inf:
            raise UsageError(f"--sv-ratio {self.sv_ratio}: expected a number from 1 on")
        if self.size is not None and self.size <= 0:
            raise UsageError(f"--size {self.size}: expected a number of bytes above 0")
        self._check_bounds(given)

    def _check_bounds(self, given: list[str]) -> None:
        if self.allocate not in ("uniform", "global"):
            raise UsageError(f"--allocate {self.allocate!r}: expected uniform or global")
        if self.allocate == "global" and (not given or given[0] in _KOHYA):
            raise UsageError(
                "--allocate global spends a budget or meets a target: give --rank, --size, "
                "--ratio, --energy or --max-error with it"
            )
        for name, value in (("min-rank", self.floor), ("max-rank", self.ceiling)):
            if value is not None and not _is_count(value):
                raise UsageError(f"--{name} {value}: expected a whole number from 1 on")
        if self.floor and self.ceiling and self.floor > self.ceiling:
            raise UsageError(f"--min-rank {self.floor} is above --max-rank {self.ceiling}")
        if isinstance(self.rank, int) and self.allocate == "uniform":
            if self.floor and self.rank < self.floor:
                raise UsageError(f"--rank {self.rank} is below --min-rank {self.floor}")
            if self.ceiling and self.rank > self.ceiling:
                raise UsageError(f"--rank {self.rank} is above --max-rank {self.ceiling}")

    @property
    def target(self) -> str | None:
        """The name of the target that was given, None for a lossless result."""
        return next((n for n in (*_TARGETS, *_KOHYA) if getattr(self, n) is not None), None)

    @property
    def is_ragged(self) -> bool:
        """Whether modules may end at ranks of their own."""
        return self.ragged or self.allocate == "global" or self.target in _KOHYA

    @property
    def needs_spectra(self) -> bool:
        """Whether singular values of the whole adapter must be known before anything is written."""
        return not self.as_stored and (self.target not in ("rank", "ratio") or self.is_ragged)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def tails(spectra: Sequence[Spectrum]) -> np.ndarray[Any, Any]:
    """‖ΔW − rank-k part‖_F of the whole adapter for k = 0, 1, …: one uniform rank for all."""
    width = max((len(spectrum.values) for spectrum in spectra), default=0)
    squares = np.zeros(width + 1)
    for spectrum in spectra:
        squares[: len(spectrum.values)] += spectrum.values**2
        squares[width] += spectrum.rest**2
    return np.sqrt(np.cumsum(squares[::-1])[::-1])


def lossless(spectra: Sequence[Spectrum]) -> int:
    """The smallest uniform rank that cuts off nothing but rounding noise."""
    return max((1, *(spectrum.rank for spectrum in spectra)))


def smallest(tail: np.ndarray[Any, Any], limit: float) -> int:
    """The smallest k >= 1 with tail[k] <= limit, the largest k there is if none has."""
    within = tail <= limit * (1 + 1e-12)
    return max(1, int(np.argmax(within))) if within.any() else len(tail) - 1


def for_energy(tail: np.ndarray[Any, Any], energy: float, whole: float) -> int:
    """The smallest k that keeps this share of `whole`²: the error it means is √(1 − energy)."""
    return smallest(tail, math.sqrt(max(1.0 - energy, 0.0)) * whole)


def by_kohya(values: np.ndarray[Any, Any], chosen: Ranks) -> int:
    """The rank that sd-scripts' dynamic rule gives a module with these singular values, at least 1.

    Raises ValueError where no rule was chosen.
    """
    if not len(values) or values[0] == 0.0:
        return 1
    if chosen.sv_ratio is not None:
        found = int((values > values[0] / chosen.sv_ratio).sum())
    elif chosen.sv_fro is not None:
        found = _reaches(values**2, chosen.sv_fro**2)
    elif chosen.sv_cumulative is not None:
        found = _reaches(values, chosen.sv_cumulative)
    else:
        raise ValueError("no rule was chosen")
    return max(1, min(found, len(values)))


def _reaches(values: np.ndarray[Any, Any], share: float) -> int:
    """How many of the first values make up this share of their sum."""
    sums = np.cumsum(values)
    return int(np.searchsorted(sums / sums[-1], share)) + 1
