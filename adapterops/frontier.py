"""Counts around greedy's: their losses, and the lists of those that no other makes superfluous.

For `knapsack`, where step, weight, gain, value, used and loss are defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Directions of one weight (integer >= 1); gains: float64, falling, each > 0 per weight."""

    weight: int
    gains: Array


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """A group seen from greedy's count k*: step s takes k* + s directions.

    `values[k* + s]` is the value of step s; `below[i]` and `above[i]` are the losses of the steps
    −1 − i and 1 + i, rising with i; `density` is the gain per weight of the direction after k*.
    """

    weight: int
    values: Array
    below: Array
    above: Array
    density: float

    @classmethod
    def of(cls, group: Group, count: int, rate: float) -> Near:
        """The group around `count`, at λ = `rate`. Sums start there: next to it they are exact."""
        price = rate * group.weight
        up, down = np.cumsum(group.gains[count:]), np.cumsum(group.gains[:count][::-1])
        above = price * np.arange(1, len(up) + 1) - up
        below = down - price * np.arange(1, len(down) + 1)
        return cls(
            weight=group.weight,
            values=np.concatenate([-down[::-1], [0.0], up]),
            below=np.maximum.accumulate(np.maximum(below, 0.0)),  # rounding may break the order
            above=np.maximum.accumulate(np.maximum(above, 0.0)),
            density=float(up[0]) / group.weight if len(up) else 0.0,
        )

    def value(self, step: Any) -> Any:
        """The value of a step, or of an array of them."""
        return self.values[len(self.below) + step]

    def reach(self, limit: Any) -> tuple[Any, Any]:
        """The most steps down and up whose loss is <= limit (a number or an array of them)."""
        return (
            np.searchsorted(self.below, limit, side="right"),
            np.searchsorted(self.above, limit, side="right"),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Undominated:
    """Steps of some groups, one entry each, by rising `used` (int64) and strictly rising `value`.

    `trail` has for each group in turn every entry's parent and step; `made` counts the entries
    made on the way.
    """

    used: Array
    value: Array
    trail: list[tuple[Array, Array]]
    made: int

    def steps(self, entry: int) -> list[int]:
        """The steps of one entry, in the order of the groups."""
        steps = []
        for parent, step in reversed(self.trail):
            steps.append(int(step[entry]))
            entry = int(parent[entry])
        return steps[::-1]


def undominated(groups: Sequence[Near], rate: float, limit: float, work: int) -> Undominated | None:
    """All steps of loss <= limit but those that use no less than others and have no more value.

    The groups are taken one at a time (Nemhauser and Ullmann 1969). Of equals the first stays.
    None where it takes more than `work` entries.
    """
    used, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[Array, Array]] = []
    made = 0
    for group in groups:
        down, up = group.reach(limit - (rate * used - value))
        width = down + up + 1
        made += int(width.sum())
        if made > work:
            return None
        parent = np.repeat(np.arange(len(used)), width)
        step = np.arange(len(parent)) - np.repeat(np.cumsum(width) - width + down, width)
        used = used[parent] + group.weight * step
        value = value[parent] + group.value(step)
        order = np.argsort(used, kind="stable")
        order = order[_records(value[order])]
        order = order[np.append(np.diff(used[order]) > 0, True)]  # the last of one weight is best
        used, value = used[order], value[order]
        trail.append((parent[order].astype(np.int32), step[order].astype(np.int32)))
    return Undominated(used, value, trail, made)


def _records(value: Array) -> Array:
    """Which values are larger than all before them."""
    return np.append(True, value[1:] > np.maximum.accumulate(value)[:-1])


def scale(groups: Sequence[Near], reach: Sequence[tuple[Any, Any]]) -> float:
    """The largest sum of gains that lists of this reach compare."""
    return sum(
        float(max(-group.value(-down), group.value(up)))
        for group, (down, up) in zip(groups, reach, strict=True)
    )


def halves(widths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices in two halves of about equally many combinations, the narrowest first.

    `widths`: how many steps besides 0 each group has.
    """
    split: tuple[list[int], list[int]] = ([], [])
    size = [0.0, 0.0]
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        smaller = int(size[1] < size[0])
        split[smaller].insert(0, i)
        size[smaller] += math.log(1 + widths[i])
    return split
