"""Every module its own rank: the target is applied to each by itself."""

from __future__ import annotations

import math

from adapterops import ranks
from adapterops.choosing.known import (
    TRIES,
    Known,
    certain,
    check_reach,
    cut_off,
    requested,
    shown,
    uncut,
    unmet,
)
from adapterops.errors import BudgetError
from adapterops.ranks import Ranks


def ragged(chosen: Ranks, known: Known) -> tuple[int, ...]:
    """The target applied to every module by itself; modules that share tensors share a rank."""
    if chosen.max_error is not None:
        return _ragged_within(chosen, known)
    if chosen.size is not None:
        return _ragged_fitting(chosen, known)
    return _each(chosen, known, chosen.energy)


def _each(chosen: Ranks, known: Known, energy: float | None) -> tuple[int, ...]:
    """Every group's own rank: what the rule asks for, at most what it needs to lose nothing.

    A ceiling caps what is asked for or fits; what a bound needs above it is refused.
    """
    result = [0] * len(known.plan.modules)
    for members in known.plan.groups:
        spectra = [known.spectra[i] for i in members]
        full = max(spectrum.rank for spectrum in spectra)
        rank, top = full, chosen.ceiling or full
        if chosen.target in ("sv_ratio", "sv_fro", "sv_cumulative"):
            rank = min(max(ranks.by_kohya(spectrum.values, chosen) for spectrum in spectra), top)
        elif energy is not None and full:
            tail = ranks.tails(spectra)
            if chosen.energy is not None:
                check_reach(energy, tail, float(tail[0]))
            kept = known.sure_energy(energy) if chosen.energy is not None else energy
            rank = min(ranks.for_energy(tail, kept, float(tail[0])), full)
        elif chosen.rank is not None:
            rank = min(requested(chosen, known.plan), full, top)
        elif chosen.ratio is not None:
            per_rank = sum(sum(known.plan.modules[i].shape) for i in members)
            most = chosen.ratio * known.plan.stored_of(members) / per_rank * (1 + 1e-12)
            rank = min(max(1, int(most)), full, top)
        elif chosen.size is not None:
            rank = min(full, top)
        if rank > top:
            raise BudgetError(
                f"{shown(chosen)} needs rank {rank}, --max-rank is {chosen.ceiling}",
                module=known.plan.modules[members[0]].stem,
                hint="raise --max-rank",
            )
        for i in members:
            result[i] = max(rank, chosen.floor or 0, known.plan.modules[i].least)
    return tuple(result) if any(result) else (1,) * len(result)


def _ragged_within(chosen: Ranks, known: Known) -> tuple[int, ...]:
    """Every module cut within the error by itself, and the whole within it as written."""
    wanted = float(chosen.max_error or 0.0)
    allowed, share = wanted, known.allowed(wanted)
    for _ in range(TRIES):
        found = _each(chosen, known, max(1.0 - allowed**2, 0.0))
        if certain(found, share, known):
            return found
        error = known.error_at(found)
        if error <= share:
            return found
        cut = cut_off(known, found)
        room = share**2 - (error**2 - cut**2)
        if room <= 0:
            break
        allowed = min(allowed * 0.999, math.sqrt(room) / known.whole)
    for full in (_each(chosen, known, 1.0), uncut(chosen, known)):
        error = known.error_at(full)
        if error <= share:
            return full
    raise unmet(wanted, known, error, cut_off(known, full))


def _ragged_fitting(chosen: Ranks, known: Known) -> tuple[int, ...]:
    """Every module at its own rank up to the largest common limit whose file fits."""
    full = _each(chosen, known, None)
    least = chosen.floor or 0
    limits = range(max(least, 1), max(full, default=1) + 1)
    capped = [tuple(max(min(r, limit), least) for r in full) for limit in limits]
    fitting = [each for each in capped if known.bytes_at(each) <= (chosen.size or 0)]
    if not fitting:
        raise BudgetError(
            f"--size {chosen.size}: the smallest adapter of rank {limits[0]} has "
            f"{known.bytes_at(capped[0]):,} bytes",
            hint="let modules go with --allocate global, or choose a narrower --dtype",
        )
    return fitting[-1]
