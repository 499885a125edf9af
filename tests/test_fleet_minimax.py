"""Relative minimax: against a convex solver, against mean and medoid, its bound, its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from adapterops.factors import Factors
from adapterops.fleet.grouping.enclosing import enclosing
from adapterops.fleet.representing import minimax
from adapterops.geometry import in_common_bases

SIZES = ((24, 18), (12, 30), (24, 18))  # two of one shape make a batch


def group(seed, count, *, rank=3, near=None, sizes=None, lacking=()):
    """Members' factors by module, in common bases, and the same dense: (modules, dense[l][i]).

    `near`: all are one adapter with noise of this size in both factors. `lacking` are (member,
    module) pairs that are not there.
    """
    rng = np.random.default_rng(seed)
    modules, dense = [], []
    for module, (m, n) in enumerate(SIZES):
        common = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
        pairs = []
        for member in range(count):
            B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
            if near is not None:
                B, A = common[0] + near * B, common[1] + near * A
            if (member, module) in lacking:
                B, A = B[:, :0], A[:0]
            pairs.append((B * (1.0 if sizes is None else sizes[member]), A))
        dense.append([B @ A for B, A in pairs])
        stacks = np.hstack([B for B, _ in pairs]), np.vstack([A for _, A in pairs])
        modules.append(in_common_bases(*stacks, [B.shape[1] for B, _ in pairs]))
    return minimax.members(modules), dense


def vectors(dense):
    """Every member as one long vector, (N, D)."""
    return np.stack([np.concatenate([m.ravel() for m in own]) for own in zip(*dense, strict=True)])


def truncated(dense, shares, rank):
    """Each module's weighted mean at its best rank, as one vector, by dense SVD."""
    parts = []
    for module in dense:
        U, s, Vh = np.linalg.svd(sum(u * d for u, d in zip(shares, module, strict=True)))
        parts.append(((U[:, :rank] * s[:rank]) @ Vh[:rank]).ravel())
    return np.concatenate(parts)


def relative(points, X):
    return np.linalg.norm(points - X, axis=1) / np.linalg.norm(points, axis=1)


def solved(points):
    """min over X of the largest relative distance, by SLSQP over X = Σcᵢ·Dᵢ and t."""
    gram = points @ points.T
    squares = np.diagonal(gram)

    def room(z):
        c, t = z[:-1], z[-1]
        return t - (squares - 2 * gram @ c + c @ gram @ c) / squares

    def slope(z):
        rows = -(-2 * gram + 2 * (gram @ z[:-1])) / squares[:, None]
        return np.hstack([rows, np.ones((len(gram), 1))])

    count = len(points)
    start = np.append(np.full(count, 1 / count), 4.0)
    found = minimize(
        lambda z: z[-1],
        start,
        jac=lambda z: np.append(np.zeros(count), 1.0),
        constraints={"type": "ineq", "fun": room, "jac": slope},
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    assert found.status in (0, 8), found.message  # 8: no better one in the line, at this precision
    return relative(points, found.x[:-1] @ points).max()


UNEQUAL = (1.0, 2.5, 0.4, 1.0, 3.0, 0.7, 1.3, 0.9)
CASES = {
    "two far apart": {"count": 2},
    "two near": {"count": 2, "near": 0.1},
    "five near": {"count": 5, "near": 0.15},
    "five of unequal norms": {"count": 5, "near": 0.3, "sizes": UNEQUAL[:5]},
    "eight unrelated of unequal norms": {"count": 8, "sizes": UNEQUAL},
    "eight near of unequal norms": {"count": 8, "near": 0.2, "sizes": UNEQUAL},
    "modules lacking": {"count": 4, "near": 0.2, "lacking": ((1, 0), (2, 2), (3, 2))},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_full_rank_center_is_a_convex_solvers(case, seed):
    members, dense = group(seed, **CASES[case])
    points = vectors(dense)
    found = minimax.minimax(members, None)
    assert found.error == pytest.approx(solved(points), rel=1e-6)
    assert found.gap <= 1e-6 * found.error
    X = found.coefficients @ points
    np.testing.assert_allclose(found.errors, relative(points, X), rtol=1e-7)
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.coefficients.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_truncated_is_never_worse_than_medoid_or_mean(case, rank):
    members, dense = group(7, **CASES[case])
    points = vectors(dense)
    count = len(points)
    traffic = np.linspace(1.0, 3.0, count) / np.sum(points**2, axis=1)
    traffic /= traffic.sum()
    found = minimax.minimax(members, rank, starts=[traffic])
    X = truncated(dense, found.coefficients, rank)
    assert found.error == pytest.approx(relative(points, X).max(), rel=1e-6)
    np.testing.assert_allclose(found.errors, relative(points, X), rtol=1e-6, atol=1e-9)
    plain = 1 / np.sum(points**2, axis=1)
    others = [traffic, plain / plain.sum(), *np.eye(count)]
    best = min(relative(points, truncated(dense, shares, rank)).max() for shares in others)
    assert found.error <= best * (1 + 1e-5)
    assert 0 <= found.bound <= found.error


@pytest.mark.parametrize("seed", range(4))
def test_bound_holds_for_any_matrix_of_the_rank(seed):
    members, dense = group(seed, 4, near=0.4, sizes=UNEQUAL[:4])
    points = vectors(dense)
    found = minimax.minimax(members, 2)
    rng = np.random.default_rng(seed)
    for _ in range(100):
        shares = found.coefficients + 0.2 * rng.standard_normal(4)
        X = truncated(dense, shares, 2)
        assert relative(points, X).max() >= found.bound
    assert found.gap <= 0.02 * found.error  # and it is near: rank r leaves a gap, but a small one


def test_gap_is_small_where_members_are_near():
    """Where the rank is the members' own and they are near, the bound all but meets the error."""
    for seed in range(5):
        members, _ = group(seed, 6, near=0.2, sizes=UNEQUAL[:6])
        found = minimax.minimax(members, 3)
        assert found.gap <= 2e-3 * found.error


def test_plain_enclosing_ball_would_be_wrong():
    """The ball for absolute distances serves the smaller one badly: numerics of unequal norms."""
    members, dense = group(3, 2, near=0.3, sizes=(1.0, 4.0))
    points = vectors(dense)
    ball = relative(points, points.mean(axis=0)).max()
    assert minimax.minimax(members, None).error < 0.5 * ball


def test_one_member_is_its_own_center():
    members, _ = group(0, 1)
    found = minimax.minimax(members, 3)
    assert found.weights.tolist() == [1.0]
    assert found.error < 1e-7
    cut = minimax.minimax(members, 1)
    assert cut.error == pytest.approx(cut.bound, rel=1e-6) and cut.error > 0.1


def test_two_members_of_equal_norm_meet_half_way():
    members = minimax.members(
        [in_common_bases(np.eye(6)[:, :2], np.eye(6)[:2], [1, 1])]  # orthogonal, norm 1
    )
    found = minimax.minimax(members, None)
    np.testing.assert_allclose(found.weights, 0.5, atol=1e-9)
    assert found.error == pytest.approx(np.sqrt(0.5), rel=1e-9)


def test_identical_members_have_no_error():
    rng = np.random.default_rng(1)
    B, A = rng.standard_normal((20, 3)), rng.standard_normal((3, 15))
    modules = [in_common_bases(np.hstack([B] * 4), np.vstack([A] * 4), [3] * 4)]
    found = minimax.minimax(minimax.members(modules), 3)
    assert found.error < 1e-6 and found.bound <= found.error


def test_member_of_norm_zero_is_left_out():
    members, dense = group(5, 4, near=0.2, lacking=[(3, module) for module in range(3)])
    points = vectors(dense)
    assert not points[3].any()
    for rank in (None, 2):
        found = minimax.minimax(members, rank)
        assert found.weights[3] == found.coefficients[3] == found.errors[3] == 0.0
        X = truncated(dense, found.coefficients, rank or 12)
        np.testing.assert_allclose(found.errors[:3], relative(points[:3], X), rtol=1e-6)
    assert minimax.minimax(members, None).error == pytest.approx(solved(points[:3]), rel=1e-6)


def test_columns_that_cancel_are_norm_zero():
    """[B, −B]·[A; A] is zero, whatever rounding leaves of it."""
    rng = np.random.default_rng(2)
    B, A = rng.standard_normal((16, 2)), rng.standard_normal((2, 12))
    other = rng.standard_normal((16, 2))
    stack = np.hstack([B, -B, other]), np.vstack([A, A, A])
    members = minimax.members([in_common_bases(*stack, [4, 2])])
    assert members.norms[0] == 0.0 and members.norms[1] > 0.0
    assert minimax.minimax(members, 2).weights.tolist() == [0.0, 1.0]


def test_all_zero():
    nothing = [Factors(np.zeros((3, 1)), np.zeros((1, 4))) for _ in range(2)]
    found = minimax.minimax(minimax.members([nothing]), 1)
    assert found.error == found.bound == 0.0 and not found.weights.any()


def test_norms_of_any_size():
    """Scaling everything changes nothing but the norms."""
    for size in (1e-120, 1e120):
        scaled, _ = group(2, 4, near=0.3, sizes=tuple(size * x for x in UNEQUAL[:4]))
        plain, _ = group(2, 4, near=0.3, sizes=UNEQUAL[:4])
        first, second = minimax.minimax(scaled, 2), minimax.minimax(plain, 2)
        assert first.error == pytest.approx(second.error, rel=1e-6)


def test_deterministic_and_bounded():
    members, _ = group(4, 6, near=0.6, sizes=UNEQUAL[:6])
    first, second = minimax.minimax(members, 1), minimax.minimax(members, 1)
    assert first.coefficients.tobytes() == second.coefficients.tobytes()
    calls = 0
    plain = minimax.evaluate

    def counted(*args):
        nonlocal calls
        calls += 1
        return plain(*args)

    minimax.evaluate = counted
    try:
        minimax.minimax(members, 1, steps=5)
    finally:
        minimax.evaluate = plain
    assert calls <= 5 + 3 + 1  # the steps, the starts, the one without light members


def test_enclosing_leaves_a_point_inside_out():
    """The ball of a segment's ends holds a point between them, which gets no weight."""
    points = np.array([[1.0, -0.3], [1.0, 0.3], [1.0, 0.05]])
    squares = ((points[:, None] - points) ** 2).sum(-1)
    weights = enclosing(squares, np.ones(3))
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.0], atol=1e-6)
