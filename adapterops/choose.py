"""The output's uniform rank, from what the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapterops import ranks
from adapterops.casts import FORMATS
from adapterops.certificate import Figures, total
from adapterops.errors import BudgetError, UsageError
from adapterops.linalg import Spectrum
from adapterops.plan import Plan
from adapterops.ranks import Ranks


def check_size(plan: Plan, chosen: Ranks) -> None:
    """Refuse a lossless result that would be larger than the dense deltas.

    It concerns sums whose rank outgrows every input's, and kinds whose factors are larger than
    what they were made from; a single plain LoRA is never refused.
    """
    plain = all(part.site.kind == "lora" for module in plan.modules for part in module.parts)
    if chosen != Ranks() or not plan.modules or (plain and plan.bound <= plan.input_rank):
        return
    if plan.parameters(plan.bound) >= plan.dense:
        raise UsageError(
            f"without a rank the result may need rank {plan.bound} and "
            f"{plan.parameters(plan.bound):,} numbers, the dense weight changes themselves have "
            f"{plan.dense:,}",
            hint="choose --rank N, --rank same or --energy E",
        )


def choose_rank(
    plan: Plan,
    chosen: Ranks,
    spectra: Sequence[Spectrum],
    whole: float,
    bytes_at: Callable[[int], int],
    figures_at: Callable[[int], list[Figures]],
) -> int:
    """The rank that `chosen` means for this plan.

    `whole` is ‖ΔW‖_F of everything, full deltas included, which no rank cuts. `bytes_at` is the
    exact size of the weights file at a rank, `figures_at` what storing every module at a rank would
    lose. Raises BudgetError where no rank will do.
    """
    if not plan.modules:
        return 0
    if chosen.rank is not None:
        return plan.input_rank if chosen.rank == "same" else int(chosen.rank)
    tail, full = ranks.tails(spectra), ranks.lossless(spectra)
    if chosen.energy is not None:
        return min(ranks.for_energy(tail, chosen.energy, whole), full)
    if chosen.size is not None:
        return _largest_fitting(chosen.size, full, bytes_at)
    if chosen.max_error is not None and tail[0] > 0:
        return _within(plan, spectra, chosen.max_error * whole, chosen.max_error, figures_at)
    return full


def _largest_fitting(size: int, full: int, bytes_at: Callable[[int], int]) -> int:
    """The largest useful rank whose file has at most `size` bytes."""
    smallest = bytes_at(1)
    if smallest > size:
        raise BudgetError(
            f"--size {size}: the smallest adapter of rank 1 has {smallest} bytes",
            hint="leave modules out with --modules, or choose a narrower --dtype",
        )
    low, high = 1, full
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_at(middle) <= size else (low, middle - 1)
    return low


def _within(
    plan: Plan,
    spectra: Sequence[Spectrum],
    allowed: float,
    max_error: float,
    figures_at: Callable[[int], list[Figures]],
) -> int:
    """The smallest rank whose error as written, truncation and storage together, is allowed.

    Truncation alone gives a lower bound; from there each rank is tried as it would be written.
    """
    tail, full = ranks.tails(spectra), ranks.lossless(spectra)
    rank = min(ranks.smallest(tail, allowed), full)
    while True:
        figures = figures_at(rank)
        if total([figure.total for figure in figures]) <= allowed:
            return rank
        storage = total([figure.storage for figure in figures])
        if rank == full:
            raise BudgetError(
                f"--max-error {max_error:g} cannot be met: storing the result as "
                f"{FORMATS[plan.dtype].name} alone costs {storage / allowed * max_error:.2g}",
                hint="add --dtype float32" if plan.dtype != "F32" else "allow a larger error",
            )
        room = allowed**2 - storage**2
        # At full rank columns are only scaled by powers of two, which may cost nothing at all.
        likely = ranks.smallest(tail, room**0.5) if room > 0 else full
        rank = min(max(rank + 1, likely), full)
