"""Exact order statistics from blocks: against sorting, for any blocks, ties and odd numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adapterops.errors import NumericsError
from adapterops.rules import limits as module
from adapterops.rules.limits import NEAR, limits, share

KINDS = [np.float32, np.float64]
ROUTES = ["gathered", "searched"]


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Small matrices are gathered; with no room for that they go the way of large ones."""
    if request.param == "searched":
        monkeypatch.setattr(module, "_SMALL", 0)
    return request.param


def blocks(X, rows):
    return lambda: iter([X[:, at : at + rows] for at in range(0, X.shape[1], rows)])


def kth(X, k):
    sizes = -np.sort(-np.abs(X.reshape(len(X), -1)), axis=1)
    return np.inf if k == 0 else sizes[:, k - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_those_of_sorting(route, kind):
    X = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(kind)
    X[1] *= 1e-30  # another scale, another exponent
    X[2, :5] = 0
    ranks = [0, 1, 2, 20, 400, 1000, 1999]
    found = limits(blocks(X, 16), 2000, ranks)
    for at, k in enumerate(ranks):
        assert np.array_equal(found.values[:, at], np.broadcast_to(kth(X, k), 3))
    assert found.values.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_blocks_and_their_order_do_not_matter(route, kind, rows):
    X = np.random.default_rng(1).standard_normal((2, 100, 30)).astype(kind)
    whole = limits(blocks(X, 100), 3000, [30, 600])
    parts = limits(blocks(X, rows), 3000, [30, 600])
    back = limits(blocks(X[:, ::-1], rows), 3000, [30, 600])
    for one in (parts, back):
        assert np.array_equal(one.values, whole.values)
        assert np.array_equal(one.near, whole.near)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_blocks_are_numpy_blocks(kind):
    X = np.random.default_rng(2).standard_normal((2, 600, 500)).astype(kind)
    one = limits(blocks(X, 64), 300000, [60000])
    other = limits(blocks(torch.from_numpy(X), 64), 300000, [60000])
    assert np.array_equal(one.values, other.values) and np.array_equal(one.near, other.near)


def test_threads_do_not_matter():
    X = torch.randn(1, 600, 500, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(limits(blocks(X, 100), 300000, [1234]).values)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


def test_both_routes_agree_on_a_large_matrix(monkeypatch):
    X = np.random.default_rng(3).standard_normal((1, 600, 500)).astype(np.float32)
    searched = limits(blocks(X, 64), 300000, [1, 60000, 299999])
    monkeypatch.setattr(module, "_SMALL", 1 << 30)
    gathered = limits(blocks(X, 64), 300000, [1, 60000, 299999])
    assert np.array_equal(searched.values, gathered.values)
    assert np.array_equal(searched.near, gathered.near)


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_two_passes_of_float32_and_three_of_float64(kind, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", 0)
    X = np.random.default_rng(4).standard_normal((2, 20, 20)).astype(kind)
    passes, blocks_seen = 0, 0

    def counted():
        nonlocal passes, blocks_seen
        passes += 1
        for at in range(0, 20, 5):
            blocks_seen += 1
            yield X[:, at : at + 5]

    limits(counted, 400, [80, 300])
    expected = 2 if kind is np.float32 else 3
    assert blocks_seen == 4 * expected + 1  # and one to see what they are


def test_ranks_at_the_ends_need_no_pass():
    X = np.full((2, 3, 4), np.nan, np.float32)
    found = limits(blocks(X, 1), 12, [0, 12])
    assert found.values.tolist() == [[np.inf, 0], [np.inf, 0]]
    assert found.near.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_ties_share_their_limit(route, kind):
    X = np.array([[3, -2, 2, 2, -1, 0, 0, 0]], kind).reshape(1, 2, 4)
    found = limits(blocks(X, 1), 8, [2, 3, 4, 5, 6])
    assert found.values.tolist() == [[2, 2, 2, 1, 0]]
    assert found.near.tolist() == [[3, 3, 3, 1, 3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0 - 2.0**-20, 1.0 + 2.0**-7, 2.0**-100, 3e-41])
def test_near_counts_what_lies_within_two_to_the_minus_twenty(route, kind, limit):
    """Also across a power of two and across the digits that a pass counts."""
    limit = float(kind(limit))
    steps = np.array([0, 0.5, -0.5, 0.99, -0.99, 1.2, -1.2, 3, -3]) * NEAR
    X = (limit * (1 + steps)).astype(kind)
    spread = np.concatenate([X, [9.0] * 4, [0.0] * 4]).astype(kind).reshape(1, 1, -1)
    k = 4 + int(np.greater_equal(X, kind(limit)).sum())  # the limit itself is the last of those
    found = limits(blocks(spread, 1), spread.size, [k])
    assert found.values[0, 0] == limit
    near = np.abs(spread.astype(float) - limit) <= NEAR * limit
    assert found.near[0, 0] == near.sum()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused(route, kind, bad):
    X = np.ones((2, 3, 4), kind)
    X[1, 2, 3] = bad
    with pytest.raises(NumericsError, match="infinite or NaN"):
        limits(blocks(X, 2), 12, [3])


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(route, kind):
    info = np.finfo(kind)
    X = np.array([info.max, -info.max, info.tiny, info.smallest_subnormal, 0.0, -0.0], kind)
    found = limits(blocks(X.reshape(1, 1, 6), 1), 6, [1, 2, 3, 4, 5])
    expected = [info.max, info.max, info.tiny, info.smallest_subnormal, 0.0]
    assert found.values[0].tolist() == [float(x) for x in expected]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    X=arrays.arrays(
        np.float32,
        st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9)),
        elements=st.floats(-100, 100, width=32),
    ),
    data=st.data(),
)
def test_any_matrix(X, data):
    N = X[0].size
    k, rows = data.draw(st.integers(0, N)), data.draw(st.integers(1, 9))
    for small in (0, N):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SMALL", small)
            found = limits(blocks(X, rows), N, [k])
        if k < N:
            assert np.array_equal(found.values[:, 0], np.broadcast_to(kth(X, k), 2))
        kept = (np.abs(X) >= found.values[:, :, None]).sum((1, 2))
        assert (kept >= k).all()


def test_share():
    assert [share(f, 10) for f in (0, 0.25, 0.35, 0.5, 1.0)] == [0, 2, 4, 5, 10]
    assert share(0.2, 16777216) == 3355443
