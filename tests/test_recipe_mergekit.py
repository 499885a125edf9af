"""Recipes in mergekit's shape: what they become, and what they cannot be."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import UsageError
from adapterops.verbs.run import prepared
from tests.support import dense, distance, pairs, read_peft, write_peft

SHAPES = {
    "model.layers.0.self_attn.q_proj": (20, 24),
    "model.layers.0.mlp.up_proj": (20, 24),
    "model.layers.1.self_attn.q_proj": (20, 24),
    "lm_head": (20, 24),
}


def models(*weights: Any) -> list[dict[str, Any]]:
    return [
        {"model": name, "parameters": {} if weight is None else {"weight": weight}}
        for name, weight in zip("abc", weights, strict=False)
    ]


def call(**recipe: Any) -> dict[str, Any]:
    """The arguments of the call that a recipe is."""
    return dict(prepared({"out": "x", **recipe}).arguments)


def warnings(**recipe: Any) -> tuple[str, ...]:
    return prepared({"out": "x", **recipe}).warnings


def test_models_are_adapters_with_weights():
    found = call(merge_method="linear", models=models(0.7, 0.3))
    assert found == {"adapters": ["a", "b"], "weights": [0.7, 0.3], "out": "x"}
    assert call(models=models(None, None)) == {"adapters": ["a", "b"], "out": "x"}


def test_the_other_keys_are_the_verbs():
    found = call(
        merge_method="ties",
        models=models(1, 1),
        parameters={"density": 0.2, "normalize": True},
        dtype="bfloat16",
        space="core",
        rank=8,
    )
    assert found == {
        "adapters": ["a", "b"],
        "weights": [1.0, 1.0],
        "method": "ties",
        "parameters": {"density": 0.2, "normalize": True},
        "dtype": "bfloat16",
        "space": "core",
        "rank": 8,
        "out": "x",
    }


def test_normalize_of_linear_is_the_methods():
    found = call(merge_method="linear", models=models(1, 3), parameters={"normalize": True})
    assert found["parameters"] == {"normalize": True} and "normalize" not in found
    assert call(merge_method="task_arithmetic", models=models(1, 3)).keys() == {
        "adapters",
        "weights",
        "out",
    }


def test_normalize_divides_each_modules_own_weights(tmp_path):
    """As mergekit does: tensor by tensor, by the sum of the weights that the filters gave it."""
    factors = [pairs(seed, SHAPES, 2) for seed in range(2)]
    for name, each in zip("ab", factors, strict=True):
        write_peft(tmp_path / name, each)
    weight = [{"filter": "q_proj", "value": 3}, {"value": 1}]
    given = {"merge_method": "linear", "models": models(weight, 1)}
    for entry in given["models"]:
        entry["model"] = str(tmp_path / entry["model"])
    ao.run({**given, "parameters": {"normalize": True}}, out=tmp_path / "m")
    found, (a, b) = read_peft(tmp_path / "m"), map(dense, factors)
    for name in SHAPES:
        share = 0.75 if "q_proj" in name else 0.5
        wanted = share * a[name] + (1 - share) * b[name]
        assert found[name] == pytest.approx(wanted, abs=1e-6)


def test_a_parameter_that_all_models_have_alike_is_one():
    both = [{"model": n, "parameters": {"weight": 1, "density": 0.4}} for n in "ab"]
    assert call(merge_method="ties", models=both)["parameters"] == {"density": 0.4}


def test_a_weight_of_all():
    assert call(models=models(0.2, None), parameters={"weight": 0.4})["weights"] == [0.2, 0.4]


def test_the_base_model_is_what_bake_writes_into():
    given = {"merge_method": "ties", "base_model": "base", "verb": "bake"}
    listed = [{"model": "base"}, *models(1, 2)]
    found = call(**given, models=listed, parameters={"density": 0.5})
    assert found["base"] == "base" and found["adapters"] == ["a", "b"]
    assert found["weights"] == [1.0, 2.0] and found["method"] == "ties"
    assert warnings(**given, models=listed) == ()


def test_the_base_of_slerp_is_the_first_of_the_two():
    """mergekit's slerp has no other way to say where t = 0 is."""
    given = {"merge_method": "slerp", "parameters": {"t": 0.3}, "base_model": "b"}
    assert call(**given, models=models(None, None))["adapters"] == ["b", "a"]
    assert warnings(**given, models=models(None, None)) == ()
    assert call(**given, models=models(None, None, None))["adapters"] == ["a", "c"]
    assert call(**given, models=models(None, None), verb="bake")["adapters"] == ["a"]


def test_what_mergekit_would_do_otherwise_is_said():
    (said,) = warnings(merge_method="ties", base_model="base", models=models(1, 1))
    assert said.startswith("base_model is not used")
    (said,) = warnings(merge_method="linear", models=models(1, 2))
    assert "the weights add up to 3" in said and "normalize: true" in said
    assert warnings(merge_method="linear", models=models(0.5, 0.5)) == ()
    for told in ({"parameters": {"normalize": False}}, {"normalize": False}):
        assert warnings(merge_method="linear", models=models(1, 2), **told) == ()


def test_warnings_are_in_the_report(tmp_path):
    for seed, name in enumerate("ab"):
        write_peft(tmp_path / name, pairs(seed, SHAPES, 2))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("models:\n- {model: a, parameters: {weight: 1}}\n- model: b\n"[:-12])
    report = ao.run(recipe, out=tmp_path / "m")
    assert report.error is not None
    recipe.write_text("base_model: base\nmodels:\n- {model: a, parameters: {weight: 1}}\n")
    assert "base_model is not used" in ao.run(recipe, out=tmp_path / "n").warnings[0]


class TestFilters:
    def test_they_become_rules_the_first_one_last(self):
        first = [{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": 2}, {"value": 1}]
        found = call(models=models(first, 0.25))
        assert found["weights"] == [1.0, 0.25]
        assert found["module_weights"] == ["re:.*mlp.*: 2.0,0.25", "re:.*self_attn.*: 0.5,0.25"]

    def test_rules_of_the_recipes_own_count_more(self):
        given = [{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 1}]
        found = call(models=models(given, 1), module_weights=["attn: 1,0"])
        assert found["module_weights"] == ["re:.*mlp.*: 0.5,1.0", "attn: 1,0"]

    def test_the_weight_of_all_is_for_what_no_filter_fits(self):
        found = call(
            models=models([{"filter": "lm_head", "value": 0}], None), parameters={"weight": 0.5}
        )
        assert found["weights"] == [0.5, 0.5]
        assert found["module_weights"] == ["re:.*lm_head.*: 0.0,0.5"]

    @pytest.mark.parametrize(
        "first",
        [
            [{"filter": "self_attn", "value": 0.5}, {"value": 1}],
            [{"filter": "layers.0.", "value": 0.5}, {"filter": "attn", "value": 3}, {"value": 1}],
            [{"filter": "q_proj.weight", "value": -1}, {"value": 0}],
            [{"filter": "attn.q", "value": 0}, {"filter": "weight", "value": 2}, {"value": 9}],
            {"value": 0.75},
        ],
        ids=["one", "order", "ending", "everything", "alone"],
    )
    def test_the_merge_is_the_one_that_mergekit_means(self, tmp_path, first):
        for seed, name in enumerate("ab"):
            write_peft(tmp_path / name, pairs(seed, SHAPES, 2))
        recipe = {"models": models(first, 0.25), "dtype": "float32"}
        for model in recipe["models"]:
            model["model"] = tmp_path / model["model"]
        ao.run(recipe, out=tmp_path / "m", overwrite=True)

        def weight(tensor: str) -> float:
            items = [first] if isinstance(first, dict) else first
            return next(i["value"] for i in items if i.get("filter", "") in tensor)

        a, b = (dense(pairs(seed, SHAPES, 2)) for seed in range(2))
        wanted = {name: weight(f"{name}.weight") * a[name] + 0.25 * b[name] for name in SHAPES}
        assert all(np.any(value) for value in wanted.values())
        assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "typo in a weight": (
        {"models": [{"model": "a"}, {"model": "b", "parameters": {"wieght": 1}}]},
        "models[1].parameters.wieght: linear has no such parameter; did you mean weight?",
    ),
    "typo in a model": (
        {"models": [{"modle": "a"}]},
        "models[0].modle: is no key of a model; did you mean model?",
    ),
    "no path": ({"models": [{"parameters": {}}]}, "models[0].model: is nothing; expected a path"),
    "a model that is text": ({"models": ["a"]}, "models[0]: is 'a'; expected a mapping"),
    "a model with a LoRA": (
        {"models": [{"model": "base+a"}]},
        "models[0].model: 'base+a' is a model with a LoRA, as mergekit has them; give the LoRA",
    ),
    "rules that are no list": (
        {
            "models": models([{"filter": "mlp", "value": 1}, {"value": 0}]),
            "module_weights": "attn: 1",
        },
        "module_weights: is the text 'attn: 1'; expected a list of text",
    ),
    "no models": ({"merge_method": "ties"}, "models: expected a list of adapters"),
    "models by name": ({"models": {"a": 1}}, "models: expected a list of adapters"),
    "only the base": (
        {"models": [{"model": "a"}], "base_model": "a"},
        "models: lists the base model alone",
    ),
    "unknown method": (
        {"merge_method": "tise", "models": models(1)},
        "merge_method: there is no method 'tise'; did you mean ties?",
    ),
    "method of another type": ({"merge_method": 3, "models": models(1)}, "merge_method: is 3"),
    "unknown parameter": (
        {"merge_method": "ties", "models": models(1), "parameters": {"densty": 1}},
        "parameters.densty: ties has no such parameter; did you mean density?",
    ),
    "parameter out of range": (
        {"merge_method": "ties", "models": models(1), "parameters": {"density": 2}},
        "parameters.density: ties: density is 2; expected a number above 0 to 1",
    ),
    "int8_mask": (
        {"merge_method": "ties", "models": models(1), "parameters": {"int8_mask": True}},
        "parameters.int8_mask: ties has no such parameter; it changes nothing here",
    ),
    "parameter by filter": (
        {"merge_method": "slerp", "models": models(1), "parameters": {"t": [{"value": 1}]}},
        "parameters.t: expected one value; filters are for weight",
    ),
    "density of each": (
        {
            "merge_method": "ties",
            "models": [
                {"model": n, "parameters": {"density": d}} for n, d in (("a", 1), ("b", 0.5))
            ],
        },
        "models[0].parameters.density: ties takes one density for all adapters; give it once",
    ),
    "one without weight": (
        {"models": models(1, None)},
        "models[1].parameters: has no weight, and others have",
    ),
    "weight is text": (
        {"models": models("1")},
        "models[0].parameters.weight: is '1'; expected a number, or values by filters",
    ),
    "gradient": (
        {"models": models([0, 0.5, 1])},
        "models[0].parameters.weight: is a gradient; values along the layers",
    ),
    "gradient in a filter": (
        {"models": models([{"filter": "mlp", "value": [0, 1]}, {"value": 1}])},
        "models[0].parameters.weight[0].value: is a gradient",
    ),
    "nothing for the others": (
        {"models": models([{"filter": "mlp", "value": 1}])},
        "models[0].parameters.weight: has no value for other modules",
    ),
    "typo in a filter": (
        {"models": models([{"fliter": "mlp", "value": 1}])},
        "models[0].parameters.weight[0].fliter: is no key of a value; did you mean filter?",
    ),
    "filters in another order": (
        {
            "models": [
                {"model": name, "parameters": {"weight": [*filters, {"value": 1}]}}
                for name, filters in (
                    ("a", [{"filter": "x", "value": 1}, {"filter": "y", "value": 2}]),
                    ("b", [{"filter": "y", "value": 1}, {"filter": "x", "value": 2}]),
                )
            ]
        },
        "models[1].parameters.weight: has other filters, or in another order",
    ),
    "both shapes": (
        {"models": models(1), "adapters": ["a"]},
        "adapters: is called models in a recipe with models",
    ),
    "method": ({"models": models(1), "method": "ties"}, "method: is called merge_method"),
    "weights": ({"models": models(1), "weights": [1]}, "weights: merge has no such key"),
    "slices": ({"models": models(1), "slices": []}, "slices: is not read here; layers keep"),
    "tokenizer": ({"models": models(1), "tokenizer_source": "union"}, "tokenizer files are carri"),
    "out_dtype": ({"models": models(1), "out_dtype": "float16"}, "dtype is what is written"),
    "typo at the top": ({"models": models(1), "dtyp": "x"}, "dtyp: merge has no such key; did you"),
    "another verb": (
        {"models": models(1), "verb": "compress"},
        "models: is for merge and bake, not for compress",
    ),
    "bake without a base": ({"models": models(1), "verb": "bake"}, "bake needs base"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_cannot_be_is_named(name):
    recipe, message = WRONG[name]
    with pytest.raises(UsageError, match=re.escape(message)):
        call(**recipe)


def test_the_place_is_that_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nmodels:\n- model: a\n- model: b\n  parameters:\n    wieght: 0.3\n"
    )
    with pytest.raises(UsageError, match=r"^r\.yaml:6:5: models\[1\]\.parameters\.wieght: "):
        ao.run("r.yaml", out="x")
