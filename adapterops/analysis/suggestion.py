"""A command to begin with, and why. Conservative: `linear`, whose result is known exactly.

No method is known to be better than the others on tasks that were not its own (arXiv 2511.21437,
2602.12323), so none is called so; others are named with what they are for, to be tried on held-out
data.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterops.analysis.report import (
    AnalyzedInput,
    Needed,
    PairAnalysis,
    Suggestion,
)
from adapterops.certificate import RankHint
from adapterops.difference.verdict import ALIKE

DOMINANT = 0.8  # of Σ|w|‖D‖
_MORE = 0.02  # beyond the half that chance gives: what counts as conflict of signs
_FAITHFUL = 0.01


@dataclass(frozen=True, slots=True)
class Found:
    """What a suggestion rests on; `paths` are None where an adapter has none."""

    inputs: Sequence[AnalyzedInput]
    pairs: Sequence[PairAnalysis]
    hints: Sequence[RankHint]
    needed: Sequence[Needed]
    lossless: int
    cancels: bool
    paths: Sequence[str] | None
    options: Mapping[str, Any]


def suggest(found: Found) -> Suggestion:
    """The command, its reasons, and further commands for what the figures show."""
    reasons = [
        "linear is the plain weighted sum: exact, and what the published comparisons of language "
        "models support most; no method is known to do better in general"
    ]
    weights = [one.weight for one in found.inputs]
    live = [one for one in found.inputs if not one.zero and one.weight]
    others: list[tuple[str, str]] = []
    rank = _rank(found, reasons)
    if found.options.get("extras"):
        reasons.append(
            "heads, biases or token rows differ: --extras first takes the first adapter's; average "
            "and drop are the others"
        )
    if found.cancels:
        reasons.append("with these weights the adapters cancel: the sum is zero up to rounding")
    if zeros := [one.name for one in found.inputs if one.zero]:
        reasons.append(f"{', '.join(zeros)} changes nothing and may be left out")
    _duplicates(found, weights, reasons, others)
    _dominance(found, live, reasons, others)
    _conflicts(found, reasons, others)
    return Suggestion(_command(found, weights, rank=rank), tuple(reasons), tuple(others))


def _rank(found: Found, reasons: list[str]) -> int | None:
    """The smallest standard rank within 1 %, None where nothing should be cut."""
    fits = [hint for hint in found.hints if hint.error <= _FAITHFUL]
    if fits:
        reasons.append(
            f"rank {fits[0].rank} keeps the sum to {_percent(fits[0].error)}; nothing is lost at "
            f"rank {found.lossless}"
        )
        return fits[0].rank
    if found.needed:
        wants = ", ".join(f"{one.rank} for {100 * one.within:g} %" for one in found.needed)
        reasons.append(
            f"no standard rank below {found.lossless} keeps the sum to 1 %, so nothing is cut "
            f"(needed: {wants})"
        )
    return None


def _duplicates(
    found: Found, weights: Sequence[float], reasons: list[str], others: list[tuple[str, str]]
) -> None:
    near = [pair for pair in found.pairs if pair.relation == "duplicate"]
    if not near:
        return
    names = ", ".join(
        f"{found.inputs[p.first].name} and {found.inputs[p.second].name}" for p in near[:3]
    )
    whole = math.fsum(weights)
    reasons.append(f"near duplicates ({names}): average them, their sum doubles one change")
    if whole > 0 and abs(whole - 1) > 1e-9:
        command = _command(found, weights, "--normalize")
        if command:
            others.append(("to average", command))


def _dominance(
    found: Found,
    live: Sequence[AnalyzedInput],
    reasons: list[str],
    others: list[tuple[str, str]],
) -> None:
    big = next((one for one in live if (one.share or 0.0) > DOMINANT), None)
    if big is None or len(live) < 2:
        return
    given = "/".join(f"{one.weight:.3g}" for one in found.inputs)
    real = "/".join("–" if one.share is None else f"{one.share:.2f}" for one in found.inputs)
    reasons.append(f"{big.name} dominates: {given} is really {real} of Σ|w|‖ΔW‖")
    # Σ|w| as before, |w|‖D‖ equal.
    inverse = {id(one): 1 / one.norm for one in live}
    scale = math.fsum(abs(one.weight) for one in live) / math.fsum(inverse.values())
    equal = [
        math.copysign(scale * inverse[id(one)], one.weight) if id(one) in inverse else one.weight
        for one in found.inputs
    ]
    command = _command(found, equal)
    if command:
        others.append(("if all are to count alike", command))
    sized = _command(found, equal, "--match-norm", "mean")
    if sized:
        others.append(("the same, at the mean norm of the adapters", sized))


def _conflicts(found: Found, reasons: list[str], others: list[tuple[str, str]]) -> None:
    """What the cosines and signs say of interference between adapters that count."""

    def sign(pair: PairAnalysis) -> float:
        return math.copysign(
            1.0, found.inputs[pair.first].weight * found.inputs[pair.second].weight
        )

    counted = [
        pair
        for pair in found.pairs
        if pair.relation != "zero"
        and found.inputs[pair.first].weight
        and found.inputs[pair.second].weight
    ]
    if not counted:
        return
    lowest = min(counted, key=lambda pair: sign(pair) * pair.cosine)
    two = f"{found.inputs[lowest.first].name} and {found.inputs[lowest.second].name}"
    cosine = sign(lowest) * lowest.cosine
    signs = max(
        (
            (pair.conflict.count, pair.conflict.count_error)
            for pair in counted
            if pair.conflict is not None
        ),
        default=(0.0, 0.0),
    )
    opposed = cosine <= -ALIKE
    clash = signs[0] > 0.5 + _MORE + 4 * signs[1]
    if opposed:
        reasons.append(
            f"{two} conflict: weighted so, their cosine is {cosine:.2f}, and either takes away a "
            "part of the other"
        )
    if clash:
        reasons.append(f"signs differ in {_percent(signs[0])} of the entries; chance gives 50 %")
    if opposed or clash:
        command = _command(found, [one.weight for one in found.inputs], *_TIES)
        if command:
            others.append(("elects a sign per entry; compare on held-out data", command))
    elif all(abs(pair.cosine) < ALIKE for pair in counted):
        reasons.append(
            "the adapters are nearly orthogonal: the sum keeps each at about its weight, "
            "interference in the weights is small"
        )


_TIES = ("-m", "ties", "--space", "knots")


def _command(
    found: Found, weights: Sequence[float], *options: str, rank: int | None = None
) -> str | None:
    if found.paths is None:
        return None
    words = ["adapterops", "merge", *found.paths, "-w", ",".join(f"{w:.6g}" for w in weights)]
    words += options
    if rank is not None:
        words += ["--rank", str(rank)]
    modules, alpha = found.options.get("modules"), found.options.get("alpha")
    if modules:
        words += ["--modules", modules]
    if isinstance(alpha, Mapping):
        for path, value in alpha.items():
            words += ["--alpha", f"{path}={value:g}"]
    elif alpha is not None:
        words += ["--alpha", f"{alpha:g}"]
    if found.options.get("extras"):
        words += ["--extras", "first"]
    if found.options.get("allow_pickle"):
        words += ["--allow-pickle"]
    return shlex.join(words)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
