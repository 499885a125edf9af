"""The block Krylov method: as near the optimum as float64 sees, in a counted number of readings."""

from __future__ import annotations

import numpy as np
import pytest

from adapterops import krylov, operators, rangefinder, sums
from adapterops.sums import Sum
from tests.sums import low, module, site, spread


def values(kind: str, size: int) -> np.ndarray:
    i = np.arange(size)
    found: np.ndarray = {
        "flat": np.ones(size),
        "slow": np.linspace(1, 0.3, size),
        "square root": (i + 1) ** -0.5,
        "polynomial": (i + 1.0) ** -1,
        "exponential": 0.8**i,
        "low rank and noise": np.where(i < 8, 40, 1.0) * np.linspace(1, 0.3, size),
        "one and small": np.where(i < 1, 1, 2e-3) * np.linspace(1, 0.5, size),
        "ten decades": np.where(i < 12, 10.0**-i, 0.0),
        "nothing": np.zeros(size),
    }[kind]
    return found


def matrix(kind: str, m: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((m, n)))[0]
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    size: np.ndarray = (U * values(kind, n)) @ V.T
    return size


def streamed(
    monkeypatch: pytest.MonkeyPatch, change: np.ndarray, dtype: str = "F32", device: str = "cpu"
) -> tuple[Sum, dict[str, float]]:
    """The change as a sum that is not held, and how often its rows are read, by precision."""
    monkeypatch.setattr(sums, "HELD_SINGLE", 0)
    monkeypatch.setattr(sums, "DENSE_BLOCK_NUMBERS", 7 * change.shape[1])
    readings = {"single": 0.0, "rows": 0.0}
    for name in readings:
        original = getattr(operators.Difference, name)

        def counted(self, start, stop, name=name, original=original):
            readings[name] += (stop - start) / self.shape[0]
            return original(self, start, stop)

        monkeypatch.setattr(operators.Difference, name, counted)
    total = Sum(module((1.0, site(np.zeros_like(change), change, dtype))), device)
    return total, readings


@pytest.mark.parametrize(
    ("kind", "rank", "single"),
    [
        ("flat", 4, 2),
        ("flat", 48, 2),
        ("square root", 4, 3),
        ("square root", 48, 4),
        ("polynomial", 16, 3),
        ("low rank and noise", 4, 2),
    ],
)
def test_a_round_is_one_reading_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, kind: str, rank: int, single: int
):
    total, readings = streamed(monkeypatch, matrix(kind, 500, 400))
    found = rangefinder.truncate(total, rank)
    assert readings == pytest.approx({"single": single, "rows": 0})  # the norm among them
    rangefinder.measure(total, found, found.B, found.A)
    assert readings == pytest.approx({"single": single, "rows": 1})


def test_a_spectrum_reads_no_more_than_its_rounds(monkeypatch: pytest.MonkeyPatch):
    total, readings = streamed(monkeypatch, matrix("flat", 300, 250))
    rangefinder.spectrum(total, 16)
    assert readings == pytest.approx({"single": 2, "rows": 0})


@pytest.mark.parametrize("turned", [False, True], ids=["as is", "transposed"])
@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize(
    "kind",
    [
        "flat",
        "slow",
        "square root",
        "polynomial",
        "exponential",
        "low rank and noise",
        "one and small",
    ],
)
def test_error_beside_that_of_a_full_svd(kind: str, rank: int, turned: bool):
    change = matrix(kind, 420, 300).astype(np.float32).astype(float)
    total = Sum(module((1.0, site(np.zeros_like(change), change, turned=turned))), "cpu")
    found = rangefinder.truncate(total, rank)
    exact = change.T if turned else change
    norm = np.linalg.norm(change)
    best = np.linalg.norm(np.linalg.svd(change, compute_uv=False)[rank:])
    lost = np.linalg.norm(exact - found.B @ found.A)
    assert lost <= best * (1 + 1e-4)
    assert abs(found.tail - lost) <= 2e-6 * norm
    assert found.norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("rank", [4, 12, 40])
def test_directions_of_ten_decades(monkeypatch: pytest.MonkeyPatch, rank: int):
    change = matrix("ten decades", 300, 200)
    total, _ = streamed(monkeypatch, change, "F64")
    found = rangefinder.truncate(total, rank)
    lost = np.linalg.norm(change - found.B @ found.A)
    best = np.linalg.norm(values("ten decades", 200)[rank:])
    assert lost == pytest.approx(best, rel=1e-6, abs=1e-13)
    known = values("ten decades", 200)[: min(rank, 11)]
    np.testing.assert_allclose(found.values[: len(known)], known, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_nothing_at_all(monkeypatch: pytest.MonkeyPatch, device: str):
    total, readings = streamed(monkeypatch, matrix("nothing", 200, 150), device=device)
    found = rangefinder.truncate(total, 4)
    assert (found.tail, found.norm, len(found.values)) == (0.0, 0.0, 0)
    assert not np.asarray(found.B @ found.A).any()
    assert readings["single"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["square root", "exponential"])
def test_the_other_spelling_gives_the_same(kind: str):
    change = matrix(kind, 300, 200).astype(np.float32)
    both = []
    for device in ("cpu", "torch"):
        total = Sum(module((1.0, site(np.zeros_like(change), change))), device)
        found = rangefinder.truncate(total, 8)
        both.append((np.asarray(found.B @ found.A), found.tail))
    np.testing.assert_allclose(both[0][0], both[1][0], atol=2e-4 * np.linalg.norm(change))
    assert both[0][1] == pytest.approx(both[1][1], rel=1e-5)


def test_sums_of_factors_are_found_to_rounding():
    rng = np.random.default_rng(1)
    pairs = [
        (rng.standard_normal((260, 1)), 0.05**j * rng.standard_normal((1, 200))) for j in range(9)
    ]
    change = module(*((1.0, low(B, A)) for B, A in pairs))
    exact = sum(np.float32(B).astype(float) @ np.float32(A).astype(float) for B, A in pairs)
    total = Sum(change, "cpu")
    found = krylov.captured(total, 9, 3e-5)
    V = found.V[:, :9]
    lost = exact - found.images @ V @ (found.basis @ V).T
    assert np.linalg.norm(lost) <= 1e-14 * np.linalg.norm(exact)


def test_a_wide_basis_is_cut(monkeypatch: pytest.MonkeyPatch):
    widths = []
    original = krylov._spectrum
    monkeypatch.setattr(
        krylov, "_spectrum", lambda images: widths.append(images.shape[1]) or original(images)
    )
    change = matrix("slow", 500, 400)
    total = Sum(module((1.0, site(np.zeros_like(change), change))), "cpu")
    found = rangefinder.truncate(total, 16)
    assert widths == [48, 96, 144, 192, 144, 192]
    best = np.linalg.norm(values("slow", 400)[16:])
    assert found.tail <= best * (1 + 1e-4)


def test_a_change_that_rows_outnumber_is_decomposed_whole():
    change = spread("graded", 300, 40)
    total = Sum(module((1.0, site(np.zeros_like(change), change))), "cpu")
    found = rangefinder.truncate(total, 8)
    exact = np.float32(change).astype(float)
    best = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[8:])
    assert np.linalg.norm(exact - found.B @ found.A) == pytest.approx(best, rel=1e-12)
    assert found.tail == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("held", [True, False], ids=["held", "read"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_no_scale_is_too_small_or_too_large_for_float32(scale, held, monkeypatch):
    change = matrix("polynomial", 260, 210) * scale
    total = streamed(monkeypatch, change)[0]
    if held:
        monkeypatch.undo()
        total = Sum(module((1.0, site(np.zeros_like(change), change, "F32"))), "cpu")
    assert (total._dense is not None) == held
    found = rangefinder.truncate(total, 8)
    sizes = np.linalg.svd(change / scale, compute_uv=False)
    assert found.tail / scale == pytest.approx(np.sqrt((sizes[8:] ** 2).sum()), rel=1e-4)
    assert found.norm / scale == pytest.approx(np.linalg.norm(sizes), rel=1e-5)


def test_rows_of_very_different_scales(monkeypatch):
    """The first rows say nothing of how large the matrix is."""
    change = matrix("polynomial", 260, 210)
    change[:20] *= 1e-25
    change[20:] *= 1e15
    found = rangefinder.truncate(streamed(monkeypatch, change)[0], 8)
    sizes = np.linalg.svd(change, compute_uv=False)
    assert found.tail == pytest.approx(np.sqrt((sizes[8:] ** 2).sum()), rel=1e-4)
