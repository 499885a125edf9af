"""The least bound for a number of adapters: found, and with how few verifications."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops.errors import BudgetError
from adapterops.fleet.consent.policy import NEAR_EXACT, Consent
from adapterops.fleet.grouping.budget import least_bound
from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.graph import Candidates, graph
from adapterops.fleet.grouping.groups import Group, Grouped
from adapterops.fleet.grouping.partition import Partition
from adapterops.fleet.grouping.sets import Sets, set_of
from adapterops.fleet.types import Record, Tenant


def planned(count: int, seed: int, noise: float = 0.03) -> tuple[Sets, Candidates, Candidates]:
    """Points in a plane as tenants, the true graph of their distances and one of estimates."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, 2))
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    j, i = np.nonzero((apart > 0) & (apart < 0.6))
    seen = apart[j, i] * (1 + noise * rng.standard_normal(len(j)))
    near = seen <= 0.55
    records = tuple(
        Record(
            Tenant(f"t{n:03}", "", f"t{n:03}"), "", "ok", "", f"c{n}", "", "", "peft", "F16", 1, 1,
            (1, 1), 1.0, 0, n,
        )
        for n in range(count)
    )  # fmt: skip
    each = set_of(Partition(records, ("",) * 6, ""), Consent("all"))
    return each, graph(count, j, i, apart[j, i]), graph(count, j[near], i[near], seen[near])


class Verifying:
    """Groups of the true graph among the edges that are promised; every bound is remembered."""

    def __init__(self, true: Candidates) -> None:
        self.true = {
            (int(j), int(i)): float(d)
            for j, i, d in zip(true.centers(), true.members, true.distances, strict=True)
        }
        self.bounds: list[float] = []

    def __call__(self, each: Sets, promised: Candidates, bound: float) -> Grouped:
        self.bounds.append(bound)
        pairs = zip(promised.centers().tolist(), promised.members.tolist(), strict=True)
        kept = promised.kept(np.array([self.true[pair] <= bound for pair in pairs]))
        groups = tuple(Group(one.center) for one in greedy_cover(kept))
        return Grouped(groups, 0, {})


@pytest.mark.parametrize("adapters", [3, 8, 20, 60, 90])
def test_the_least_bound_in_few_verifications(adapters: int) -> None:
    each, true, seen = planned(90, 1)
    grouped = Verifying(true)
    bound, [found] = least_bound([each], [seen], adapters, 0, grouped)
    assert len(found.groups) <= adapters
    assert len(grouped.bounds) <= 12 and max(grouped.bounds) < max(1.3 * bound, 0.01)
    if adapters == 90:
        assert bound == NEAR_EXACT and grouped.bounds == [NEAR_EXACT]
    else:
        again = Verifying(true)
        assert len(again(each, seen, 0.997 * bound).groups) > adapters


def test_a_bound_a_little_above_that_of_duplicates() -> None:
    """The step down ends at the bound of duplicates, which does not suffice."""
    each, _, _ = planned(4, 5)
    two = graph(4, np.array([0, 0]), np.array([1, 2]), np.array([1.02e-3, 1.01e-3]))
    seen = graph(4, np.array([0, 0]), np.array([1, 2]), np.array([1.04e-3, 1.03e-3]))
    bound = least_bound([each], [seen], 2, 0, Verifying(two))[0]
    assert bound == pytest.approx(1.02e-3, rel=2e-3)


def test_adapters_besides_count_and_none_is_least() -> None:
    each, true, seen = planned(40, 2)
    assert least_bound([], [], 7, 7, Verifying(true)) == (NEAR_EXACT, [])
    narrow = least_bound([each], [seen], 10, 0, Verifying(true))[0]
    assert least_bound([each], [seen], 16, 6, Verifying(true))[0] == narrow


def test_too_few() -> None:
    each, true, seen = planned(40, 3)
    with pytest.raises(BudgetError, match=r"--max-adapters 5: 6 are the fewest"):
        least_bound([each], [seen], 5, 5, Verifying(true))
    lonely = graph(40, *np.zeros((2, 0), np.int64), np.zeros(0))
    with pytest.raises(BudgetError, match=r"40 are needed even where .* off by 0.5") as caught:
        least_bound([each], [lonely], 5, 0, Verifying(true))
    assert caught.value.hint == "give --max-adapters 40 or more"


def test_estimates_that_promise_too_much_lead_to_the_bound_all_the_same() -> None:
    each, true, seen = planned(60, 4)
    halved = Candidates(seen.starts, seen.members, seen.distances * np.float32(0.6))
    grouped = Verifying(true)
    bound = least_bound([each], [halved], 12, 0, grouped)[0]
    assert bound == pytest.approx(least_bound([each], [seen], 12, 0, Verifying(true))[0], rel=3e-3)
    assert len(grouped.bounds) <= 16
