"""Ranks allocated over all modules together, where they save most error per parameter."""

from __future__ import annotations

import math

import numpy as np

from adapterops import allocate
from adapterops.casts import FORMATS
from adapterops.choosing.known import (
    TRIES,
    Choice,
    Known,
    certain,
    cut_off,
    requested,
    uncut,
)
from adapterops.choosing.uniform import uniform
from adapterops.errors import BudgetError
from adapterops.ranks import Ranks


def allocated(chosen: Ranks, known: Known) -> Choice:
    """Directions spent over all modules where they save most error per parameter."""
    plan = known.plan
    count = len(plan.modules)
    if chosen.rank is not None:
        budget = plan.parameters([requested(chosen, plan)] * count)
        return _spent(chosen, known, budget)
    if chosen.ratio is not None:
        return _spent(chosen, known, int(chosen.ratio * plan.stored_parameters))
    if chosen.size is not None:
        return _spent_bytes(chosen, known, chosen.size)
    if chosen.energy is not None:
        left = max(1.0 - known.sure_energy(chosen.energy), 0.0)
        return _reached(chosen, known, math.sqrt(left) * known.whole)
    wanted = float(chosen.max_error or 0.0)
    allowed = share = known.allowed(wanted)
    for _ in range(TRIES):
        found = _reached(chosen, known, allowed)
        if certain(found.ranks, share, known):
            return found
        error = known.error_at(found.ranks)
        if error <= share:
            return found
        cut = cut_off(known, found.ranks)
        room = share**2 - (error**2 - cut**2)
        if room <= 0:
            break
        allowed = min(allowed * 0.9999, math.sqrt(room))
    whole = uncut(chosen, known)
    if known.error_at(whole) <= share:
        return Choice(whole)
    return Choice((uniform(chosen, known),) * count)  # or raise what cannot be met at any rank


def _blocks(chosen: Ranks, known: Known) -> list[allocate.Block]:
    """One block per group of modules that share a rank; noise is no gain."""
    blocks = []
    for members in known.plan.groups:
        spectra = [known.spectra[i] for i in members]
        width = max((len(spectrum.values) for spectrum in spectra), default=0)
        gains = np.zeros(width)
        for spectrum in spectra:
            seen = np.where(spectrum.values > spectrum.floor, spectrum.values, 0.0)
            gains[: len(seen)] += seen**2
        cost = sum(sum(known.plan.modules[i].shape) for i in members)
        least = max(known.plan.modules[i].least for i in members)
        blocks.append(allocate.Block(cost, gains, max(chosen.floor or 0, least), chosen.ceiling))
    return blocks


def _rest(known: Known) -> float:
    """Energy beyond the directions that were computed."""
    return math.fsum(spectrum.rest**2 for spectrum in known.spectra)


def _spread(known: Known, found: allocate.Allocation) -> Choice:
    result = [0] * len(known.plan.modules)
    for members, rank in zip(known.plan.groups, found.ranks, strict=True):
        for i in members:
            result[i] = rank
    if not any(result) and not known.whole:  # zeros at rank 1 are still an adapter
        return Choice((1,) * len(result), found.gap)
    if not any(result):
        raise BudgetError(
            "no direction fits: every module would end at rank 0",
            hint="allow more, or set --min-rank 1",
        )
    return Choice(tuple(result), found.gap)


def _spent(chosen: Ranks, known: Known, budget: int) -> Choice:
    return _spread(known, allocate.within_budget(_blocks(chosen, known), budget, _rest(known)))


def _reached(chosen: Ranks, known: Known, allowed: float) -> Choice:
    return _spread(known, allocate.within_error(_blocks(chosen, known), allowed, _rest(known)))


def _spent_bytes(chosen: Ranks, known: Known, size: int) -> Choice:
    """A budget of bytes: what names and extras take depends a little on which modules stay."""
    plan = known.plan
    width = FORMATS[plan.dtype].bits // 8
    one = [1] * len(plan.modules)
    overhead = known.bytes_at(one) - width * plan.parameters(one)
    budget = (size - overhead) // width
    best: Choice | None = None
    for _ in range(TRIES):
        if budget <= 0:
            break
        found = _spent(chosen, known, budget)
        used = known.bytes_at(found.ranks)
        if used > size:
            budget = min(budget, plan.parameters(found.ranks)) - -(-(used - size) // width)
            continue
        if best is not None and plan.parameters(found.ranks) <= plan.parameters(best.ranks):
            break
        best = found
        spare = (size - used) // width
        if not spare:
            break
        budget = plan.parameters(found.ranks) + spare
    if best is None:
        raise BudgetError(
            f"--size {size}: names and header alone take about {overhead:,} bytes",
            hint="leave modules out with --modules",
        )
    return best
