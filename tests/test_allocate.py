"""Global rank allocation: against every choice, against a dense programme, and its own bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops import knapsack
from adapterops.allocate import Allocation, Block, within_budget, within_error
from adapterops.errors import BudgetError, NumericsError, UsageError

EXACT = 1e-12  # of the whole energy: what float64 sums of a few dozen gains may differ by


def block(cost, *gains, floor=0, ceiling=None):
    return Block(cost, np.array(gains, dtype=np.float64), floor, ceiling)


def random_blocks(rng, most_blocks=5, most_directions=4, costs=(2, 3, 5, 7, 11, 12)):
    """Mixed costs, floors, ceilings, empty blocks, zero gains; every other case has tied gains."""
    blocks = []
    whole = rng.random() < 0.5
    for _ in range(rng.integers(1, most_blocks + 1)):
        length = rng.integers(0, most_directions + 1)
        gains = rng.integers(0, 6, length) * 1.0 if whole else rng.exponential(1.0, length)
        gains[rng.random(length) < 0.1] = 0.0
        floor = int(rng.integers(0, 6)) if rng.random() < 0.3 else 0
        ceiling = floor + int(rng.integers(0, 4)) if rng.random() < 0.3 else None
        blocks.append(
            block(int(rng.choice(costs)), *-np.sort(-gains), floor=floor, ceiling=ceiling)
        )
    return blocks


def counts_of(one):
    """Every count the rules allow: from the floor to the ceiling or the number of directions."""
    last = len(one.gains) if one.ceiling is None else min(one.ceiling, len(one.gains))
    return range(one.floor, max(one.floor, last) + 1)


def every_choice(blocks, rest=0.0):
    """(parameters, squared error) of every allowed choice."""
    parameters, squares = np.zeros(1, dtype=np.int64), np.full(1, rest)
    for one in blocks:
        counts = counts_of(one)
        parameters = np.add.outer(parameters, [one.cost * k for k in counts]).ravel()
        squares = np.add.outer(squares, [math.fsum(one.gains[k:]) for k in counts]).ravel()
    return parameters, squares


def check_valid(blocks, found: Allocation, rest=0.0):
    """What the result says of itself is so, and the rules are kept."""
    assert all(k in counts_of(one) for one, k in zip(blocks, found.ranks, strict=True))
    assert found.parameters == sum(one.cost * k for one, k in zip(blocks, found.ranks, strict=True))
    tails = [one.gains[k:] for one, k in zip(blocks, found.ranks, strict=True)]
    assert found.error == math.sqrt(math.fsum([rest, *np.concatenate([[0.0], *tails])]))
    for one, k in zip(blocks, found.ranks, strict=True):
        assert k == one.floor or one.gains[k - 1] > 0
    assert 0.0 <= found.gap <= 1.0


def greedy(blocks, budget):
    """Squared error of the plain greedy by gain per parameter that stops at the first misfit."""
    items = sorted(
        (
            (-gain / one.cost, i, j)
            for i, one in enumerate(blocks)
            for j, gain in enumerate(one.gains)
        )
    )
    left = math.fsum(gain for one in blocks for gain in one.gains)
    for _, i, j in items:
        if blocks[i].cost > budget:
            break
        budget -= blocks[i].cost
        left -= blocks[i].gains[j]
    return left


@pytest.mark.parametrize("seed", range(60))
def test_a_budget_gets_the_least_error_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        blocks = random_blocks(rng)
        rest = float(rng.random()) if rng.random() < 0.3 else 0.0
        parameters, squares = every_choice(blocks, rest)
        energy = squares.max()
        for budget in rng.integers(parameters.min(), parameters.max() + 3, 6):
            found = within_budget(blocks, int(budget), rest)
            check_valid(blocks, found, rest)
            assert found.parameters <= budget
            assert (found.gap, found.bound) == (0.0, found.error)
            best = squares[parameters <= budget].min()
            assert found.error**2 == pytest.approx(best, rel=0, abs=EXACT * energy)
            equal = squares <= best + EXACT * energy
            assert found.parameters == parameters[(parameters <= budget) & equal].min()


@pytest.mark.parametrize("seed", range(60))
def test_an_allowed_error_gets_the_fewest_parameters_of_all_choices(seed):
    rng = np.random.default_rng(1000 + seed)
    for _ in range(6):
        blocks = random_blocks(rng)
        rest = float(rng.random()) if rng.random() < 0.3 else 0.0
        parameters, squares = every_choice(blocks, rest)
        energy = squares.max()
        on_a_choice = [math.sqrt(s) for s in rng.choice(squares, 3)]
        between = [math.sqrt(rng.uniform(squares.min(), energy * 1.1)) for _ in range(3)]
        for allowed in on_a_choice + between:
            found = within_error(blocks, allowed, rest)
            check_valid(blocks, found, rest)
            assert found.error <= allowed * (1 + 1e-14)
            fits = squares <= allowed**2 * (1 + EXACT)
            assert found.parameters == parameters[fits].min()
            assert (found.gap, found.bound) == (0.0, float(found.parameters))
            best = squares[fits & (parameters == found.parameters)].min()
            assert found.error**2 == pytest.approx(best, rel=0, abs=EXACT * energy)


def dense_programme(blocks, budget):
    """Largest integer gain for every budget: the textbook recursion over all parameter counts."""
    best = np.zeros(budget + 1, dtype=np.int64)
    for one in blocks:
        reached = best.copy()
        for k in range(1, len(one.gains) + 1):
            if k * one.cost <= budget:
                gain = int(one.gains[:k].sum())
                at = k * one.cost
                reached[at:] = np.maximum(reached[at:], best[: budget + 1 - at] + gain)
        best = reached
    return best


@pytest.mark.parametrize("distinct", [2, 3, 6, 20])
@pytest.mark.parametrize("shape", ["falling", "flat", "proportional"])
def test_middle_sizes_agree_with_a_dense_programme(shape, distinct):
    rng = np.random.default_rng(distinct)
    costs = rng.choice(np.arange(15, 120), distinct, replace=False)
    blocks = []
    for cost in rng.choice(costs, 24):
        gains = {
            "falling": -np.sort(-rng.integers(1, 10**6, 8)),
            "flat": np.full(8, rng.integers(1, 50)),
            "proportional": np.full(8, cost),
        }[shape]
        blocks.append(block(int(cost), *gains))
    energy = int(sum(one.gains.sum() for one in blocks))
    every = sum(one.cost * len(one.gains) for one in blocks)
    best = dense_programme(blocks, every)
    for budget in rng.integers(1, every, 25):
        found = within_budget(blocks, int(budget))
        assert found.gap == 0.0
        assert energy - best[budget] == pytest.approx(found.error**2, rel=1e-12)
        again = within_error(blocks, found.error)
        assert again.gap == 0.0
        assert again.parameters == int(np.searchsorted(best, best[budget]))


def test_the_review_s_example():
    found = within_budget([block(3, 3.1), block(2, 2.0, 2.0)], 4)
    assert found.ranks == (0, 2)
    assert found.parameters == 4
    assert found.error == math.sqrt(3.1)


def test_greedy_is_beaten_often_and_never_better():
    rng = np.random.default_rng(7)
    beaten = 0
    for _ in range(300):
        blocks = [block(int(rng.choice([2, 3, 5])), *-np.sort(-rng.random(3))) for _ in range(4)]
        budget = int(rng.integers(2, 40))
        theirs, ours = greedy(blocks, budget), within_budget(blocks, budget).error ** 2
        assert ours <= theirs + EXACT
        beaten += ours < theirs - 1e-6
    assert beaten > 60


@pytest.mark.parametrize("budget", range(0, 100, 9))
def test_equal_costs_are_greedy(budget):
    rng = np.random.default_rng(3)
    blocks = [block(7, *-np.sort(-rng.random(4))) for _ in range(4)]
    found = within_budget(blocks, budget)
    gains = np.sort(np.concatenate([one.gains for one in blocks]))
    assert sum(found.ranks) == min(budget // 7, 16)
    assert found.error**2 == pytest.approx(gains[: 16 - min(budget // 7, 16)].sum())


def test_equal_gains_go_to_the_earlier_block():
    blocks = [block(4, 2.0, 1.0, 1.0), block(4, 1.0, 1.0), block(4, 3.0, 1.0)]
    ranks = [within_budget(blocks, 4 * k).ranks for k in range(8)]
    assert ranks == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 0, 1),
        (2, 0, 1),
        (3, 0, 1),
        (3, 1, 1),
        (3, 2, 1),
        (3, 2, 2),
    ]


def test_equal_gains_go_to_the_earlier_block_among_many():
    blocks = [block(4, 2.0, *[1.0] * 7) for _ in range(30)]
    assert within_budget(blocks, 4 * 83).ranks == (8,) * 7 + (5,) + (1,) * 22


def test_of_equal_errors_the_fewest_parameters_and_the_other_way_round():
    pair = [block(3, 4.0), block(2, 4.0)]
    assert within_budget(pair, 4).ranks == (0, 1)
    assert within_error(pair, 2.0).ranks == (0, 1)
    trio = [block(4, 9.5), block(5, 10.0), block(6, 10.0)]
    assert within_budget(trio, 6).ranks == (0, 1, 0)
    better = [block(3, 4.0), block(3, 5.0), block(3, 4.5)]
    assert within_error(better, math.sqrt(9.5)).ranks == (0, 1, 0)
    assert within_error([block(2, 3.0, 3.0), block(4, 7.0)], math.sqrt(7.0)).ranks == (0, 1)


def test_zero_gains_are_never_taken_above_the_floor():
    blocks = [block(2, 1.0, 0.0, 0.0), block(3, 0.0), block(3), block(5, 0.0, 0.0, floor=1)]
    for found in (within_budget(blocks, 10**6), within_error(blocks, 0.0)):
        assert found.ranks == (1, 0, 0, 1)
        assert (found.error, found.gap, found.parameters) == (0.0, 0.0, 7)


def test_a_floor_above_the_directions_holds_and_costs():
    blocks = [block(10, 2.0, 1.0, floor=4), block(6, 5.0, ceiling=9)]
    found = within_budget(blocks, 46)
    assert (found.ranks, found.parameters, found.error) == ((4, 1), 46, 0.0)
    assert within_budget(blocks, 45).ranks == (4, 0)
    assert within_error(blocks, 0.0).ranks == (4, 1)


def test_no_blocks_leave_the_rest():
    for found in (within_budget([], 0, 9.0), within_error([], 3.0, 9.0)):
        assert (found.ranks, found.parameters, found.error, found.gap) == ((), 0, 3.0, 0.0)


def test_a_budget_below_the_floors_names_the_smallest():
    blocks = [block(10, 1.0, floor=2), block(7, 1.0, 1.0, floor=1)]
    with pytest.raises(BudgetError, match=r"at most 26 parameters .* take 27; allow 27 parameters"):
        within_budget(blocks, 26)
    assert within_budget(blocks, 27).ranks == (2, 1)


def test_an_unreachable_error_names_the_smallest():
    blocks = [block(10, 3.0, 2.0, ceiling=1), block(7, 1.0)]
    with pytest.raises(BudgetError, match=r"at most 1.9 was asked .* leaves 2; .* 2.00001 or more"):
        within_error(blocks, 1.9, rest=2.0)
    assert within_error(blocks, 2.0, rest=2.0).ranks == (1, 1)


@pytest.mark.parametrize("third", [1 / 3, 2 / 3, 0.1234565, 1e-9 / 7])
def test_the_smallest_error_named_is_accepted(third):
    with pytest.raises(BudgetError) as caught:
        within_error([block(2, 1.0)], 0.0, rest=third)
    named = float(caught.value.hint.split()[4])
    assert within_error([block(2, 1.0)], named, rest=third).ranks == (1,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: block(0, 1.0), UsageError, "costs 0 parameters"),
        (lambda: block(3, 1.0, floor=-1), UsageError, "lowest rank of -1"),
        (lambda: block(3, 1.0, floor=3, ceiling=2), UsageError, "of 3 above the highest rank of 2"),
        (lambda: block(3, 1.0, 2.0), UsageError, "must be >= 0 and fall"),
        (lambda: block(3, 1.0, -2.0), UsageError, "must be >= 0 and fall"),
        (lambda: block(3, math.nan), NumericsError, "NaN"),
        (lambda: block(3, math.inf), NumericsError, "infinite"),
        (lambda: within_error([], math.nan), UsageError, "allowed error of nan"),
        (lambda: within_error([], -1.0), UsageError, "allowed error of -1.0"),
    ],
    ids=["cost", "floor", "ceiling", "order", "negative", "nan", "inf", "nan-error", "below-0"],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@st.composite
def problems(draw):
    gain = st.one_of(st.floats(0, 1e6, allow_subnormal=False), st.integers(0, 4).map(float))
    blocks = []
    for _ in range(draw(st.integers(1, 6))):
        gains = sorted(draw(st.lists(gain, max_size=5)), reverse=True)
        floor = draw(st.integers(0, 2))
        ceiling = draw(st.one_of(st.none(), st.integers(floor, 6)))
        blocks.append(block(draw(st.integers(1, 40)), *gains, floor=floor, ceiling=ceiling))
    return blocks


@given(problems(), st.integers(0, 400), st.integers(0, 400), st.floats(0, 1))
def test_more_is_never_worse_and_the_two_questions_agree(blocks, budget, more, share):
    fixed = sum(one.cost * one.floor for one in blocks)
    energy = math.fsum(gain for one in blocks for gain in one.gains)
    small, large = (within_budget(blocks, fixed + b) for b in (budget, budget + more))
    check_valid(blocks, small)
    assert large.error**2 <= small.error**2 + EXACT * energy
    assert within_error(blocks, small.error).parameters <= small.parameters
    allowed = large.error + share * (small.error - large.error)
    fewest = within_error(blocks, allowed)
    assert within_budget(blocks, fewest.parameters).error ** 2 <= allowed**2 + EXACT * energy
    if fewest.parameters > fixed:
        assert within_budget(blocks, fewest.parameters - 1).error >= allowed * (1 - 1e-12)


@given(problems(), st.integers(0, 400), st.integers(-300, 300))
def test_powers_of_two_in_the_gains_change_nothing(blocks, budget, power):
    fixed = sum(one.cost * one.floor for one in blocks)
    scaled = [Block(b.cost, np.ldexp(b.gains, power), b.floor, b.ceiling) for b in blocks]
    small = min((gain for one in blocks for gain in one.gains if gain), default=1.0)
    if small > 1e-150:
        one, other = (within_budget(given, fixed + budget) for given in (blocks, scaled))
        assert one.ranks == other.ranks


@pytest.mark.parametrize("work", [0, 5, 20, 60])
def test_a_search_cut_short_is_valid_and_its_bound_is_one(monkeypatch, work):
    monkeypatch.setattr(knapsack, "WORK", work)
    rng = np.random.default_rng(work)
    unproved = 0
    for _ in range(150):
        blocks = random_blocks(rng, most_blocks=6, most_directions=3)
        parameters, squares = every_choice(blocks)
        energy = squares.max()
        budget = int(rng.integers(parameters.min(), parameters.max() + 1))
        found = within_budget(blocks, budget)
        check_valid(blocks, found)
        assert found.parameters <= budget
        best = squares[parameters <= budget].min()
        assert found.bound**2 <= best + EXACT * energy
        assert (found.gap == 0.0) == (found.bound == found.error)
        if found.gap:
            assert found.gap == pytest.approx(1 - found.bound / found.error)
            unproved += 1

        allowed = math.sqrt(rng.uniform(squares.min(), energy))
        fewest = within_error(blocks, allowed)
        check_valid(blocks, fewest)
        assert fewest.error <= allowed * (1 + 1e-14)
        assert fewest.bound <= parameters[squares <= allowed**2 * (1 + EXACT)].min()
        assert (fewest.gap == 0.0) == (fewest.bound == fewest.parameters)
        unproved += fewest.gap > 0
    assert unproved > (40 if work == 0 else 0)


def test_a_search_cut_short_keeps_what_its_finished_rounds_proved(monkeypatch):
    rng = np.random.default_rng(5)
    costs = rng.choice([997, 1301, 1801, 2203], 30)
    blocks = [block(int(c), *-np.sort(-c * (1 + 0.1 * rng.random(60)))) for c in costs]
    optimum = within_budget(blocks, 500_001)
    assert optimum.gap == 0.0
    bounds = []
    for work in (0, 100, 300):
        monkeypatch.setattr(knapsack, "WORK", work)
        found = within_budget(blocks, 500_001)
        assert found.gap > 0
        bounds.append(found.bound)
    assert bounds[0] < bounds[1] < bounds[2] < optimum.error


def spectra(rng, costs, modules, directions):
    """Falling exponentials of random size and decay, as real adapters have."""
    blocks = []
    for cost in rng.choice(costs, modules):
        falling = np.exp(-np.arange(directions) * rng.uniform(0.01, 0.2))
        gains = -np.sort(-rng.exponential(1.0) * falling * rng.uniform(0.9, 1.1, directions))
        blocks.append(block(int(cost), *gains))
    return blocks


SDXL = [1280, 2560, 3328, 5760, 11520, 1328, 2688, 3200, 6400, 3840, 1536, 12800, 960, 1600, 4480]


@pytest.mark.parametrize(
    ("costs", "modules", "directions"),
    [
        ([8192, 15104], 224, 64),
        (SDXL, 722, 128),
        ([int(c) | 1 for c in np.random.default_rng(0).integers(500, 12000, 20)], 722, 128),
        ([int(c) for c in np.random.default_rng(1).integers(500, 12000, 300)], 722, 128),
    ],
    ids=["llama", "sdxl", "20-odd-costs", "300-costs"],
)
@pytest.mark.parametrize("share", [0.02, 0.25, 0.7])
def test_real_sizes_finish(costs, modules, directions, share):
    blocks = spectra(np.random.default_rng(9), costs, modules, directions)
    budget = int(share * sum(one.cost * directions for one in blocks))
    found = within_budget(blocks, budget)
    check_valid(blocks, found)
    assert found.gap == 0.0
    assert budget - max(costs) < found.parameters <= budget
    assert found.error**2 <= greedy(blocks, budget) * (1 + 1e-12)
    fewest = within_error(blocks, found.error)
    assert fewest.gap == 0.0
    assert fewest.parameters == found.parameters
