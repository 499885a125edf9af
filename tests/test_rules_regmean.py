"""RegMean against the dense formula: both routes, singular moments, weights, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.errors import FormatError, IncompatibleError, NumericsError, UsageError
from adapterops.rules.registry import Moments, Pair, find

M, N = 9, 14
Array = np.ndarray


def pair(seed: int, rank: int, scale: float = 1.0, m: int = M, n: int = N) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(rng.standard_normal((m, rank)), rng.standard_normal((rank, n)), scale)


def moments(seed: int, kind: Any, count: int = 40, n: int = N) -> Moments:
    """Inputs with correlations, and some numbers much larger than others."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((count, n)) @ rng.standard_normal((n, n)) * np.logspace(0, 1, n)
    return Moments(kind, X if kind == "samples" else X.T @ X / count)


def delta(one: Pair) -> Array:
    return one.scale * one.B @ one.A


def gram(known: Moments) -> Array:
    X = known.matrix
    return X if known.kind == "gram" else X.T @ X / len(X)


def dense(
    pairs: list[Pair], w: list[float], inputs: list[Moments], reduce: float, ridge: float
) -> Array:
    """Jin et al. 2023 with weights, from moments as they are."""
    G = [gram(each) for each in inputs]
    sizes = np.abs(w) / np.abs(w).sum()
    level = ridge * np.mean(sum(c * np.diag(g) for c, g in zip(sizes, G, strict=True)))
    H = [reduce * g + (1 - reduce) * np.diag(np.diag(g)) + level * np.eye(len(g)) for g in G]
    right = sum(c * delta(x) @ h for c, x, h in zip(w, pairs, H, strict=True))
    left = sum(abs(c) * h for c, h in zip(w, H, strict=True))
    return np.linalg.solve(left, right.T).T


def run(pairs: list[Pair], w: list[float], inputs: list[Moments], **given: Any) -> Array:
    one = find("regmean")
    B, A = one.function(pairs, np.array(w, float), inputs, **one.values(given))
    assert B.shape[1] == A.shape[0] <= one.columns([x.A.shape[0] for x in pairs], {})
    assert B.dtype == A.dtype == np.float64
    return B @ A


W = [0.5, 1.5, -0.7]
PAIRS = [pair(0, 3, 2.0), pair(1, 2, 0.5), pair(2, 4, 1.0)]


@pytest.mark.parametrize("reduce", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
@pytest.mark.parametrize(
    "inputs",
    [
        [moments(i, "gram") for i in range(3)],
        [moments(i, "samples", 3 + i) for i in range(3)],  # 12 < 14: thin
        [moments(i, "samples", 5 + i) for i in range(3)],  # 18: by S itself
        [moments(0, "gram"), moments(1, "samples", 4), moments(2, "samples", 30)],
    ],
    ids=["gram", "thin", "samples", "mixed"],
)
def test_it_is_the_dense_formula(inputs: list[Moments], reduce: float, ridge: float):
    expected = dense(PAIRS, W, inputs, reduce, ridge)
    result = run(PAIRS, W, inputs, reduce=reduce, ridge=ridge)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(result - expected) <= 1e-7 * size  # the reference's own condition
    assert size > 0.1


@pytest.mark.parametrize("reduce", [1.0, 0.9])
def test_both_routes_agree(reduce: float):
    thin = [moments(i, "samples", 4) for i in range(3)]
    full = [Moments("gram", gram(each)) for each in thin]
    one, other = (run(PAIRS, W, each, reduce=reduce, ridge=1e-4) for each in (thin, full))
    np.testing.assert_allclose(one, other, atol=1e-9 * np.abs(other).max())


@pytest.mark.parametrize("kind", ["gram", "samples"])
def test_it_is_least_squares_on_the_adapters_own_outputs(kind: str):
    """No change of the result brings its outputs nearer to what each adapter gives."""
    inputs = [moments(i, kind, 50) for i in range(3)]
    result = run(PAIRS, [1, 2, 1], inputs, reduce=1.0, ridge=1e-12)

    def cost(D: Array) -> float:
        terms = zip([1, 2, 1], PAIRS, inputs, strict=True)
        return sum(c * np.trace((D - delta(x)) @ gram(g) @ (D - delta(x)).T) for c, x, g in terms)

    least = cost(result)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            assert cost(result + size * rng.standard_normal(result.shape)) > least


def test_directions_that_no_input_takes_get_the_weighted_mean():
    """Two inputs of a 14-dimensional space each: in the ten others the adapters are averaged."""
    inputs = [moments(i, "samples", 2) for i in range(2)]
    pairs, w = PAIRS[:2], [1.0, 3.0]
    result = run(pairs, w, inputs, reduce=1.0, ridge=1e-9)
    seen = np.concatenate([each.matrix for each in inputs])
    unseen = np.linalg.svd(seen)[2][4:].T
    mean = (delta(pairs[0]) + 3 * delta(pairs[1])) / 4
    np.testing.assert_allclose(result @ unseen, mean @ unseen, atol=1e-5)
    assert np.abs(mean @ unseen).max() > 0.1
    for one, each in zip(pairs, inputs, strict=True):  # and on its inputs each is itself
        np.testing.assert_allclose(
            result @ each.matrix.T,
            delta(one) @ each.matrix.T,
            atol=1e-3 * np.abs(each.matrix).max(),
        )


def test_nothing_blows_up_where_the_moments_are_singular():
    one = np.zeros((N, N))
    one[0, 0] = 1.0
    for reduce in (1.0, 0.9):
        inputs = [Moments("gram", one), Moments("gram", 4 * one)]
        result = run(PAIRS[:2], [1, 1], inputs, reduce=reduce)
        mean = (delta(PAIRS[0]) + delta(PAIRS[1])) / 2
        np.testing.assert_allclose(result[:, 1:], mean[:, 1:], rtol=1e-9)
        first = (delta(PAIRS[0]) + 4 * delta(PAIRS[1]))[:, 0] / 5
        np.testing.assert_allclose(result[:, 0], first, rtol=1e-4)
    dead = [Moments("gram", 0 * one)] * 2  # no input at all
    np.testing.assert_allclose(run(PAIRS[:2], [1, 1], dead), mean, rtol=1e-12)
    dead = [Moments("samples", np.zeros((2, N)))] * 2
    np.testing.assert_allclose(run(PAIRS[:2], [1, 1], dead), mean, rtol=1e-12)


def test_the_ridge_and_reduce_matter():
    inputs = [moments(i, "samples", 4) for i in range(3)]
    plain = run(PAIRS, W, inputs, reduce=1.0)
    size = np.linalg.norm(plain)
    assert np.linalg.norm(run(PAIRS, W, inputs) - plain) > 0.01 * size
    assert np.linalg.norm(run(PAIRS, W, inputs, reduce=1.0, ridge=0.5) - plain) > 0.01 * size


def test_equal_moments_give_the_weighted_mean():
    """And a negative weight turns its adapter round and still counts in the divisor."""
    inputs = [moments(0, "gram")] * 3
    expected = sum(c * delta(x) for c, x in zip(W, PAIRS, strict=True)) / np.abs(W).sum()
    np.testing.assert_allclose(run(PAIRS, W, inputs), expected, atol=1e-10)
    np.testing.assert_allclose(run(PAIRS, [7 * c for c in W], inputs), expected, atol=1e-10)


def test_the_number_of_inputs_does_not_matter_but_their_kind_does():
    """Moments are means: the same samples twice over change nothing."""
    thin = [moments(i, "samples", 3) for i in range(3)]
    more = [Moments("samples", np.concatenate([x.matrix] * k)) for k, x in enumerate(thin, 1)]
    np.testing.assert_allclose(run(PAIRS, W, thin), run(PAIRS, W, more), atol=1e-8)


def test_the_column_space_stays():
    inputs = [moments(i, "samples", 3) for i in range(3)]
    one = find("regmean")
    B, _ = one.function(PAIRS, np.array(W), inputs, **one.values({}))
    np.testing.assert_array_equal(B, np.concatenate([x.B for x in PAIRS], axis=1))


def test_adapters_of_zeros_and_of_weight_zero_are_as_if_absent():
    """Their inputs are not even looked at."""
    inputs = [moments(i, "samples", 3) for i in range(3)]
    nothing = Pair(np.zeros((M, 2)), np.ones((2, N)))
    unread: Any = None
    more = run(
        [*PAIRS, nothing, PAIRS[0], Pair(PAIRS[0].B, PAIRS[0].A, 0.0)],
        [*W, 5.0, 0.0, 1.0],
        [*inputs, unread, unread, unread],
    )
    np.testing.assert_allclose(more, run(PAIRS, W, inputs), atol=1e-13)
    assert run([nothing], [1.0], [unread]).shape == (M, N)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    reduce=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_sizes(seed: int, n: int, counts: list[int], reduce: float):
    pairs = [pair(seed + i, 2, 1.0, 3, n) for i in range(len(counts))]
    inputs = [moments(seed + i, "samples", k, n) for i, k in enumerate(counts)]
    w = np.random.default_rng(seed).uniform(0.1, 1, len(counts)).tolist()
    result = run(pairs, w, inputs, reduce=reduce, ridge=1e-3)
    expected = dense(pairs, w, inputs, reduce, 1e-3)
    assert np.linalg.norm(result - expected) <= 1e-9 * (1 + np.linalg.norm(expected))


def test_what_is_refused():
    good = moments(0, "gram")
    bad = good.matrix.copy()
    bad[0, 1] = np.nan
    for other in (Moments("gram", bad), Moments("samples", bad)):
        with pytest.raises(NumericsError, match="inputs of adapter 2 hold NaN"):
            run(PAIRS[:2], [1, 1], [good, other])
    for other in (moments(1, "gram", n=N + 1), moments(1, "samples", n=N - 1)):
        with pytest.raises(IncompatibleError, match=r"adapter 2 are .* the module takes 14"):
            run(PAIRS[:2], [1, 1], [good, other])
    skew = good.matrix.copy()
    skew[0, 1] *= 3
    for matrix in (skew, -good.matrix):
        with pytest.raises(FormatError, match="second moments"):
            run(PAIRS[:2], [1, 1], [good, Moments("gram", matrix)])
    for name, value in (("ridge", 0), ("ridge", -1), ("reduce", 1.1), ("reduce", -0.1)):
        with pytest.raises(UsageError, match=name):
            run(PAIRS, W, [good] * 3, **{name: value})


def test_moments_that_rounding_made_indefinite_are_an_error_with_a_way_out():
    direction = np.ones((N, 1)) / np.sqrt(N)
    broken = Moments("gram", np.eye(N) - 1.01 * direction @ direction.T)
    with pytest.raises(NumericsError, match="raise ridge, or lower reduce"):
        run(PAIRS[:1], [1], [broken], reduce=1.0)
    np.testing.assert_allclose(run(PAIRS[:1], [1], [broken]), delta(PAIRS[0]), atol=1e-12)
