"""Global rank allocation: how many directions each module keeps when parameters are what counts.

A block is a module with cost c = m + n parameters per direction and squared singular values
g_1 >= g_2 >= … (gains). Keeping k directions costs c·k and leaves Σ_{j>k} g_j of the squared error.
The best counts are an integer knapsack: greedy in g/c is best for what it uses, not for what was
allowed (costs 3 and 2, gains (3.1) and (2, 2), budget 4: greedy takes 3.1, the best is 4). Blocks
of equal cost share one list of directions by falling gain, so one count per distinct cost is open,
and `knapsack` finds those exactly. Of equal gains the earlier block's comes first.

Floors and ceilings bound the count of a block. A floor above its number of directions holds: the
module is written with zeros at that rank and pays for them. Directions of zero gain are never taken
above the floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.errors import BudgetError, NumericsError, UsageError
from adapterops.frontier import Group
from adapterops.knapsack import least, most

# Squares of an allowed error and sums of gains agree to a few ulps: 1e-14 of the error.
_ROUNDING = 2.0**-46


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A module: parameters per direction, gains (float64, falling, >= 0), and bounds on the count.

    Without a ceiling all directions may be taken.
    """

    cost: int
    gains: np.ndarray[Any, Any]
    floor: int = 0
    ceiling: int | None = None

    def __post_init__(self) -> None:
        if self.cost < 1:
            raise UsageError(f"a direction costs {self.cost} parameters; expected 1 or more")
        if self.floor < 0:
            raise UsageError(f"a lowest rank of {self.floor}; expected 0 or more")
        if self.ceiling is not None and self.ceiling < self.floor:
            raise UsageError(
                f"a lowest rank of {self.floor} above the highest rank of {self.ceiling}"
            )
        if not np.isfinite(self.gains).all():
            raise NumericsError("a squared singular value is NaN or infinite")
        if (self.gains < 0).any() or (np.diff(self.gains) > 0).any():
            raise UsageError("squared singular values must be >= 0 and fall")

    @property
    def top(self) -> int:
        """The largest count that can save error."""
        return len(self.gains) if self.ceiling is None else min(self.ceiling, len(self.gains))

    @property
    def open(self) -> np.ndarray[Any, Any]:
        """The gains that may be taken or not: between floor and ceiling, none of them zero."""
        gains = self.gains[self.floor : self.top]
        return gains[gains / self.cost > 0]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The directions each block keeps, in the order of the blocks.

    `error`: √ of the squares left out and `rest`. `bound`: proved of every choice that obeys the
    floors and ceilings: its error with at most the budget's parameters (`within_budget`), or its
    parameters with at most the allowed error (`within_error`), is no smaller. `gap`: by what share
    of itself the result misses that bound; 0.0: no choice is better. In `within_budget` then no
    choice with at most `parameters` has a smaller error.
    """

    ranks: tuple[int, ...]
    parameters: int
    error: float
    bound: float
    gap: float


def within_budget(blocks: Sequence[Block], budget: int, rest: float = 0.0) -> Allocation:
    """The least error with at most `budget` parameters; of equals the fewest parameters.

    `rest`: squared error that no direction listed wins back. BudgetError where the floors alone
    need more than the budget.
    """
    fixed = sum(block.floor * block.cost for block in blocks)
    if budget < fixed:
        raise BudgetError(
            f"at most {budget} parameters were asked for, the lowest ranks take {fixed}",
            hint=f"allow {fixed} parameters or more, or lower the lowest ranks",
        )
    pool = _Pool.of(blocks)
    choice = most(pool.groups, (min(budget, fixed + pool.parameters) - fixed) // pool.unit)
    ranks = pool.ranks(blocks, choice.counts)
    left = _left(blocks, ranks, rest)
    error = math.sqrt(left)
    bound = error
    if choice.slack:
        bound = math.sqrt(max(left - choice.slack, _reachable(blocks, rest)))
    return Allocation(
        ranks=ranks,
        parameters=_parameters(blocks, ranks),
        error=error,
        bound=bound,
        gap=(error - bound) / error if bound < error else 0.0,
    )


def within_error(blocks: Sequence[Block], allowed: float, rest: float = 0.0) -> Allocation:
    """The fewest parameters with error <= allowed (to 1e-14 of it); of equals the least error.

    `rest`: squared error that no direction listed wins back. BudgetError where even all directions
    within the ceilings leave more than allowed.
    """
    if not allowed >= 0:
        raise UsageError(f"an allowed error of {allowed}; expected a number from 0 on")
    reachable = _reachable(blocks, rest)
    limit = allowed**2 * (1 + _ROUNDING)
    if reachable > limit:
        smallest = math.sqrt(reachable) * (1 + 5e-6)  # printed digits must not round it down
        raise BudgetError(
            f"an error of at most {allowed:.6g} was asked for, keeping all that may be kept leaves"
            f" {math.sqrt(reachable):.6g}",
            hint=f"allow an error of {smallest:.6g} or more, or raise the highest ranks",
        )
    pool = _Pool.of(blocks)
    choice = least(pool.groups, limit - reachable)
    ranks = pool.ranks(blocks, choice.counts)
    parameters = _parameters(blocks, ranks)
    bound = parameters - pool.unit * round(choice.slack)
    return Allocation(
        ranks=ranks,
        parameters=parameters,
        error=math.sqrt(_left(blocks, ranks, rest)),
        bound=float(bound),
        gap=(parameters - bound) / parameters if bound < parameters else 0.0,
    )


def _left(blocks: Sequence[Block], ranks: Sequence[int], rest: float) -> float:
    """The squared error at these ranks, correctly rounded."""
    tails = [block.gains[rank:] for block, rank in zip(blocks, ranks, strict=True)]
    return math.fsum(np.concatenate([[rest], *tails]))


def _reachable(blocks: Sequence[Block], rest: float) -> float:
    """The squared error with all that the ceilings allow."""
    return _left(blocks, [block.top for block in blocks], rest)


def _parameters(blocks: Sequence[Block], ranks: Sequence[int]) -> int:
    return sum(block.cost * rank for block, rank in zip(blocks, ranks, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Open directions by distinct cost: `owners[i][j]` is the block of direction j of group i.

    Weights are costs in `unit`s, their greatest common divisor; `parameters`: cost of all of them.
    """

    groups: list[Group]
    owners: list[np.ndarray[Any, Any]]
    unit: int
    parameters: int

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> _Pool:
        """Blocks are concatenated in order and sorted stably: ties go to the earlier block."""
        members: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            if len(block.open):
                members.setdefault(block.cost, []).append(index)
        unit = math.gcd(*members) or 1
        groups, owners = [], []
        for cost, indices in sorted(members.items()):
            gains = np.concatenate([blocks[index].open for index in indices])
            order = np.argsort(-gains, kind="stable")
            owner = np.repeat(indices, [len(blocks[index].open) for index in indices])
            groups.append(Group(cost // unit, gains[order]))
            owners.append(owner[order])
        parameters = sum(group.weight * unit * len(group.gains) for group in groups)
        return cls(groups, owners, unit, parameters)

    def ranks(self, blocks: Sequence[Block], counts: Sequence[int]) -> tuple[int, ...]:
        """Directions per block, floors included, when each group takes its first `counts`."""
        taken = [owner[:count] for owner, count in zip(self.owners, counts, strict=True)]
        extra = np.bincount(
            np.concatenate([np.zeros(0, dtype=np.intp), *taken]), minlength=len(blocks)
        )
        return tuple(block.floor + int(count) for block, count in zip(blocks, extra, strict=True))
