"""The figures of what became of a change: by projection as by elements, whatever the shapes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapterops.baking import measuring
from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.changes.targets import Target, Term
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site
from adapterops.rounding.grid import NAMES


def ref(x: np.ndarray[Any, Any], label: str, dtype: str = "F64") -> Ref:
    source = MemoryFile(label, x.tobytes())
    return Ref(source, label, dtype, x.shape, 0, source.size())


def change(B: np.ndarray[Any, Any], A: np.ndarray[Any, Any], W: torch.Tensor, **site: Any) -> Delta:
    """The change W + B·A of a weight that is only named: its bytes are not read here."""
    (m, r), n = B.shape, A.shape[1]
    parts = {"B": ref(B, "B"), "A": ref(A, "A")}
    pair = Site("w", "peft", "lora", "linear", (m, n), (), r, r, parts, scale=1.0)
    term = Term(0, 1.0, pair, slice(0, m, 1), slice(0, n, 1))
    weight = Ref(MemoryFile(Path("w").name, b""), "w", NAMES[W.dtype], (m, n), 0, 0)
    target = Target("w", weight, (m, n), (term,), **site)
    return Delta(target, bands(target)[0])


def both(
    rank: int, size: float, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[Drift | None, Drift]:
    rng = np.random.default_rng([rank, *shape])
    m, n = shape
    W = torch.from_numpy(0.02 * rng.standard_normal(shape)).to(dtype)
    B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    B *= 0.02 * size / np.sqrt(rank)
    A[0] *= 100.0  # one direction outweighs the others
    B[:, 0] /= 100.0
    delta = change(B, A, W)
    rounded = delta.onto(W, 0, m).to(dtype)
    projected = measuring._projected(W, rounded, delta, 0, m)
    compared, _ = measuring.compared(W, rounded, delta.double(0, m), delta, 0, m)
    return projected, compared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (300, 1000), (1000, 70)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_projection_tells_what_the_elements_tell(
    rank: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    projected, compared = both(rank, 0.01, dtype, shape)
    if projected is None:  # E too small beside D for so few rows: then elements are compared
        least = measuring._CANCELLED / (shape[0] * min(rank, *shape)) ** 0.5
        assert compared.error < 1.01 * least * compared.delta
        return
    for field in fields(Drift):
        mine, truth = getattr(projected, field.name), getattr(compared, field.name)
        loose = 0.02 * compared.error**0.5 if field.name == "bias" else 1e-7 * compared.delta
        assert mine == pytest.approx(truth, rel=1e-3, abs=loose), field.name


def test_small_errors_are_not_taken_from_differences() -> None:
    """‖E‖² = 10⁻⁷‖D‖² is lost in float32 sums of ‖D‖²: the elements tell."""
    projected, compared = both(4, 30.0, torch.float16, (200, 300))
    assert projected is None
    assert 0 < compared.error < 1e-6 * compared.delta


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_the_error_so(value: float) -> None:
    W = torch.zeros((4, 8), dtype=torch.bfloat16)
    delta = change(np.ones((4, 1)), np.ones((1, 8)), W)
    W[2, 3] = value
    drift, _ = measuring.measured(W, delta.onto(W, 0, 4).to(W.dtype), delta, 0, 4)
    assert not np.isfinite(drift.error)


@pytest.mark.parametrize("inputs", ["columns", "rows"])
def test_measured_is_the_sum_of_its_tiles(inputs: Any, monkeypatch: Any) -> None:
    rng = np.random.default_rng(3)
    W = torch.from_numpy(0.02 * rng.standard_normal((90, 50))).to(torch.bfloat16)
    B, A = 1e-3 * rng.standard_normal((90, 3)), rng.standard_normal((3, 50))
    found = []
    for tile in (1 << 18, 700, 1):
        monkeypatch.setattr(measuring, "_TILE", tile)
        delta = change(B, A, W, inputs=inputs)
        drift, along = measuring.measured(W, delta.onto(W, 0, 90).to(W.dtype), delta, 0, 90)
        assert (along is None) == (inputs == "columns")
        found.append([drift.delta, drift.realised, drift.error, drift.changed, drift.inside])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=2e-5)
