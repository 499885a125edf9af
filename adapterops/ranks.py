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


@dataclass(frozen=True, slots=True)
class Ranks:
    """How the rank is chosen: at most one of the four; none of them means nothing is cut.

    `energy` is the share of Σσ² to keep, `max_error` the total relative error as written, `size`
    bytes of the weights file.
    """

    rank: int | Literal["same"] | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("rank", "energy", "max_error", "size")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both choose the rank; give one of them")
        if self.rank not in (None, "same") and not (
            isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        ):
            raise UsageError(f"--rank {self.rank}: expected a whole number from 1 on, or same")
        for name, value in (("energy", self.energy), ("max-error", self.max_error)):
            if value is not None and not 0.0 < value <= 1.0:
                raise UsageError(f"--{name} {value}: expected a number above 0, at most 1")
        if self.size is not None and self.size <= 0:
            raise UsageError(f"--size {self.size}: expected a number of bytes above 0")

    @property
    def needs_spectra(self) -> bool:
        """Whether singular values of the whole adapter must be known before anything is written."""
        return self.rank is None


def tails(spectra: Sequence[Spectrum]) -> np.ndarray[Any, Any]:
    """‖ΔW − rank-k part‖_F of the whole adapter for k = 0, 1, …: one uniform rank for all."""
    width = max((len(spectrum.values) for spectrum in spectra), default=0)
    squares = np.zeros(width + 1)
    for spectrum in spectra:
        squares[: len(spectrum.values)] += spectrum.values**2
    return np.sqrt(np.cumsum(squares[::-1])[::-1])


def lossless(spectra: Sequence[Spectrum]) -> int:
    """The smallest uniform rank that cuts off nothing but rounding noise."""
    return max((1, *(spectrum.rank for spectrum in spectra)))


def smallest(tail: np.ndarray[Any, Any], limit: float) -> int:
    """The smallest k >= 1 with tail[k] <= limit."""
    return max(1, int(np.argmax(tail <= limit * (1 + 1e-12))))


def for_energy(tail: np.ndarray[Any, Any], energy: float, whole: float) -> int:
    """The smallest k that keeps this share of `whole`²: the error it means is √(1 − energy)."""
    return smallest(tail, math.sqrt(max(1.0 - energy, 0.0)) * whole)
