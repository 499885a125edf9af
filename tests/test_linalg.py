"""Truncation, norms and ranks against dense float64, judged as LAPACK judges itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops import linalg
from adapterops.factors import Factors

EPS = 2.0**-52
LIMIT = 30.0


def as_numpy(x):
    return x


def as_torch(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


both = pytest.mark.parametrize("place", [as_numpy, as_torch], ids=["numpy", "torch"])


def gauge(rng: np.random.Generator, r: int) -> np.ndarray:
    """An invertible matrix of condition 10⁶."""
    left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
    return (left * np.logspace(0, 6, r)) @ right


def make(kind: str, m: int, n: int, r: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the kinds that break things."""
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    if kind == "graded":
        B = B * 10.0 ** -np.linspace(0, 12, r)
    elif kind == "zero":
        B = 0 * B
    elif kind == "shared":  # two adapters with the same A
        A[r // 2 : 2 * (r // 2)] = A[: r // 2]
    elif kind == "doubled":  # PiSSA converted to LoRA: [B, −B₀]·[A; A₀], little movement
        half = r // 2
        B[:, half : 2 * half] = -B[:, :half] * (1 + 1e-4 * rng.standard_normal((m, half)))
        A[half : 2 * half] = A[:half]
    elif kind == "gauge":  # a bad gauge of a benign matrix
        G = gauge(rng, r)
        B, A = B @ G, np.linalg.solve(G, A)
    elif kind == "huge":
        B, A = B * 1e37, A * 1e-37
    elif kind == "tiny":
        B, A = B * 1e-38, A * 1e-38
    elif kind == "unbalanced":
        scale = 2.0 ** rng.integers(-60, 60, r)
        B, A = B * scale, A / scale[:, None]
    return B, A


KINDS = ["plain", "graded", "zero", "shared", "doubled", "gauge", "huge", "tiny", "unbalanced"]
SIZES = [(40, 30, 8), (30, 40, 30), (5, 60, 12), (60, 1, 3), (1, 1, 1), (7, 9, 0)]


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truncation_is_eckart_young_to_rounding(kind, size, place):
    m, n, r = size
    B, A = make(kind, m, n, r)
    dense = B @ A
    values = np.linalg.svd(dense, compute_uv=False)
    beta = float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1)) if r else 0.0
    unit = beta * max(m, n) * EPS + 1e-300
    for rank in {1, 3, max(r // 2, 1), r + 2}:
        got = linalg.truncate(place(B)[None], place(A)[None], rank)[0]
        back = np.asarray(got.B) @ np.asarray(got.A)
        best = float(np.sqrt(np.sum(values[rank:] ** 2)))
        assert got.B.shape == (m, rank) and got.A.shape == (rank, n)
        # the tail is what is really missing, and is the least possible
        assert abs(np.linalg.norm(dense - back) - got.tail) <= max(
            LIMIT * unit, 1e-8 * np.linalg.norm(dense)
        )
        assert got.tail <= best * (1 + 1e-6) + LIMIT * unit
        assert got.tail >= best * (1 - 1e-6) - LIMIT * unit
        assert abs(got.norm - np.linalg.norm(dense)) <= max(
            LIMIT * unit, 1e-12 * np.linalg.norm(dense)
        )
        left, right = np.linalg.norm(got.B, axis=0), np.linalg.norm(got.A, axis=1)
        live = left > 0
        assert np.all(left[live] <= 2.01 * right[live]) and np.all(right[live] <= 2.01 * left[live])


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_spectrum_and_numerical_rank(kind, size, place):
    m, n, r = size
    B, A = make(kind, m, n, r)
    core = linalg.cores(place(B)[None], place(A)[None])[0]
    got = linalg.spectrum(place(B), place(A), core)
    expected = np.linalg.svd(B @ A, compute_uv=False)[: len(got.values)]
    floor = linalg.rank_floor(m, n, core.beta)
    assert np.all(np.abs(got.values - expected) <= LIMIT * floor + 1e-7 * expected)
    true = {
        "plain": min(m, n, r), "zero": 0, "shared": min(m, n, r - r // 2),
        "gauge": min(m, n, r), "huge": min(m, n, r), "tiny": min(m, n, r),
        "unbalanced": min(m, n, r),
    }  # fmt: skip
    if kind in true:
        assert got.rank == true[kind]


def test_a_batch_gives_what_single_modules_give():
    rng = np.random.default_rng(3)
    kinds = ["plain", "doubled", "zero", "graded"]
    pairs = [make(kind, 20, 25, 6, seed=int(rng.integers(99))) for kind in kinds]
    B, A = np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs])
    for place in (as_numpy, as_torch):
        for got, (b, a) in zip(linalg.truncate(place(B), place(A), 3), pairs, strict=True):
            alone = linalg.truncate(b[None], a[None], 3)[0]
            assert got.route == alone.route
            assert np.allclose(
                np.asarray(got.B) @ np.asarray(got.A), alone.B @ alone.A, rtol=0, atol=1e-10
            )


def test_gram_route_only_where_it_can_see():
    routes = {
        kind: linalg.truncate(*(x[None] for x in make(kind, 40, 30, 8)), 4)[0].route
        for kind in KINDS
    }
    assert routes["plain"] == "gram" and routes["unbalanced"] == "gram"
    assert routes["doubled"] == "qr" and routes["gauge"] == "qr" and routes["zero"] == "zero"


@both
def test_keeping_all_columns_is_exact_to_the_bit(place):
    B, A = make("unbalanced", 30, 20, 6)
    got = linalg.truncate(place(B)[None], place(A)[None], 9)[0]
    assert got.route == "stack" and got.tail == 0.0
    ratio = np.asarray(got.B)[:, :6] / B
    assert np.all(np.frexp(ratio)[0] == 0.5)  # only powers of two
    assert np.array_equal(np.asarray(got.B)[:, :6] / ratio[0], B)
    assert not np.any(np.asarray(got.B)[:, 6:]) and not np.any(np.asarray(got.A)[6:])


@both
def test_cancellation_is_seen_down_to_rounding(place):
    rng = np.random.default_rng(5)
    B, A = rng.standard_normal((50, 8)), rng.standard_normal((8, 40))
    for gap in (1e-3, 1e-5, 1e-9, 1e-12):
        other = B * (1 + gap * rng.standard_normal(B.shape))
        stacked = place(np.hstack([B, -other])), place(np.vstack([A, A]))
        exact = np.linalg.norm((B - other) @ A)
        assert abs(linalg.norm(*stacked) / exact - 1) < 1e-13 / gap + 1e-12
    core = linalg.cores(place(np.hstack([B, -B]))[None], place(np.vstack([A, A]))[None])[0]
    nothing = linalg.spectrum(place(np.hstack([B, -B])), place(np.vstack([A, A])), core)
    assert nothing.rank == 0 and nothing.norm < linalg.rank_floor(50, 40, core.beta)


@pytest.mark.parametrize("kind", ["plain", "shared", "gauge", "doubled"])
def test_gauge_does_not_matter(kind):
    B, A = make(kind, 30, 24, 6)
    rng = np.random.default_rng(8)
    G = gauge(rng, 6)
    first = linalg.truncate(B[None], A[None], 3)[0]
    other = linalg.truncate((B @ G)[None], np.linalg.solve(G, A)[None], 3)[0]
    size = np.linalg.norm(B) * np.linalg.norm(A)
    assert np.linalg.norm(first.B @ first.A - other.B @ other.A) < 1e-8 * size
    assert math.isclose(first.tail, other.tail, rel_tol=1e-6, abs_tol=1e-9 * size)


sizes = st.integers(0, 9)


@given(sizes, sizes, sizes, sizes, st.integers(0, 2**31), st.floats(-3, 3))
def test_factor_algebra_is_dense_algebra(m, n, r, q, seed, scalar):
    rng = np.random.default_rng(seed)
    a = Factors(rng.standard_normal((m, r)), rng.standard_normal((r, n)))
    b = Factors(rng.standard_normal((m, q)), rng.standard_normal((q, n)))
    x, y = rng.standard_normal((n, 2)), rng.standard_normal((m, 2))
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose((a + b).dense(), a.dense() + b.dense(), **close)
    np.testing.assert_allclose((scalar * a - b).dense(), scalar * a.dense() - b.dense(), **close)
    np.testing.assert_allclose(a.matmul(x), a.dense() @ x, **close)
    np.testing.assert_allclose(a.rmatmul(y), a.dense().T @ y, **close)
    np.testing.assert_allclose(a.rows(1, 3), a.dense()[1:3], **close)
    np.testing.assert_allclose(a.inner(b), np.sum(a.dense() * b.dense()), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.norm(), np.linalg.norm(a.dense()), **close)
    assert (a + b).rank == r + q and a.shape == (m, n)


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match="do not multiply"):
        Factors(np.zeros((3, 2)), np.zeros((3, 4)))
