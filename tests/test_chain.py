"""Sequences of adapters: rounded one after the other, and at once, against plain float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adapterops import casts
from adapterops.changes.targets import DenseTerm, Target, Term
from adapterops.errors import NumericsError
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site
from adapterops.judging.chain import chain
from tests.test_intruders import oracle


def ref(values: np.ndarray, dtype: str = "F64", name: str = "t") -> Ref:
    """Values as a file holds them, behind eight other bytes."""
    data = bytes(casts.stored_bytes(casts.store(values.astype(np.float64), dtype)))
    return Ref(
        MemoryFile("m.safetensors", b"padding." + data), name, dtype, values.shape, 8, len(data)
    )


def site(B: np.ndarray, A: np.ndarray) -> Site:
    parts = {"B": ref(B), "A": ref(A)}
    shape = (B.shape[0], A.shape[1])
    return Site("m", "peft", "lora", "linear", shape, (), B.shape[1], B.shape[1], parts, scale=1.0)


def target(
    W: Ref, B: np.ndarray, A: np.ndarray, c: float = 1.0, rows=slice(None), **more
) -> Target:
    """A change of these rows of a weight, of all its columns."""
    turned = more.get("inputs") == "rows"
    matrix = (W.shape[0], math.prod(W.shape[1:]))
    rows = slice(*rows.indices(matrix[0]))
    return Target(
        "w", W, matrix, (Term(0, c, site(B, A), rows, slice(0, matrix[1], 1), turned),), **more
    )


def sizes(seed: int, m: int, n: int, ratio: float, rank: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a change whose elements have the standard deviation 0.02·`ratio`."""
    rng = np.random.default_rng(seed)
    return (
        0.02 * ratio / math.sqrt(rank) * rng.standard_normal((m, rank)),
        rng.standard_normal((rank, n)),
    )


def weight(m: int, n: int, dtype: str = "BF16", seed: int = 99) -> tuple[Ref, np.ndarray]:
    W = 0.02 * np.random.default_rng(seed).standard_normal((m, n))
    stored = casts.round_to(W, dtype)
    return ref(stored, dtype), stored


def simulated(W: np.ndarray, changes, dtype: str) -> list[tuple[tuple, tuple]]:
    """(‖E‖, ‖E‖/‖S‖, gain, ‖E·Q‖/‖S‖) in sequence and at once: the definition, densely."""
    now, result = W, []
    for j in range(1, len(changes) + 1):
        B, A = changes[j - 1]
        now = casts.round_to(now + B @ A, dtype)
        S = sum(B @ A for B, A in changes[:j])
        Q = np.linalg.qr(np.concatenate([A for _, A in changes[:j]]).T)[0]
        both = []
        for after in (now, casts.round_to(W + S, dtype)):
            E, norm = after - W - S, np.linalg.norm(S)
            both.append(
                (
                    np.linalg.norm(E),
                    np.linalg.norm(E) / norm,
                    float(((after - W) * S).sum() / norm**2),
                    np.linalg.norm(E @ Q) / norm,
                )
            )
        result.append(tuple(both))
    return result


def figures(step) -> tuple[tuple, tuple]:
    names = ("error", "relative_error", "gain", "subspace_error")
    return tuple(tuple(getattr(f, n) for n in names) for f in (step.sequential, step.at_once))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("ratio", [5e-4, 5e-2], ids=["swallowed", "kept"])
@pytest.mark.parametrize("inputs", ["columns", "rows"])
def test_the_figures_are_those_of_dense_arithmetic(dtype, ratio, inputs):
    W, stored = weight(40, 64, dtype)
    changes = [sizes(seed, 40, 64, ratio) for seed in range(3)]
    if inputs == "rows":
        W = ref(stored.T, dtype)
    report = chain([{"w": target(W, B, A, inputs=inputs)} for B, A in changes])
    assert [step.adapters for step in report.steps] == [1, 2, 3]
    for step, expected in zip(report.steps, simulated(stored, changes, dtype), strict=True):
        assert np.allclose(figures(step), expected, rtol=2e-6)
    assert report.tensors["w"] == report.steps
    assert report.steps[0].sequential == report.steps[0].at_once
    assert report.steps[0].growth == 1.0


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_error_grows_like_the_root_of_the_number_of_adapters(dtype):
    """k nearly independent roundings against one: bake.md measured 1.41 for 2 and 3.1 for 10."""
    W, _ = weight(192, 256, dtype)
    adapters = [{"w": target(W, *sizes(seed, 192, 256, 5e-2))} for seed in range(10)]
    report = chain(adapters)
    growth = [step.growth for step in report.steps]
    for k, found in enumerate(growth, 1):
        assert found == pytest.approx(math.sqrt(k), rel=0.06)
    absolute = [step.at_once.error for step in report.steps]
    assert max(absolute) < 1.1 * min(absolute)  # one rounding, whatever it rounds


@pytest.mark.parametrize("mode", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("inputs", ["columns", "rows"])
def test_other_roundings(mode, inputs):
    W, stored = weight(48, 64)
    if inputs == "rows":
        W = ref(stored.T, "BF16")
    adapters = [{"w": target(W, *sizes(s, 48, 64, 5e-3), inputs=inputs)} for s in range(4)]
    report = chain(adapters, mode, seed=3)
    assert report == chain(adapters, mode, seed=3)
    exact = chain(adapters)
    for step, plain in zip(report.steps, exact.steps, strict=True):
        if mode == "nearest":
            assert step.sequential.error == pytest.approx(plain.sequential.error, rel=1e-3)
        else:
            assert step.sequential.error > plain.sequential.error
            assert step.sequential.gain == pytest.approx(1, abs=0.05)
        if mode == "compensated":
            assert step.at_once.subspace_error < plain.at_once.subspace_error


def test_stochastic_rounding_does_not_repeat_itself():
    """The same bits at every step would add their errors up like k, not like its root."""
    W, _ = weight(128, 256)
    B, A = sizes(0, 128, 256, 1e-4)
    report = chain([{"w": target(W, B, A)}] * 8, "stochastic")
    assert report.steps[-1].growth < 2
    assert report.steps[-1].sequential.gain == pytest.approx(1, abs=0.2)


def test_weights_bands_and_adapters_that_lack_a_tensor():
    """Changes of parts of the rows, tensors that only some adapters have, coefficients."""
    W, stored = weight(30, 24)
    V, other = weight(16, 24, seed=5)
    top, low = sizes(1, 12, 24, 0.05), sizes(2, 8, 24, 0.05)
    both = sizes(3, 16, 24, 0.05)
    adapters = [
        {"w": target(W, *top, rows=slice(0, 12))},
        {"v": target(V, *both, c=0.5)},
        {"w": target(W, *low, c=-2.0, rows=slice(10, 26, 2))},
    ]
    report = chain(adapters)
    assert list(report.tensors) == ["w", "v"]
    D1, D3 = np.zeros((30, 24)), np.zeros((30, 24))
    D1[:12] = top[0] @ top[1]
    D3[10:26:2] = -2.0 * low[0] @ low[1]
    one = casts.round_to(stored + D1, "BF16")
    two = casts.round_to(one + D3, "BF16")
    for step, after, S in ((0, one, D1), (1, one, D1), (2, two, D1 + D3)):
        found = report.tensors["w"][step].sequential
        E = after - stored - S
        assert found.error == pytest.approx(np.linalg.norm(E), rel=1e-6)
        assert found.relative_error == pytest.approx(
            np.linalg.norm(E) / np.linalg.norm(S), rel=1e-6
        )
    D2 = 0.5 * both[0] @ both[1]
    E2 = casts.round_to(other + D2, "BF16") - other - D2
    v = report.tensors["v"]
    assert (v[0].sequential.error, v[0].sequential.relative_error, v[0].growth) == (0, None, None)
    assert v[1].sequential.error == v[2].at_once.error == pytest.approx(np.linalg.norm(E2))
    total = math.hypot(*(report.tensors[name][2].sequential.error for name in "wv"))
    assert report.steps[2].sequential.error == pytest.approx(total)


def test_changes_that_cancel():
    """Of a sum that is nothing but rounding noise there is an error, and no share of it."""
    W, _ = weight(64, 48)
    B, A = sizes(0, 64, 48, 0.05)
    report = chain([{"w": target(W, B, A)}, {"w": target(W, B, A, c=-1.0)}])
    first, last = report.steps
    assert first.sequential.relative_error < 0.2
    assert last.at_once.error < 1e-15
    assert last.sequential.error > 0  # not every element came back
    for figures in (last.sequential, last.at_once):
        assert figures.relative_error is figures.gain is figures.subspace_error is None


def test_dense_changes_and_convolutions():
    class Dense:
        def __init__(self, D: np.ndarray) -> None:
            self.D = D

        def rows(self, start: int, stop: int) -> np.ndarray:
            return self.D[start:stop]

    W, stored = weight(20, 36)
    W = Ref(W.source, W.name, W.dtype, (20, 4, 3, 3), W.offset, W.nbytes)
    D = 1e-3 * np.random.default_rng(4).standard_normal((20, 36))
    B, A = sizes(1, 20, 36, 0.05)
    first = Target("w", W, (20, 36), dense=(DenseTerm(0, 0.5, "m", lambda: Dense(D)),))
    report = chain([{"w": first}, {"w": target(W, B, A)}], intruders=True)
    one = casts.round_to(stored + 0.5 * D, "BF16")
    two = casts.round_to(one + B @ A, "BF16")
    S = 0.5 * D + B @ A
    found = report.steps[1].sequential
    assert found.error == pytest.approx(np.linalg.norm(two - stored - S), rel=1e-9)
    assert found.subspace_error == found.relative_error  # a dense change reads everything
    assert found.intruders == len(oracle(stored, two))


@pytest.mark.parametrize("inputs", ["columns", "rows"])
def test_intruders_of_each_step(inputs):
    W, stored = weight(60, 48)
    changes = [sizes(seed, 60, 48, 4.0, rank=1) for seed in range(3)]
    if inputs == "rows":
        W = ref(stored.T, "BF16")
    report = chain([{"w": target(W, B, A, inputs=inputs)} for B, A in changes], intruders=True)
    now, expected = stored, []
    for B, A in changes:
        now = casts.round_to(now + B @ A, "BF16")
        expected.append(len(oracle(stored, now)))
    assert [step.sequential.intruders for step in report.steps] == expected == [1, 2, 3]
    assert [step.at_once.intruders for step in report.steps] == [1, 2, 3]
    plain = chain([{"w": target(W, B, A, inputs=inputs)} for B, A in changes])
    assert all(step.sequential.intruders is None for step in plain.steps)


def test_a_bias_has_no_intruders():
    W, _ = weight(1, 40)
    report = chain([{"w": target(W, *sizes(0, 1, 40, 0.1, rank=1))}], intruders=True)
    assert report.steps[0].sequential.intruders is None


def test_blocks_do_not_matter(monkeypatch):
    W, _ = weight(50, 40)
    adapters = [{"w": target(W, *sizes(seed, 50, 40, 0.05))} for seed in range(3)]
    whole = chain(adapters).steps
    monkeypatch.setattr("adapterops.judging.chain._BLOCK", 7 * 40)
    for one, other in zip(chain(adapters).steps, whole, strict=True):
        assert np.allclose(figures(one), figures(other), rtol=1e-12)


def test_a_step_that_overflows():
    W, _ = weight(8, 16, "F16")
    B, A = sizes(0, 8, 16, 1.0)
    adapters = [{"w": target(W, B, A)}, {"w": target(W, 1e7 * B, A)}]
    with pytest.raises(NumericsError, match="'w' are beyond float16"):
        chain(adapters)


def test_as_json():
    W, _ = weight(16, 16)
    report = chain([{"w": target(W, *sizes(s, 16, 16, 0.05))} for s in range(2)])
    document = json.loads(json.dumps(report.to_dict()))
    assert document["steps"] == document["tensors"]["w"]
    assert document["steps"][1]["growth"] == report.steps[1].growth
    assert set(document["steps"][1]["sequential"]) == {
        "error",
        "relative_error",
        "gain",
        "subspace_error",
        "intruders",
    }
    assert chain([]).to_dict() == {"steps": [], "tensors": {}}
