"""calc: expressions against the same lines of Python and dense arithmetic, and what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.adapter import Adapter
from adapterops.combining import combine
from adapterops.derived.combination import Combination
from adapterops.errors import IncompatibleError, UsageError
from adapterops.expression import evaluate, read
from adapterops.expression.calls import GENERAL, spelled
from adapterops.expression.grammar import DEEPEST
from adapterops.expression.text import LONGEST
from adapterops.formats.model import Ref
from adapterops.rules.registry import METHODS
from tests.rules_dense_elements import magnitude_prune, ties
from tests.support import dense, distance, load_file, pairs, read_peft, weighted, write_peft

SHAPES = {
    f"model.layers.0.self_attn.{p}_proj": shape for p, shape in (("q", (16, 20)), ("v", (12, 20)))
}
RANKS = {"a": 2, "b": 3, "c": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_peft(root / name, pairs(seed, SHAPES, rank), alpha=2 * rank)
    return root


@pytest.fixture(scope="module")
def opened(folder) -> dict[str, Adapter]:
    return {name: ao.open_adapter(folder / name) for name in RANKS}


def deltas() -> dict[str, dict[str, np.ndarray]]:
    return {name: dense(pairs(i, SHAPES, r), 2.0) for i, (name, r) in enumerate(RANKS.items())}


def value(text: str, adapters: dict[str, Adapter]) -> Adapter:
    """An expression of those of the adapters that it names."""
    names = [name for name in adapters if name in _words(text)]
    return evaluate(read(text, names), adapters)


def _words(text: str) -> set[str]:
    kept = (c if c.isalnum() or c == "_" else " " for c in text)
    return set("".join(kept).split())


def tensors(out: Path) -> bytes:
    """The bytes behind the header, which has the provenance."""
    data = (out / "adapter_model.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


class TestAsPython:
    @pytest.mark.parametrize(
        ("text", "python"),
        [
            ("0.7*a + 0.3*b", lambda a, b, c: 0.7 * a + 0.3 * b),
            ("a", lambda a, b, c: a),
            ("-a + b", lambda a, b, c: -a + b),
            ("+a - (b - c)", lambda a, b, c: a - (b - c)),
            ("a*2/3 - b/(1 + 2)", lambda a, b, c: a * 2 / 3 - b / 3),
            ("(1 - 0.9)*a + 1/3*b", lambda a, b, c: (1 - 0.9) * a + 1 / 3 * b),
            ("0.1*a + 0.2*a", lambda a, b, c: 0.1 * a + 0.2 * a),
            ("2*(a + b)*0.5 - -c", lambda a, b, c: 2 * (a + b) * 0.5 - -c),
            ("a - a + b", lambda a, b, c: a - a + b),
            ("linear(a, b, weights=[0.7, 0.3])", lambda a, b, c: 0.7 * a + 0.3 * b),
        ],
        ids=itertools.count(),
    )
    def test_weighted_sums_have_the_same_terms(self, opened, text, python):
        assert value(text, opened).terms == python(*opened.values()).terms

    @pytest.mark.parametrize(
        ("text", "options"),
        [
            ("space='knots'", {"space": "knots"}),
            ("space='core', seed=7", {"space": "core", "seed": 7}),
            ("seed=3", {"seed": 3}),
            ("calibrate='pico', match_norm='max'", {"calibrate": "pico", "match_norm": "max"}),
            ("density=1/2, rescale=false", {"parameters": {"density": 0.5, "rescale": False}}),
            ("lambda_=2*1.5, normalize=True", {"parameters": {"lambda": 3.0, "normalize": True}}),
        ],
        ids=["knots", "core", "seed", "modifiers", "parameters", "lambda"],
    )
    def test_options_of_methods(self, opened, text, options):
        found = value(f"dare(a, b, {text})", opened)
        same = combine("dare", [opened["a"], opened["b"]], **options)
        for module in SHAPES:
            assert np.array_equal(found[module].dense(), same[module].dense())

    def test_parts_that_are_equal_are_one(self, opened):
        found = value("ties(a, b) - ties( a,b )", opened)
        assert [weight for weight, _ in found.terms] == [0.0]
        found = value("0.5*dare(a, b) + slerp(dare(a, b), c)", opened)
        assert found.terms[0][1] is found.terms[1][1].made_of[0][1]
        found = value("dare(a, b, seed=1) - dare(a, b, seed=2)", opened)
        assert len(found.terms) == 2

    def test_methods_take_whatever_is_an_adapter(self, opened):
        a, b, c = opened.values()
        found = value("0.5*slerp(svd(a + b, rank=2), 0.5*c, t=0.25) - a", opened)
        cut = combine("svd", [a + b], parameters={"rank": 2})
        same = 0.5 * combine("slerp", [cut, 0.5 * c], parameters={"t": 0.25}) - a
        for module in SHAPES:
            assert np.array_equal(found[module].dense(), same[module].dense())

    def test_norm_is_a_number(self, opened):
        d = deltas()
        size = {n: math.sqrt(sum((x**2).sum() for x in each.values())) for n, each in d.items()}
        found = value("a/norm(a)*norm(b) + c*(norm(a) - norm(b))/norm(a - b)", opened)
        apart = weighted((1.0, d["a"]), (-1.0, d["b"]))
        size["gap"] = math.sqrt(sum((x**2).sum() for x in apart.values()))
        weights = [size["b"] / size["a"], (size["a"] - size["b"]) / size["gap"]]
        assert [weight for weight, _ in found.terms] == pytest.approx(weights, rel=1e-12)
        found = value("slerp(a, b, t=norm(a)/(norm(a) + norm(b)))", opened)
        share = {"t": size["a"] / (size["a"] + size["b"])}
        same = combine("slerp", [opened["a"], opened["b"]], parameters=share)
        for module in SHAPES:
            assert found[module].dense() == pytest.approx(same[module].dense(), rel=1e-12)

    def test_norm_of_what_is_known_by_rows(self, opened, monkeypatch):
        a, b, c = opened.values()
        trimmed, drawn = combine("ties", [a, b]), combine("dare", [a, c])
        mixes = (trimmed, -2.0 * trimmed, trimmed - 0.5 * c, c + trimmed - drawn)
        wanted = [math.sqrt(sum((m[n].dense() ** 2).sum() for n in SHAPES)) for m in mixes]
        monkeypatch.setattr(Combination, "factors", lambda *how: pytest.fail("made dense"))
        assert [mix.norm() for mix in mixes] == pytest.approx(wanted, rel=1e-12)

    def test_nothing_but_headers_is_read(self, opened, monkeypatch):
        def refuse(ref: Ref, *how: object) -> None:
            raise AssertionError(f"{ref.name} was read")

        monkeypatch.setattr(Ref, "raw", refuse)
        monkeypatch.setattr(Ref, "read", refuse)
        assert len(value("0.7*a + ties(b, c) - 0.5*project(svd(c, rank=1), a)", opened)) == 2
        with pytest.raises(AssertionError, match="was read"):
            value("a / norm(a)", opened)

    def test_no_parameter_hides_what_every_method_takes(self):
        for method in METHODS.values():
            assert not {spelled(each.name) for each in method.parameters} & set(GENERAL)
        assert "norm" not in METHODS


class TestSaved:
    def test_result_and_provenance(self, folder, tmp_path):
        report = ao.calc(
            " 0.7 * b\n + 0.5*project(c,  a)",
            {"a": folder / "a", "c": folder / "c", "b": folder / "b"},
            out=tmp_path / "m",
        )
        assert report.verb == "calc" and report.to_dict()["schema"] == "adapterops.calc/1"
        data = (tmp_path / "m" / "adapter_model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        made = json.loads(header["__metadata__"]["adapterops"])
        assert made["verb"] == "calc"
        assert made["options"]["expression"] == "0.7 * b + 0.5*project(c, a)"
        for name, place in made["options"]["names"].items():
            assert made["inputs"][place]["name"] == name
        assert "activations" not in made["options"]

    def test_a_plain_sum_is_merge(self, folder, tmp_path):
        paths = {"a": folder / "a", "b": folder / "b"}
        ao.calc("0.7*a + 0.3*b", paths, out=tmp_path / "calc", dtype="float16", rank=2)
        ao.merge(list(paths.values()), [0.7, 0.3], out=tmp_path / "merge", dtype="float16", rank=2)
        assert tensors(tmp_path / "calc") == tensors(tmp_path / "merge")
        ao.calc("1*a", {"a": folder / "a"}, out=tmp_path / "copy")
        assert tensors(tmp_path / "copy") == tensors(folder / "a")

    def test_result_is_the_dense_one(self, folder, tmp_path):
        ao.calc("0.7*a - 0.3*b", {n: folder / n for n in "ab"}, out=tmp_path / "m")
        d = deltas()
        assert distance(read_peft(tmp_path / "m"), weighted((0.7, d["a"]), (-0.3, d["b"]))) < 1e-7

    def test_adapters_that_are_sums_already(self, opened, tmp_path):
        mix = 0.5 * opened["a"] + 0.5 * opened["b"]
        ao.calc("x - c", {"c": opened["c"], "x": mix}, out=tmp_path / "m")
        sidecar = load_provenance(tmp_path / "m")
        assert sidecar["options"]["names"] == {"c": 2, "x": [[0.5, 0], [0.5, 1]]}
        assert [each["weight"] for each in sidecar["inputs"]] == [0.5, 0.5, -1.0]
        (mix - opened["c"]).save(tmp_path / "same")
        assert tensors(tmp_path / "m") == tensors(tmp_path / "same")

    @pytest.mark.parametrize(
        ("text", "weights"),
        [
            ("0.7*a - 0.2*b", (0.7, -0.2)),
            ("0.7*a + 0*b", (0.7, 0.0)),
            ("ties(a, b, weights=[0.6, 0.4])", (0.6, 0.4)),
            ("2*ties(a, b)", (None, None)),
            ("ties(a, b) + 0.5*a", (None, None)),
            ("0.7*a - 0.2*project(a, b)", (None, None)),
            ("0.7*a - 0.2*project(c, b)", (0.7, None, None)),
            ("slerp(a + b, c)", (None, None, 1.0)),
            ("slerp(a, slerp(a, b))", (None, None)),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_a_weight_is_reported_where_it_is_that_of_one_term(
        self, folder, tmp_path, text, weights
    ):
        used = {name: folder / name for name in "abc" if re.search(rf"\b{name}\b", text)}
        report = ao.calc(text, used, out=tmp_path / "m", rank=4)
        inputs = {each.name: each for each in report.inputs}
        assert tuple(inputs[name].weight for name in used) == weights
        assert all(each.share is not None for each in inputs.values())
        assert all((each.retention is None) == (each.weight == 0.0) for each in inputs.values())
        made = load_provenance(tmp_path / "m")
        assert all(isinstance(each["weight"], float) for each in made["inputs"])
        document = json.loads((tmp_path / "m" / "adapterops.json").read_text())
        assert [each["weight"] for each in document["inputs"]] == [
            each.weight for each in report.inputs
        ]
        card = (tmp_path / "m" / "README.md").read_text()
        for each in report.inputs:
            shown = "–" if each.weight is None else f"{each.weight:g}"
            assert f"| {each.name} | {shown} | {each.rank} |" in card

    def test_only_the_modules_asked_for(self, folder, tmp_path):
        report = ao.calc(
            "slerp(a, b)", {n: folder / n for n in "ab"}, out=tmp_path / "m", modules=".*q_proj"
        )
        assert list(report.modules) == ["model.layers.0.self_attn.q_proj"]
        shapes = dict(zip(SHAPES, [(16, 20), (3, 4)], strict=True))  # another's second module
        other = write_peft(tmp_path / "x", pairs(5, shapes, 2))
        given = {"a": folder / "a", "x": other}
        with pytest.raises(IncompatibleError):
            ao.calc("slerp(a, x)", given, out=tmp_path / "n")
        ao.calc("slerp(a, x)", given, out=tmp_path / "n", modules=".*q_proj")

    def test_real_adapters(self, corpus, tmp_path):
        root = corpus / "wyek1n__MLX-CLI"
        paths = {"a": root / "0000100", "b": root / "0000200"}
        text = "0.7*b + 0.3*ties(a, b, density=0.3) - 0.5*project(b, a)/norm(b)*norm(a)"
        report = ao.calc(text, paths, out=tmp_path / "m", rank=12)
        a, b = (ao.open_adapter(path) for path in paths.values())
        trimmed = combine("ties", [a, b], parameters={"density": 0.3})
        mix = 0.7 * b + 0.3 * trimmed - 0.5 * combine("project", [b, a]) / b.norm() * a.norm()
        same = mix.save(tmp_path / "same", rank=12)
        one, two = (load_file(tmp_path / n / "adapters.safetensors") for n in ("m", "same"))
        assert all(np.array_equal(one[name], two[name]) for name in {*one, *two})
        assert report.error == same.error and 0 < report.error < 1

    def test_activations_by_name(self, folder, tmp_path):
        rng = np.random.default_rng(0)
        for name in "ab":
            write_activations(
                tmp_path / f"{name}.safetensors",
                {stem: ("samples", rng.standard_normal((9, 20))) for stem in SHAPES},
                tokens=9,
                model="tiny/base",
            )
        files = {name: tmp_path / f"{name}.safetensors" for name in "ba"}
        paths = {name: folder / name for name in "ab"}
        ao.calc("regmean(a, 2*b)", paths, out=tmp_path / "m", activations=files)
        second = 2 * ao.open_adapter(folder / "b")
        same = combine("regmean", [folder / "a", second], activations=[files["a"], files["b"]])
        same.save(tmp_path / "same")
        assert tensors(tmp_path / "m") == tensors(tmp_path / "same")
        digests = load_provenance(tmp_path / "m")["options"]["activations"]
        assert set(digests) == {"a", "b"} and digests["a"] != digests["b"]
        with pytest.raises(UsageError, match="a and b have activations of their own") as failure:
            ao.calc("regmean(a + b, b)", paths, out=tmp_path / "n", activations=files)
        assert str(failure.value).endswith("    regmean(a + b, b)\n              ^")
        with pytest.raises(UsageError, match="there are none of b; --activations b=FILE"):
            ao.calc("regmean(a, b)", paths, out=tmp_path / "n", activations={"a": files["a"]})
        with pytest.raises(UsageError, match="names 'd', which is no adapter"):
            ao.calc("regmean(a, b)", paths, out=tmp_path / "n", activations={"d": files["a"]})
        with pytest.raises(UsageError, match="nothing in the expression needs"):
            ao.calc("a + b", paths, out=tmp_path / "n", activations=files)
        with pytest.raises(UsageError, match="regmean needs the inputs"):
            ao.calc("regmean(a, b)", paths, out=tmp_path / "n")
        assert not (tmp_path / "n").exists()


def load_provenance(out: Path) -> dict:
    data = (out / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["adapterops"])


# An expression of a, b and c, the line of carets below it, and what is said above it.
WRONG = [
    ("a +* b", "   ^", "cannot be read: invalid syntax"),
    ("a + (b", "    ^", "'(' was never closed; count the parentheses"),
    ("a + b)", "     ^", "unmatched ')'; count the parentheses"),
    ("2a + b", "^", "invalid decimal literal; a product is written with *"),
    ("a + b c", "      ^", "invalid syntax; a product is written with *"),
    ("ties(a b)", "     ^^^", "is a comma or an operator missing?"),
    ("a = b", "  ^", "adapters are given beside the expression: NAME=PATH"),
    ("ties(a, lambda=1)", "              ^", "lambda is a word of Python: write lambda_="),
    ("1if a else b", "^", "cannot be read: invalid decimal literal"),
    ("0.7*a + 0.3*d", "            ^", "there is no adapter 'd'; give d=PATH"),
    ("aa + b", "^^", "there is no adapter 'aa'; did you mean a?"),
    ("A + b", "^", "there is no adapter 'A'; did you mean a?"),
    ("_a + b", "^^", "names do not begin with an underscore"),
    ("__import__(a)", "^^^^^^^^^^", "names do not begin with an underscore"),
    ("a + nan", "    ^^^", "nan is not a finite number"),
    ("a*inf", "  ^^^", "inf is not a finite number"),
    ("tiess(a, b)", "^^^^^", "there is no function 'tiess'; did you mean ties?"),
    ("nrm(a)*b", "^^^", "there is no function 'nrm'; did you mean norm?"),
    ("eval(a)", "^^^^", "there is no function 'eval'; adapterops methods lists them"),
    ("ties", "^^^^", "ties is a function: write ties(…)"),
    ("a(b)", "^", "a is an adapter, no function; a product is written with *"),
    ("2(a)", "^", "only functions are called; a product is written with *"),
    ("a*b", " ^", "adapters are not multiplied by one another"),
    ("(a + b) * (b)", "        ^", "adapters are not multiplied by one another"),
    ("2/a", " ^", "nothing is divided by an adapter"),
    ("a/b", " ^", "nothing is divided by an adapter"),
    ("a + 3", "  ^", "a number cannot be added to an adapter; a number multiplies: 3*a"),
    ("3 + a", "  ^", "a number cannot be added to an adapter; a number multiplies: 3*a"),
    ("a - 3", "  ^", "a number cannot be subtracted from an adapter"),
    ("3 - a", "  ^", "a number cannot be subtracted from an adapter, nor one from a number"),
    ("a**2", " ^^", "** is no operator here; there are + - * /"),
    ("a + 9**9**9*b", "        ^^", "** is no operator here"),
    ("a//2", " ^^", "// is no operator here"),
    ("(1 + 2)*3", "^^^^^^^^^", "the result is a number, not an adapter"),
    ("norm(a)", "^^^^^^^", "the result is a number, not an adapter"),
    ("a/0", "  ^", "division by zero"),
    ("a/(2 - 2)", "   ^^^^^", "division by zero"),
    ("1/0.0*a", "  ^^^", "division by zero"),
    ("1e999*a", "^^^^^", "this number is too large for floating point"),
    ("1e300*1e300*a", "^^^^^^^^^^^", "this number is too large for floating point"),
    ("1" + "0" * 309 + "*a", "^" * 76, "this number is too large for floating point"),
    ("a*1e300*1e300", "       ^", "a weight becomes too large for floating point"),
    ("1.5e308*a + 1.5e308*a", "          ^", "a weight becomes too large for floating point"),
    ("a/1e-320", " ^", "division by 9.99989e-321"),
    ("norm(a - a)/norm(b - b)*c", "           ^", "division by zero: the norm behind it is 0"),
    ("c/norm(b - b)", " ^", "division by 0"),
    ("a.terms", " ^^^^^^", "nothing is looked up behind a dot"),
    ("a[0]", "^^^^", "nothing is taken out of an adapter"),
    ("[a]", "^^^", "a list stands only behind weights="),
    ("(a, b)", "^^^^^^", "a comma separates arguments of a function only"),
    ("[a for a in b]", "^^^^^^^^^^^^^^", "numbers, adapters, + - * / and functions only"),
    ("a if b else c", "^^^^^^^^^^^^^", "numbers, adapters, + - * / and functions only"),
    ("not a", "^^^^^", "numbers, adapters, + - * / and functions only"),
    ("a == b", "^^^^^^", "numbers, adapters, + - * / and functions only"),
    ("True*a", "^^^^", "True stands only behind the name of a parameter"),
    ("None", "^^^^", "None is neither a number nor an adapter"),
    ("1j*a", "^^", "1j is neither a number nor an adapter"),
    ("'a' + b", "^^^", "adapters are named without quotes"),
    ("f'a' + b", "^^^^", "a text stands only behind the name of a parameter"),
    ("b'a' + b", "^^^^", "b'a' is neither a number nor an adapter"),
    ("ties(*a)", "     ^^", "without a star"),
    ("ties(a, **b)", "        ^^^", "without stars"),
    ("norm()*a", "^^^^", "norm takes one adapter; there are 0"),
    ("norm(a, b)*a", "^^^^", "norm takes one adapter; there are 2"),
    ("norm(2)*a", "     ^", "norm takes an adapter; this is a number"),
    ("norm(a, p=2)*a", "        ^^^", "norm takes no parameters"),
    ("slerp(a)", "^^^^^", "slerp takes 2 adapters; there are 1"),
    ("slerp(a, b, c)", "^^^^^", "slerp takes 2 adapters; there are 3"),
    ("ties()", "^^^^", "ties takes at least 1"),
    ("svd(a, 8)", "       ^", "svd takes adapters; this is a number; parameters are written by "),
    ("svd(a)", "^^^", "svd needs rank"),
    ("svd(a, rank=0)", "            ^", "svd: rank is 0; expected a whole number from 1"),
    ("svd(a, rank=1.5)", "            ^^^", "svd: rank is 1.5; expected a whole number"),
    ("svd(a, rank=norm(a))", "            ^^^^^^^", "expected a whole number from 1"),
    ("slerp(a, b, t=2)", "              ^", "slerp: t is 2; expected a number from 0 to 1"),
    ("slerp(a, b, t=-0.5)", "              ^^^^", "slerp: t is -0.5; expected"),
    ("slerp(a, b, t=norm(a))", "              ^^^^^^^", "expected a number from 0 to 1"),
    (
        "ties(a, densty=1)",
        "        ^^^^^^",
        "ties has no parameter 'densty'; did you mean density?",
    ),
    ("ties(a, lamda_=1)", "        ^^^^^^", "did you mean lambda_?"),
    ("ties(a, zz=1)", "        ^^", "ties has no parameter 'zz'; it has density, "),
    ("ties(a, density=1, density=1)", "                   ^^^^^^^", "density is given twice"),
    ("ties(a, density='1')", "                ^^^", "density is '1'; expected a number above 0 to"),
    ("ties(a, density=b)", "                ^", "ties: density is an adapter; expected a number"),
    ("ties(a, normalize=1)", "                  ^", "normalize is 1; expected true or false"),
    ("ties(a, convention=peft)", "                   ^^^^", 'write convention="adapterops" or "p'),
    ("ties(a, convention='pft')", "                   ^^^^^", "did you mean peft?"),
    ("ties(a, b, weights=[1])", "                   ^^^", "there are 1 weights for 2 adapters"),
    ("ties(a, b, weights=1)", "                   ^", "weights is a list of numbers"),
    ("ties(a, b, weights=[1, 'x'])", "                       ^^^", "a weight is a number"),
    (
        "ties(a, b, weights=[1, c])",
        "                       ^",
        "a weight is a number; this is an a",
    ),
    ("ties(a, seed=1)", "        ^^^^", "ties draws nothing at random; seed says nothing to it"),
    ("dare(a, seed=-1)", "             ^^", "seed is a whole number from 0"),
    ("dare(a, seed=0.5)", "             ^^^", "seed is a whole number from 0"),
    ("dare(a, seed='x')", "             ^^^", "seed is a whole number from 0"),
    ("dare(a, space='cor')", "              ^^^^^", "there is no space 'cor'; did you mean core?"),
    ("dare(a, space='x')", "              ^^^", 'write space="dense" or space="core" or space="kn'),
    (
        "dare(a, space=core)",
        "              ^^^^",
        'space is a text; write space="dense" or space="',
    ),
    ("slerp(a, b, space='core')", "^^^^^", "slerp gives the same in every space"),
    ("tsv(a, match_norm='min')", "                  ^^^^^", "there is no match_norm 'min'; write"),
    ("tsv(a, calibrate='Pico')", "                 ^^^^^^", "did you mean pico?"),
    ("tsv(a, zz=1)", "       ^^", "it has alpha, rank, cut, weights, calibrate, match_norm"),
    ("0,5*a + b", "^^^^^^^^^", "a number has a point: 0.5, not 0,5"),
    ("0.7×a", "   ^", "'×' (U+00D7) means nothing in an expression; write *"),
    ("a − b", "  ^", "'−' (U+2212) means nothing in an expression; write -"),
    ("ä + b", "^", "'ä' (U+00E4) means nothing in an expression"),
    ("a\0b", " ^", "a character (U+0000) means nothing"),
    ("a # b", "  ^", "'#' means nothing in an expression"),
    ("a^2", " ^", "means nothing in an expression; there are + - * /"),
    ("30%*a", "  ^", "write 0.3 for 30%"),
    ("(lambda: a)", "       ^", "':' means nothing"),
    ("a @ b", "  ^", "'@' means nothing in an expression"),
    ("a; b", " ^", "';' means nothing in an expression"),
]


@pytest.mark.parametrize(("text", "carets", "said"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_shown(folder, tmp_path, text, carets, said):
    used = _words(text) | ({"a"} if "did you mean a?" in said else set())
    names = {name: folder / name for name in "abc" if name in used} or {"a": folder / "a"}
    with pytest.raises(UsageError) as failure:
        ao.calc(text, names, out=tmp_path / "m")
    message, shown, below = str(failure.value).split("\n")
    assert said in message
    assert below.rstrip() == f"    {carets}"
    if len(text) < 77:
        assert shown == f"    {text.replace(chr(0), '?')}"
    assert not (tmp_path / "m").exists()


class TestOtherMistakes:
    @pytest.mark.parametrize("text", ["", " \n\t"], ids=["nothing", "space"])
    def test_empty(self, text):
        with pytest.raises(UsageError, match="the expression is empty"):
            read(text, ["a"])

    def test_no_text(self):
        with pytest.raises(UsageError, match="an expression is text, not bytes"):
            read(b"a", ["a"])

    def test_unused_adapter(self):
        with pytest.raises(UsageError, match=r"does not use d; leave d=… away, or use it\n    a$"):
            read("a", ["a", "d"])

    @pytest.mark.parametrize("name", ["1a", "a-b", "", "_a", "ä", "if", None, "a b"], ids=repr)
    def test_names(self, folder, tmp_path, name):
        with pytest.raises(UsageError, match="is no name for an adapter"):
            ao.calc("a", {"a": folder / "a", name: folder / "b"}, out=tmp_path / "m")

    def test_no_mapping(self, tmp_path):
        with pytest.raises(UsageError, match="takes adapters by name"):
            ao.calc("a", ["a"], out=tmp_path / "m")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("-" * DEEPEST + "a", "operations deep"),
            ("-" * (LONGEST - 1) + "a", "operations deep"),
            ("+".join("a" * (DEEPEST + 1)), "operations deep"),
            ("+".join("a" * (LONGEST // 2)), "operations deep"),
            ("(" * 150 + "a" + ")" * 150, None),
            ("(" * 250 + "a" + ")" * 250, "too many nested parentheses"),
            ("(" * (LONGEST - 1) + "a", "too many nested parentheses"),
            ("-(" * 199 + "a" + ")" * 199, "operations deep"),
            ("norm(" * 100 + "a" + ")" * 100, "norm takes an adapter; this is a number"),
            ("1" * LONGEST, "too large|Exceeds"),
            ("a" * LONGEST, "there is no adapter"),
        ],
        ids=itertools.count(),
    )
    def test_deep(self, text, said):
        if said is None:
            assert read(text, ["a"]).root.kind == "adapter"
            return
        with pytest.raises(UsageError, match=said):
            read(text, ["a"])

    def test_as_deep_as_may_be(self, opened):
        assert value("+".join("a" * (DEEPEST - 1)), opened).terms[0][0] == DEEPEST - 1
        assert value("-" * (DEEPEST - 1) + "a", opened).terms[0][0] == -1.0
        nested = "svd(" * 20 + "a" + ", rank=1)" * 20
        assert value(nested, opened)[next(iter(SHAPES))].rank == 1
        with pytest.raises(UsageError, match="more than 20 methods are nested"):
            read(f"svd({nested}, rank=1)", ["a"])

    def test_long(self):
        with pytest.raises(UsageError, match=f"has {LONGEST + 1} characters; at most {LONGEST}"):
            read("a" + " " * LONGEST, ["a"])

    def test_a_long_text_is_shown_where_it_is_wrong(self):
        text = " + ".join(["a"] * 60) + " + bad + " + " + ".join(["a"] * 60)
        with pytest.raises(UsageError) as failure:
            read(text, ["a"])
        _, shown, below = str(failure.value).split("\n")
        assert shown[below.index("^") : below.rindex("^") + 1] == "bad"
        assert shown.startswith("    …") and shown.endswith("…") and len(shown) < 84

    def test_other_errors_keep_their_kind(self, folder, tmp_path):
        other = write_peft(tmp_path / "x", pairs(0, {next(iter(SHAPES)): (3, 3)}, 1))
        for text in ("a + x", "slerp(a, x)"):
            with pytest.raises(IncompatibleError):
                ao.calc(text, {"a": folder / "a", "x": other}, out=tmp_path / "m")


class _Sum:
    """Random sums as text and as weights of a, b and c: the grammar's linear part."""

    numbers = st.sampled_from(["2", "0.5", "(1 - 0.25)", "3/4", "-1.5", "1e-1"])
    leaf = st.sampled_from(["a", "b", "c"]).map(lambda n: (n, {n: 1.0}))

    @staticmethod
    def grown(inner):
        def scaled(pair):
            (text, terms), number, form = pair
            factor = eval(number)
            if form == "/":
                return f"({text})/{number if number[0] == '(' else f'({number})'}", {
                    n: w / factor for n, w in terms.items()
                }
            shown = f"{number}*({text})" if form == "left" else f"({text}) * {number}"
            if number == "3/4" and form == "right":
                return f"({text})*3/4", {n: w * 3 / 4 for n, w in terms.items()}
            return shown, {n: w * factor for n, w in terms.items()}

        def added(pair):
            (left, one), (right, two), sign = pair
            factor = 1 if sign == "+" else -1
            both = {n: one.get(n, 0.0) + factor * two.get(n, 0.0) for n in {*one, *two}}
            return f"{left} {sign} ({right})", both

        def cut(pair):
            (text, terms), sign = pair
            return f"{sign}({text})", {n: w * (-1 if sign == "-" else 1) for n, w in terms.items()}

        return st.one_of(
            st.tuples(inner, _Sum.numbers, st.sampled_from(["left", "right", "/"])).map(scaled),
            st.tuples(inner, inner, st.sampled_from("+-")).map(added),
            st.tuples(inner, st.sampled_from("+-")).map(cut),
        )


SUMS = st.recursive(_Sum.leaf, _Sum.grown, max_leaves=8)


@given(SUMS)
@settings(max_examples=300)
def test_random_sums(opened, drawn):
    text, weights = drawn
    found = value(text, opened)
    shares = {id(file): weight for weight, file in found.terms}
    assert len(shares) == len(found.terms)
    scale = max(map(abs, weights.values())) + 10
    for name, weight in weights.items():
        file = opened[name].terms[0][1]
        assert shares[id(file)] == pytest.approx(weight, abs=1e-12 * scale)
    d = deltas()
    exact = weighted(*((w, d[n]) for n, w in weights.items()))
    for module in SHAPES:
        got = found[module].dense() if module in found else np.zeros(SHAPES[module])
        assert got == pytest.approx(exact[module], abs=1e-11 * scale)


def best(D: np.ndarray, rank: int) -> np.ndarray:
    U, values, Vh = np.linalg.svd(D)
    return (U[:, :rank] * values[:rank]) @ Vh[:rank]


def on_arc(x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    angle = math.acos((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@st.composite
def of_methods(draw):
    """Sums of methods on adapters, and the same of dense matrices, module by module."""
    first, second, third = draw(st.permutations("abc"))
    number = draw(st.sampled_from([0.5, -1.5, 0.25]))
    share = draw(st.sampled_from([0.2, 0.5, 0.9]))
    w = np.array([draw(st.sampled_from([0.75, 1.0])), number])

    def trimmed(rule, d):
        return rule(np.stack([d[first], d[second]]), w, None, density=share)

    calls = {
        f"svd({first} + {number}*{second}, rank=2)": lambda d: best(
            d[first] + number * d[second], 2
        ),
        f"slerp({first}, {second}, t={share})": lambda d: on_arc(d[first], d[second], share),
        f"project({first}, {second}, side='left')": lambda d: (
            d[second] @ np.linalg.pinv(d[second], 1e-6) @ d[first]
        ),
        f"ties({first}, {second}, density={share}, weights=[{w[0]}, {w[1]}])": lambda d: trimmed(
            ties, d
        ),
        f"magnitude_prune({first}, {second}, density={share}, weights=[{w[0]}, {w[1]}])": (
            lambda d: trimmed(magnitude_prune, d)
        ),
        f"linear({first}, {second}, weights=[{w[0]}, {w[1]}])": lambda d: (
            w[0] * d[first] + w[1] * d[second]
        ),
    }
    text, one = draw(st.sampled_from(sorted(calls.items(), key=lambda pair: pair[0])))
    other, two = draw(st.sampled_from(sorted(calls.items(), key=lambda pair: pair[0])))
    form = draw(st.sampled_from(["alone", "sum", "within"]))
    if form == "alone":
        return text, one
    if form == "sum":
        whole = f"{number}*{text} - ({other} + {third})/2"
        return whole, lambda d: number * one(d) - (two(d) + d[third]) / 2
    return (
        f"svd({text} + {third}, rank=3)*{share}",
        lambda d: share * best(one(d) + d[third], 3),
    )


@given(of_methods())
@settings(max_examples=100)
def test_random_methods(opened, drawn):
    text, reference = drawn
    found = value(text, opened)
    d = deltas()
    for module in SHAPES:
        exact = reference({name: each[module] for name, each in d.items()})
        gap = np.linalg.norm(found[module].dense() - exact)
        assert gap <= 1e-5 * np.linalg.norm(exact), text  # dense space is computed in float32


PIECES = ["a", "b", "c", "d", "norm", "weights=", "seed=", "rank=", "'", '"', "0.5", "1e9", "**"]
PIECES += [*"+-*/()[],.= _", *METHODS, "lambda", "if", "for", "True", "None", "\n", "\0", "é"]


@given(
    st.one_of(
        st.text(max_size=60),
        st.text(string.printable, max_size=60),
        st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    )
)
@example("(" * 300)
@example("a" + "(" * 150)
@example("[" * 99 + "]" * 99)
@example("a" + ".a" * 1900)
@example("-" * 3999)
@example("1" * 3999)
@example("f(" + "a=1," * 900 + ")")
@settings(max_examples=300)
def test_any_text_is_an_expression_or_an_error_that_points(text):
    """Whatever is no expression says so, and where."""
    try:
        found = read(text, ["a"])
    except UsageError as error:
        lines = str(error).split("\n")
        if len(lines) == 3:
            assert set(lines[2].strip()) == {"^"} and lines[2].startswith("    ")
            assert len(lines[2]) <= max(len(lines[1]) + 1, 85)
        else:
            assert "empty" in lines[0] or "does not use" in lines[0] or "characters" in lines[0]
    else:
        assert found.names == ("a",) and found.root.kind == "adapter"


@given(of_methods(), st.integers(0), st.integers(0, 4), st.sampled_from(PIECES))
@settings(max_examples=300)
def test_a_slip_of_the_pen_is_never_unexpected(opened, drawn, place, length, piece):
    """Valid expressions with something in the place of something else."""
    text, _ = drawn
    start = place % len(text)
    text = text[:start] + piece + text[start + length :]
    try:
        found = value(text, opened)
    except UsageError as error:
        lines = str(error).split("\n")
        assert len(lines) == 3 and set(lines[2].strip()) == {"^"}
    else:
        assert set(found) <= set(SHAPES) and all(math.isfinite(w) for w, _ in found.terms)
