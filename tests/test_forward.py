"""Forward error of a merge over measured inputs, against dense float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from adapterops import casts
from adapterops.activations import open_activations, write_activations
from adapterops.errors import FormatError, IncompatibleError, NumericsError
from adapterops.formats.model import Ref
from adapterops.judging.forward import forward_errors
from tests.test_chain import ref, sizes, target, weight


def inputs(seed: int, n: int, k: int = 200) -> np.ndarray:
    """Samples with outlier channels and a mean."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((k, n)) + 0.5
    X[:, ::7] *= 30
    return X.astype(np.float32)


def write(file: Path, modules, model: str = "tiny/base", **more):
    values = {
        name: (kind, X.T.astype(float) @ X / len(X) if kind == "gram" else X)
        for name, (kind, X) in modules.items()
    }
    write_activations(file, values, tokens=200, model=model, **more)
    return open_activations(file)


def merged(stored: np.ndarray, D: np.ndarray, dtype: str = "BF16") -> np.ndarray:
    return casts.round_to(stored + D, dtype)


def expected(stored, D, after, X) -> tuple[float, float, float]:
    E = after - stored - D
    return tuple(float(np.linalg.norm(M @ X.T) / math.sqrt(len(X))) for M in (E, D, after))


@pytest.mark.parametrize("kind", ["gram", "samples"])
@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_norms_are_those_of_dense_arithmetic(tmp_path, kind, order, dtype):
    _, stored = weight(40, 63, dtype)
    B, A = sizes(1, 40, 63, 1e-2)
    X = inputs(0, 63)
    after = merged(stored, B @ A, dtype)
    W, W2 = (ref(M.T if order == "rows" else M, dtype) for M in (stored, after))
    activations = write(tmp_path / "a.safetensors", {"m.q_proj": (kind, X)})
    targets = {"m.q_proj.weight": target(W, B, A, inputs=order)}
    report = forward_errors(targets, {"m.q_proj.weight": W2}, activations)
    found = report.modules["m.q_proj.weight"]
    error, change, output = expected(stored, B @ A, after, X)
    assert found.inputs == kind
    assert found.error == pytest.approx(error, rel=1e-5, abs=2 * found.floor)
    assert found.change == pytest.approx(change, rel=1e-5)
    assert found.output == pytest.approx(output, rel=1e-5)
    assert found.to_change == report.to_change == pytest.approx(found.error / found.change)
    assert found.to_output == report.to_output == pytest.approx(found.error / found.output)
    assert found.floor < 1e-2 * found.error
    assert (found.floor == 0) == (kind == "samples")
    assert report.without == ()


def test_a_worse_merge_has_a_larger_error(tmp_path):
    W, stored = weight(48, 64)
    B, A = sizes(1, 48, 64, 2e-3)
    X = inputs(0, 64)
    activations = write(tmp_path / "a.safetensors", {"m.q": ("samples", X)})

    def error(after: np.ndarray) -> float:
        report = forward_errors(
            {"m.q.weight": target(W, B, A)}, {"m.q.weight": ref(after)}, activations
        )
        return report.modules["m.q.weight"].to_change

    assert error(stored) == pytest.approx(1.0)  # not applied
    assert error(stored + 2 * B @ A) == pytest.approx(1.0)  # twice
    assert error(stored - B @ A) == pytest.approx(2.0)  # with the wrong sign
    assert error(stored + B @ A) < 1e-12
    assert 1e-3 < error(merged(stored, B @ A)) < 0.9


def test_several_modules_and_those_without_inputs(tmp_path):
    """Shared inputs, a prefix that the base lacks, biases, embeddings: all named."""
    X, Y = inputs(0, 24), inputs(1, 16)
    file = tmp_path / "a.safetensors"
    activations = write(
        file,
        {"model.l.0.q": ("gram", X), "model.l.0.o": ("samples", Y)},
        shared={"model.l.0.k": "model.l.0.q"},
    )
    targets, baked, parts = {}, {}, {}
    for seed, (name, n) in enumerate({"q": 24, "k": 24, "o": 16, "up": 24}.items()):
        W, stored = weight(20, n, seed=seed)
        B, A = sizes(seed, 20, n, 0.05)
        after = merged(stored, B @ A)
        targets[f"l.0.{name}.weight"] = target(W, B, A)
        baked[f"l.0.{name}.weight"] = ref(after, "BF16")
        parts[name] = expected(stored, B @ A, after, Y if name == "o" else X)
    W, _ = weight(1, 20)
    targets["l.0.q.bias"] = target(W, *sizes(9, 1, 20, 0.1, rank=1))
    baked["l.0.q.bias"] = W
    report = forward_errors(targets, baked, activations)
    assert list(report.modules) == ["l.0.q.weight", "l.0.k.weight", "l.0.o.weight"]
    assert report.without == ("l.0.up.weight", "l.0.q.bias")
    for name in "qko":
        found = report.modules[f"l.0.{name}.weight"]
        assert (found.error, found.change, found.output) == pytest.approx(parts[name], rel=1e-4)
    norms = [math.hypot(*(parts[name][part] for name in "qko")) for part in range(3)]
    assert report.to_change == pytest.approx(norms[0] / norms[1], rel=1e-4)
    assert report.to_output == pytest.approx(norms[0] / norms[2], rel=1e-4)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["modules"]["l.0.o.weight"]["inputs"] == "samples"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("l.0.q", "model.l.0.q"),
        ("model.l.0.q", "l.0.q"),
        ("l.0.q", "l.0.q"),
        ("transformer.h.0.c", "base.transformer.h.0.c"),
    ],
    ids=["base-longer", "file-longer", "equal", "two-parts"],
)
def test_names_may_differ_by_a_prefix(tmp_path, module, name):
    W, _ = weight(10, 12)
    B, A = sizes(0, 10, 12, 0.05)
    activations = write(tmp_path / "a.safetensors", {module: ("samples", inputs(0, 12))})
    report = forward_errors({f"{name}.weight": target(W, B, A)}, {f"{name}.weight": W}, activations)
    assert report.without == ()
    assert report.to_change == pytest.approx(1.0)


def test_names_that_fit_in_two_ways(tmp_path):
    X = inputs(0, 12)
    activations = write(tmp_path / "a.safetensors", {"a.q": ("samples", X), "b.q": ("samples", X)})
    W, _ = weight(10, 12)
    targets = {"q.weight": target(W, *sizes(0, 10, 12, 0.05))}
    with pytest.raises(IncompatibleError, match=r"fit the base's in several ways .*'a\.' or 'b\.'"):
        forward_errors(targets, {"q.weight": W}, activations)


def test_a_file_of_another_model_has_nothing_to_say(tmp_path):
    activations = write(tmp_path / "a.safetensors", {"x.y": ("samples", inputs(0, 12))})
    W, _ = weight(10, 12)
    targets = {"l.q.weight": target(W, *sizes(0, 10, 12, 0.05))}
    report = forward_errors(targets, {"l.q.weight": W}, activations)
    assert report.modules == {} and report.without == ("l.q.weight",)
    assert report.to_change is None and report.to_output is None


@pytest.mark.parametrize("order", ["columns", "rows"])
def test_inputs_of_another_size(tmp_path, order):
    activations = write(tmp_path / "a.safetensors", {"q": ("samples", inputs(0, 20))})
    W, stored = weight(10, 12)
    W = ref(stored.T, "BF16") if order == "rows" else W
    targets = {"q.weight": target(W, *sizes(0, 10, 12, 0.05), inputs=order)}
    with pytest.raises(IncompatibleError, match="12 numbers in the base, 20 in the activations"):
        forward_errors(targets, {"q.weight": W}, activations)


def test_a_merge_of_another_shape(tmp_path):
    activations = write(tmp_path / "a.safetensors", {"q": ("samples", inputs(0, 12))})
    W, stored = weight(10, 12)
    targets = {"q.weight": target(W, *sizes(0, 10, 12, 0.05))}
    with pytest.raises(IncompatibleError, match=r"\[12, 10\], in the base \[10, 12\]"):
        forward_errors(targets, {"q.weight": ref(stored.T)}, activations)


@pytest.mark.parametrize("where", ["gram", "samples", "merge"])
def test_what_is_not_finite(tmp_path, where):
    kind = "samples" if where == "merge" else where
    activations = write(tmp_path / "a.safetensors", {"q": (kind, inputs(0, 12))})
    W, stored = weight(10, 12)
    after = stored.copy()
    if where == "merge":
        after[3, 4] = np.inf
    else:
        _overwrite(activations.modules["q"].ref, 5, np.nan)
    targets = {"q.weight": target(W, *sizes(0, 10, 12, 0.05))}
    with pytest.raises(NumericsError, match="holds NaN or infinities"):
        forward_errors(targets, {"q.weight": ref(after)}, open_activations(activations.path))


@pytest.mark.parametrize("at", [1, 0], ids=["asymmetric", "negative"])
def test_what_are_no_second_moments(tmp_path, at):
    activations = write(tmp_path / "a.safetensors", {"q": ("gram", inputs(0, 12))})
    _overwrite(activations.modules["q"].ref, at, -1e6)
    W, _ = weight(10, 12)
    targets = {"q.weight": target(W, *sizes(0, 10, 12, 0.05))}
    with pytest.raises(FormatError, match="no second moment"):
        forward_errors(targets, {"q.weight": W}, open_activations(activations.path))


def _overwrite(tensor: Ref, index: int, value: float) -> None:
    with open(tensor.source.path, "r+b") as file:
        file.seek(tensor.offset + 4 * index)
        file.write(np.float32(value).tobytes())


def test_convolutions_and_blocks(tmp_path, monkeypatch):
    """Inputs of a convolution are its unfolded patches; blocks do not matter."""
    monkeypatch.setattr("adapterops.judging.forward._BLOCK", 5 * 36)
    X = inputs(0, 36)
    activations = write(tmp_path / "a.safetensors", {"c": ("gram", X)})
    W, stored = weight(22, 36)
    W = Ref(W.source, W.name, W.dtype, (22, 4, 3, 3), W.offset, W.nbytes)
    B, A = sizes(0, 22, 36, 0.05)
    after = merged(stored, B @ A)
    baked = ref(after.reshape(22, 4, 3, 3), "BF16")
    found = forward_errors({"c.weight": target(W, B, A)}, {"c.weight": baked}, activations).modules[
        "c.weight"
    ]
    parts = expected(stored, B @ A, after, X)
    assert (found.error, found.change, found.output) == pytest.approx(parts, rel=1e-4)
