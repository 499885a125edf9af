"""Members in shared coordinates: inner products as dense, few of them, and the edges."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops.factors import Factors
from adapterops.fleet.representing import minimax
from adapterops.fleet.representing.coordinates import CUT, in_shared_coordinates
from adapterops.geometry import beta, in_common_bases

M, N, RANK = 60, 45, 4


def member(seed, *, rank=RANK, near=None, noise=0.1):
    """Factors of their own, or those of `near` with some noise in both."""
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((M, rank)), rng.standard_normal((rank, N))
    return Factors(B, A) if near is None else Factors(near.B + noise * B, near.A + noise * A)


def check_inner_products(members):
    found = in_shared_coordinates(members)
    assert [each.rank for each in found] == [each.rank for each in members]
    for i, one in enumerate(members):
        for j, other in enumerate(members):
            apart = abs(found[i].inner(found[j]) - float(np.sum(one.dense() * other.dense())))
            assert apart <= 4 * CUT * beta(one) * beta(other)
    return found


def test_inner_products_are_those_of_the_dense_changes():
    one = member(0)
    found = check_inner_products([one, member(1, near=one), member(2, rank=7), member(3)])
    assert {each.B.shape[0] for each in found} == {4 + 4 + 7 + 4}


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_columns_of_very_different_sizes(size):
    """One holds in B what another holds in A: neither is lost beside the other."""
    one = member(0)
    moved = Factors(one.B * size, one.A / size)
    found = check_inner_products([one, moved, member(1, near=one)])
    assert found[0].inner(found[1]) == pytest.approx(found[0].inner(found[0]), rel=1e-12)


def test_what_members_share_takes_room_once():
    """A of all, B of two: the coordinates are those of what is distinct."""
    one = member(0)
    found = check_inner_products([one, Factors(1.5 * one.B, one.A), Factors(one.B, one.A)])
    assert all(each.A.shape[1] == RANK for each in found)
    assert all(each.B.shape[0] == RANK for each in found)


def test_columns_that_depend_on_others():
    """A mixture of another's columns, as re-factoring makes it: the Gram matrix is singular."""
    one, mix = member(0), np.random.default_rng(9).standard_normal((RANK, RANK))
    check_inner_products([one, Factors(one.B @ mix, np.linalg.solve(mix, one.A))])
    found = check_inner_products([one, Factors(one.B[:, ::-1], one.A[::-1])])
    assert found[0].B.shape[0] <= 2 * RANK


def test_more_columns_than_rows():
    found = check_inner_products([member(seed, rank=20) for seed in range(5)])
    assert found[0].B.shape == (M, 20) and found[0].A.shape == (20, N)


def test_a_module_that_a_member_lacks():
    none = Factors(np.zeros((M, 0)), np.zeros((0, N)))
    found = check_inner_products([member(0), none, member(1)])
    assert found[1].B.shape == (8, 0)


@pytest.mark.parametrize("zero", ["B", "A", "both", "column"])
def test_zeros(zero):
    one, other = member(0), member(1)
    B, A = one.B.copy(), one.A.copy()
    if zero in ("B", "both"):
        B[...] = 0
    if zero in ("A", "both"):
        A[...] = 0
    if zero == "column":
        B[:, 1] = A[1] = 0
    check_inner_products([Factors(B, A), other])
    check_inner_products([Factors(0 * B, A), Factors(0 * B, A)])


def test_squares_that_overflow_go_another_way():
    big = [Factors(1e200 * each.B, each.A) for each in (member(0), member(1))]
    expected = in_common_bases(
        np.hstack([each.B for each in big]), np.vstack([each.A for each in big]), [RANK, RANK]
    )
    for found, known in zip(in_shared_coordinates(big), expected, strict=True):
        np.testing.assert_array_equal(found.B, known.B)
        np.testing.assert_array_equal(found.A, known.A)


@pytest.mark.parametrize("rank", [1, 4, None])
def test_an_average_is_that_of_common_bases(rank):
    """Three modules, one of them zero for all, one that a member lacks."""
    modules, known = [], []
    for module in range(3):
        one = member(module)
        members = [one, *(member(10 * module + seed, near=one) for seed in range(3))]
        if module == 1:
            members = [Factors(0 * each.B, each.A) for each in members]
        if module == 2:
            members[3] = Factors(np.zeros((M, 0)), np.zeros((0, N)))
        modules.append(in_shared_coordinates(members))
        stacks = (
            np.hstack([each.B for each in members]),
            np.vstack([each.A for each in members]),
        )
        known.append(in_common_bases(*stacks, [each.rank for each in members]))
    found = minimax.minimax(minimax.members(modules), rank)
    expected = minimax.minimax(minimax.members(known), rank)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, atol=1e-5)
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-6)
    assert found.bound == pytest.approx(expected.bound, rel=1e-6)
