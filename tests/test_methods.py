"""What `adapterops methods` says of every method, as a list, a table, a page and JSON."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.cli import app
from adapterops.errors import UsageError
from adapterops.render.methods import page, table
from adapterops.rules.laws import BREACHES, LAWS
from adapterops.rules.registry import METHODS, find
from tests.inspecting import call
from tests.support import pairs, write_peft

NAMES = [one.name for one in ao.methods()]


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["methods", *arguments])
    assert done.exit_code == code, done.output
    return str(done.stdout)


def test_every_method_is_listed_once_by_what_it_looks_at():
    assert sorted(NAMES) == sorted(METHODS)
    assert len(set(NAMES)) == len(NAMES)
    found = [(one.signature, one.name) for one in ao.methods()]
    order = ["gram", "core", "elements", "factors"]
    assert found == sorted(found, key=lambda item: (order.index(item[0]), item[1]))


def test_these_are_the_methods_that_were_promised():
    assert set(NAMES) >= {
        *("linear", "slerp", "nuslerp", "karcher", "model_stock"),
        *("project", "subtract", "tsv", "iso_c", "iso_cts", "ctm", "svd"),
        *("ties", "dare", "dare_ties", "della", "breadcrumbs", "sce", "magnitude_prune"),
        *("regmean", "peft_linear"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name: str):
    [one] = ao.methods(name)
    assert one.summary.endswith(".") and len(one.summary) < 100
    assert re.search(r"arXiv \d{4}\.\d{5}|doi 10\.|PEFT 0\.21\.2|section", one.reference)
    assert set(one.laws) <= set(LAWS) and set(one.breaks) <= set(BREACHES)
    assert one.spaces == (("dense", "core", "knots") if one.signature == "elements" else ())
    for parameter, meant in zip(one.parameters, find(name).parameters, strict=True):
        assert parameter.meaning and parameter.range
        if parameter.default is not None:  # a default is one of the values allowed
            assert meant.read(parameter.default, name) == parameter.default


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_says_can_be_given(name: str):
    """The defaults as they are printed are read back as the defaults, as `--param` reads them."""
    text = page(ao.methods(name)[0])
    one, plain = find(name), " ".join(text.split())
    assert one.reference in plain and text.startswith(name)
    given = dict(re.findall(r"--param (\w+)=(\S+)", text))
    assert list(given) == [each.name for each in one.parameters[:1]]
    values = one.values(given)
    for parameter in one.parameters:
        if parameter.default is not None:
            assert values[parameter.name] == parameter.default
        row = next(line for line in text.split("\n") if line.startswith(f"{parameter.name} "))
        assert parameter.range in row and parameter.meaning in plain


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_page_runs(name: str, tmp_path):
    [example] = re.findall(r"for example: adapterops (.*)", page(ao.methods(name)[0]))
    shapes = {"model.layers.0.q_proj": (30, 24)}
    rng = np.random.default_rng(0)
    for seed, each in enumerate("ab"):
        write_peft(tmp_path / each, pairs(seed, shapes, 3))
        samples = {stem: ("samples", rng.standard_normal((9, 24))) for stem in shapes}
        write_activations(tmp_path / f"{each}.safetensors", samples, tokens=9, model="tiny/base")
    call(*shlex.split(example), cwd=tmp_path)
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


def test_the_table_names_everything():
    text = table(ao.methods())
    plain = " ".join(text.split())
    for one in ao.methods():
        assert re.search(rf"^{one.name} ", text, re.MULTILINE)
        for parameter in one.parameters:
            assert parameter.name in plain
    assert all(len(line) <= 140 for line in text.split("\n"))
    assert "density=0.2" in text and "normalize=true" in text and "arXiv" in text
    assert run() == text + "\n"


def test_pages():
    ties = run("ties")
    assert "above 0 to 1" in ties and "dense, core, knots (--space)" in ties
    assert "required" in run("svd") and "rank=16" in run("svd")
    assert "inputs of every adapter's modules (--activations)" in run("regmean")
    assert "random bits (--seed)" in run("dare")
    assert "breaks      gauge" in run("peft_linear") and "breaks" not in run("linear")
    assert re.search(r"adapters +2\n", run("slerp"))
    assert re.search(r"adapters +2 or more\n", run("project"))


def test_json_is_one_document_with_everything():
    found = json.loads(run("--json"))
    assert found["schema"] == "adapterops.methods/1"
    assert [one["name"] for one in found["methods"]] == NAMES
    [svd] = json.loads(run("svd", "--json"))["methods"]
    assert svd["parameters"] == [
        {
            "name": "rank",
            "kind": "whole",
            "default": None,
            "range": "a whole number from 1",
            "meaning": "rank of the result at most",
        }
    ]
    assert svd["signature"] == "core" and svd["least"] == 1 and svd["most"] is None
    assert list(svd["laws"]) == ["homogeneous", "low-rank"] and svd["breaks"] == {}


def test_an_unknown_method_is_an_error_that_knows_better():
    with pytest.raises(UsageError, match="no method 'tie'; did you mean ties"):
        ao.methods("tie")
    with pytest.raises(UsageError, match="adapterops methods lists them"):
        ao.methods("zzz")


def test_bounds_of_the_rank():
    ranks = [4, 8, 2]
    assert find("linear").columns(ranks, {}) == find("tsv").columns(ranks, {}) == 14
    assert find("svd").columns(ranks, {"rank": 3}) == 3
    assert find("svd").columns(ranks, {"rank": 99}) == 14
    assert find("ctm").columns(ranks, {"rank": 0}) == 8
    assert find("ctm").columns(ranks, {"rank": 5}) == 5
    assert find("project").columns(ranks, {"side": "both"}) == 4
    assert find("project").columns([9, 2], {"side": "left"}) == 2
    assert find("subtract").columns(ranks, {"side": "right"}) == 4
    assert find("subtract").columns(ranks, {"side": "both"}) == 8
    assert find("peft_linear").columns([4, 4, 0], {}) == 4
    assert find("regmean").columns(ranks, {}) == 14
