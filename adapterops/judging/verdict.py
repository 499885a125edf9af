"""Whether one tensor was merged right, and what its number format kept of the change.

Two verdicts that have nothing to do with each other. *Implementation*: a bug of the tool that
merged, proved by a bound that no rounding can break, or by a slope. *Representation*: what the
format swallowed although all was done right. A tensor that a right merge would leave as it was, to
the last bit, is undetermined: nothing tells a merge from none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from adapterops.baking.figures import Drift
from adapterops.baking.report import NOTABLE
from adapterops.judging.ladder import FAITHFUL, RUNGS, TOLERATED, coarseness, holds
from adapterops.judging.measure import (
    Alter,
    Pair,
    Sums,
    energies,
    inputs_of,
    measure,
)
from adapterops.judging.route import SUM, Route
from adapterops.judging.trend import detectable, significant, z_score

Implementation = Literal["ok", "failed", "undetermined"]
Representation = Literal["ok", "lossy"]

# From here on the share of the change that its own inputs see as error is worth a warning: twice
# what a bf16, fp16 or float32 merge of an ordinary adapter (norm above 0.5 % of W's) loses.
LOSSY = {**NOTABLE, "F32": 1e-5}
_RANDOM = (0.5, 1.5)  # elements that are not RN(T), over their mean number if rounded faithfully
GUESSED = (
    "each weight is a neighbour of the right sum: rounded at random or with feedback, "
    "e.g. by bake --round compensated without its adapterops.json"
)


@dataclass(frozen=True, slots=True)
class Cause:
    """What happened to a tensor that was merged wrong, by one word and in a sentence.

    `certain` where it explains the tensor as a right merge is; `factor`, if it is a scale.
    """

    kind: str
    text: str
    certain: bool = False
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of one tensor that the adapters change.

    `dtype` is the stored type of W', `grid` the type whose values it holds. `rung` is the lowest of
    the ladder that explains it, None if none does, and `route` how W' was reached. `unexplained`
    counts elements by rung. `slope` and `z` are those of what is left on D; `detectable` the
    smallest scale error that would have shown, None if none would. `outside` counts elements that
    differ where nothing changes, `nonfinite` those of W' that are NaN or infinite, `overflow` those
    that a right merge cannot hold. `expected` is how many elements a right merge moves. `narrow`
    are the 16-bit types that it may have gone through. `cause` says what happened, of a tensor that
    failed; `changes` are the codes that scale errors change, by size.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: str
    implementation: Implementation
    representation: Representation
    rung: int | None
    route: Route
    unexplained: tuple[int, ...]
    elements: int
    slope: float
    z: float
    detectable: float | None
    outside: int
    nonfinite: int
    overflow: int
    expected: int
    drift: Drift
    inputs: tuple[int, ...] = ()
    narrow: tuple[str, ...] = ()
    cause: Cause | None = None
    changes: Any = None

    @property
    def model(self) -> str:
        """How it was computed, in words; "" where nothing explains it."""
        if self.rung is None:
            return ""
        if self.route.guessed:
            return GUESSED
        cast = "; the base was rounded to the result's type first" if self.route.cast else ""
        return RUNGS[self.rung] + cast


def lowest(sums: Sums, route: Route) -> int | None:
    """The lowest rung that explains all but a millionth of the elements."""
    allowed = TOLERATED * sums.elements
    found = next((k for k, n in enumerate(sums.unexplained) if n <= allowed), None)
    return None if found is None else max(found, route.rung)


def judge(pair: Pair, faithful: int = 0) -> Judged:
    """The verdict on one tensor; a wrong one has no cause yet (`diagnosis.diagnose`).

    `faithful`: provenance says that it was rounded so many times, at random or with feedback. One
    pass over both, and others only where that finds many roundings, or a slope that they may have
    made.
    """
    first = replace(SUM, faithful=faithful)
    sums = measure(pair, first)
    found = _verdict(pair, sums, first)
    if faithful or found.outside or found.nonfinite:
        return found
    if found.rung is None:
        return _either(pair, found)
    if found.implementation != "failed" and not (found.rung == FAITHFUL - 1 and _cast(pair, found)):
        return found
    for route in routes(pair, found, _cast(pair, found)):
        other = _verdict(pair, measure(pair, route), route)
        better = found.implementation == "failed" or (other.rung or 0) < found.rung
        if other.implementation != "failed" and other.rung is not None and better:
            return other
    return found


def _either(pair: Pair, found: Judged) -> Judged:
    """A tensor that no way to compute explains, as a faithful rounding that nothing tells of.

    That leaves RN(T) as often as T is far from it, at random or with feedback alike. A merge that
    was rounded to nearest leaves it more seldom unless its scale is far off, which its slope shows;
    one that was truncated leaves it twice as often.
    """
    route = Route(faithful=1, guessed=True)
    sums = measure(pair, route)
    share = found.unexplained[0] / sums.astray if sums.astray else 0.0
    if not _RANDOM[0] <= share <= _RANDOM[1]:
        return found
    other = _verdict(pair, sums, route)
    return found if other.implementation == "failed" else other


def routes(pair: Pair, found: Judged, cast: bool) -> list[Route]:
    """Ways to the result that a tensor allows, other than W + D rounded once."""
    several = len(inputs_of(pair.target)) > 1
    ways = [
        Route(first, each, delta, product)
        for first in ((False, True) if cast else (False,))
        for each in ((False, True) if several else (False,))
        for delta in ("", *found.narrow)
        for product in ((False, True) if delta else (False,))
    ]
    ways = sorted((way for way in ways if way != SUM), key=lambda way: (way.rung, way.cast))
    return [*ways, Route(each=several, half=True)] if found.grid == "BF16" else ways


def _cast(pair: Pair, found: Judged) -> bool:
    """Whether a tool that works in the result's type rounds W before it adds anything."""
    return not holds(found.grid, pair.target.ref.dtype)


def judge_sums(pair: Pair, sums: Sums, route: Route, slope_error: float) -> Implementation:
    """The implementation's verdict, from sums and the standard error of their slope."""
    if lowest(sums, route) is None or sums.outside or sums.nonfinite or sums.overflow:
        return "failed"
    if significant(sums.trend.slope, slope_error):
        return "failed"
    silent = not sums.expected and not sums.unexplained[0] and sums.drift.delta > 0
    return "undetermined" if silent else "ok"


def slope_error(pair: Pair, sums: Sums, route: Route, alter: Alter | None = None) -> float:
    """The standard error of a tensor's slope; with clusters only where it decides something."""
    trend = sums.trend
    if not significant(trend.slope, trend.error):
        return trend.error
    by_cluster = trend.clustered(*energies(pair, alter))
    return math.hypot(by_cluster, coarseness(lowest(sums, route), tuple(sums.narrow)))


def _verdict(pair: Pair, sums: Sums, route: Route) -> Judged:
    target, trend = pair.target, sums.trend
    error = slope_error(pair, sums, route)
    grid = sums.grid if sums.grid and 2 * sums.coarse > sums.elements else pair.after.dtype
    changes = sums.changes
    smallest = detectable(changes)
    lossy = (sums.drift.subspace_error or 0.0) > LOSSY.get(grid, LOSSY["F32"])
    return Judged(
        name=target.name,
        shape=pair.after.shape,
        dtype=pair.after.dtype,
        grid=grid,
        implementation=judge_sums(pair, sums, route, error),
        representation="lossy" if lossy else "ok",
        rung=lowest(sums, route),
        route=route,
        unexplained=sums.unexplained,
        elements=sums.elements,
        slope=trend.slope,
        z=z_score(trend.slope, error),
        detectable=smallest if smallest is None else max(smallest, 5 * error),
        outside=sums.outside,
        nonfinite=sums.nonfinite,
        overflow=sums.overflow,
        expected=sums.expected,
        drift=sums.drift,
        inputs=tuple(inputs_of(target)),
        narrow=tuple(sorted(sums.narrow)),
        changes=np.asarray(changes),
    )
