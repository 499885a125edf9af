"""The cover of a candidate graph: greedy's bound, ties, continuation, budgets, what others give."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.errors import BudgetError
from adapterops.fleet.grouping.cover import Group, for_budget, greedy_cover
from adapterops.fleet.grouping.graph import Candidates, graph
from adapterops.fleet.grouping.outlook import GRID, pareto


def made(count: int, edges: dict[tuple[int, int], float]) -> Candidates:
    """A graph of {(centre, member): distance}."""
    pairs = np.array(list(edges), np.int64).reshape(-1, 2)
    return graph(count, pairs[:, 0], pairs[:, 1], np.array(list(edges.values()), np.float32))


def drawn(seed: int, count: int, share: float) -> Candidates:
    rng = np.random.default_rng(seed)
    chosen = np.argwhere(rng.random((count, count)) < share)
    return made(count, {(int(j), int(i)): float(rng.random()) for j, i in chosen})


def naive(found: Candidates) -> int:
    """How many plain greedy keeps, everything recounted at every step, ties to the smaller."""
    left, total = set(range(found.count)), 0
    while left:
        gains = [len(left & set(found.row(j)[0].tolist())) for j in range(found.count)]
        best = gains.index(max(gains))
        left -= set(found.row(best)[0].tolist())
        total += 1
    return total


def optimum(found: Candidates) -> int:
    rows = [sum(1 << int(i) for i in found.row(j)[0]) for j in range(found.count)]
    everyone = (1 << found.count) - 1
    for size in range(1, found.count + 1):
        for some in itertools.combinations(range(found.count), size):
            covered = 0
            for j in some:
                covered |= rows[j]
            if covered == everyone:
                return size
    return 0


def check(found: Candidates, groups: list[Group], wanted: set[int]) -> None:
    """Everyone is served once, over an edge, and by the nearest centre there is."""
    centers = [group.center for group in groups]
    served = [int(i) for group in groups for i in group.members]
    assert sorted(served) == sorted(wanted) and centers == sorted(centers)
    for group in groups:
        row = dict(zip(*(part.tolist() for part in found.row(group.center)), strict=True))
        for member, distance in zip(group.members.tolist(), group.distances, strict=True):
            assert row[member] == distance
            options = [
                (0.0 if j == member else float(found.row(j)[1][found.row(j)[0] == member][0]), j)
                for j in centers
                if member in found.row(j)[0]
            ]
            assert group.center == (member if member in centers else min(options)[1])


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.15, 0.3, 0.6, 1.0]),
)
def test_never_more_than_greedys_bound(seed: int, count: int, share: float) -> None:
    found = drawn(seed, count, share)
    groups = greedy_cover(found)
    check(found, groups, set(range(count)))
    largest = int(np.diff(found.starts).max())
    harmonic = sum(1 / n for n in range(1, largest + 1))
    assert optimum(found) <= len(groups) <= harmonic * optimum(found) + 1e-9
    assert len(groups) <= naive(found)


def test_equal_gains_go_to_the_smaller_tenant() -> None:
    pairs = {(j, i): 0.1 for j in range(6) for i in range(6) if (j < 3) == (i < 3)}
    assert [group.center for group in greedy_cover(made(6, pairs))] == [0, 3]
    one = made(3, {(0, 2): 0.1, (1, 2): 0.1})
    assert [(g.center, g.members.tolist()) for g in greedy_cover(one)] == [(0, [0, 2]), (1, [1])]


def test_members_go_to_the_nearest_centre() -> None:
    found = made(6, {(0, 1): 0.3, (0, 2): 0.3, (5, 2): 0.1, (5, 3): 0.1, (5, 4): 0.1, (0, 4): 0.2})
    groups = {group.center: group.members.tolist() for group in greedy_cover(found)}
    assert groups == {0: [0, 1], 5: [2, 3, 4, 5]}


def test_a_centre_serves_itself_even_where_another_is_as_near() -> None:
    found = made(6, {(0, 1): 0.0, (0, 4): 0.1, (0, 5): 0.1, (1, 2): 0.1, (1, 3): 0.1})
    groups = {group.center: group.members.tolist() for group in greedy_cover(found)}
    assert groups == {0: [0, 4, 5], 1: [1, 2, 3]}


def test_a_centre_that_others_make_needless_is_dropped() -> None:
    # Greedy takes 6 (four of them), then 7 and 8 for the rest, which leave nothing to 6.
    rows = {6: [1, 2, 3, 4], 7: [0, 1, 2, 6], 8: [3, 4, 5, 6]}
    edges = {(j, i): 0.1 for j, members in rows.items() for i in members}
    groups = greedy_cover(made(9, edges))
    assert {group.center for group in groups} == {7, 8}


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 12), share=st.sampled_from([0.2, 0.5]))
def test_a_cover_goes_on_after_edges_are_struck_out(seed: int, count: int, share: float) -> None:
    found = drawn(seed, count, share)
    groups = greedy_cover(found)
    rng = np.random.default_rng(seed)
    used = [(g.center, int(i)) for g in groups for i in g.members if i != g.center]
    failed = [pair for pair in used if rng.random() < 0.5]
    todo = np.zeros(count, bool)
    todo[[member for _, member in failed]] = True
    left = found.without(failed)
    chosen = [group.center for group in groups]
    more = greedy_cover(left, todo=todo, chosen=chosen)
    served = {int(i): group.center for group in more for i in group.members}
    assert set(np.flatnonzero(todo)) <= set(served)
    assert set(served) - set(np.flatnonzero(todo)) <= {g.center for g in more} - set(chosen)
    for member, center in served.items():
        assert member in left.row(center)[0] and (center, member) not in failed
        assert center in chosen or center == served[center]
    assert [g.center for g in greedy_cover(left, todo=np.zeros(count, bool), chosen=chosen)] == []


def test_graphs_lose_edges_and_never_their_own() -> None:
    found = made(4, {(0, 1): 0.1, (0, 2): 0.3, (1, 0): 0.15, (3, 2): 0.4, (2, 2): 9.0})
    assert found.row(2)[1].tolist() == [0.0]

    def edges(some: Candidates) -> set[tuple[int, int]]:
        pairs = zip(some.centers().tolist(), some.members.tolist(), strict=True)
        return {(j, i) for j, i in pairs if j != i}

    assert edges(found.within(0.2)) == {(0, 1), (1, 0)}
    assert edges(found.within(np.array([0.0, 1.0, 0.35, 1.0]))) == {(0, 1), (0, 2)}
    assert edges(found.without([(0, 1), (0, 3), (0, 1)])) == {(0, 2), (1, 0), (3, 2)}
    assert edges(found.without([])) == edges(found)
    assert edges(found.permitted(lambda j, i: (i != 2) & (j != 1))) == {(0, 1)}
    for some in (found.within(-1.0), found.permitted(lambda _, i: np.zeros(len(i), bool))):
        assert edges(some) == set() and some.members.tolist() == [0, 1, 2, 3]
        assert some.starts.tolist() == [0, 1, 2, 3, 4]


def test_nobody() -> None:
    empty = made(0, {})
    assert empty.count == 0 and greedy_cover(empty) == []


@pytest.mark.parametrize("adapters", [4, 5, 9, 20])
def test_a_budget_takes_the_least_bound_that_fits(adapters: int) -> None:
    graphs = [drawn(1, 12, 0.6), drawn(2, 8, 0.6)]
    found = for_budget(graphs, adapters)
    assert found.adapters <= adapters
    for one, groups in zip(graphs, found.groups, strict=True):
        check(one.within(found.max_error), groups, set(range(one.count)))
    radii = np.unique(np.concatenate([one.distances for one in graphs]))
    below = radii[radii < np.float32(found.max_error)]
    if len(below):
        fewer = sum(len(greedy_cover(one.within(float(below[-1])))) for one in graphs)
        assert fewer > adapters


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match=r"6 tenants cannot be served by 1 .* 2 are left"):
        for_budget([made(3, {(0, 1): 0.1, (0, 2): 0.5}), made(3, {(1, 0): 0.2, (1, 2): 0.9})], 1)


def test_what_other_bounds_would_give() -> None:
    norms = np.array([1.0, 1.0, 2.0, 0.5])
    found = made(4, {(0, 1): 0.3, (1, 0): 0.3, (2, 3): 3.0, (0, 2): 0.75, (0, 3): 0.0625})
    points = pareto([found], [norms], grid=(0.05, 0.2, 0.5, 0.8), alone=2)
    assert [point.adapters for point in points] == [6, 5, 4, 3]
    assert [point.largest for point in points] == pytest.approx([0.0, 0.0625, 0.3, 0.75])
    assert [point.mean for point in points] == pytest.approx(
        [0.0, 0.0625 / 4, 0.3625 / 4, 1.1125 / 4]
    )
    # Of 0 for 1, as long: g = (1 + 1 − 0.3²)/2. Of 0 for 3, twice as long, more than 0.0625 off:
    # such an estimate leaves nothing foreign.
    g = (1 + 1 - 0.09) / 2
    assert points[2].foreign == pytest.approx(math.sqrt(0.09 - (1 - g) ** 2) / 4, rel=1e-6)
    assert len(pareto([], [], alone=3)) == len(GRID) and pareto([], [], alone=3)[0].adapters == 3
