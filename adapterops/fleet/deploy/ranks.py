"""Proposals to lower the fleet's maximum rank: who holds it up, and what they would lose, exactly.

Slots are paid for at the largest rank, and kernels run over it, so a few adapters make all others
dear. The error of a cut is the tail of the singular values (Eckart & Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from adapterops import passes
from adapterops.align import align
from adapterops.fleet.deploy.memory import Held, Shapes, needed
from adapterops.fleet.deploy.report import Deployed, Proposal
from adapterops.formats.model import AdapterFile
from adapterops.ranks import tails
from adapterops.serving.model import Engine
from adapterops.stream import Compute

_USUAL = (8, 16, 32, 64, 128, 256, 512)
_FEW = 8  # adapters, or a tenth of the fleet: beyond, it is no exception that holds the rank up


def lower(engine: Engine, rank: int) -> list[int]:
    """Legal ranks below what `rank` is paid for, descending."""
    now = engine.slot_rank(rank) or rank
    legal = {engine.legal_rank(each) for each in (engine.ranks or engine.slots or _USUAL)}
    return sorted((r for r in legal if r is not None and r < now), reverse=True)


def candidates(
    engine: Engine, adapters: Sequence[Deployed]
) -> list[tuple[int, tuple[Deployed, ...]]]:
    """(rank, adapters above it) for every lower rank that only few adapters forbid."""
    largest = max((item.rank for item in adapters), default=0)
    found = []
    for rank in lower(engine, largest):
        above = tuple(item for item in adapters if item.rank > rank)
        if len(above) == len(adapters) or len(above) > max(_FEW, len(adapters) // 10):
            break
        found.append((rank, above))
    return found


def tail(file: AdapterFile, on: Compute) -> list[float]:
    """‖ΔW − its best rank-k part‖/‖ΔW‖ of the whole adapter for k = 0, 1, …"""
    try:
        values = tails(passes.spectra(align((file,), (1.0,)), file.rank, on, None))
    finally:
        for source in file.sources:
            source.close()
    return [float(value / values[0]) if values[0] else 0.0 for value in values]


def propose(
    engine: Engine,
    adapters: Sequence[Deployed],
    held: Sequence[Held],
    shapes: Shapes,
    slots: int,
    tail_of: Callable[[str], Sequence[float]],
    errors: Mapping[str, float],
    limit: float | None,
) -> tuple[Proposal, ...]:
    """Proposals for lower ranks, the next one first.

    `held` are the adapters as memory sees them, in the same order. `tail_of(id)` gives an adapter's
    truncation errors by rank. `errors` are tenants' now, which `limit` bounds, None for no bound.
    """
    offers = candidates(engine, adapters)
    wanted = dict.fromkeys(item.id for _, above in offers for item in above)
    known = {each: tail_of(each) for each in wanted}
    largest = max((item.rank for item in adapters), default=0)
    now = needed(engine, held, shapes, slots)
    proposals = []

    def over(item: Deployed, rank: int) -> list[str]:
        """‖C′ − D‖ ≤ ‖C − D‖ + ‖C′ − C‖, and ‖C‖ ≤ ‖D‖ + ‖C − D‖."""
        cut, most = _at(known[item.id], rank), math.inf if limit is None else limit
        return [x for x in item.members if errors[x] + cut * (1 + errors[x]) > most]

    for rank, above in offers:
        cut = [replace(item, rank=min(item.rank, rank)) for item in held]
        then = needed(engine, cut, shapes, slots)
        proposals.append(
            Proposal(
                rank,
                engine.slot_rank(largest) or largest,
                {item.name or item.id: _at(known[item.id], rank) for item in above},
                sum(len(item.members) for item in above),
                None if now is None or then is None else now - then,
                tuple(sorted(name for item in above for name in over(item, rank))),
            )
        )
    return tuple(proposals)


def _at(tail: Sequence[float], rank: int) -> float:
    return tail[rank] if rank < len(tail) else 0.0
