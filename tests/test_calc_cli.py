"""calc as a command: what it takes, prints, refuses and leaves behind."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from adapterops.cli.calc import command, split_assignments
from adapterops.errors import UsageError
from tests.inspecting import SHAPES, call, peft
from tests.support import (
    dense,
    distance,
    pairs,
    read_kohya,
    read_peft,
    weighted,
    write_kohya,
    write_peft,
)


@pytest.fixture
def two(tmp_path) -> Path:
    peft(tmp_path / "one", 2, seed=1)
    peft(tmp_path / "two", 3, seed=2)
    return tmp_path


def exact(*weights: float) -> dict[str, np.ndarray]:
    return weighted(*((w, dense(pairs(i + 1, SHAPES, i + 2))) for i, w in enumerate(weights)))


NAMED = ("a=one", "b=two")


class TestResult:
    def test_page(self, two):
        done = call("calc", "0.7*a + 0.3*b", *NAMED, "-o", "m", cwd=two)
        first, error, *_ = done.stdout.splitlines()
        assert first.split()[:4] == ["m", "peft,", "rank", "5,"] and error.startswith("error ")
        assert [line.split()[:2] for line in done.stdout.splitlines()[3:5]] == [
            ["one", "0.7"],
            ["two", "0.3"],
        ]
        assert done.stderr == ""
        assert distance(read_peft(two / "m"), exact(0.7, 0.3)) < 1e-6

    def test_json(self, two):
        done = call("calc", "svd(a + b, rank=2)", *NAMED, "-o", "m", "--json", cwd=two)
        document = json.loads(done.stdout)
        sidecar = json.loads((two / "m" / "adapterops.json").read_text())
        assert document["schema"] == sidecar["schema"] == "adapterops.calc/1"
        assert document["rank"] == 2 and document["error"] == sidecar["error"]
        assert [each["name"] for each in document["inputs"]] == ["one", "two"]

    def test_quiet_and_verbose(self, two):
        done = call("calc", "a + b", *NAMED, "-o", "m", "-q", cwd=two)
        assert done.stdout == done.stderr == ""
        done = call("calc", "a + b", *NAMED, "-o", "n", "-v", cwd=two)
        assert all(name in done.stdout for name in SHAPES)

    def test_dry_run_writes_nothing(self, two):
        done = call("calc", "a + ties(a, b)", *NAMED, "-o", "m", "-r", "4", "--dry-run", cwd=two)
        assert "rank 4" in done.stdout and not (two / "m").exists()

    def test_what_only_a_norm_is_taken_of_is_an_input(self, two):
        done = call("calc", "a * norm(b) / norm(a)", *NAMED, "-o", "m", "--json", cwd=two)
        size = [
            np.linalg.norm([np.linalg.norm(x) for x in each.values()])
            for each in (exact(1, 0), exact(0, 1))
        ]
        inputs = json.loads(done.stdout)["inputs"]
        assert [each["name"] for each in inputs] == ["one", "two"] and inputs[1]["weight"] == 0
        assert distance(read_peft(two / "m"), exact(size[1] / size[0], 0)) < 1e-6
        call("run", "m", "-o", "n", "--inputs", ".", cwd=two)
        assert distance(read_peft(two / "n"), read_peft(two / "m")) == 0

    def test_card_names_the_verb(self, two):
        call("calc", "a - b", *NAMED, "-o", "m", cwd=two)
        assert "# Calculated LoRA adapter" in (two / "m" / "README.md").read_text()

    @pytest.mark.parametrize("target", ["folder/", "m.safetensors"], ids=["folder", "file"])
    def test_another_dialect(self, two, target):
        (two / "folder").mkdir()
        shapes = {f"lora_unet_block_{i}_to_q": (12, 10) for i in range(2)}
        for seed, name in enumerate(("x", "y")):
            write_kohya(two / f"{name}.safetensors", pairs(seed, shapes, 2), alpha=2)
        call("calc", "x/2 - y", "x=x.safetensors", "y=y.safetensors", "-o", target, cwd=two)
        [file] = [*two.glob("m.safetensors"), *two.glob("folder/calculated.safetensors")]
        want = weighted((0.5, dense(pairs(0, shapes, 2))), (-1.0, dense(pairs(1, shapes, 2))))
        assert distance(read_kohya(file), want) < 1e-6

    def test_the_command_it_suggests_does_what_it_says(self, two):
        done = call("calc", "-0.7*a + 0.3*b", *NAMED, "-o", "m", cwd=two)
        [line] = [text for text in done.stdout.splitlines() if "--rank 1" in text]
        suggested = shlex.split(line[line.index("adapterops calc") :])[1:]
        call(*suggested, cwd=two)
        assert json.loads((two / "m" / "adapterops.json").read_text())["rank"] == 1

    def test_alpha_by_name_or_path(self, two):
        config = json.loads((two / "one" / "adapter_config.json").read_text())
        del config["lora_alpha"]
        (two / "one" / "adapter_config.json").write_text(json.dumps(config))
        for number, alpha in enumerate(("a=4", "one=4", "4")):
            call("calc", "a + b", *NAMED, "-o", f"{number}", "--alpha", alpha, cwd=two)
            assert distance(read_peft(two / f"{number}"), exact(2.0, 1.0)) < 1e-6

    def test_paths_may_have_an_equals_sign(self, two):
        write_peft(two / "x=1", pairs(1, SHAPES, 2))
        call("calc", "a + b", "a=x=1", "b=two", "-o", "m", cwd=two)
        assert distance(read_peft(two / "m"), exact(1.0, 1.0)) < 1e-6

    def test_one_path_under_two_names(self, two):
        call("calc", "a - 0.5*b", "a=one", "b=one", "-o", "m", cwd=two)
        assert distance(read_peft(two / "m"), exact(0.5)) < 1e-6


class TestMinus:
    @pytest.mark.parametrize(
        ("text", "weights"),
        [
            ("-0.5*a + b", (-0.5, 1.0)),
            ("-a + b", (-1.0, 1.0)),
            ("-a+b", (-1.0, 1.0)),
            ("-(a - b)", (-1.0, 1.0)),
            ("- a - b", (-1.0, -1.0)),
            ("-.5*a - b/2", (-0.5, -0.5)),
            ("-a/2 - b", (-0.5, -1.0)),
            ("-linear(a, b)", (-1.0, -1.0)),
            ("-a + b - a", (-2.0, 1.0)),
        ],
        ids=range(9),
    )
    def test_an_expression_may_begin_with_one(self, two, text, weights):
        call("calc", text, *NAMED, "-o", "m", cwd=two)
        assert distance(read_peft(two / "m"), exact(*weights)) < 1e-6
        call("calc", "-o", "n", text, *NAMED, cwd=two)
        assert distance(read_peft(two / "n"), exact(*weights)) < 1e-6

    def test_names_that_are_options_too(self, two):
        call("calc", "-r*0.5 + o", "r=one", "o=two", "-o", "m", "-r5", cwd=two)
        assert distance(read_peft(two / "m"), exact(-0.5, 1.0)) < 1e-6
        call("calc", "-q", "-r5", "-on", "-j1", "r - o", "r=one", "o=two", cwd=two)
        assert distance(read_peft(two / "n"), exact(1.0, -1.0)) < 1e-6
        call("calc", "-o", "k", "--", "-r", "r=one", cwd=two)
        call("calc", "-a", "a=one", "-o", "l", cwd=two)
        assert distance(read_peft(two / "l"), exact(-1.0)) < 1e-6
        assert distance(read_peft(two / "k"), exact(-1.0)) < 1e-6

    def test_values_of_options_are_left_alone(self, two):
        call("calc", "a - b", *NAMED, "-o", "-(1)", cwd=two)
        assert (two / "-(1)" / "adapter_config.json").exists()

    def test_options_that_there_are_not(self, two):
        done = call("calc", "a", "a=one", "-o", "m", "-z", cwd=two, code=2)
        assert "No such option" in done.stderr
        done = call("calc", "a", "a=one", "-o", "m", "--rnk", "3", cwd=two, code=2)
        assert "No such option" in done.stderr


class TestRefused:
    def test_position(self, two):
        done = call("calc", "0.7*a + 0.3*c", *NAMED, "-o", "m", cwd=two, code=2)
        assert done.stdout == "" and done.stderr.splitlines() == [
            "error: there is no adapter 'c'; give c=PATH",
            "    0.7*a + 0.3*c",
            "                ^",
        ]
        assert not (two / "m").exists()

    def test_json_error(self, two):
        done = call("calc", "a +", "a=one", "-o", "m", "--json", cwd=two, code=2)
        error = json.loads(done.stderr)["error"]
        assert error["type"] == "UsageError" and error["code"] == 2
        assert error["message"].endswith("^")

    def test_files_are_looked_for_after_the_expression_is_read(self, two):
        done = call("calc", "tis(a)", "a=nowhere", "-o", "m", cwd=two, code=2)
        assert "did you mean ties?" in done.stderr
        done = call("calc", "ties(a)", "a=nowhere", "-o", "m", cwd=two, code=6)
        assert "nowhere" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("a", "a=one"), "Missing option '-o'"),
            (("a", "-o", "m"), "Missing argument 'NAME=PATH"),
            (("a", "one", "-o", "m"), "'one' is no NAME=PATH"),
            (("a", "a=", "-o", "m"), "'a=' is no NAME=PATH"),
            (("0.5*a", "+", "a=one", "-o", "m"), "the expression is one argument, in quotes"),
            (("a", "a=one", "a=two", "-o", "m"), "a is given twice: one and two"),
            (("a", "a=one", "d=two", "-o", "m"), "the expression does not use d"),
            (("a", "1=one", "-o", "m"), "'1' is no name for an adapter"),
            (("lambda", "lambda=one", "-o", "m"), "it is a word of Python's grammar"),
            (("", "a=one", "-o", "m"), "the expression is empty"),
            (("2", "a=one", "-o", "m"), "the result is a number, not an adapter"),
            (("a", "a=one", "-o", "m", "--activations", "x"), "nothing in the expression needs"),
            (
                ("regmean(a)", "a=one", "-o", "m", "--activations", "x", "--activations", "y"),
                "one FILE for all adapters, or NAME=FILE for each",
            ),
            (
                ("regmean(a)", "a=one", "-o", "m", *("--activations", "a=x") * 2),
                "one FILE for all adapters, or NAME=FILE for each",
            ),
            (("a", "a=one", "-o", "one"), "one"),
            (("a", "a=one", "-o", "m", "--alpha", "b=3"), "0 inputs are called 'b'"),
            (("a", "a=one", "-o", "m", "--to", "x"), "Invalid value for '--to'"),
        ],
        ids=range(17),
    )
    def test_usage(self, two, arguments, said):
        done = call("calc", *arguments, cwd=two, code=2)
        assert said in done.stderr and done.stdout == ""
        assert not (two / "m").exists()

    def test_result_that_cancels(self, two):
        done = call("calc", "a - b", "a=one", "b=one", "-o", "m", cwd=two, code=5)
        assert "error: " in done.stderr and not (two / "m").exists()


def test_split_assignments():
    assert split_assignments(("a=x", "b=y=z")) == {"a": "x", "b": "y=z"}
    with pytest.raises(UsageError, match="'x' is no NAME=PATH"):
        split_assignments(("x",))


def test_help_shows_what_is_meant():
    assert "0.7*a + 0.3*b" in (command.help or "")
