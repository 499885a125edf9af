"""Calibrating adapters and results against dense ones; which directions count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterops.errors import NumericsError
from adapterops.factors import Factors
from adapterops.rules import cuts, modify, spectral
from tests import rules_dense_spectral as dense
from tests.test_rules_spectral import SPECTRA, M, N, W, trio


def test_pico_is_the_dense_one():
    members = trio()
    left, right, cores = dense.frame(members)
    expected = dense.pico([one.dense() for one in members], [4, 3, 4])
    found = modify.pico(cores, np.array(W))
    for core, D in zip(found, expected, strict=True):
        np.testing.assert_allclose(left @ core @ right.T, D, atol=1e-12)
    one = [members[0], 0 * members[1]]
    np.testing.assert_allclose(
        modify.pico(dense.frame(one)[2], np.ones(2)), dense.frame(one)[2], atol=1e-15
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_modifiers_do_not_depend_on_the_gauge(spectrum: str):
    results = []
    for members in (trio(spectrum), [dense.regauged(one, 3) for one in trio(spectrum)]):
        left, right, cores = dense.frame(members)
        calibrated = modify.pico(cores, np.array(W))
        flat = spectral.iso_c(  # its equal singular values are the hard case
            cores, np.array(W), np.zeros(3), alpha=1.0, scale="norm", cut=1e-3
        ).core
        for core in (np.tensordot(W, calibrated, 1), np.tensordot(W, cores, 1), flat):
            post = modify.svc(core, cores, np.array(W), np.zeros(3))
            results.append(left @ post @ right.T)
            results.append(left @ core @ right.T)
    for first, second in zip(results[:6], results[6:], strict=True):
        assert np.linalg.norm(first - second) < 1e-10 * np.linalg.norm(first)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_svc_is_the_dense_one(alpha: float | None):
    members = trio(seed=2)
    left, right, cores = dense.frame(members)
    w = np.array([1.0, 0.5, 2.0])
    core = np.tensordot(w, cores, 1)
    floor = 1 / 3 if alpha is None else alpha
    merged = left @ core @ right.T
    expected = dense.svc(merged, [one.dense() for one in members], w, 11, floor)
    found = modify.svc(core, cores, w, np.zeros(3), alpha=alpha)
    np.testing.assert_allclose(left @ found @ right.T, expected, atol=1e-11)


def test_svc_leaves_directions_of_one_adapter_and_halves_those_of_two():
    U, V = (dense.orthonormal(np.random.default_rng(i), size, 4) for i, size in ((1, M), (2, N)))
    one = Factors(U[:, :2] * [3.0, 1.0], V[:, :2].T)
    two = Factors(U[:, [0, 3]] * [3.0, 0.7], V[:, [0, 3]].T)
    left, right, cores = dense.frame([one, two])
    merged = modify.svc(cores.sum(axis=0), cores, np.ones(2), np.zeros(2))
    values = np.linalg.svd(left @ merged @ right.T, compute_uv=False)[:3]
    np.testing.assert_allclose(values, [3.0, 1.0, 0.7], rtol=1e-12)  # 6 was counted twice


def test_norm_factor():
    members = trio()
    cores = dense.frame(members)[2]
    w = np.array([2.0, 0.0, -1.0])
    a = math.sqrt(sum(x * x for x in SPECTRA["distinct"]))
    c = a / 2
    size = float(np.linalg.norm(np.tensordot(w, cores, 1)))
    norms = np.linalg.norm(cores, axis=(1, 2))
    for to, expected in {"mean": (2 * a + c) / 3, "max": a, "sum": 2 * a + c}.items():
        factor = modify.norm_factor(size, norms, w, to)  # type: ignore[arg-type]
        assert size * factor == pytest.approx(expected, rel=1e-12)
    assert modify.norm_factor(0.0, 0 * norms, w, "mean") == 1.0
    assert modify.norm_factor(0.0, norms, w, "mean") == 1.0
    with pytest.raises(NumericsError, match="zero up to rounding"):
        modify.norm_factor(1e-14 * size, norms, w, "mean")


def test_an_isometry_judges_columns_at_their_strengths():
    """A strong pair 0.02 apart has a difference, a weak pair 0.2 apart is one direction."""
    E = np.eye(6)
    angles = ((0, 0.0), (0, 0.02), (2, 0.0), (2, 0.2))
    columns = np.stack([math.cos(x) * E[i] + math.sin(x) * E[i + 1] for i, x in angles], axis=1)
    found = cuts.isometry(columns, np.array([1, 1, 5e-3, 5e-3]), 1.4e-3)
    assert found.rank == 3 and found.gap < 0.2
    inside = found.matrix.T @ found.matrix
    np.testing.assert_allclose(inside @ [1, -1, 0, 0], [1, -1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(inside @ [0, 0, 1, -1], 0, atol=1e-12)
    nearest = columns @ inside  # with the difference gone, the polar factor of what is left
    np.testing.assert_allclose(found.matrix, dense.polar(nearest), atol=1e-10)


def test_clusters_follow_the_largest_value():
    values = np.array([2.0, 2.0 - 1e-8, 1.0, 1.0 - 3e-8, 1e-9, 0.0])
    assert [(run.start, run.stop) for run in cuts.clusters(values)] == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 6),
    ]
    assert cuts.clusters(np.zeros(0)) == []
    assert cuts.above(values, 0.5, 1) == 2 and cuts.above(values, 0.5) == 4
    assert cuts.above(values, 3.0) == 0 == cuts.above(values, 3.0, 1)
    assert cuts.above(values, 1e-12) == 5  # what is next to a small one does not come with it
