"""Inner products, distances, angles and spaces against dense float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from adapterops import geometry, linalg
from adapterops.factors import Factors
from adapterops.geometry import Stack
from tests.test_linalg import gauge, make

EPS = 2.0**-52
LIMIT = 30.0
KINDS = ["random", "graded", "zero", "shared", "doubled", "gauge", "unbalanced"]


def factors(kind: str, m: int, n: int, r: int, seed: int) -> Factors:
    return Factors(*make(kind, m, n, r, seed))


def basis(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "r"),
    [(40, 30, 6), (9, 50, 12), (1, 1, 1), (64, 64, 64), (1100, 40, 5), (30, 2570, 3)],
)
def test_common_bases_keep_every_figure(kind: str, m: int, n: int, r: int) -> None:
    a, b = factors(kind, m, n, r, 1), factors("random", m, n, max(1, r // 2), 2)
    small = geometry.in_common_bases(np.hstack([a.B, b.B]), np.vstack([a.A, b.A]), [a.rank, b.rank])
    bound = geometry.beta(a) + geometry.beta(b)
    assert small[0].B.shape == (min(m, a.rank + b.rank), a.rank)
    for one, other in ((a, small[0]), (b, small[1]), (a - b, small[0] - small[1])):
        exact = np.linalg.norm(one.dense())
        error = abs(np.linalg.norm(other.dense()) - exact)
        assert error <= LIMIT * max(m, n) * EPS * bound
    product = float(np.sum(a.dense() * b.dense()))
    assert abs(small[0].inner(small[1]) - product) <= LIMIT * max(m, n) * EPS * bound**2
    assert geometry.beta(small[0]) == pytest.approx(geometry.beta(a), rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (4, 0), (3, 5)])
def test_sizes_down_to_nothing(m: int, n: int) -> None:
    nothing = Factors(np.zeros((m, 0)), np.zeros((0, n)))
    [small] = geometry.in_common_bases(nothing.B, nothing.A, [0])
    assert small.rank == 0 and geometry.spaces(small, 0.0).columns.shape[1] == 0
    assert geometry.distance(nothing, nothing) == 0.0 == geometry.cosine(nothing, nothing)
    wide = Factors(np.ones((m, 2)), np.ones((2, n)))
    [small] = geometry.in_common_bases(wide.B, wide.A, [2])
    assert np.linalg.norm(small.dense()) == pytest.approx(np.linalg.norm(wide.dense()))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_distance_and_cosine_are_the_dense_ones(kind: str) -> None:
    a, b = factors(kind, 40, 30, 6, 1), factors("random", 40, 30, 4, 2)
    x, y = a.dense(), b.dense()
    bound = geometry.beta(a) + geometry.beta(b)
    assert abs(geometry.inner(a, b) - np.sum(x * y)) <= LIMIT * 40 * EPS * bound**2
    assert abs(geometry.distance(a, b) - np.linalg.norm(x - y)) <= LIMIT * 40 * EPS * bound
    if kind == "zero":
        assert geometry.cosine(a, b) == 0.0 == geometry.cosine(b, a)
    elif kind not in ("doubled", "gauge"):  # there the inner product itself is noise
        exact = float(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
        assert geometry.cosine(a, b) == pytest.approx(exact, abs=1e-10)


def test_small_distances_are_not_lost() -> None:
    """Relative 1e-12 must read 1e-12: the difference of squared norms would see nothing of it."""
    a = factors("random", 200, 100, 8, 1)
    rng = np.random.default_rng(2)
    for small in (1e-6, 1e-9, 1e-12):
        shift = small * rng.standard_normal(a.B.shape)
        b = Factors(a.B + shift, a.A)
        exact = np.linalg.norm((b.B - a.B) @ a.A)
        assert geometry.distance(a, b) == pytest.approx(exact, rel=1e-2)
        stack = Stack(np.hstack([a.B, b.B]), np.vstack([a.A, b.A]), (8, 8))
        assert geometry.gram(stack, stack)[1][0, 1] == pytest.approx(exact, rel=1e-2)
    assert geometry.distance(a, a) <= LIMIT * EPS * geometry.beta(a)


ANGLES = [0.0, 1e-14, 1e-9, 1e-4, 0.3, math.pi / 4 - 1e-9, math.pi / 4 + 1e-9, 1.2, math.pi / 2]


def test_principal_angles_large_and_small() -> None:
    rng = np.random.default_rng(3)
    whole = basis(rng, 60, 2 * len(ANGLES))
    first, beside = whole[:, : len(ANGLES)], whole[:, len(ANGLES) :]
    second = first * np.cos(ANGLES) + beside * np.sin(ANGLES)
    turned = second @ basis(rng, len(ANGLES), len(ANGLES))
    found = geometry.principal_angles(first @ basis(rng, len(ANGLES), len(ANGLES)), turned)
    assert np.abs(found - sorted(ANGLES)).max() < 1e-14
    cosines = np.linalg.svd(first.T @ turned)[1]
    by_cosine = np.arccos(np.minimum(cosines, 1.0))
    assert np.abs(np.sort(by_cosine) - sorted(ANGLES)).max() > 1e-10  # why sines are needed


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**31))
def test_principal_angles_are_scipys(k: int, l: int, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    first, second = basis(rng, 9, k), basis(rng, 9, l)
    found = geometry.principal_angles(first, second)
    assert len(found) == min(k, l) and np.array_equal(found, np.sort(found))
    assert np.allclose(found, geometry.principal_angles(second, first), atol=1e-14)
    if k and l:
        exact = np.sort(scipy.linalg.subspace_angles(first, second))
        assert np.allclose(found, exact, atol=1e-13)


def test_spaces_are_those_of_the_delta_not_of_the_factors() -> None:
    """Padding, dead columns and a bad gauge change factors; the spaces and the rank stay."""
    rng = np.random.default_rng(4)
    B, A = rng.standard_normal((50, 5)), rng.standard_normal((5, 40))
    G = gauge(rng, 5)
    plain = Factors(B, A)
    left, right = (np.linalg.svd(x, full_matrices=False)[0] for x in (B, A.T))
    padded = Factors(
        np.hstack([B, np.zeros((50, 2)), rng.standard_normal((50, 3))]),
        np.vstack([A, rng.standard_normal((2, 40)), np.zeros((3, 40))]),
    )
    twice = Factors(np.hstack([B, 3 * B]), np.vstack([A, A / 7]))
    for one in (plain, padded, twice, Factors(B @ G, np.linalg.solve(G, A))):
        floor = linalg.rank_floor(50, 40, geometry.beta(one))
        found = geometry.spaces(one, floor)
        assert found.columns.shape == (50, 5) and found.rows.shape == (40, 5)
        assert np.linalg.norm(found.columns.T @ found.columns - np.eye(5)) < 1e-13
        allowed = found.uncertainty + 1e-14
        assert geometry.principal_angles(found.columns, left).max() < allowed
        assert geometry.principal_angles(found.rows, right).max() < allowed
    assert geometry.spaces(Factors(0 * B, A), 0.0).values.size == 0


def test_share_inside_is_one_chance_or_nothing() -> None:
    rng = np.random.default_rng(5)
    space = basis(rng, 400, 8)
    inside, outside = space @ rng.standard_normal((8, 3)), rng.standard_normal((400, 300))
    assert geometry.share_inside(inside, space, 400) == pytest.approx(1.0)
    assert abs(geometry.share_inside(outside, space, 400)) < 0.005
    beside = outside - space @ (space.T @ outside)
    assert geometry.share_inside(beside, space, 400) == pytest.approx(-8 / 392)
    half = inside / np.linalg.norm(inside) + outside[:, :3] / np.linalg.norm(outside[:, :3])
    assert geometry.share_inside(half, space, 400) == pytest.approx(0.5, abs=0.05)
    whole = np.eye(5)
    assert geometry.share_inside(rng.standard_normal((5, 2)), whole, 5) == 0.0
    assert geometry.share_inside(np.zeros((400, 2)), space, 400) == 0.0


def stack_of(members: list[Factors]) -> Stack:
    return Stack(
        np.hstack([one.B for one in members]),
        np.vstack([one.A for one in members]),
        tuple(one.rank for one in members),
    )


def members(seed: int, ranks: list[int], m: int = 30, n: int = 20) -> list[Factors]:
    """Random ones; every third repeats the one before in another gauge, every fifth is zero."""
    rng = np.random.default_rng(seed)
    found: list[Factors] = []
    for index, rank in enumerate(ranks):
        B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
        if index % 3 == 2:
            B, A = found[-1].B, found[-1].A
            G = gauge(rng, B.shape[1])
            B, A = B @ G, np.linalg.solve(G, A) if B.shape[1] else A
        if index % 5 == 4:
            B = 0 * B
        found.append(Factors(B, A))
    return found


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(0, 2**31))
def test_gram_is_every_pair_by_itself(ranks: list[int], seed: int) -> None:
    found = members(seed, ranks)
    stack = stack_of(found)
    inner, distance = geometry.gram(stack, stack)
    assert np.array_equal(distance, distance.T) and not np.diagonal(distance).any()
    for i, a in enumerate(found):
        for j, b in enumerate(found):
            bound = geometry.beta(a) + geometry.beta(b)
            noise = LIMIT * 30 * EPS * bound
            assert abs(inner[i, j] - np.sum(a.dense() * b.dense())) <= noise * bound
            assert (
                abs(distance[i, j] - np.linalg.norm(a.dense() - b.dense()))
                <= noise + 1e-9 * (distance[i, j])
            )
    # A rectangle of it, from two stacks, says the same.
    rows, columns = stack_of(found[: len(found) // 2 + 1]), stack
    part = geometry.gram(rows, columns)
    scale = max(1.0, float(stack.betas.max()))
    assert np.allclose(part[0], inner[: len(rows.widths)], atol=1e-12 * scale**2, rtol=1e-9)
    assert np.allclose(part[1], distance[: len(rows.widths)], atol=1e-12 * scale, rtol=1e-6)


@given(st.permutations(range(6)), st.integers(0, 2**31))
def test_permuting_members_permutes_the_matrix(order: list[int], seed: int) -> None:
    found = members(seed, [3, 1, 4, 2, 2, 5])
    straight = geometry.gram(*[stack_of(found)] * 2)
    mixed = geometry.gram(*[stack_of([found[i] for i in order])] * 2)
    scale = float(stack_of(found).betas.max())
    for one, other, power in zip(straight, mixed, (2, 1), strict=True):
        assert np.allclose(one[np.ix_(order, order)], other, atol=1e-13 * scale**power, rtol=1e-6)


def test_stacks_know_their_members() -> None:
    found = members(0, [3, 0, 1, 2])
    stack = stack_of(found)
    assert stack.members == [slice(0, 3), slice(3, 3), slice(3, 3), slice(3, 5)]
    assert np.allclose(stack.norms, [np.linalg.norm(one.dense()) for one in found])
    assert np.allclose(stack.betas, [geometry.beta(one) for one in found])


scales = st.floats(1e-6, 1e6).map(lambda x: x if x < 1 else -x)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6), scales)
def test_laws_of_distance_and_cosine(seed: int, r: int, s: int, factor: float) -> None:
    a, b = factors("random", 20, 16, r, seed), factors("random", 20, 16, s, seed + 1)
    c = factors("random", 20, 16, 2, seed + 2)
    apart, near = geometry.distance(a, b), geometry.cosine(a, b)
    assert geometry.distance(b, a) == pytest.approx(apart, rel=1e-12)
    assert geometry.distance(a * factor, b * factor) == pytest.approx(abs(factor) * apart, rel=1e-9)
    assert apart <= geometry.distance(a, c) + geometry.distance(c, b) + 1e-9
    assert -1.0 <= near <= 1.0
    assert geometry.cosine(a * factor, b) == pytest.approx(math.copysign(near, factor * near))
    squared = a.norm() ** 2 + b.norm() ** 2 - 2 * geometry.inner(a, b)
    assert apart**2 == pytest.approx(squared, rel=1e-9)


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_gauge_changes_nothing(seed: int, r: int) -> None:
    """A gauge of condition 1e6 makes β a million times ‖ΔW‖; figures move by u·β."""
    a, b = factors("random", 30, 24, r, seed), factors("random", 30, 24, r, seed + 1)
    G = gauge(np.random.default_rng(seed), r)
    turned = Factors(a.B @ G, np.linalg.solve(G, a.A))
    noise = LIMIT * 30 * EPS * (geometry.beta(turned) + geometry.beta(b))
    assert geometry.distance(turned, a) <= noise
    assert abs(geometry.distance(turned, b) - geometry.distance(a, b)) <= noise
    small = geometry.in_common_bases(
        np.hstack([turned.B, b.B, a.B]), np.vstack([turned.A, b.A, a.A]), [r, r, r]
    )
    floors = [linalg.rank_floor(30, 24, geometry.beta(one)) for one in small]
    spaces = [geometry.spaces(one, floor) for one, floor in zip(small, floors, strict=True)]
    between = [geometry.principal_angles(spaces[i].rows, spaces[1].rows) for i in (0, 2)]
    assert len(spaces[0].values) == r
    assert np.abs(between[0] - between[1]).max() <= spaces[0].uncertainty + 1e-12
