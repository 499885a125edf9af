"""What a choice of ranks knows about the output, and what its ways of choosing share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adapterops.casts import FORMATS
from adapterops.certificate import total
from adapterops.errors import BudgetError
from adapterops.linalg import Spectrum
from adapterops.plan import Plan
from adapterops.ranks import Ranks
from adapterops.serving.legal import LegalForm

TRIES = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank for every module of the plan; the gap that an allocation is proved to be within."""

    ranks: tuple[int, ...]
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What a choice may ask about the output.

    `spectra` are the modules' singular values in the metric, `whole` is ‖ΔW‖ of everything in it,
    full deltas included, which no rank cuts. `bytes_at` is the exact size of the weights file,
    `error_at` the error in the metric as written, storage included. `form` is what an engine asks
    of the output, None where any rank will do.
    """

    plan: Plan
    spectra: Sequence[Spectrum]
    whole: float
    bytes_at: Callable[[Sequence[int]], int]
    error_at: Callable[[Sequence[int]], float]
    form: LegalForm | None = None

    def legal(self, rank: int) -> int | None:
        """The smallest rank from this one on that the output may have, None if there is none."""
        return self.form.rank_for(rank) if self.form else rank


def requested(chosen: Ranks, plan: Plan) -> int:
    """The rank that `--rank` names."""
    return plan.input_rank if chosen.rank == "same" else int(chosen.rank or 1)


def shown(chosen: Ranks) -> str:
    """The target as it was given."""
    name = chosen.target
    if name is None:
        return "a lossless result"
    return f"--{name.replace('_', '-')} {getattr(chosen, name):g}"


def unmet(max_error: float, known: Known, error: float, cut: float) -> BudgetError:
    """Why the bound cannot be met at the largest rank there is."""
    plan, whole = known.plan, known.whole
    if cut > max_error * whole:
        return BudgetError(
            f"--max-error {max_error:g} cannot be met: at the largest rank computed "
            f"{cut / whole:.3g} is still cut off",
            hint="raise --max-rank or allow a larger error",
        )
    return BudgetError(
        f"--max-error {max_error:g} cannot be met: storing the result as "
        f"{FORMATS[plan.dtype].name} alone costs {error / whole:.2g}",
        hint="add --dtype float32" if plan.dtype != "F32" else "allow a larger error",
    )


def cut_off(known: Known, chosen: Sequence[int]) -> float:
    """What these ranks cut off, in the metric."""
    lost = [
        math.hypot(float(np.linalg.norm(spectrum.values[rank:])), spectrum.rest)
        for spectrum, rank in zip(known.spectra, chosen, strict=True)
    ]
    return total(lost)
