"""What two adapters are to each other, in plain words: the first of these rules that holds.

Equality is judged by what rounding the factors once to their storage type does to ΔW, root mean
square, with 2⁻²¹ of its norm for arithmetic in float32 (`difference.rounding`; of both adapters, in
squares): a difference up to three times that is one the files cannot tell from none. This must hold
in each module by itself. Where it allows more than a quarter of the norm, the factors are stored
too coarsely to be called equal.

    identical      the weights files are equal byte for byte, and so are the scales
    same-factors   all numbers of the factors are equal (types may differ), or equal up to powers of
                   two that the scale makes up for, or each factor to within rounding
    rounded        one adapter's numbers are the other's, each rounded to its narrower type
    same-delta     ‖A − B‖ is within rounding: the same adapter in another gauge
    scaled         ‖B − c·A‖ is within rounding for one c
    scaled-parts   the same with a c for each module (block weights, a part left out)
    zero           one of them changes nothing
    one-run        the row spaces, those of the A factors, overlap (mean cos² of their principal
                   angles at least 0.3 beyond chance, mean of the modules) and the cosine of ΔW is
                   at least 0.3
    shared-start   the same row space, and a smaller cosine: one initialisation (a seed that many
                   use), different training
    alike          other row spaces, cosine at least 0.08 in size: what two runs on one task learn
    unrelated      none of these

Where the thresholds come from: row spaces overlap by 0.97 to 1.00 in fourteen pairs of checkpoints
of three public runs (cosines of 0.58 to 1.00), by 0.61 and 0.62 in two pairs of adapters of one
seed trained on different text (cosines of 0.07), and by 0.03 at most in all other pairs: two owners
on one base, different seeds on one text (cosines of 0.09 and 0.19) or on two (0.04). Others found
cosines of 0.12 for two owners with one seed, of 0.66 for independent runs on one task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapterops.difference.report import (
    DeltaDifference,
    Evidence,
    Extras,
    ModuleDifference,
    Verdict,
)
from adapterops.difference.rounding import CERTAIN

COARSE = 0.25
SHARED = 0.3
ONE_RUN = 0.3
ALIKE = 0.08
_NAMES_SHOWN = 3
_SAME = ("identical", "same-factors", "rounded", "same-delta", "scaled", "scaled-parts")
_HEAD = re.compile(r"(head|classifier|score|pooler|proj_out)(\.|$)")


@dataclass(frozen=True, slots=True)
class Whole:
    """Totals over modules and dense deltas, and what cannot be seen from single modules.

    `identical`: the files' bytes and scales are equal. `dtypes` are the types stored, as users
    write them.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float
    ratio: float | None
    residual: float
    noise: tuple[float, float]
    floor: float
    zero: tuple[bool, bool]
    identical: bool
    dtypes: tuple[str, str]


_Part = ModuleDifference | DeltaDifference


def residual_at(x: _Part, factor: float) -> float:
    """‖B − factor·A‖ of one part: what its own best ratio leaves, and how far that one is off."""
    return math.hypot(x.residual, ((x.ratio or 0.0) - factor) * x.norms[0])


def _limit(x: _Part | Whole, factor: float = 1.0) -> float:
    """The largest ‖B − factor·A‖ that storage and arithmetic may have made of nothing."""
    return CERTAIN * math.hypot(factor * x.noise[0], x.noise[1]) + x.floor * max(1.0, abs(factor))


def judge(
    whole: Whole,
    modules: Mapping[str, ModuleDifference],
    deltas: Mapping[str, DeltaDifference],
    extras: Extras,
) -> Verdict:
    """The verdict on two adapters, with the figures it rests on."""
    found = _relation(whole, list(modules.values()), list(deltas.values()))
    if found.kind in _SAME and extras.disagree:
        return replace(found, text=f"{found.text}, {_heads(extras)}")
    return found


def _relation(
    whole: Whole, modules: list[ModuleDifference], deltas: list[DeltaDifference]
) -> Verdict:
    if whole.identical:
        return Verdict("identical", "identical bytes", {"distance": Evidence(0.0)})
    if all(whole.zero):
        norm = Evidence(max(whole.norms), whole.floor)
        return Verdict("zero", "both are zero: neither changes any weight", {"norm": norm})
    parts: list[_Part] = [*modules, *deltas]
    found = _same_factors(whole, modules, deltas) or _same_delta(whole, parts)
    if found:
        return found
    if any(whole.zero):
        norm = Evidence(min(whole.norms), whole.floor)
        name = "AB"[whole.zero.index(True)]
        return Verdict("zero", f"{name} is zero: it changes no weight", {"norm": norm})
    return _scaled(whole, parts) or _training(whole, modules)


def _same_factors(
    whole: Whole, modules: list[ModuleDifference], deltas: list[DeltaDifference]
) -> Verdict | None:
    """Whether the factors themselves are equal, or would be but for the type they are stored in."""
    relations = {m.factors for m in modules if m.factors != "alone" or max(m.norms) > m.floor}
    if relations <= {"equal", "split"} and not any(d.distance for d in deltas):
        text = "the same factors"
        if "split" in relations:
            text += ", the scale split otherwise between B, A and alpha"
        if whole.dtypes[0] != whole.dtypes[1]:
            text += f", stored as {whole.dtypes[0]} and {whole.dtypes[1]}"
        return Verdict("same-factors", text, {"distance": Evidence(whole.distance)})
    evidence = {"distance": Evidence(whole.distance, _limit(whole))}
    if not all(d.distance <= _limit(d) for d in deltas):
        return None
    for rounded, text in (
        ("rounded-b", f"the same values: B is A rounded to {whole.dtypes[1]}"),
        ("rounded-a", f"the same values: A is B rounded to {whole.dtypes[0]}"),
    ):
        if rounded in relations <= {"equal", rounded}:
            return Verdict("rounded", text, evidence)
    if relations <= {"equal", "rounded-a", "rounded-b", "close"}:
        text = "the same factors to within the rounding of their storage"
        return Verdict("same-factors", text, evidence)
    return None


def _same_delta(whole: Whole, parts: list[_Part]) -> Verdict | None:
    """Whether ΔW is equal as far as the files can tell."""
    limit = _limit(whole)
    if limit > COARSE * min(whole.norms) or any(x.distance > _limit(x) for x in parts):
        return None
    return Verdict(
        "same-delta",
        "the same adapter in another gauge: other factors, the same ΔW to within the rounding of "
        "their storage",
        {"distance": Evidence(whole.distance, limit)},
    )


def _scaled(whole: Whole, parts: list[_Part]) -> Verdict | None:
    """Whether B is A times one number, or part by part a number of its own."""
    factor = whole.ratio or 0.0
    limit = _limit(whole, factor)
    if limit > COARSE * whole.norms[1]:
        return None
    if all(residual_at(x, factor) <= _limit(x, factor) for x in parts):
        return Verdict(
            "scaled",
            f"B is A scaled by {factor:.4g}",
            {"factor": Evidence(factor), "residual": Evidence(whole.residual, limit)},
        )
    if all(x.residual <= _limit(x, x.ratio or 0.0) for x in parts):
        factors = [x.ratio for x in parts if x.ratio is not None]
        low, high = min(factors), max(factors)
        return Verdict(
            "scaled-parts",
            f"B is A, each module scaled by a factor of its own, from {low:.4g} to {high:.4g}",
            {"smallest": Evidence(low), "largest": Evidence(high)},
        )
    return None


def _training(whole: Whole, modules: list[ModuleDifference]) -> Verdict:
    """What is left: how much the two have in common as things that were trained."""
    shares = [m.shared for m in modules if m.shared is not None]
    columns, rows = (
        math.fsum(share[side] for share in shares) / len(shares) if shares else 0.0
        for side in (0, 1)
    )
    related = rows >= SHARED
    evidence = {
        "cosine": Evidence(whole.cosine, ONE_RUN if related else ALIKE),
        "shared_rows": Evidence(rows, SHARED),
        "shared_columns": Evidence(columns),
    }
    if related and whole.cosine >= ONE_RUN:
        return Verdict(
            "one-run",
            "one run at two times, or one continued from the other",
            evidence,
            "which is older the files do not say; training usually makes ‖ΔW‖ grow, and it is "
            f"{whole.norms[0]:.4g} in A, {whole.norms[1]:.4g} in B. A merge that holds much of the "
            "other looks like this too, and so do two runs on the same data, from one seed or "
            "trained until nothing of their starts is left",
        )
    if related:
        return Verdict(
            "shared-start",
            "shared initialisation, different training: the row spaces still agree, ΔW does not",
            evidence,
        )
    if abs(whole.cosine) >= ALIKE:
        return Verdict(
            "alike",
            f"{'alike' if whole.cosine > 0 else 'opposed'}, but not from one start: what runs on "
            "related data have in common",
            evidence,
        )
    return Verdict("unrelated", "unrelated", evidence)


def _heads(extras: Extras) -> str:
    """Which of the tensors that are no deltas set the two apart."""
    said = []
    if extras.differ:
        word = "head" if all(map(_HEAD.search, extras.differ)) else "extras"
        said.append(f"different {word} ({_some(extras.differ)})")
    for names, has in ((extras.only_a, "A"), (extras.only_b, "B")):
        if names:
            said.append(f"only {has} has {_some(names)}")
    return ", ".join(said)


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
