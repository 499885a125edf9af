"""How many directions to take per group, exactly: an integer knapsack with concave groups.

A group holds directions of one weight with falling gains, so only the number taken from its front
is open: one integer k_g per group. Let λ be the gain per weight of the first direction that greedy
by gain per weight leaves, k* greedy's counts, and for any counts k

    used  = Σ w_g·(k_g − k*_g)
    value = Σ (gain of the first k_g − gain of the first k*_g)
    loss  = λ·used − value = Σ loss_g(k_g),  each loss_g convex, >= 0, and 0 at k*_g

(λ is a Lagrange multiplier that solves the linear relaxation.) So used <= room implies
value <= λ·room, and value >= need implies used >= need / λ. The deficit of a result is what it
misses its bound by, in gain; its loss is no larger. The search lists all counts of loss <= limit,
for a limit that grows until it reaches the deficit of the best result: then nothing better exists.
A search cut short has still proved that no deficit is smaller than its last limit.

A list is made for each half of the groups, without dominated entries, and the two are joined: the
best mate of an entry is found by bisection. Few entries remain, since losses grow with the square
of the steps from greedy's counts: hundreds for 92,000 directions of 20 odd weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adapterops.frontier import Array, Group, Near, Undominated, halves, scale, undominated

# Entries one search may make: about 0.2 µs each, and some 80 bytes each at the peak.
WORK = 2_000_000
# The first limit as a share of the deficit at hand, and the factor from one limit to the next.
_FIRST = 2.0**-20
_GROWTH = 4.0
# Results are told apart down to this share of the gains they differ by: four float64 ulps.
_ROUNDING = 2.0**-50


class Choice(NamedTuple):
    """Counts per group; `slack`: no choice within the same limit is better by more than this.

    In gain for `most`, in weight for `least`; 0.0 where the search finished.
    """

    counts: list[int]
    slack: float


def most(groups: Sequence[Group], room: int) -> Choice:
    """Counts of the largest total gain with total weight <= room (>= 0); the lightest of equals."""
    groups = [Group(group.weight, group.gains[: room // group.weight]) for group in groups]
    owner, _, density = _greedy(groups)
    weights = np.cumsum(np.array([group.weight for group in groups], dtype=np.int64)[owner])
    taken = int(np.searchsorted(weights, room, side="right"))
    counts = _counts(owner[:taken], groups)
    if taken == len(owner):
        return Choice(counts, 0.0)
    room -= int(weights[taken - 1]) if taken else 0
    rate = float(density[taken])
    near = [Near.of(group, count, rate) for group, count in zip(groups, counts, strict=True)]
    start, spare = [0] * len(near), room
    for i in sorted(range(len(near)), key=lambda i: -near[i].density):
        start[i] = min(spare // near[i].weight, len(near[i].above))
        spare -= start[i] * near[i].weight
    found, proved = _search(near, _Most(rate, room), start)
    return Choice(_moved(counts, found.steps), found.deficit - proved)


def least(groups: Sequence[Group], spare: float) -> Choice:
    """Counts of the least total weight that leave out gains of at most `spare` (>= 0) in sum.

    Of equals, those that leave out the least.
    """
    owner, gains, density = _greedy(groups)
    taken = len(gains) - int(np.searchsorted(np.cumsum(gains[::-1]), spare, side="right"))
    while math.fsum(gains[taken:]) > spare:  # that running sum was rounded
        taken += 1
    while taken and math.fsum(gains[taken - 1 :]) <= spare:
        taken -= 1
    if not taken:
        return Choice([0] * len(groups), 0.0)
    # Greedy takes direction taken − 1 as its last; the counts around which to search are without.
    counts = _counts(owner[: taken - 1], groups)
    need = math.fsum(gains[taken - 1 :]) - spare
    rate = float(density[taken - 1])
    near = [Near.of(group, count, rate) for group, count in zip(groups, counts, strict=True)]
    start = [int(i == owner[taken - 1]) for i in range(len(near))]
    found, proved = _search(near, _Least(rate, need), start)
    slack = 0
    if proved < found.deficit:
        slack = max(found.used - math.ceil((need + proved) / rate * (1 - _ROUNDING)), 0)
    return Choice(_moved(counts, found.steps), float(slack))


def _greedy(groups: Sequence[Group]) -> tuple[Array, Array, Array]:
    """Group, gain, gain per weight of every direction; densest first, earlier groups at ties."""
    gains = np.concatenate([np.zeros(0), *(group.gains for group in groups)])
    density = np.concatenate([np.zeros(0), *(group.gains / group.weight for group in groups)])
    owner = np.repeat(np.arange(len(groups)), [len(group.gains) for group in groups])
    order = np.argsort(-density, kind="stable")
    return owner[order], gains[order], density[order]


def _counts(owner: Array, groups: Sequence[Group]) -> list[int]:
    return [int(count) for count in np.bincount(owner, minlength=len(groups))]


def _moved(counts: Sequence[int], steps: Sequence[int]) -> list[int]:
    return [count + step for count, step in zip(counts, steps, strict=True)]


class _Result(NamedTuple):
    """Steps per group with their sums, and by how much they miss the bound (in gain)."""

    steps: list[int]
    used: int
    value: float
    deficit: float


@dataclass(frozen=True, slots=True)
class _Most:
    """The goal of the most value with used <= room; the relaxation reaches rate·room."""

    rate: float
    room: int

    @property
    def bound(self) -> float:
        return self.rate * self.room

    def deficit(self, used: int, value: float) -> float:
        return self.bound - value

    def merit(self, result: _Result) -> tuple[float, float]:
        return result.value, -result.used

    def join(self, one: Undominated, other: Undominated) -> tuple[int, int] | None:
        """The best pair of entries; None where no pair meets the goal."""
        mate = np.searchsorted(other.used, self.room - one.used, side="right") - 1
        fits = np.flatnonzero(mate >= 0)
        if not len(fits):
            return None
        mate = mate[fits]
        value, used = one.value[fits] + other.value[mate], one.used[fits] + other.used[mate]
        best = int(np.lexsort((used, -value))[0])
        return int(fits[best]), int(mate[best])


@dataclass(frozen=True, slots=True)
class _Least:
    """The goal of the least used with value >= need; the relaxation uses need / rate."""

    rate: float
    need: float

    @property
    def bound(self) -> float:
        return self.need

    def deficit(self, used: int, value: float) -> float:
        return self.rate * used - self.need

    def merit(self, result: _Result) -> tuple[float, float]:
        return -result.used, result.value

    def join(self, one: Undominated, other: Undominated) -> tuple[int, int] | None:
        """The best pair of entries; None where no pair meets the goal."""
        mate = np.searchsorted(other.value, self.need - one.value, side="left")
        fits = np.flatnonzero(mate < len(other.value))
        if not len(fits):
            return None
        lightest = int((one.used[fits] + other.used[mate[fits]]).min())
        return _Most(self.rate, lightest).join(one, other)


def _search(near: Sequence[Near], goal: _Most | _Least, start: list[int]) -> tuple[_Result, float]:
    """The best steps, and the proved least deficit: that of the result where the search finished.

    `start` are steps that meet the goal. The limit never passes the deficit of the best result, so
    the last round of a search that finishes has seen everything that could be better.
    """
    best = _result(near, goal, start)
    limit, proved, rounding = best.deficit * _FIRST, 0.0, _ROUNDING * goal.bound
    work = WORK
    while best.deficit > proved + rounding:
        limit = min(limit, best.deficit)
        reach = [group.reach(limit) for group in near]
        rounding = _ROUNDING * (goal.bound + scale(near, reach))
        split = halves([int(down + up) for down, up in reach])
        lists: list[Undominated] = []
        for half in split:
            made = undominated([near[i] for i in half], goal.rate, limit + rounding, work)
            if made is None:
                return best, max(proved - rounding, 0.0)
            work -= made.made
            lists.append(made)
        pair = goal.join(lists[0], lists[1])
        if pair is not None:
            steps = [0] * len(near)
            for half, entries, entry in zip(split, lists, pair, strict=True):
                for i, step in zip(half, entries.steps(entry), strict=True):
                    steps[i] = step
            best = max(best, _result(near, goal, steps), key=goal.merit)
        proved = limit
        limit *= _GROWTH
    return best, best.deficit


def _result(near: Sequence[Near], goal: _Most | _Least, steps: list[int]) -> _Result:
    used = sum(group.weight * step for group, step in zip(near, steps, strict=True))
    value = math.fsum(group.value(step) for group, step in zip(near, steps, strict=True))
    return _Result(steps, used, value, goal.deficit(used, value))
