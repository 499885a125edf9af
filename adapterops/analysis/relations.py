"""What two adapters are to each other before a merge, in plain words: the first rule that holds.

    zero          one of them changes nothing
    duplicate     ‖D₁ − D₂‖ is at most a tenth of the larger norm
    scaled        so is ‖c·D₁ − D₂‖ of ‖D₂‖ for one c: the same change, stronger or weaker
    one-run       one start (below), and the cosine of ΔW is at least 0.3
    shared-start  one start, and a smaller cosine: a seed that both used, different training
    alike         another start, cosine at least 0.08
    opposed       cosine at most −0.08
    orthogonal    none of these: the cosine is within ±0.08

One start: the row spaces overlap by 0.3 beyond chance (mean of the modules), or the A factors as
they are stored have a mean cosine of 0.5. Where the thresholds come from is said in
`difference.verdict` and `fleet.relating.related`, whose they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterops.analysis.report import Relation
from adapterops.difference.verdict import ALIKE, ONE_RUN, SHARED
from adapterops.fleet.relating.related import SAME_START

NEAR = 0.1  # of the norm: what a near duplicate may differ by


@dataclass(frozen=True, slots=True)
class Facts:
    """What the relation of two adapters is judged by.

    `distance` is relative to the larger norm, rounding noise up to `floor`; `factor` is the c of
    c·D₁ ≈ D₂, `rows` the overlap of the row spaces beyond chance, `start` the cosine of the A
    factors, None where it is unknown.
    """

    names: tuple[str, str]
    zero: tuple[bool, bool]
    cosine: float
    distance: float
    floor: float
    factor: float
    rows: float
    start: float | None


def relation(facts: Facts) -> tuple[Relation, str]:
    """The relation and a sentence that says what follows for a merge."""
    a, b = facts.names
    if any(facts.zero):
        gone = " and ".join(n for n, zero in zip(facts.names, facts.zero, strict=True) if zero)
        return "zero", f"{gone} changes nothing (ΔW is zero)"
    said = f"cosine {facts.cosine:.2f}"
    if facts.distance <= NEAR:
        apart = f"near duplicates, {100 * facts.distance:.2g} % apart"
        if facts.distance <= facts.floor:
            apart = "the same ΔW up to rounding"
        return "duplicate", f"{apart}: adding them doubles one change, averaging them keeps it"
    if facts.cosine > 0 and math.sqrt(max(1 - facts.cosine**2, 0.0)) <= NEAR:
        return "scaled", f"{b} is nearly {facts.factor:.3g} times {a} ({said})"
    if facts.rows >= SHARED or (facts.start or 0.0) >= SAME_START:
        why = f"the row spaces overlap by {facts.rows:.2f} beyond chance"
        if facts.start is not None:
            why += f", the A factors have a cosine of {facts.start:.2f}"
        if facts.cosine >= ONE_RUN:
            return (
                "one-run",
                f"one run at two times, or one continued from the other: {why}, {said}",
            )
        turn = ", and they work against each other" if facts.cosine <= -ALIKE else ""
        return "shared-start", f"one initialisation (seed), different training: {why}, {said}{turn}"
    if facts.cosine <= -ALIKE:
        return "opposed", f"they work against each other ({said})"
    if facts.cosine >= ALIKE:
        return "alike", f"partly the same change, from different starts ({said})"
    return "orthogonal", f"nearly orthogonal ({said}): a sum keeps each"
