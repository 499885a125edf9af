"""run RECIPE.yaml: every verb by its own parameters, or as mergekit has it, and nothing unsaid."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import adapterops as ao
from adapterops.cli import COMMANDS
from adapterops.cli.run import _PAGES
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.recipe.fitting import expected
from adapterops.verbs.run import VERBS, prepared, verb
from tests import bake_models
from tests.inspecting import call
from tests.support import pairs, write_kohya, write_peft

SHAPES = {
    "model.layers.0.self_attn.q_proj": (40, 48),
    "model.layers.0.mlp.up_proj": (40, 48),
    "model.layers.1.self_attn.q_proj": (40, 48),
}
MAIN = "adapter_model.safetensors"
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Adapters a, b, c in a folder that is not the current one."""
    folder = tmp_path / "recipes"
    for seed, name in enumerate("abc"):
        write_peft(folder / name, pairs(seed, SHAPES, 3), alpha=6)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def written(folder: Path, text: str, name: str = "r.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def same(one: Path, other: Path) -> bool:
    """Whether all files of two outputs are equal to the byte, but for their own name."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()} and MAIN in names
    found = [
        [(folder / name).read_text(errors="surrogateescape") for name in sorted(names)]
        for folder in (one, other)
    ]
    return found[0] == [text.replace(other.name, one.name) for text in found[1]]


class TestEveryVerb:
    @pytest.mark.parametrize("name", VERBS)
    def test_keys_are_the_parameters(self, name):
        function = getattr(ao, name)
        parameters = inspect.signature(function).parameters
        found = verb(name)
        assert found.function is function
        assert list(found.keys) == [key for key in parameters if key != "progress"]
        assert found.takes_progress == ("progress" in parameters)
        for key, kind in found.keys.items():
            assert expected(kind), key  # each takes something that can be written down

    @pytest.mark.parametrize("name", VERBS)
    def test_keys_are_options_of_the_command_under_another_name_at_most(self, name):
        command = importlib.import_module(COMMANDS[name]).command
        names = {"output" if key == "out" else key for key in verb(name).keys}
        options = {param.name for param in command.params}
        # Arguments that the command takes apart, and what is said with each.
        apart = {"adapter": "adapters", "path": "paths", "baked": "models"}
        missing = {key for key in names if key not in options and apart.get(key) not in options}
        assert missing - {"adapters", "weights", "models"} == set()

    def test_every_verb_of_the_package_is_there_and_has_its_page(self):
        verbs = {path.stem for path in Path(ao.__file__).parent.glob("verbs/*.py")}
        public = verbs & set(ao.__all__) - {"methods", "run"}
        assert public == set(VERBS) == set(_PAGES)
        for module, page in _PAGES.values():
            assert callable(getattr(importlib.import_module(module), page))

    def test_run_is_a_function_and_stays_one(self):
        importlib.import_module("adapterops.verbs.run")
        assert ao.run is importlib.import_module("adapterops.verbs.run").run


class TestBytes:
    @pytest.mark.parametrize(
        ("text", "direct"),
        [
            (
                "verb: merge\nadapters: [a, b]\nweights: [0.7, 3e-1]\nrank: 4\nout: OUT",
                lambda d, out: ao.merge([d / "a", d / "b"], [0.7, 0.3], rank=4, out=out),
            ),
            (
                "verb: merge\nadapters: [b, a, c]\nweights: [1, 2, 1]\nnormalize: true\n"
                "max_error: 0.4\ndtype: float16\nmodules: '.*attn.*'\nout: OUT",
                lambda d, out: ao.merge(
                    [d / "b", d / "a", d / "c"],
                    [1, 2, 1],
                    normalize=True,
                    max_error=0.4,
                    dtype="float16",
                    modules=".*attn.*",
                    out=out,
                ),
            ),
            (
                "verb: merge\nadapters: [a, b]\nweights: [1, 1]\nmethod: dare_ties\nseed: 3\n"
                "parameters: {density: .5}\nspace: core\nrank: 4\nout: OUT",
                lambda d, out: ao.merge(
                    [d / "a", d / "b"],
                    [1, 1],
                    method="dare_ties",
                    parameters={"density": 0.5},
                    seed=3,
                    space="core",
                    rank=4,
                    out=out,
                ),
            ),
            (
                "verb: compress\nadapter: a\nenergy: 1\nform: svd\nalpha: {a: 4}\nout: OUT",
                lambda d, out: ao.compress(
                    d / "a", energy=1.0, form="svd", alpha={d / "a": 4.0}, out=out
                ),
            ),
            (
                "verb: convert\nadapter: c\nscaling: rslora\nout: OUT",
                lambda d, out: ao.convert(d / "c", scaling="rslora", out=out),
            ),
            (
                "verb: calc\nexpression: a - 0.5*project(b, a)\nadapters: {a: c, b: a}\n"
                "rank: 5\nout: OUT",
                lambda d, out: ao.calc(
                    "a - 0.5*project(b, a)", {"a": d / "c", "b": d / "a"}, rank=5, out=out
                ),
            ),
            (
                "merge_method: ties\nmodels:\n- {model: a, parameters: {weight: 0.7}}\n"
                "- {model: b, parameters: {weight: 0.3}}\nparameters: {density: 0.4}\n"
                "dtype: bfloat16\nrank: 4\nspace: knots\nout: OUT",
                lambda d, out: ao.merge(
                    [d / "a", d / "b"],
                    [0.7, 0.3],
                    method="ties",
                    parameters={"density": 0.4},
                    dtype="bfloat16",
                    rank=4,
                    space="knots",
                    out=out,
                ),
            ),
        ],
        ids=["merge", "merge-options", "merge-method", "compress", "convert", "calc", "mergekit"],
    )
    def test_a_recipe_gives_the_bytes_of_the_call(self, here, text, direct):
        ao.run(written(here, text.replace("OUT", "one")))
        direct(here, here / "two")
        assert same(here / "one", here / "two")

    def test_extract_and_bake_and_unbake(self, here):
        base = bake_models.model(here / "base", bake_models.weights())
        write_peft(here / "d", bake_models.factors(1))
        for text in (
            "verb: bake\nbase: base\nadapters: d\nround: stochastic\nseed: 4\n"
            "reversible: true\nout: baked",
            "verb: extract\nbase: base\ntuned: baked\nrank: 4\nout: back",
            "verb: unbake\nbaked: baked\nout: restored",
        ):
            ao.run(written(here, text))
        ao.bake(base, here / "d", round="stochastic", seed=4, reversible=True, out=here / "baked-2")
        ao.extract(base, here / "baked", rank=4, out=here / "back-2")
        stored = bake_models.stored
        assert stored(here / "baked") == stored(here / "baked-2") != stored(base)
        assert same(here / "back", here / "back-2")
        assert stored(here / "restored") == stored(base)

    def test_many_adapters_as_the_command_has_them(self, here):
        text = "verb: compress\nadapters: [a, b]\nrank: 2\nout: small"
        report = ao.run(written(here, text))
        assert report.schema == "adapterops.compress-many/1" and len(report.results) == 2
        ao.compress(here / "b", rank=2, out=here / "b2")
        assert (here / "small/b" / MAIN).read_bytes() == (here / "b2" / MAIN).read_bytes()

    def test_verbs_that_read_give_their_reports(self, here):
        distance = ao.run(written(here, "verb: diff\nadapters: [a, b]")).to_dict()
        assert distance == ao.diff([here / "a", here / "b"]).to_dict()
        found = ao.run({"verb": "inspect", "path": here / "a", "spectrum": True})
        assert found.path == str(here / "a") and found.spectrum is not None
        shutil.copytree(here / "a", here / "d")
        checked = ao.run(written(here, "verb: check\npaths: [a, b, d]\nstrict: true"))
        assert {finding.code for finding in checked.findings} == {"duplicate"}
        assert checked.exit_code == 4

    def test_a_mapping_is_a_recipe_and_takes_adapters(self, here):
        sum_ = 0.5 * ao.open_adapter(here / "a") + ao.open_adapter(here / "b")
        ao.run({"verb": "compress", "adapter": sum_, "rank": 3}, out=here / "one")
        ao.compress(sum_, rank=3, out=here / "two")
        assert same(here / "one", here / "two")


class TestOverrides:
    def test_what_is_said_beside_the_recipe_counts(self, here, tmp_path):
        recipe = written(here, "verb: compress\nadapter: a\nrank: 2\nout: never\nstrict: false")
        report = ao.run(recipe, out="mine", dry_run=True, jobs=1, memory="1GB")
        assert report.schema == "adapterops.compress-plan/1" and report.output == "mine"
        ao.run(recipe, out="mine")
        assert (tmp_path / "elsewhere" / "mine").is_dir() and not (here / "never").exists()
        with pytest.raises(AdapterOpsError, match="exists"):
            ao.run(recipe, out="mine")
        ao.run({"verb": "merge", "adapters": [here / "a"], "overwrite": True}, out="mine")

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("verb: diff\nadapters: [a, b]", {"overwrite": True}, "diff has no overwrite"),
            ("verb: diff\nadapters: [a, b]", {"out": "x"}, "diff has no out"),
            ("verb: merge\nadapters: [a]", {}, "merge needs out; in the recipe, or -o PATH"),
            ("verb: extract\nbase: a", {"out": "x"}, "extract needs tuned"),
            ("verb: merge\nadapters: [a]\nout: x", {"inputs": "."}, "--inputs is for an output"),
        ],
    )
    def test_what_does_not_fit_the_verb(self, here, text, options, message):
        with pytest.raises(UsageError, match=re.escape(message)):
            ao.run(written(here, text), **options)


GENERAL = {
    "no verb": ("adapters: [a]", "r.yaml:1:1: has no verb; begin with verb: and one of merge"),
    "unknown verb": ("verb: marge", "r.yaml:1:1: verb: there is no verb 'marge'; did you mean me"),
    "verb is a list": ("verb: [merge]", "there is no verb ['merge']"),
    "typo": ("verb: merge\nadpaters: [a]", "r.yaml:2:1: adpaters: merge has no such key; did you"),
    "dash": ("verb: merge\nmax-error: 1", "did you mean max_error?"),
    "command's name": ("verb: merge\noutput: x", "output: merge has no such key; it is out here"),
    "progress": ("verb: merge\nprogress: x", "progress: merge has no such key"),
    "list": ("- verb: merge", "expected keys, such as verb: merge"),
    "text": ("merge a b", "expected keys"),
    "number for text": ("verb: merge\nmodules: 3", "r.yaml:2:1: modules: is the number 3; expect"),
    "text for a number": ("verb: merge\nenergy: '0.9'", "is the text '0.9'; expected a number"),
    "switch for a number": ("verb: merge\nrank: true", "is the switch true; expected a whole"),
    "yes": ("verb: merge\nstrict: yes", "strict: is the text 'yes'; expected true or false"),
    "word": ("verb: merge\nspace: knot", "is the text 'knot'; expected dense, core, knots"),
    "item": ("verb: merge\nadapters: [a, 1.5]", "r.yaml:2:15: adapters[1]: is the number 1.5"),
    "weights": ("verb: merge\nweights: [1, x]", "weights[1]: is the text 'x'; expected a number"),
    "scalar for a list": ("verb: merge\nweights: 1", "is the number 1; expected a list of numbers"),
    "mapping": ("verb: merge\nadapters: {a: 1}", "adapters: is a mapping; expected a path or a li"),
    "list for a path": ("verb: compress\nadapter: [a]", "adapter: is a list; expected a path"),
    "alpha": ("verb: merge\nalpha: {a: x}", "alpha.a: is the text 'x'; expected a number"),
    "nothing": ("verb: merge\nout:", "out: is nothing; expected a path"),
    "fraction": ("verb: merge\nrank: 1.5", "rank: is the number 1.5; expected a whole number or"),
    "method": (
        "verb: merge\nmethod: tie",
        "r.yaml:2:1: method: there is no method 'tie'; did you",
    ),
    "parameter": (
        "verb: bake\nmethod: ties\nparameters: {densty: 1}",
        "r.yaml:3:14: parameters.densty: ties has no such parameter; did you mean density?",
    ),
    "of linear": ("verb: merge\nparameters:\n  t: 1", "r.yaml:3:3: parameters.t: linear has no "),
    "range": (
        "verb: merge\nmethod: slerp\nparameters:\n  t: 1.5",
        "r.yaml:4:3: parameters.t: slerp: t is 1.5; expected a number from 0 to 1",
    ),
    "lacking": ("verb: merge\nmethod: svd", "r.yaml:1:1: parameters: svd needs rank: rank of the "),
    "together": (
        "verb: merge\nmethod: della\nparameters: {density: .1}",
        "r.yaml:3:1: parameters: density 0.1 ± epsilon 0.15 has to lie between 0 and 1",
    ),
}


@pytest.mark.parametrize("name", GENERAL)
def test_wrong_keys_and_values_are_named_with_their_place(here, name, monkeypatch):
    monkeypatch.chdir(here)
    text, message = GENERAL[name]
    with pytest.raises(UsageError) as caught:
        ao.run(written(here, text).name)
    assert message in str(caught.value) and caught.value.exit_code == 2


def arguments(recipe: Any) -> dict[str, Any]:
    """What a recipe calls its verb with."""
    return dict(prepared(recipe, out="out").arguments)


class TestPaths:
    def test_relative_ones_are_below_the_recipe(self, here):
        recipe = written(
            here,
            "verb: merge\nadapters: [a, /abs, ../b, 's3://x/y']\nalpha: {a: 2}\nmodules: a\nto: a",
        )
        found = arguments(recipe)
        assert found["adapters"] == [str(here / "a"), "/abs", f"{here}/../b", "s3://x/y"]
        assert found["alpha"] == {str(here / "a"): 2.0}
        assert (found["modules"], found["to"], found["out"]) == ("a", "a", "out")

    def test_a_recipe_in_the_current_folder_leaves_them_as_they_are(self, here, monkeypatch):
        monkeypatch.chdir(here)
        written(here, "verb: merge\nadapters: a")
        assert arguments("r.yaml")["adapters"] == "a"
        assert arguments({"verb": "merge", "adapters": "a"})["adapters"] == "a"

    def test_nothing_is_expanded(self, here, monkeypatch):
        monkeypatch.setenv("A", "a")
        recipe = written(here, "verb: merge\nadapters: [$A, '${A}', ~x, 'a*']")
        assert arguments(recipe)["adapters"] == [f"{here}/{n}" for n in ("$A", "${A}", "~x", "a*")]

    def test_tenants_and_lists(self, here):
        recipe = written(here, "verb: assign\nplan: p\nnew: [t=a, u=/x, v]")
        assert arguments(recipe)["new"] == [f"t={here}/a", "u=/x", f"{here}/v"]
        recipe = written(here, "verb: assign\nplan: p\nnew: {t: a}")
        assert arguments(recipe)["new"] == {"t": f"{here}/a"}
        recipe = written(here, "verb: check\npaths: []\nfrom_file: list.txt")
        assert prepared(recipe).arguments["from_file"] == f"{here}/list.txt"
        recipe = written(here, "verb: index\nsource: s3://bucket/x\nremove: [t]\nseed: 7")
        assert arguments(recipe) == {
            "source": "s3://bucket/x",
            "remove": ["t"],
            "seed": 7,
            "out": "out",
        }


class TestCommand:
    def test_it_prints_what_the_verb_prints(self, here):
        written(here, "verb: compress\nadapter: a\nrank: 2\nout: one")
        told = call("run", "r.yaml", "--no-progress", cwd=here)
        direct = call("compress", "a", "--rank", "2", "-o", "two", "--no-progress", cwd=here)
        assert told.stdout.replace("one", "two") == direct.stdout
        assert same(here / "one", here / "two")
        document = json.loads(call("run", "r.yaml", "-o", "x", "--json", cwd=here).stdout)
        assert document["schema"] == "adapterops.compress/1" and document["output"] == "x"
        assert call("run", "r.yaml", "-o", "y", "-q", cwd=here).stdout == ""
        planned = call("run", "r.yaml", "-o", "z", "--dry-run", cwd=here)
        assert "would be" in planned.stdout and not (here / "z").exists()

    def test_exit_codes_are_the_verbs(self, here):
        (here / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        written(here, "verb: check\npaths: broken.safetensors")
        assert "broken" in call("run", "r.yaml", cwd=here, code=3).stdout
        written(here, "verb: inspect\npath: a")
        found = call("run", "r.yaml", "--json", "-v", cwd=here).stdout
        direct = call("inspect", "a", "--json", "-v", cwd=here).stdout
        assert json.loads(found) == json.loads(direct)
        written(here, "verb: merge\nadapters: [a]\nuot: x")
        failed = call("run", "r.yaml", "--json", cwd=here, code=2)
        error = json.loads(failed.stderr.splitlines()[-1])["error"]
        assert error["path"] == "r.yaml:3:1" and "did you mean out?" in error["hint"]
        assert "no such file" in call("run", "none.yaml", cwd=here, code=6).stderr

    def test_a_fleet_from_its_index_to_its_report(self, here):
        shutil.copytree(here / "a", here / "d")
        for text, words in (
            ("verb: index\nsource: [a, b, d]\nout: f", ["index", "a", "b", "d", "-o", "F"]),
            ("verb: cluster\nfleet: f\nout: p", ["cluster", "f", "-o", "P"]),
            ("verb: assign\nplan: p\nnew: {e: c}\nout: q", ["assign", "p", "e=c", "-o", "Q"]),
            ("verb: report\nplan: p", ["report", "p"]),
            (
                "verb: deploy\nplan: p\nengine: vllm\nserved_base: tiny/base\nout: d2",
                ["deploy", "p", "--engine", "vllm", "--served-base", "tiny/base", "-o", "D2"],
            ),
        ):
            written(here, text)
            told = call("run", "r.yaml", "--no-progress", cwd=here).stdout
            direct = call(*words, *["--no-progress"] * (words[0] != "report"), cwd=here).stdout
            # Names of outputs differ in case alone; times are what they are.
            plain = [re.sub(r"\d+\.\d+ (s|MB/s)", "TIME", page).lower() for page in (told, direct)]
            assert plain[0] == plain[1] and told

    def test_the_page_of_every_verb_that_reads(self, here):
        write_kohya(here / "k.safetensors", pairs(4, {"lora_unet_q": (20, 24)}, 2), alpha=2)
        for text, words in (
            ("verb: diff\nadapters: [a, b]", ("diff", "a", "b")),
            ("verb: check\npaths: [a, k.safetensors]", ("check", "a", "k.safetensors")),
            (
                "verb: analyze\nadapters: [a, b]\nweights: [1, 1]",
                ("analyze", "a", "b", "-w", "1,1"),
            ),
        ):
            written(here, text)
            told = call("run", "r.yaml", "--no-progress", cwd=here)
            assert told.stdout == call(*words, "--no-progress", cwd=here).stdout


@pytest.mark.parametrize(
    "recipe", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_in_examples_run(recipe, tmp_path):
    verb = yaml.safe_load(recipe.read_text()).get("verb", "merge")
    reads = verb == "analyze"
    found = ao.run(recipe) if reads else ao.run(recipe, out=tmp_path / "out")
    assert found.to_dict()["schema"] == f"adapterops.{verb}/1"
    assert reads or 0 < found.error < 0.7


def test_what_is_wrong_with_an_expression_has_the_recipes_place_too(tmp_path):
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("verb: calc\nexpression: 0.7*a + tiess(a)\nadapters: {a: a}\nout: o\n")
    with pytest.raises(UsageError) as caught:
        prepared(recipe)
    said = str(caught.value)
    assert said.startswith(f"{recipe}:2:1: expression: ") and "did you mean ties?" in said
    assert said.endswith("0.7*a + tiess(a)\n            ^^^^^")
