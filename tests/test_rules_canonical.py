"""Canonical factors and bases: the same for every gauge, whatever the singular values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.factors import Factors
from adapterops.rules.canonical import balanced, core_bases, knots
from tests import rules_dense_spectral as dense

M, N = 33, 21
SPECTRA = {
    "distinct": [5.0, 3.0, 2.0, 1.0],
    "close": [3.0, 3.0 * (1 - 1e-3), 1.0, 1.0 - 1e-3],
    "repeated": [3.0, 3.0, 3.0, 1.0],
    "equal": [2.0, 2.0, 2.0, 2.0],
    "graded": [1.0, 1e-2, 1e-4, 1e-6],
}


def trim(x: np.ndarray, keep: float = 0.3) -> np.ndarray:
    """An elementwise rule: the largest entries of each."""
    flat = np.abs(x).reshape(len(x), -1)
    limits = np.quantile(flat, 1 - keep, axis=1)
    return np.where(np.abs(x) >= limits[:, None, None], x, 0.0).sum(axis=0)


def trio(spectrum: str) -> list[Factors]:
    values = SPECTRA[spectrum]
    return [dense.adapter(i, M, N, values[: 4 - i % 2]) for i in range(3)]


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_balanced_is_the_adapter_and_the_same_for_every_gauge(spectrum: str):
    one = dense.adapter(1, M, N, SPECTRA[spectrum])
    form = balanced(one)
    np.testing.assert_allclose(form.dense(), one.dense(), atol=1e-14 * 30)
    sizes = [(form.B**2).sum(axis=0), (form.A**2).sum(axis=1)]
    np.testing.assert_allclose(sizes[0], SPECTRA[spectrum], rtol=1e-9)
    np.testing.assert_allclose(sizes[1], sizes[0], rtol=1e-9)
    gram = form.B.T @ form.B
    assert np.abs(gram - np.diag(np.diagonal(gram))).max() < 1e-13 * gram.max()
    for seed in range(3):
        again = balanced(dense.regauged(one, seed))
        limit = {"graded": 1e-8, "close": 1e-11}.get(spectrum, 1e-12)
        np.testing.assert_allclose(again.B, form.B, atol=limit)
        np.testing.assert_allclose(again.A, form.A, atol=limit)


def test_without_the_rotation_of_clusters_equal_values_would_differ():
    """The trap: a plain SVD gives other vectors for another gauge of the same adapter."""
    one = dense.adapter(1, M, N, SPECTRA["repeated"])
    sides = [np.linalg.svd(x.dense())[0][:, :3] for x in (one, dense.regauged(one, 1))]
    angles = scipy.linalg.subspace_angles(*sides)
    assert angles.max() < 1e-12 and np.abs(np.abs(sides[0]) - np.abs(sides[1])).max() > 0.05


@pytest.mark.parametrize("power", [200, 2])
def test_pairs_out_of_balance_and_repeated_columns(power: int):
    one = dense.adapter(1, M, N, [3, 2, 1])
    scale = 2.0 ** np.array([power, -power, 0])
    lopsided = Factors(one.B * scale, one.A / scale[:, None])
    np.testing.assert_allclose(balanced(lopsided).B, balanced(one).B, atol=1e-13)
    doubled = balanced(0.5 * one + 0.5 * one)
    assert doubled.rank == 3
    np.testing.assert_allclose(doubled.B, balanced(one).B, atol=1e-13)
    assert balanced(one - one).rank == 0


def test_structured_columns_with_ties_everywhere():
    """Entries of one size: pivots and signs go to the first, not to the luck of rounding."""
    H = scipy.linalg.hadamard(8).astype(float)
    one = Factors(H[:, 1:4] / np.sqrt(8), H[1:4] / np.sqrt(8))
    form = balanced(one)
    for seed in range(5):
        again = balanced(dense.regauged(one, seed))
        np.testing.assert_allclose(again.B, form.B, atol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_core_bases_hold_the_adapters_and_do_not_depend_on_gauge_or_order(spectrum: str):
    members = trio(spectrum)
    left, right, cores = core_bases(members)
    assert cores.shape == (3, left.shape[1], right.shape[1])
    for basis in (left, right):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-13)
    for one, core in zip(members, cores, strict=True):
        np.testing.assert_allclose(left @ core @ right.T, one.dense(), atol=1e-13)
    limit = 1e-6 if spectrum == "graded" else 1e-9
    merged = left @ trim(cores) @ right.T
    other = [dense.regauged(one, 5 + i) for i, one in enumerate(members)]
    for again in (other, other[::-1]):
        left, right, cores = core_bases(again)
        np.testing.assert_allclose(left @ trim(cores) @ right.T, merged, atol=limit)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_knots_is_the_dense_one(spectrum: str):
    members = trio(spectrum)
    U, blocks = knots(members)
    side = np.concatenate([one.dense() for one in members], axis=1)
    expected = np.linalg.svd(side, full_matrices=False)
    k = U.shape[1]
    np.testing.assert_allclose(U @ np.concatenate(list(blocks), axis=1), side, atol=1e-12)
    stacked = np.concatenate(list(blocks), axis=1)
    np.testing.assert_allclose(np.linalg.norm(stacked, axis=1), expected[1][:k], atol=1e-12)
    gram = stacked @ stacked.T  # ΣVᵀ: its rows are orthogonal
    assert np.abs(gram - np.diag(np.diagonal(gram))).max() < 1e-10
    merged = U @ trim(blocks)
    other = [dense.regauged(one, 5 + i) for i, one in enumerate(members)]
    for again in (other, other[::-1]):
        U, blocks = knots(again)
        np.testing.assert_allclose(
            U @ trim(blocks), merged, atol=1e-6 if spectrum == "graded" else 1e-9
        )


def test_a_rule_on_plain_cores_depends_on_the_gauge():
    """What the canonical bases are for."""
    members = trio("distinct")
    results = []
    for other in (members, [dense.regauged(one, 5) for one in members]):
        left, right, cores = dense.frame(other)
        results.append(left @ trim(cores) @ right.T)
    assert np.linalg.norm(results[0] - results[1]) > 0.1 * np.linalg.norm(results[0])


def test_equal_values_across_adapters():
    """Orthogonal adapters of one spectrum: clusters run across them in both bases."""
    rng = np.random.default_rng(0)
    U, V = dense.orthonormal(rng, M, 6), dense.orthonormal(rng, N, 6)
    members = [Factors(U[:, own], V[:, own].T) for own in (slice(0, 3), slice(3, 6))]
    left, right, cores = core_bases(members)
    turned = [dense.regauged(one, i) for i, one in enumerate(members)][::-1]
    again = core_bases(turned)
    np.testing.assert_allclose(again[0], left, atol=1e-12)
    np.testing.assert_allclose(again[1], right, atol=1e-12)
    np.testing.assert_allclose(again[2][::-1], cores, atol=1e-12)
    np.testing.assert_allclose(knots(turned)[0], knots(members)[0], atol=1e-12)


def test_shared_factors_and_zeros():
    one = dense.adapter(1, M, N, [3, 2, 1])
    shared = Factors(np.random.default_rng(3).standard_normal((M, 3)), one.A)
    zero = Factors(np.zeros((M, 2)), np.zeros((2, N)))
    left, right, cores = core_bases([one, shared, zero])
    assert left.shape == (M, 6) and right.shape == (N, 3) and not cores[2].any()
    np.testing.assert_allclose(left @ cores[1] @ right.T, shared.dense(), atol=1e-13)
    left, right, cores = core_bases([zero, zero])
    assert left.shape == (M, 0) and right.shape == (N, 0) and cores.shape == (2, 0, 0)
    U, blocks = knots([zero, one])
    assert U.shape == (M, 3) and blocks.shape == (2, 3, N) and not blocks[0].any()
    assert knots([zero])[1].shape == (1, 0, N)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
)
def test_any_sizes(seed: int, m: int, n: int, ranks: list[int]):
    """Also more columns than rows: the bases stop at m and n."""
    rng = np.random.default_rng(seed)
    members = [Factors(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for r in ranks]
    left, right, cores = core_bases(members)
    U, blocks = knots(members)
    for one, core, block in zip(members, cores, blocks, strict=True):
        size = max(float(np.linalg.norm(one.dense())), 1.0)
        assert np.linalg.norm(left @ core @ right.T - one.dense()) < 1e-12 * size
        assert np.linalg.norm(U @ block - one.dense()) < 1e-12 * size
        assert np.linalg.norm(balanced(one).dense() - one.dense()) < 1e-12 * size


def test_the_numerical_rank_of_small_matrices_does_not_waver():
    """A sum with itself in another gauge has no more directions, whatever rounding does."""
    for seed in range(300):
        one = dense.adapter(seed, 3, 5, [2.0, 1.0])
        total = Factors(
            np.hstack([dense.regauged(one, seed + i).B for i in range(4)]),
            np.vstack([0.9**i * dense.regauged(one, seed + i).A for i in range(4)]),
        )
        assert balanced(total).rank == 2
        assert core_bases([one, total])[2].shape == (2, 2, 2)
        assert knots([one, total])[1].shape == (2, 2, 5)


def test_torch_factors_give_numpy():
    torch = pytest.importorskip("torch")
    one = dense.adapter(1, M, N, [3, 2, 1])
    again = balanced(Factors(torch.from_numpy(one.B), torch.from_numpy(one.A)))
    assert isinstance(again.B, np.ndarray)
    np.testing.assert_array_equal(again.B, balanced(one).B)
