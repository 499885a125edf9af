"""One rank for all modules: engines and loaders pay for the largest anyway."""

from __future__ import annotations

import math
from collections.abc import Callable

from adapterops import ranks
from adapterops.choosing.known import Known, certain, check_reach, requested, shown, uncut, unmet
from adapterops.errors import BudgetError
from adapterops.ranks import Ranks

_LEAST = 0.98  # of what storing loses at one rank, at another


def uniform(chosen: Ranks, known: Known) -> int:
    """The uniform rank that the target means.

    A ceiling caps what is asked for or fits; what a bound needs above it is refused.
    """
    plan, least = known.plan, chosen.floor or 1
    count = len(plan.modules)
    if chosen.rank is not None:
        asked = min(requested(chosen, plan), chosen.ceiling or math.inf)
        return _below(_legal(max(int(asked), least), known, asked=True), chosen, known)
    if chosen.ratio is not None:
        per_rank = plan.parameters([1] * count)
        most = int(chosen.ratio * plan.stored_parameters / per_rank * (1 + 1e-12))
        return _largest(chosen, known, most, lambda k: k <= most)
    full = max(ranks.lossless(known.spectra), least)
    if chosen.size is not None:
        size = chosen.size
        return _largest(chosen, known, full, lambda k: known.bytes_at([k] * count) <= size)
    tail = ranks.tails(known.spectra)
    rank = full
    if chosen.energy is not None:
        check_reach(chosen.energy, tail, known.whole)
        kept = known.sure_energy(chosen.energy)
        rank = min(ranks.for_energy(tail, kept, known.whole), full)
    elif chosen.max_error is not None and tail[0] > 0:
        rank = _within(chosen.max_error, known, full, max(uncut(chosen, known)))
    return _below(_legal(max(rank, least), known), chosen, known)


def _below(rank: int, chosen: Ranks, known: Known) -> int:
    """The rank, refused where it is above the ceiling."""
    if chosen.ceiling is None or rank <= chosen.ceiling:
        return rank
    message = f"{shown(chosen)} needs rank {rank}, --max-rank is {chosen.ceiling}"
    if known.form is not None and (known.legal(1) or 1) > 1:
        message += f" ({known.form.engine.title} takes no rank between)"
    if known.spectra:
        tail = ranks.tails(known.spectra)
        lost = float(tail[min(chosen.ceiling, len(tail) - 1)]) / (known.whole or 1.0)
        message += f": rank {chosen.ceiling} cuts off {lost:.3g}"
    bound = chosen.energy is not None or chosen.max_error is not None
    raise BudgetError(message, hint="raise --max-rank" + " or allow a larger error" * bound)


def _legal(rank: int, known: Known, *, asked: bool = False) -> int:
    """The smallest legal rank from this one on; raises where there is none."""
    found = known.legal(rank)
    if found is not None:
        return found
    assert known.form is not None
    raise known.form.beyond(rank, asked=asked)


def _largest(chosen: Ranks, known: Known, most: int, fits: Callable[[int], bool]) -> int:
    """The largest legal rank up to the ceiling, and to the first that loses nothing, that fits."""
    limit = min(most, chosen.ceiling or most)
    least = _below(_legal(chosen.floor or 1, known), chosen, known)
    if not fits(least):
        plan = known.plan
        few = [least] * len(plan.modules)
        raise BudgetError(
            f"{shown(chosen)}: the smallest adapter of rank {least} has {plan.parameters(few):,} "
            f"numbers in its factors and {known.bytes_at(few):,} bytes",
            hint="leave modules out with --modules or choose a narrower --dtype"
            + ("" if known.form else ", or let modules go with --allocate global"),
        )
    top = chosen.ceiling or math.inf
    found = {k for k in map(known.legal, range(least, limit + 1)) if k and k <= top}
    steps = sorted({least, *found})
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(steps[middle]) else (low, middle - 1)
    return steps[low]


def _within(max_error: float, known: Known, full: int, most: int) -> int:
    """The smallest rank whose error as written, truncation and storage together, is allowed.

    Truncation alone gives a lower bound. What a trial there loses in storing, which hardly depends
    on the rank, says where to try next. Above `full`, which loses nothing but noise, `most` is
    tried, where columns stay as they are.
    """
    tail, allowed = ranks.tails(known.spectra), known.allowed(max_error)
    count, most = len(known.plan.modules), known.legal(most) or 0
    rank = _legal(min(ranks.smallest(tail, allowed), full), known)
    below, storage = rank, 0.0
    while not certain([rank] * count, allowed, known):
        error = known.error_at([rank] * count)
        if error <= allowed:
            break
        cut = float(tail[min(rank, len(tail) - 1)])
        if rank >= max(full, most):
            raise unmet(max_error, known, error, cut)
        storage = math.sqrt(max(error * error - cut * cut, 0.0))
        room = allowed**2 - storage**2
        likely = ranks.smallest(tail, room**0.5) if room > 0 else full
        below = rank
        rank = most if rank >= full else min(max(rank + 1, likely), full)
        rank = _legal(rank, known)
    for other in reversed(range(below + 1, rank)):  # storing may lose a little less at another rank
        if known.legal(other) != other:
            continue
        cut = float(tail[min(other, len(tail) - 1)])
        if math.hypot(cut, _LEAST * storage) > allowed:
            break
        if known.error_at([other] * count) > allowed:
            break
        rank = other
    return rank
