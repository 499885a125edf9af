"""The sampled conflict of signs: unbiased, within its error, the same whatever else is there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterops.analysis.signs import Signs, conflict, entries, signs

SIZES = {"small": (37, 29), "wide": (60, 200), "tall": (300, 40)}


def planted(seed: int, cosine: float) -> dict[str, np.ndarray]:
    """Three dense matrices for each module (3, m, n), low-rank, of uneven columns."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (m, n) in SIZES.items():
        first, other, third = (
            rng.standard_normal((m, 3)) @ (rng.standard_normal((3, n)) * rng.gamma(1, 1, n))
            for _ in range(3)
        )
        second = cosine * first + math.sqrt(1 - cosine**2) * other
        found[name] = np.stack([first, second, 0.1 * third])
    return found


def exact(matrices: dict[str, np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """The share of entries, and of mass, of the first two in which signs differ."""
    x, y = (
        np.concatenate([weights[i] * one[i].ravel() for one in matrices.values()]) for i in (0, 1)
    )
    mass, apart = abs(x) + abs(y), x * y < 0
    return float(apart.mean()), float(mass[apart].sum() / mass.sum())


def sampled(
    matrices: dict[str, np.ndarray], weights: np.ndarray, seed: int, count: int
) -> list[Signs]:
    found = []
    for name, one in matrices.items():
        i, j = entries(seed, name, one.shape[1:], count)
        found.append(signs(one[:, i, j], weights, one[0].size))
    return found


@pytest.mark.parametrize("cosine", [0.0, 0.9, -0.7, 0.999])
def test_within_four_standard_errors(cosine: float) -> None:
    matrices, weights = planted(1, cosine), np.array([1.0, 0.5, 2.0])
    wanted = exact(matrices, weights)
    z = []
    for seed in range(300):
        found = conflict(sampled(matrices, weights, seed, 400), 0)
        assert found is not None and found.entries == 3 * 400
        z.append(
            [
                (found.count - wanted[0]) / found.count_error,
                (found.mass - wanted[1]) / found.mass_error,
            ]
        )
    scores = np.array(z)
    assert np.abs(scores).max() < 4.5 and (np.abs(scores) > 4).sum() <= 1
    assert np.all(np.abs(scores.mean(0)) < 0.3)  # unbiased
    assert np.all(scores.std(0) < 1.15)  # the error is no smaller than it is said to be
    if cosine < 0.9:
        assert np.all(scores.std(0) > 0.8)  # and not much larger


def test_all_entries_are_exact() -> None:
    matrices, weights = planted(2, 0.3), np.array([1.0, -1.0, 0.0])
    found = conflict(sampled(matrices, weights, 0, 10**6), 0)
    assert found is not None
    assert (found.count, found.mass) == pytest.approx(exact(matrices, weights), rel=1e-12)
    assert found.count_error == found.mass_error == 0.0


def test_what_does_not_count() -> None:
    values = np.array([[1.0, 1.0, 0.0, -1.0], [1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    part = [signs(values, np.ones(3), 4)]
    pairs = [conflict(part, place) for place in (0, 1, 2, -1)]
    assert pairs[0] is not None and pairs[0].count == pairs[0].mass == 0.5
    assert pairs[1] is pairs[2] is None
    assert pairs[3] is not None and pairs[3].count == 0.5
    assert conflict([signs(values, np.array([1.0, 0.0, 1.0]), 4)], -1) is None


def test_no_conflict_found_is_not_certain_from_a_sample() -> None:
    x = np.ones((2, 50, 40))
    i, j = entries(0, "m", (50, 40), 100)
    found = conflict([signs(x[:, i, j], np.ones(2), 2000)], 0)
    assert found is not None and found.count == 0.0 and found.count_error == pytest.approx(0.01)


def test_entries_are_uniform_and_fixed() -> None:
    i, j = entries(3, "layers.0.q", (7, 11), 20)
    assert len(i) == 20
    again = entries(3, "layers.0.q", (7, 11), 20)
    assert (again[0] == i).all() and (again[1] == j).all()
    more = entries(3, "layers.0.q", (7, 11), 70)
    assert (more[0][:20] == i).all() and (more[1][:20] == j).all()
    for seed, stem in ((4, "layers.0.q"), (3, "layers.1.q")):
        assert (entries(seed, stem, (7, 11), 20)[0] != i).any()
    i, j = entries(0, "m", (300, 500), 60_000)
    table = np.histogram2d(i, j, [10, 10], [[0, 300], [0, 500]])[0]
    expected = 600.0
    assert ((table - expected) ** 2 / expected).sum() < 150  # χ², 99 degrees of freedom
    assert (i.min(), i.max(), j.min(), j.max()) == (0, 299, 0, 499)
    everything = entries(0, "m", (3, 4), 12)
    assert sorted(zip(*map(np.ndarray.tolist, everything), strict=True)) == [
        (a, b) for a in range(3) for b in range(4)
    ]
