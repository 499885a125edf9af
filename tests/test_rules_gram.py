"""Gram methods against dense vectors; what happens at angles of 0 and π, without and with zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.errors import NumericsError, UsageError
from adapterops.rules import gram  # registers them
from adapterops.rules.registry import METHODS, find
from tests import rules_dense_spectral as dense

NAMES = [name for name, one in METHODS.items() if one.function.__module__ == gram.__name__]


def deltas(seed: int, count: int, shared: float = 0.7) -> list[np.ndarray]:
    """Matrices with positive cosines among them and different norms."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((7, 5))
    return [
        (1 + 0.3 * k) * (shared * common + (1 - shared) * rng.standard_normal((7, 5)))
        for k in range(count)
    ]


def run(name: str, D: list[np.ndarray], w: list[float], **given: object) -> np.ndarray:
    one = find(name)
    c = one.function(dense.gram(D), np.array(w), **one.arguments(one.values(given)))
    assert c.shape == (len(D),) and np.isfinite(c).all()
    return np.tensordot(c, np.stack(D), 1)


def test_these_are_registered():
    assert NAMES == ["linear", "slerp", "nuslerp", "karcher", "model_stock"]


def test_linear_is_the_weighted_sum_and_normalises_only_when_asked():
    D = deltas(0, 3)
    expected = 2 * D[0] - 0.5 * D[1] + 0.1 * D[2]
    np.testing.assert_allclose(run("linear", D, [2, -0.5, 0.1]), expected, rtol=1e-14)
    mean = run("linear", D, [2, -0.5, 0.1], normalize=True)
    np.testing.assert_allclose(mean, expected / 1.6, rtol=1e-14)
    zero = [np.zeros_like(D[0]), D[1]]  # an absent adapter is zero, its weight still divides
    np.testing.assert_allclose(run("linear", zero, [1, 1], normalize=True), D[1] / 2, rtol=1e-15)
    with pytest.raises(UsageError, match="add up to"):
        run("linear", D, [0.1, 0.2, -(0.1 + 0.2)], normalize=True)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_the_arc(t: float):
    D = deltas(1, 2, 0.3)
    cosine = float((D[0] * D[1]).sum() / np.linalg.norm(D[0]) / np.linalg.norm(D[1]))
    theta = math.acos(cosine)
    expected = (math.sin((1 - t) * theta) * D[0] + math.sin(t * theta) * D[1]) / math.sin(theta)
    np.testing.assert_allclose(run("slerp", D, [1, 1], t=t), expected, rtol=1e-12)
    np.testing.assert_allclose(run("slerp", D, [3, 3], t=t), 3 * expected, rtol=1e-12)
    turned = run("slerp", [D[0], -D[1]], [1, -1], t=t)
    np.testing.assert_allclose(turned, expected, rtol=1e-12)
    shares = [1 - t, t]
    np.testing.assert_allclose(run("nuslerp", D, shares), expected, rtol=1e-12)
    np.testing.assert_allclose(run("nuslerp", D, [7 * x for x in shares]), expected, rtol=1e-12)


@given(st.floats(-17, 0.49), st.floats(0, 1))
def test_slerp_between_angles_of_zero_and_near_opposite(exponent: float, t: float):
    theta = 10.0**exponent
    x, y = np.array([[1.0, 0.0]]), np.array([[math.cos(theta), math.sin(theta)]])
    if theta > math.pi - 1e-3:
        with pytest.raises(NumericsError, match="opposite"):
            run("slerp", [x, y], [1, 1], t=t)
        return
    result = run("slerp", [x, y], [1, 1], t=t)
    expected = np.array([[math.cos(t * theta), math.sin(t * theta)]])
    np.testing.assert_allclose(result, expected, atol=1e-8 if theta > 3 else 1e-13)


def test_angles_below_what_the_gram_matrix_resolves_change_nothing():
    """‖x − y‖² = 2 − 2cos is lost below 1e-8, and the arc is its chord there to 1e-16."""
    for theta in np.logspace(-16, -6, 41):
        found = gram.angle(math.cos(theta))
        assert abs(found - theta) <= max(4e-8, 2.0**-51 / theta)
        first, second = gram.arc(found, 0.3)
        assert first == pytest.approx(math.sin(0.7 * theta) / math.sin(theta), rel=1e-12)
        assert second == pytest.approx(math.sin(0.3 * theta) / math.sin(theta), rel=1e-12)


def test_how_near_to_opposite_is_too_near():
    x = np.array([[1.0, 0.0]])
    for short, refused in ((2e-3, False), (5e-4, True), (1e-9, True)):
        y = np.array([[-math.cos(short), math.sin(short)]])
        if refused:
            with pytest.raises(NumericsError, match="opposite"):
                run("slerp", [x, y], [1, 1])
        else:
            assert np.linalg.norm(run("slerp", [x, y], [1, 1])) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher"])
def test_opposite_adapters_are_refused(name: str):
    [D] = deltas(2, 1)
    with pytest.raises(NumericsError, match=r"opposite|cancel"):
        run(name, [D, -D], [1, 1])
    with pytest.raises(NumericsError, match=r"opposite|cancel"):
        run(name, [D, D], [1, -1])
    np.testing.assert_allclose(run(name, [D, -D], [1, -1]), D, rtol=1e-12)


@pytest.mark.parametrize("name", ["karcher", "nuslerp"])
def test_karcher_has_no_tangent_left_and_two_adapters_meet_on_the_arc(name: str):
    D = deltas(3, 5 if name == "karcher" else 2, 0.4)
    w = np.array([1, 2, 0.5, 3, 1.5])[: len(D)]
    x = run(name, D, w.tolist()).ravel()
    u = [d.ravel() / np.linalg.norm(d) for d in D]
    x = x / np.linalg.norm(x) if name == "karcher" else x
    if name == "karcher":
        length = np.linalg.norm(run(name, D, w.tolist()))
        assert length == pytest.approx(dense.mean_norm(D, w), rel=1e-12)
        rest = sum(c * dense.log_map(x, v) for c, v in zip(w, u, strict=True))
        assert np.linalg.norm(rest) < 1e-9 * w.sum()
        return
    unit = [v.reshape(D[0].shape) for v in u]
    np.testing.assert_allclose(
        run("karcher", unit, w.tolist()), run("nuslerp", unit, w.tolist()), atol=1e-9
    )


def test_karcher_minimises_squared_angles():
    D, w = deltas(4, 4, 0.2), np.array([1.0, 2.0, 3.0, 0.5])
    u = np.stack([d.ravel() / np.linalg.norm(d) for d in D])
    x = run("karcher", D, w.tolist()).ravel()

    def cost(point: np.ndarray) -> float:
        return float(w @ np.arccos(u @ point / np.linalg.norm(point)) ** 2)

    rng = np.random.default_rng(0)
    x /= np.linalg.norm(x)
    assert all(cost(x) < cost(x + 1e-4 * rng.standard_normal(len(x))) for _ in range(50))


def test_karcher_says_when_it_does_not_settle():
    with pytest.raises(NumericsError, match="the last of 1 steps"):
        run("karcher", deltas(5, 4, 0.2), [1, 2, 3, 4], max_iter=1)


def test_karcher_settles_among_near_copies():
    """Steps below what the Gram matrix resolves must end it, not run on or fail."""
    [D] = deltas(6, 1)
    rng = np.random.default_rng(1)
    twins = [D + 10.0**-k * rng.standard_normal(D.shape) for k in (16, 12, 9, 7)]
    found = run("karcher", [D, *twins], [1, 1, 1, 1, 1], tol=0.0)
    np.testing.assert_allclose(found, sum([D, *twins]) / 5, rtol=1e-10)


def test_model_stock():
    D = deltas(7, 3, 0.5)
    unit = [d.ravel() / np.linalg.norm(d) for d in D]
    q = np.mean([unit[i] @ unit[j] for i in range(3) for j in range(i)])
    t = 3 * q / (1 + 2 * q)
    assert 0 < t < 1
    np.testing.assert_allclose(run("model_stock", D, [1, 1, 1]), t * sum(D) / 3, rtol=1e-12)
    as_given = run("model_stock", D, [1, 1, 1], normalize=False)
    np.testing.assert_allclose(as_given, t * sum(D), rtol=1e-12)


@pytest.mark.parametrize("q", [-0.5 + 1e-12, -0.3, 0.0])
def test_model_stock_stays_within_bounds_where_adapters_disagree(q: float):
    """At q = −1/(T−1) the formula divides by zero; below 0 it would turn the mean round."""
    G = np.full((3, 3), q) + (1 - q) * np.eye(3)
    assert not find("model_stock").function(G, np.ones(3), normalize=False).any()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_as_if_absent(name: str):
    pair = find(name).most == 2
    D = deltas(8, 2)
    zero = np.zeros_like(D[0])
    assert not run(name, [zero, zero], [1, 1]).any()
    assert not run(name, D, [0, 0]).any()
    np.testing.assert_allclose(run(name, [D[0], zero], [1, 1]), D[0], rtol=1e-12)
    np.testing.assert_allclose(run(name, D, [0, 1]), D[1], rtol=1e-12)
    if not pair:
        some = run(name, [zero, D[0], D[1], D[0]], [1, 0.4, -0.6, 0])
        np.testing.assert_allclose(some, run(name, D, [0.4, -0.6]), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_declared_laws(name: str, seed: int):
    one = find(name)
    count = one.most or 4
    rng = np.random.default_rng(seed)
    D, w = deltas(seed, count, 0.5), rng.uniform(0.2, 2, count).tolist()
    order = [1, 0] if count == 2 else rng.permutation(count).tolist()
    given: dict[str, object] = {"t": 0.5} if name == "slerp" else {}
    result = run(name, D, w, **given)
    permuted = run(name, [D[i] for i in order], [w[i] for i in order], **given)
    np.testing.assert_allclose(permuted, result, atol=1e-9)
    if "identity" in one.laws:
        first = run(name, D, [1.0] + [0.0] * (count - 1), **given)
        np.testing.assert_allclose(first, D[0], rtol=1e-12)
    if "copies" in one.laws:
        copies = run(name, [D[0]] * count, [1 / count] * count, **given)
        np.testing.assert_allclose(copies, D[0], rtol=1e-12)
    if "homogeneous" in one.laws:
        scaled = run(name, [1e-3 * d for d in D], w, **given)
        np.testing.assert_allclose(scaled, 1e-3 * result, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "count", "w", "given", "theirs"),
    [
        ("slerp", 2, [1, 1], {"t": 0.3}, {"t": 0.3}),
        ("nuslerp", 2, [0.7, 0.3], {}, {"weight": [0.7, 0.3]}),
        ("karcher", 4, [1, 1, 1, 1], {}, {"max_iter": 200, "tol": 1e-12}),
        ("model_stock", 3, [1 / 3] * 3, {}, {}),
        ("linear", 3, [0.5, -0.2, 1], {}, {"weight": [0.5, -0.2, 1], "normalize": False}),
        ("linear", 2, [0.5, 2], {"normalize": True}, {"weight": [0.5, 2]}),
    ],
)
def test_mergekit_agrees(name: str, count: int, w: list[float], given: dict, theirs: dict):
    """On deltas; its Karcher mean has no weights, its model stock multiplies the mean."""
    torch = pytest.importorskip("torch")
    api = pytest.importorskip("mergekit.merge_methods")
    D = deltas(9, count, 0.4)
    tensors, base = [torch.from_numpy(d) for d in D], None
    if name == "model_stock":
        tensors, base = [torch.zeros_like(tensors[0]), *tensors], 0
    if name == "slerp":  # it takes its arc row by row: the whole as one row
        tensors, base = [x.reshape(1, -1) for x in tensors], 0
    merged = api.merge_tensors(tensors, name, parameters=theirs, base_index=base)
    np.testing.assert_allclose(
        run(name, D, w, **given), merged.numpy().reshape(D[0].shape), atol=2e-6
    )
