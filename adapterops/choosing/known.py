"""What a choice of ranks knows about the output, and what its ways of choosing share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterops.casts import FORMATS
from adapterops.certificate import total
from adapterops.errors import BudgetError
from adapterops.linalg import Spectrum
from adapterops.plan import Plan
from adapterops.ranks import Ranks

if TYPE_CHECKING:
    from adapterops.serving.legal import LegalForm

TRIES = 20
_NEARLY = 5e-4


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
    of the output, None where any rank will do. `bounded`: what storing loses is bounded by
    `storage_bound`, as it is for balanced factors with nothing beside them. `exact`: truncation
    loses no more than the spectra say.
    """

    plan: Plan
    spectra: Sequence[Spectrum]
    whole: float
    bytes_at: Callable[[Sequence[int]], int]
    error_at: Callable[[Sequence[int]], float]
    form: LegalForm | None = None
    bounded: bool = False
    exact: bool = True

    def allowed(self, max_error: float) -> float:
        """The error that a bound means, in the metric; a figure equal to it is within."""
        return max_error * self.whole * (1 + 1e-12)

    def sure_energy(self, energy: float) -> float:
        """The energy to keep by the spectra so that it is kept by what is written.

        The factors of what is not in factors lose up to a few parts in 10⁴ more than the best.
        """
        return energy if self.exact else 1.0 - (1.0 - energy) * (1.0 - _NEARLY) ** 2

    def legal(self, rank: int) -> int | None:
        """The smallest rank from this one on that the output may have, None if there is none."""
        return self.form.rank_for(rank) if self.form else rank


def requested(chosen: Ranks, plan: Plan) -> int:
    """The rank that `--rank` names."""
    return plan.input_rank if chosen.rank == "same" else int(chosen.rank or 1)


def uncut(chosen: Ranks, known: Known) -> tuple[int, ...]:
    """The ranks at which nothing is cut, within floor and ceiling.

    Columns are only scaled by powers of two then, which may cost nothing at all, also where their
    numerical rank is lower. What goes through the range finder has none to keep.
    """
    plan = known.plan
    result = [0] * len(plan.modules)
    for members in plan.groups:
        full = max(plan.modules[i].bound if known.exact else known.spectra[i].rank for i in members)
        for i in members:
            result[i] = max(min(full, chosen.ceiling or full), chosen.floor or 0)
    return tuple(result)


def shown(chosen: Ranks) -> str:
    """The target as it was given."""
    name = chosen.target
    if name is None:
        return "a lossless result"
    value = getattr(chosen, name)
    return (
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, float)
        else (f"--{name.replace('_', '-')} {value}")
    )


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


def check_reach(energy: float, tail: np.ndarray[Any, Any], whole: float) -> None:
    """Raise BudgetError where the directions that were computed do not hold this energy."""
    left = float(tail[-1])
    if left > math.sqrt(max(1.0 - energy, 0.0)) * whole * (1 + 1e-12):
        raise BudgetError(
            f"--energy {energy:g} cannot be met: the {len(tail) - 1} directions computed hold "
            f"{1 - (left / whole) ** 2:.4g}",
            hint="raise --max-rank or ask for less",
        )


def certain(chosen: Sequence[int], allowed: float, known: Known) -> bool:
    """Whether these ranks are within the error for sure, without a trial.

    What is cut off and the most that storing can lose add up to no more than is allowed.
    """
    if not known.bounded:
        return False
    return cut_off(known, chosen) + storage_bound(chosen, known) <= allowed


def storage_bound(chosen: Sequence[int], known: Known) -> float:
    """The most that rounding balanced factors B·A to the output's type can change them by.

    Rounding is off by u|x|, or by half the smallest subnormal t; columns have ‖b_j‖ = ‖a_j‖ within
    a factor of two, s_j = ‖b_j‖‖a_j‖ is at most σ_j, or β in all where no direction is cut.
    """
    form = FORMATS[known.plan.dtype]
    u, t = 2.0 ** -(form.mantissa + 1), form.smallest_normal * 2.0 ** -(form.mantissa + 1)
    losses = []
    for spectrum, rank, module in zip(known.spectra, chosen, known.plan.modules, strict=True):
        kept = spectrum.values[:rank]
        size = max(float(kept.sum()), spectrum.beta if rank >= spectrum.columns else 0.0)
        size /= module.weight
        sides = t * (math.sqrt(module.shape[0]) + math.sqrt(module.shape[1]))
        tiny = sides * (2 * math.sqrt(size * rank) + rank * sides)
        losses.append(module.weight * ((2 * u + u * u) * size + tiny))
    return total(losses)
