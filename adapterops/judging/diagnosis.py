"""What happened to a tensor that was merged wrong, in one sentence.

Each suspicion comes from inner products (`evidence`) and is then tried: the ladder is climbed again
with the change altered accordingly. A cause is certain where that explains the tensor as a right
merge is explained, likely where it explains nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from adapterops.casts import format_name
from adapterops.judging import alterations as altered
from adapterops.judging.evidence import Evidence, gather
from adapterops.judging.ladder import FAITHFUL
from adapterops.judging.measure import Alter, Array, Pair, Sums, measure
from adapterops.judging.route import SUM, Route
from adapterops.judging.scales import Named, named_factors
from adapterops.judging.trend import CERTAIN, SLOPE
from adapterops.judging.verdict import Cause, Judged, judge_sums, slope_error
from adapterops.rounding.exact import narrowed

_ENOUGH = 4  # codes that a right merge moves before a row counts as left out
_CLOSE = 0.1  # how far a coefficient may be from 0 or 1 to be taken for it
_ALIKE = 0.7  # the cosine from which a low-rank change counts as a form of the right one
_NAMED = 0.03  # how far a factor may be from the name that is tried for it
_LIKELY = 0.2  # share of what was unexplained that a likely cause may leave
_STEPS = 4
_FEW = 1e-3
_FAR = 0.3  # of the weights' norm: no adapter changes so much at no low rank


def diagnose(pair: Pair, found: Judged, names: Sequence[str] = ()) -> Cause:
    """The cause of a failed verdict; `names` are the adapters', in order."""
    if found.nonfinite:
        what = f"{found.nonfinite} of its values are NaN or infinite, where the base's are not"
        return Cause("non-finite", what, certain=True)
    few = found.unexplained[FAITHFUL - 1]
    if 0 < few <= _FEW * found.elements and not found.overflow and abs(found.z) < CERTAIN:
        what = f"{few} of {found.elements} elements are off by more than any rounding"
        return Cause("few", f"{what}, the others are right", certain=True)
    evidence = gather(pair)
    if evidence.saturated or found.overflow:
        what = f"{found.overflow} values of base + change are beyond {format_name(found.grid)}"
        kept = f"; {evidence.saturated} were clipped to its largest" if evidence.saturated else ""
        return Cause("overflow", what + kept, certain=True)
    if not evidence.moved[0].sum():
        return _not_applied(found, evidence)
    for cause in _suspects(pair, evidence, found, names):
        if cause is not None:
            return cause
    return _leftover(found, evidence)


def _not_applied(found: Judged, evidence: Evidence) -> Cause:
    if found.outside:
        what = f"{found.outside} elements that no adapter changes differ from the base"
        return Cause("untargeted", what, certain=True)
    expected = int(evidence.expected[0].sum())
    what = f"the base's values, to the last bit: a right merge moves {expected} of "
    return Cause("not-applied", f"not applied: it holds {what}{found.elements}", certain=True)


def _suspects(
    pair: Pair, evidence: Evidence, found: Judged, names: Sequence[str]
) -> Iterator[Cause | None]:
    """Causes that stand their trial, the simplest first."""
    yield _part(pair, evidence, found, axis=0)
    yield _part(pair, evidence, found, axis=1)
    yield _inputs(pair, evidence, found, names)
    yield _scaled(pair, evidence, found)
    yield _turned(pair, evidence, found)
    yield _ranks(pair, evidence, found)
    if found.outside:
        what = f"{found.outside} elements that no adapter changes differ from the base"
        yield Cause("untargeted", what, certain=True)


def _try(pair: Pair, found: Judged, alter: Alter) -> tuple[bool | None, Sums]:
    """Whether an altered change explains the tensor: True, False if nearly all, None if not."""
    sums = measure(pair, SUM, alter)
    error = slope_error(pair, sums, SUM, alter)
    if judge_sums(pair, sums, SUM, error) != "failed":
        return True, sums
    before, left = found.unexplained[FAITHFUL - 1], sums.unexplained[FAITHFUL - 1]
    fewer = left <= _LIKELY * before if before else abs(sums.trend.slope) < abs(found.slope) / 5
    return (False if fewer and abs(sums.trend.slope) < 100 * SLOPE else None), sums


def _part(pair: Pair, evidence: Evidence, found: Judged, axis: int) -> Cause | None:
    """Rows or columns that stayed as they were although a right merge moves them."""
    moved, expected = evidence.moved[axis], evidence.expected[axis]
    missing = (moved == 0) & (expected >= _ENOUGH)
    if not missing.any():
        return None
    # Rows where a right merge moves nothing belong to neither side.
    sure, _ = _try(pair, found, altered.without_lines(missing, axis))
    if sure is None:
        return None
    word = ("rows", "columns")[axis]
    where = _ranges(np.flatnonzero(missing))
    what = f"partial: {word} {where} of {len(missing)} were left as they were"
    return Cause("partial-" + word, what, certain=sure)


def _inputs(pair: Pair, evidence: Evidence, found: Judged, names: Sequence[str]) -> Cause | None:
    """One adapter of several that is missing, or has another weight."""
    mine = found.inputs
    factors = evidence.inputs[list(mine)]
    if len(mine) < 2 or not np.isfinite(factors).all() or np.ptp(factors) < _CLOSE:
        return None
    near = np.abs(factors - factors.round()) < _CLOSE
    present = (factors > 0.3 * factors.max()).astype(float)  # a small change is swallowed in part
    for tried in (np.where(near, factors.round(), factors), present):
        sure, _ = _try(pair, found, altered.weighted(dict(zip(mine, tried, strict=True))))
        if sure is not None:
            break
    else:
        return None
    said = []
    for index, factor in zip(mine, tried, strict=True):
        name = names[index] if index < len(names) else f"adapter {index + 1}"
        if factor == 0:
            said.append(f"{name} was not added")
        elif factor != 1:
            said.append(f"{name} was added {factor:.4g} times as strong")
    kind = "missing-adapter" if (tried == 0).any() else "wrong-weight"
    return Cause(kind, f"of {len(mine)} adapters " + ", ".join(said), certain=sure)


def _scaled(pair: Pair, evidence: Evidence, found: Judged) -> Cause | None:
    """One factor on all of the change, by its name if it has one."""
    first = response(evidence)
    if first is None or abs(first) < 1e-3:
        return None
    if 1.2 < first < 2.5 and _twice(pair, found):
        return Cause("twice", "merged twice: the change was added to weights that held it", True, 2)
    near = [n for n in named_factors(pair.target) if abs(first / n.factor - 1) < _NAMED]
    for name in sorted(near, key=lambda n: abs(first / n.factor - 1)):
        sure, _ = _try(pair, found, altered.scaled(name.factor))
        if sure is not None:
            return _scale_cause(name.factor, name, sure)
    factor, sure = _refined(pair, found, first)
    return None if sure is None else _scale_cause(factor, None, sure)


def _twice(pair: Pair, found: Judged) -> bool:
    """Whether W' is W + D, rounded, + D, rounded."""
    for delta in ("", *sorted(found.narrow)):
        route = Route(each=True, delta=delta, times=2)
        sums = measure(pair, route)
        if judge_sums(pair, sums, route, slope_error(pair, sums, route)) != "failed":
            return True
    return False


def _refined(pair: Pair, found: Judged, factor: float) -> tuple[float, bool | None]:
    """The factor at which what is left no longer follows the change, by secants."""
    sure: bool | None = None
    last: tuple[float, float] | None = None
    for _ in range(_STEPS):
        sure, sums = _try(pair, found, altered.scaled(factor))
        if sure:
            break
        slope = sums.trend.slope * factor  # D was altered by `factor`
        rate = 1.0
        if last is not None and last[0] != factor and last[1] != slope:
            rate = min(max((last[1] - slope) / (factor - last[0]), 0.05), 20.0)
        last, factor = (factor, slope), factor + slope / rate
    return factor, sure


def _scale_cause(factor: float, name: Named | None, sure: bool) -> Cause:
    kind = name.kind if name else "wrong-scale"
    size = f"{abs(factor):.4g} times as strong as it should be"
    if factor < 0:
        size = "subtracted" if factor == -1 else f"subtracted, {size}"
    if kind == "sign":
        return Cause(kind, "sign: the change was subtracted, not added", sure, factor)
    why = f" ({name.text})" if name else ""
    return Cause(kind, f"wrong scale: the change is {size}{why}", sure, factor)


def response(evidence: Evidence) -> float | None:
    """The factor s for which RN(W + sD) − W has R's part along D, by bisection on the sample.

    That part never falls as s grows, for each element's does not. None where no factor up to 2¹²
    has it.
    """
    W, R, D, dtype = evidence.sample
    norm = float((D * D).sum())
    if not norm:
        return None
    wanted = float((R * D).sum()) / norm

    def part(factor: float) -> float:
        moved = narrowed(W + factor * D, dtype).double().nan_to_num_() - W
        return float((moved * D).sum()) / norm

    sign = math.copysign(1.0, wanted)
    low, high = 2.0**-12, 2.0**12
    if abs(wanted) < 1e-6 or sign * part(sign * high) < sign * wanted:
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        if sign * part(sign * middle) < sign * wanted:
            low = middle
        else:
            high = middle
        if high / low < 1 + 1e-7:
            break
    return sign * math.sqrt(low * high)


def _turned(pair: Pair, evidence: Evidence, found: Judged) -> Cause | None:
    """Dᵀ in place of D, of a square matrix."""
    if abs(evidence.turned) < _CLOSE:
        return None
    sure, _ = _try(pair, found, altered.transposed())
    if sure is None:
        return None
    return Cause("transposed", "transposed: the change was added as its transpose", sure)


def _ranks(pair: Pair, evidence: Evidence, found: Judged) -> Cause | None:
    """Some of the directions of the factors only."""
    factors: Array = evidence.directions
    if len(factors) < 2 or not np.isfinite(factors).all():
        return None
    kept = factors > 0.5
    if kept.all() or not kept.any():
        return None
    sure, _ = _try(pair, found, altered.directions(kept))
    if sure is None:
        return None
    what = f"partial: {kept.sum()} of the change's {len(kept)} directions were added"
    return Cause("partial-rank", f"{what} ({_ranges(np.flatnonzero(kept))})", sure)


def _leftover(found: Judged, evidence: Evidence) -> Cause:
    """What the adapter given does not explain."""
    part = response(evidence) or 0.0
    size = evidence.norm / evidence.change if evidence.change else math.inf
    rank = "" if evidence.rank is None else f"of rank about {evidence.rank}, "
    far = f"one {rank}{size:.3g} times the norm of the right one"
    if evidence.rank is None and evidence.norm > _FAR * evidence.base:
        ratio = evidence.norm / evidence.base if evidence.base else math.inf
        what = f"another base: it differs from this one by {ratio:.2g} of the weights' norm"
        return Cause("another-base", what)
    if abs(part) < _CLOSE:
        return Cause("another-adapter", f"another change: {far}, and none of the right one's")
    if abs(part - 1) < _CLOSE and evidence.rank is not None:
        what = "the change is there, and more that no adapter given explains"
        return Cause("more", f"{what}: altogether {far}")
    if evidence.rank is not None and abs(part) < _ALIKE * size:
        what = f"another change: {far}, at a cosine of {part / size:.2g} to it"
        return Cause("another-adapter", what)
    share = found.unexplained[FAITHFUL - 1] / max(found.elements, 1)
    what = f"{share:.2%} of the elements are off by more than any rounding"
    return Cause("unexplained", f"no one cause: {what}, along the change {part:.3g} of it")


def _ranges(indices: Array) -> str:
    """Indices as ranges, the first three of them."""
    if not len(indices):
        return "none"
    cuts = np.flatnonzero(np.diff(indices) > 1) + 1
    runs = [
        f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in np.split(indices, cuts)
    ]
    return ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
