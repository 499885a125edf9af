"""What inputs make of ΔW, against dense float64: singular values, truncations, norms, floors."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterops import casts, linalg, metric, weighting
from adapterops.errors import FormatError, NumericsError
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref
from adapterops.metric import Inputs

EPS = 2.0**-52


def as_numpy(x):
    return x


def as_torch(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


both = pytest.mark.parametrize("place", [as_numpy, as_torch], ids=["numpy", "torch"])


def stored(values: np.ndarray, kind: str, dtype: str = "F64") -> Inputs:
    """Values as a file would hold them, behind a few other bytes."""
    data = values.astype({"F64": "<f8", "F32": "<f4"}[dtype]).tobytes()
    source = MemoryFile("inputs.safetensors", struct.pack("<d", np.nan) + data)
    return Inputs(kind, Ref(source, f"m.{kind}", dtype, values.shape, 8, len(data)))


def moments(kind: str, n: int, seed: int = 0) -> tuple[Inputs, np.ndarray]:
    """Inputs of the kinds that break things, and X (k, n) with C = XᵀX."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * n, n)) / np.sqrt(4 * n)
    if kind == "ill-conditioned":  # from 1 to 10⁻⁶, squared in C
        X = (np.linalg.qr(X)[0] * np.logspace(0, -6, n)) @ np.linalg.qr(X[:n])[0]
    if kind == "singular":
        X = X[:, : n // 2] @ rng.standard_normal((n // 2, n))
    if kind == "few samples":
        X = X[:3]
    if kind == "outliers":  # a few channels a thousand times the others
        X[:, :: max(n // 2, 1)] *= 1e3
    if kind == "dead":
        X = 0 * X
    return stored(X.T @ X, "gram"), X


def factors(kind: str, m: int, n: int, r: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    if kind == "deficient":
        B, A = B[:, : r // 2] @ rng.standard_normal((r // 2, r)), A
    if kind == "gauge":
        U, V = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
        G = (U * np.logspace(0, 6, r)) @ V
        B, A = B @ G, np.linalg.solve(G, A)
    if kind == "doubled":
        half = r // 2
        B[:, half : 2 * half] = -B[:, :half] * (1 + 1e-4 * rng.standard_normal((m, half)))
        A[half : 2 * half] = A[:half]
    return B, A


def frobenius(B, A) -> linalg.Spectrum:
    return linalg.spectrum(B, A, linalg.cores(B[None], A[None])[0])


def weighted(dense: np.ndarray, X: np.ndarray) -> float:
    """‖ΔW·C^{1/2}‖_F, dense."""
    return float(np.linalg.norm(dense @ X.T))


MOMENTS = ["full", "ill-conditioned", "singular", "few samples", "outliers", "dead"]
FACTORS = ["plain", "deficient", "gauge", "doubled"]
SIZES = [(40, 30, 8), (6, 30, 12), (30, 9, 12), (1, 7, 1)]


def both_forms(kind: str, n: int) -> list[tuple[Inputs, np.ndarray, float]]:
    """The same C as a gram and as samples, X, and how finely singular values are resolved."""
    gram, X = moments(kind, n)
    fine, coarse = n * EPS, np.sqrt(n * EPS)
    return [(gram, X, coarse), (stored(X * np.sqrt(len(X)), "samples"), X, fine)]


@both
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("change", FACTORS)
@pytest.mark.parametrize("kind", MOMENTS)
def test_equal_to_the_dense_optimum(kind, change, size, place):
    m, n, r = size
    B, A = factors(change, m, n, r)
    dense = B @ A
    beta = float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1))
    for inputs, X, unit in both_forms(kind, n):
        values = np.linalg.svd(dense @ X.T, compute_uv=False)
        values = np.pad(values, (0, max(0, min(m, n, r) - len(values))))
        size_x = np.linalg.norm(X)
        noise = 3 * (unit * np.linalg.norm(dense) + 30 * max(m, n) * EPS * beta) * size_x
        known = frobenius(B, A)
        got = metric.spectrum(place(B), place(A), inputs, known)
        assert got.floor <= noise
        assert len(got.values) == len(known.values) and got.rank == known.rank
        assert np.all(np.diff(got.values) <= 0)
        assert np.abs(got.values - values[: len(got.values)]).max() <= noise
        assert abs(got.norm - weighted(dense, X)) <= 1e-9 * got.norm + noise**2 / (
            got.norm + noise + 1e-300
        )
        for rank in {1, 2, max(r // 2, 1), r}:
            new_b, new_a = metric.truncate(place(B), place(A), rank, inputs)
            assert new_b.shape == (m, rank) and new_a.shape == (rank, n)
            back = np.asarray(new_b) @ np.asarray(new_a)
            best = float(np.sqrt(np.sum(values[rank:] ** 2)))
            lost = weighted(dense - back, X)
            assert lost <= best * (1 + 1e-9) + noise
            difference = np.hstack([B, -np.asarray(new_b)]), np.vstack([A, np.asarray(new_a)])
            measured, floor = metric.norm(*map(place, difference), inputs)
            assert abs(measured - lost) <= 1e-9 * lost + noise
            assert floor <= 2 * noise


@pytest.mark.parametrize("kind", ["full", "outliers"])
def test_the_error_measured_densely_is_the_tail_of_the_spectrum(kind):
    B, A = factors("plain", 50, 40, 12)
    for inputs, X, _ in both_forms(kind, 40):
        values = metric.spectrum(B, A, inputs, frobenius(B, A)).values
        for rank in (1, 4, 8):
            new_b, new_a = metric.truncate(B, A, rank, inputs)
            tail = float(np.sqrt(np.sum(values[rank:] ** 2)))
            assert weighted(B @ A - new_b @ new_a, X) == pytest.approx(tail, rel=1e-9)
            lost = np.hstack([new_b, -B]), np.vstack([new_a, A])
            assert metric.norm(*lost, inputs)[0] == pytest.approx(tail, rel=1e-9)


def test_it_pays_to_know_the_inputs():
    """With outlier channels the unweighted optimum is far from the weighted one."""
    B, A = factors("plain", 50, 40, 12)
    inputs, X = moments("outliers", 40)
    ours = metric.truncate(B, A, 4, inputs)
    plain = linalg.truncate(B[None], A[None], 4)[0]
    assert weighted(B @ A - ours[0] @ ours[1], X) < 0.1 * weighted(B @ A - plain.B @ plain.A, X)


@pytest.mark.parametrize("form", [0, 1], ids=["gram", "samples"])
def test_gauge(form):
    B, A = factors("plain", 40, 30, 8)
    inputs, X, _ = both_forms("full", 30)[form]
    rng = np.random.default_rng(3)
    U, V = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    G = (U * np.logspace(0, 6, 8)) @ V
    turned = B @ G, np.linalg.solve(G, A)
    first, second = (metric.truncate(*pair, 3, inputs) for pair in ((B, A), turned))
    size = np.linalg.norm(B @ A)
    assert np.abs(first[0] @ first[1] - second[0] @ second[1]).max() <= 1e-7 * size
    assert metric.norm(*turned, inputs)[0] == pytest.approx(weighted(B @ A, X), rel=1e-8)


@pytest.mark.parametrize("form", [0, 1], ids=["gram", "samples"])
def test_a_minus_a_is_below_a_floor_of_rounding(form):
    B, A = factors("plain", 40, 30, 8)
    inputs, X, _ = both_forms("full", 30)[form]
    whole = metric.norm(B, A, inputs)[0]
    value, floor = metric.norm(np.hstack([B, -B]), np.vstack([A, A]), inputs)
    assert value <= floor <= 1e-11 * whole
    # a difference of 10⁻⁸ is seen in spite of what cancels, to seven digits
    moved = B + 1e-8 * np.random.default_rng(4).standard_normal(B.shape)
    value, floor = metric.norm(np.hstack([moved, -B]), np.vstack([A, A]), inputs)
    assert floor < 1e-4 * value
    assert value == pytest.approx(weighted((moved - B) @ A, X), rel=1e-6)


@pytest.mark.parametrize("form", [0, 1], ids=["gram", "samples"])
def test_what_inputs_do_not_see_is_filled_by_size(form):
    """Three samples leave nothing to choose beyond rank 3; the rest goes where ΔW is largest."""
    B, A = factors("plain", 40, 30, 8)
    inputs, X, _ = both_forms("few samples", 30)[form]
    new_b, new_a = metric.truncate(B, A, 5, inputs)
    lost = B @ A - new_b @ new_a
    assert weighted(lost, X) <= 1e-7 * weighted(B @ A, X)
    U = np.linalg.svd(B @ A @ X.T, full_matrices=False)[0][:, :3]
    rest = B @ A - U @ (U.T @ B @ A)
    best = np.sqrt(np.sum(np.linalg.svd(rest, compute_uv=False)[2:] ** 2))
    assert np.linalg.norm(lost) == pytest.approx(best, rel=1e-7)
    new_b, new_a = metric.truncate(B, A, 8, inputs)
    assert np.linalg.norm(B @ A - new_b @ new_a) <= 1e-12 * np.linalg.norm(B @ A)


def test_dead_inputs_leave_the_plain_truncation():
    B, A = factors("plain", 40, 30, 8)
    new_b, new_a = metric.truncate(B, A, 3, moments("dead", 30)[0])
    plain = linalg.truncate(B[None], A[None], 3)[0]
    assert np.abs(new_b @ new_a - plain.B @ plain.A).max() < 1e-12 * np.linalg.norm(B @ A)


@given(st.integers(0, 2**32 - 1), st.sampled_from(MOMENTS), st.integers(1, 6))
def test_no_other_matrix_of_that_rank_is_closer(seed, kind, rank):
    rng = np.random.default_rng(seed)
    B, A = factors("plain", 12, 10, 6, seed)
    inputs, X = moments(kind, 10, seed)
    new_b, new_a = metric.truncate(B, A, rank, inputs)
    ours = weighted(B @ A - new_b @ new_a, X)
    noise = 1e-7 * np.linalg.norm(B @ A) * np.linalg.norm(X)
    for step in (1.0, 1e-2, 1e-4):
        other_b = new_b + step * rng.standard_normal(new_b.shape)
        # the best A for this B, in the metric: least squares
        other_a = np.linalg.lstsq(other_b, B @ A, rcond=None)[0]
        assert ours <= weighted(B @ A - other_b @ other_a, X) + noise
    random = rng.standard_normal((12, rank)) @ rng.standard_normal((rank, 10))
    assert ours <= weighted(B @ A - random, X) + noise


def test_factors_are_balanced():
    B, A = factors("plain", 40, 30, 8)
    new_b, new_a = metric.truncate(B, A, 5, moments("outliers", 30)[0])
    size = np.linalg.norm(new_b, axis=0)
    assert np.allclose(size, np.linalg.norm(new_a, axis=1), rtol=1e-9)
    assert np.all(np.diff(size) <= 0)
    off = new_b.T @ new_b - np.diag(size**2)
    assert np.abs(off).max() < 1e-9 * size[0] ** 2


@pytest.mark.parametrize("kind", ["gram", "samples"])
def test_blocks_do_not_matter(kind, monkeypatch):
    """A moment of one block, of many and of one row at a time."""
    B, A = factors("plain", 20, 17, 5)
    gram, X = moments("full", 17)
    inputs = gram if kind == "gram" else stored(X, "samples")
    found = []
    for numbers in (1 << 20, 40, 1):
        monkeypatch.setattr(metric, "_BLOCK_NUMBERS", numbers)
        found.append(metric.norm(B, A, inputs)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-13)
    assert found[2] == pytest.approx(found[0], rel=1e-13)


def test_float32_grams_are_read_as_they_are():
    """Rounding to float32 makes a singular gram indefinite; that is no error of the file."""
    B, A = factors("plain", 40, 300, 8)
    X = moments("few samples", 300)[1]
    inputs = stored(X.T @ X, "gram", "F32")
    value, floor = metric.norm(B, A, inputs)
    assert value == pytest.approx(weighted(B @ A, X), rel=1e-4)
    # a change that these inputs do not see: what is left is float32's doing, and the floor says so
    hidden = A - A @ np.linalg.pinv(X) @ X
    value, floor = metric.norm(B, hidden, inputs)
    assert value <= 1e-3 * np.linalg.norm(B @ hidden) * np.linalg.norm(X)
    assert floor >= 1e-9 * np.linalg.norm(B @ hidden) * np.linalg.norm(X)


def _spoilt(how: str) -> tuple[Inputs, type[Exception], str]:
    C = np.eye(6)
    kind = "gram"
    if how == "nan":
        C[4, 5] = np.nan
        return stored(C, kind), NumericsError, "NaN"
    if how == "infinite samples":
        C[5, 0] = -np.inf
        return stored(C, "samples"), NumericsError, "NaN"
    if how == "negative diagonal":
        C[3, 3] = -1e-3
        return stored(C, kind), FormatError, "negative number"
    if how == "not symmetric":
        C[0, 5] = 0.5
        return stored(C, kind), FormatError, "not symmetric"
    C[0, 1] = C[1, 0] = 1.5
    return stored(C, kind), FormatError, "not positive semidefinite"


@pytest.mark.parametrize("verb", ["spectrum", "truncate", "norm"])
@pytest.mark.parametrize(
    "how", ["nan", "infinite samples", "negative diagonal", "not symmetric", "indefinite"]
)
def test_what_is_no_second_moment(how, verb):
    B, A = factors("plain", 8, 6, 6)
    inputs, error, words = _spoilt(how)
    call = {
        "spectrum": partial(metric.spectrum, B, A, inputs, frobenius(B, A)),
        "truncate": partial(metric.truncate, B, A, 2, inputs),
        "norm": partial(metric.norm, B, A, inputs),
    }[verb]
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.value.path == "inputs.safetensors" and "m." in caught.value.message


@both
@pytest.mark.parametrize("size", [(5, 7, 0), (0, 7, 2), (1, 1, 1)], ids=str)
def test_small_sizes(size, place):
    m, n, r = size
    B, A = np.ones((m, r)), np.ones((r, n))
    inputs = stored(np.eye(n), "gram")
    got = metric.spectrum(place(B), place(A), inputs, frobenius(B, A))
    value, _ = metric.norm(place(B), place(A), inputs)
    assert value == got.norm == (1.0 if size == (1, 1, 1) else 0.0)
    new_b, new_a = metric.truncate(place(B), place(A), 2, inputs)
    assert new_b.shape == (m, 2) and new_a.shape == (2, n)
    assert np.allclose(np.asarray(new_b) @ np.asarray(new_a), B @ A)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_norms_of_weights(dtype, monkeypatch):
    """Every shape and type, in one block or many; a transposed weight has the norm it has."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 7), "b": (4, 3, 3, 3), "turned": (2, 3)}
    for name, shape in shapes.items():
        data = casts.store(rng.standard_normal(shape), dtype)
        expected = np.linalg.norm(casts.widen(data, dtype))
        source = MemoryFile("base.safetensors", bytes(casts.stored_bytes(data)))
        ref = Ref(source, name, dtype, shape, 0, source.size())
        if name == "turned":
            ref = replace(ref, shape=shape[::-1], transposed=True)
        for numbers in (1 << 20, 4, 1):
            monkeypatch.setattr(weighting, "_BLOCK", numbers)
            assert weighting.norm(ref) == pytest.approx(expected, rel=1e-14)
