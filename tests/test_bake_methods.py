"""What merge methods make of adapters, in a base: matrices wherever its layout puts them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops.combining import combine, rule_for
from adapterops.derive import derived
from tests import bake_models, test_bake_names
from tests.support import dense, load_file, pairs, write_peft

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.0.mlp.up_proj": (32, 24)}


@pytest.fixture
def as_matrices(monkeypatch):
    """Every adapter of `test_bake_names` as the matrix of a rule that changes nothing."""
    plain = test_bake_names.changes
    rule = rule_for("magnitude_prune", {"density": 1.0})

    def of_matrices(base, inputs, weights, **options):
        made = [derived([file], [1.0], rule) for file in inputs]
        return plain(base, made, weights, **options)

    monkeypatch.setattr(test_bake_names, "changes", of_matrices)


@pytest.mark.usefixtures("as_matrices")
class TestFused(test_bake_names.TestFused):
    test_biases = None  # a bias is no matrix


@pytest.mark.usefixtures("as_matrices")
class TestExperts(test_bake_names.TestExperts):
    pass


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return bake_models.model(tmp_path / "base", tensors, "F32"), tensors


@pytest.mark.parametrize(
    ("method", "space"),
    [
        ("ties", "dense"),
        ("dare", "dense"),
        ("ties", "knots"),
        ("tsv", "dense"),
        ("slerp", "dense"),
        ("linear", "dense"),
    ],
)
@pytest.mark.parametrize("way", ["exact", "nearest"])
def test_the_base_gets_what_the_method_makes(method, space, way, model, tmp_path):
    base, tensors = model
    folders = [write_peft(tmp_path / f"a{i}", pairs(i, SHAPES, 3)) for i in range(2)]
    out = tmp_path / "out"
    ao.bake(base, folders, [0.6, 0.4], out=out, method=method, space=space, seed=4, round=way)
    made = combine(method, folders, [0.6, 0.4], space=space, seed=4)
    found = load_file(next(out.glob("*.safetensors")))
    for name in SHAPES:
        wanted = (tensors[f"{name}.weight"].astype(np.float32) + made[name].dense()).astype("f4")
        off = np.abs(found[f"{name}.weight"] - wanted)
        assert off.max() <= 2.0**-23 * np.abs(wanted).max()


def test_a_bake_and_a_merge_record_the_same_and_a_rerun_is_the_same_file(model, tmp_path):
    base, _ = model
    folders = [write_peft(tmp_path / f"a{i}", pairs(i, SHAPES, 3)) for i in range(2)]
    for out in "xy":
        ao.bake(base, folders, out=tmp_path / out, method="dare_ties", seed=7, dtype="float16")
    document = json.loads((tmp_path / "x" / "adapterops.json").read_text())
    options, inputs = document["provenance"]["options"], document["provenance"]["inputs"]
    assert options["method"] == "dare_ties"
    assert options["parameters"]["density"] == 0.5
    assert options["seed"] == 7
    assert [each["name"] for each in inputs] == ["a0", "a1"]
    one, two = (next((tmp_path / out).glob("*.safetensors")).read_bytes() for out in "xy")
    assert one == two


def test_reversible(model, tmp_path):
    base, _ = model
    folders = [write_peft(tmp_path / f"a{i}", pairs(i, SHAPES, 3)) for i in range(2)]
    for method in ("ties", "tsv"):
        out, back = tmp_path / method, tmp_path / f"{method}-back"
        ao.bake(base, folders, out=out, method=method, reversible=True)
        ao.unbake(out, out=back)
        names = [path.name for path in Path(base).glob("*.safetensors")]
        for name in names:
            assert (back / name).read_bytes() == (Path(base) / name).read_bytes()


def test_module_weights_and_plain_sums(model, tmp_path):
    base, tensors = model
    factors = [pairs(i, SHAPES, 3) for i in range(2)]
    folders = [write_peft(tmp_path / f"a{i}", each) for i, each in enumerate(factors)]
    ao.bake(
        base,
        folders,
        [1, 1],
        out=tmp_path / "o",
        module_weights=["attn: 0.5,0.25"],
        dtype="float32",
    )
    found = load_file(next((tmp_path / "o").glob("*.safetensors")))
    for name, shares in zip(SHAPES, ((0.5, 0.25), (1, 1)), strict=True):
        change = sum(w * dense(each)[name] for w, each in zip(shares, factors, strict=True))
        wanted = tensors[f"{name}.weight"] + change
        assert np.abs(found[f"{name}.weight"] - wanted).max() < 1e-6


def test_modules_that_are_left_out_need_no_place_in_the_base(model, tmp_path):
    base, tensors = model
    more = {**SHAPES, "model.layers.7.mlp.gate_proj": (32, 24)}
    folders = [write_peft(tmp_path / f"w{i}", pairs(i, more, 2), alpha=2.0) for i in range(2)]
    ao.bake(
        base,
        folders,
        [1, 1],
        out=tmp_path / "out",
        method="ties",
        modules=".*q_proj",
        parameters={"density": 1.0, "normalize": False},
        dtype="float32",
    )
    stem = "model.layers.0.self_attn.q_proj"
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{stem}.weight"]
    D = np.stack([dense(pairs(i, more, 2))[stem] for i in range(2)])
    expected = tensors[f"{stem}.weight"].astype(np.float32) + np.where(
        D[0] * D[1] >= 0, D.sum(0), np.where(np.abs(D[0]) > np.abs(D[1]), D[0], D[1])
    )
    assert np.abs(found - expected).max() <= 1e-5
