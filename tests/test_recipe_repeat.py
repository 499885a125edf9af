"""run OUT: what made an output is done again, from inputs found by their hashes."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FormatError,
    IncompatibleError,
    PickleRefusedError,
    UsageError,
)
from adapterops.provenance import undistinct
from adapterops.rules.registry import METHODS
from adapterops.verbs.run import prepared
from tests import bake_models
from tests.inspecting import call
from tests.support import pairs, write_kohya, write_peft

SHAPES = bake_models.shapes()
MAIN = "adapter_model.safetensors"
Make = Callable[[Path, Path], Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """What things are made from: two adapters of one name, others, a base, what it was tuned to."""
    folder = tmp_path_factory.mktemp("store")
    write_peft(folder / "x" / "ad", bake_models.factors(1), alpha=8)
    write_peft(folder / "y" / "ad", bake_models.factors(2, rank=2))
    write_peft(
        folder / "c", bake_models.factors(3, rank=3), extras={"base_model.model.n": np.ones(3)}
    )
    write_peft(folder / "e", bake_models.factors(6))
    (folder / "c" / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(5)
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector.weight": rng.random(rows, np.float32) + 1
        for name, (rows, _) in SHAPES.items()
    }
    write_peft(folder / "dora", bake_models.factors(4, rank=2), extras=magnitudes, use_dora=True)
    flat = {"lora_unet_mid_block_to_q": (16, 20)}
    write_kohya(folder / "k.safetensors", pairs(1, flat, 2))
    write_kohya(folder / "l.safetensors", pairs(2, flat, 2), alpha=1)
    weights = bake_models.weights()
    base = bake_models.model(folder / "models" / "base", weights, layout="shards")
    bake_models.model(folder / "models" / "one", weights, "F32", layout="file")
    ao.bake(base, folder / "x" / "ad", out=folder / "models" / "tuned")
    moments = {}
    for name, (_, columns) in SHAPES.items():
        samples = rng.standard_normal((3 * columns, columns))
        moments[name] = ("gram", (samples.T @ samples / len(samples)).astype(np.float32))
    write_activations(folder / "acts.safetensors", moments, tokens=9, model="tiny/base")
    doubled = {name: (kind, 2 * np.flip(value)) for name, (kind, value) in moments.items()}
    write_activations(folder / "more.safetensors", doubled, tokens=9, model="tiny/base")
    return folder


def merged(*names: str, **options: Any) -> Make:
    def make(store: Path, out: Path) -> Any:
        given = dict(options)
        weights = given.pop("weights", [0.7, -0.3, 1.1][: len(names)])
        if "inputs" in given:
            files = [store / f"{name}.safetensors" for name in given.pop("inputs")]
            given["activations"] = files if len(files) > 1 else files[0]
        return ao.merge([store / name for name in names], weights, out=out, **given)

    return make


def calculated(expression: str, **options: Any) -> Make:
    names = {"a": "x/ad", "b": "y/ad", "c": "c"}
    used = {name: path for name, path in names.items() if re.search(rf"\b{name}\b", expression)}
    return lambda store, out: ao.calc(
        expression, {name: store / path for name, path in used.items()}, out=out, **options
    )


def compressed(name: str, **options: Any) -> Make:
    def make(store: Path, out: Path) -> Any:
        given = {
            key: store / value if key in ("base", "activations") else value
            for key, value in options.items()
        }
        return ao.compress(store / name, out=out, **given)

    return make


def converted(name: str, **options: Any) -> Make:
    def make(store: Path, out: Path) -> Any:
        given = {key: store / v if key == "base" else v for key, v in options.items()}
        return ao.convert(store / name, out=out, **given)

    return make


THREE = ("x/ad", "y/ad", "c")
CASES: dict[str, Make] = {
    "linear": merged("x/ad", "y/ad"),
    "normalize": merged("x/ad", "y/ad", weights=[1, 3], normalize=True, rank=3, dtype="bf16"),
    "one of its modules": merged("x/ad", modules=".*q_proj"),
    "size": merged(*THREE, size="20kB", extras="drop"),
    "energy": merged(*THREE, energy=0.9, extras="first"),
    "module weights": merged("x/ad", "y/ad", module_weights=["attn: 1,0", "layers 1: 0,2"]),
    "module weights of a method": merged(
        "x/ad", "y/ad", method="ties", module_weights=["re:.*q_proj: 0.5,0"], rank=3
    ),
    "calibrated": merged("x/ad", "y/ad", method="tsv", calibrate="svc", match_norm="mean", rank=4),
    "dare of equal names": merged("x/ad", "y/ad", method="dare", seed=7, rank=6),
    "dare in core": merged("x/ad", "y/ad", method="dare_ties", seed=2, space="core", rank=6),
    "regmean": merged("x/ad", "y/ad", method="regmean", inputs=["acts"], rank=5),
    "regmean of two files": merged("x/ad", "e", method="regmean", inputs=["acts", "more"], rank=5),
    "kohya with alpha": lambda store, out: ao.merge(
        [store / "k.safetensors", store / "l.safetensors"],
        [1, 1],
        alpha={store / "k.safetensors": 4.0},
        out=out,
    ),
    "alpha that wins": lambda store, out: ao.merge(
        [store / "x/ad"], alpha={store / "x/ad": 2.0}, dtype="float16", out=out
    ),
    "sums of Python": lambda store, out: ao.merge(
        [0.5 * ao.open_adapter(store / "x/ad") - ao.open_adapter(store / "y/ad")], [2.0], out=out
    ),
    "calc": calculated("0.7*a + 0.3*b - 0.5*project(c, a)", rank=9, extras="drop"),
    "calc at random": calculated("a - dare(b, density=0.4, seed=3)", rank=6),
    "compress": compressed("x/ad", rank=2),
    "compress globally": compressed("x/ad", ratio=0.5, allocate="global", min_rank=1, max_rank=4),
    "compress by a rule": compressed("x/ad", sv_fro=0.9, form="svd", scaling="keep"),
    "compress relatively": compressed("x/ad", max_error=0.4, metric="relative", base="models/base"),
    "compress by activations": compressed(
        "x/ad", rank=3, metric="activation", activations="acts.safetensors"
    ),
    "compress for an engine": compressed("x/ad", rank=4, engine="vllm", base="models/base"),
    "convert": converted("c", extras="drop", dtype="float16"),
    "convert to a file": converted("l.safetensors", scaling="folded"),
    "convert DoRA": converted("dora", base="models/base", rank=5),
    "extract": lambda store, out: ao.extract(
        store / "models/base", store / "models/tuned", rank=3, vectors="drop", out=out
    ),
    "extract by energy": lambda store, out: ao.extract(
        store / "models/base", store / "models/tuned", energy=0.9, max_rank=6, out=out
    ),
}


def composed(make: Callable[..., Any], how: str = "save", **options: Any) -> Make:
    """What Python puts together of the adapters a, b, c and e and the folder of the store."""

    def made(store: Path, out: Path) -> Any:
        opened = {name[-1]: ao.open_adapter(store / name) for name in ("x/ad", "c", "e")}
        opened = {"a": opened.pop("d"), "b": ao.open_adapter(store / "y/ad"), **opened}
        needed = inspect.signature(make).parameters
        found = make(**{name: {**opened, "store": store}[name] for name in needed})
        if how == "save":
            return found.save(out, **options)
        given = {"base": store / options["base"]} if "base" in options else {}
        return getattr(ao, how)(found, out=out, **{**options, **given})

    return made


RULES = ["attn: 0.5,1", "re:.*q_proj: 0,2"]
_COMPOSED: dict[str, Make] = {
    "one method": composed(
        lambda a, b: 2 * ao.combine("ties", [a, b], [1, 0.5], parameters={"density": 0.3}), rank=4
    ),
    "calibrated": composed(
        lambda a, b: ao.combine("tsv", [a, b], calibrate="svc", match_norm="mean") + b, rank=4
    ),
    "at random within another": composed(
        lambda a, b, c: ao.combine("slerp", [ao.combine("dare", [a, b], space="core", seed=7), c]),
        extras="drop",
        rank=5,
    ),
    "sums in a method": composed(
        lambda a, b, e: ao.combine("dare", [a + 2 * b, 0.5 * e], seed=1), rank=4
    ),
    "a method twice": composed(
        lambda a, b, e: (t := ao.combine("tsv", [a, b])) - 0.5 * ao.combine("project", [e, t])
    ),
    "modules of a method": composed(
        lambda a, b: ao.combine("tsv", [a, b], modules=".*q_proj") - b, rank=4
    ),
    "activations": composed(
        lambda a, e, store: (
            e - ao.combine("regmean", [a, e], activations=store / "acts.safetensors")
        ),
        rank=5,
    ),
    "activations of each": composed(
        lambda a, e, store: ao.combine(
            "regmean",
            [a, e],
            activations=[store / "acts.safetensors", store / "more.safetensors"],
        ),
        rank=5,
    ),
    "module weights of a sum": composed(
        lambda a, b, e: 2 * ao.combine("linear", [a, b], [0.7, 0], module_weights=RULES) + e + a
    ),
    "module weights within a method": composed(
        lambda a, b, e: ao.combine("ties", [a, b], module_weights=RULES) + e, rank=3
    ),
    "module weights of a method": composed(
        lambda a, b, e: ao.combine(
            "linear",
            [ao.combine("linear", [ao.combine("tsv", [a, b]), e], module_weights=RULES), a],
            module_weights=["mlp: 1,3"],
        )
    ),
    "a label": composed(
        lambda store, b: (
            ao.combine("dare", [ao.open_adapter(store / "x/ad", label="a"), b], seed=2)
            + ao.combine("dare", [ao.open_adapter(store / "e", label="a#2")], seed=2)
        ),
        rank=6,
    ),
    "merge of sums": composed(
        lambda a, b, e: [a + b, 0.5 * e], "merge", method="dare", seed=4, rank=4
    ),
    "merge of sums by module": composed(
        lambda a, b, e: [a + b, e], "merge", weights=[1, 2], module_weights=RULES
    ),
    "compress of methods": composed(
        lambda a, b: ao.combine("tsv", [a, b]) + b, "compress", max_error=0.3, max_rank=5
    ),
    "convert of methods": composed(
        lambda a, b: ao.combine("tsv", [a, b]) - b, "convert", scaling="folded", dtype="float16"
    ),
    "calc of sums": lambda store, out: ao.calc(
        "2*a - project(b, a)",
        {
            "a": 0.5 * ao.open_adapter(store / "x/ad") + ao.open_adapter(store / "e"),
            "b": ao.combine("tsv", [store / "y/ad", store / "x/ad"]),
        },
        out=out,
    ),
    "calc of a part": lambda store, out: ao.calc(
        "3*a", {"a": 0.5 * ao.open_adapter(store / "x/ad")}, out=out
    ),
}
CASES |= {f"Python: {name}": make for name, make in _COMPOSED.items()}
_NEEDED: dict[str, dict[str, Any]] = {"svd": {"parameters": {"rank": 3}}}
CASES |= {
    f"method {name}": merged("x/ad", "e", method=name, rank=4, **_NEEDED.get(name, {}))
    for name, method in METHODS.items()
    if "activations" not in method.needs
}


def tensors(out: Path) -> dict[str, bytes]:
    """Everything in an output but sidecars and cards, which have its name in them."""
    files = [out] if out.is_file() else sorted(out.rglob("*"))
    return {
        "file" if path == out else path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.is_file() and not path.name.endswith(("adapterops.json", "README.md"))
    }


@pytest.mark.parametrize("name", CASES)
def test_an_output_is_made_again_to_the_byte(store, tmp_path, name):
    report = CASES[name](store, tmp_path / "first")
    out = Path(report.output)
    again = ao.run(out, out=tmp_path / f"second{out.suffix}", inputs=store)
    found, wanted = tensors(Path(again.output)), tensors(out)
    assert found == wanted and any(name.endswith((MAIN, "file")) for name in wanted)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("method ")])
def test_check_computes_every_output_again(store, tmp_path, name):
    """By the same code: nothing that `run` makes again is one that `check` cannot."""
    report = CASES[name](store, tmp_path / "first")
    found = ao.check(report.output, recompute=True, inputs=store, jobs=1)
    assert [each.code for each in found.between] == ["recompute-equal"]


BAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "folder": ("base", {"weights": [0.5, 1]}),
    "file": ("one/model.safetensors", {"dtype": "bfloat16", "modules": ".*mlp.*"}),
    "stochastic": ("base", {"round": "stochastic", "seed": 3}),
    "compensated": ("base", {"round": "compensated", "reversible": True}),
    "hashed": ("base", {"hash": True}),
    "ties": ("base", {"method": "ties", "parameters": {"density": 0.3}}),
    "dare": ("base", {"method": "dare", "seed": 8, "module_weights": ["attn: 0,1"]}),
    "of sums": ("base", {"method": "dare", "seed": 8, "weights": [1, 0.5]}),
}


@pytest.mark.parametrize("name", BAKES)
def test_a_bake_is_done_again_to_the_byte(store, tmp_path, name):
    base, options = BAKES[name]
    adapters = [store / "x/ad", store / "y/ad"]
    if name == "of sums":
        a, b = map(ao.open_adapter, adapters)
        adapters = [a + b, ao.combine("tsv", [a, b])]
    ao.bake(
        store / "models" / base, adapters, out=tmp_path / f"first{Path(base).suffix}", **options
    )
    out = tmp_path / f"first{Path(base).suffix}"
    again = ao.run(out, out=tmp_path / f"second{out.suffix}", inputs=store)
    assert tensors(Path(again.output)) == tensors(out) != {}
    one, two = (json.loads(_sidecar(path).read_bytes()) for path in (out, Path(again.output)))
    assert one["provenance"] == two["provenance"]


def _sidecar(out: Path) -> Path:
    return out / "adapterops.json" if out.is_dir() else out.with_suffix(".adapterops.json")


def test_a_bake_of_what_is_relative_to_its_base(store, tmp_path):
    ao.bake(store / "models/base", store / "dora", out=tmp_path / "first")
    ao.run(tmp_path / "first", out=tmp_path / "second", inputs=store)
    assert tensors(tmp_path / "first") == tensors(tmp_path / "second")


def test_every_class_of_method_is_among_the_cases():
    named = {
        METHODS[name.removeprefix("method ")].signature
        for name in CASES
        if name.startswith("method ")
    }
    assert {"gram", "core", "elements"} <= named


@pytest.fixture
def made(store, tmp_path) -> Path:
    """A merge at random, whose bits hang on names."""
    out = tmp_path / "made"
    merged("x/ad", "y/ad", method="dare", seed=4, rank=5)(store, out)
    return out


class TestInputs:
    def test_names_and_places_do_not_count(self, store, made, tmp_path):
        shutil.copytree(store / "x" / "ad", tmp_path / "in" / "deep" / "other")
        shutil.copytree(store / "y" / "ad", tmp_path / "in" / "ad")
        shutil.copytree(store / "c", tmp_path / "in" / "c")
        ao.run(made, out=tmp_path / "again", inputs=tmp_path / "in")
        assert tensors(made) == tensors(tmp_path / "again")

    def test_here_is_where_they_are_sought_by_default(self, store, made, tmp_path, monkeypatch):
        monkeypatch.chdir(store)
        ao.run(made, out=tmp_path / "again")
        assert tensors(made) == tensors(tmp_path / "again")

    def test_all_that_are_missing_are_named(self, store, made, tmp_path):
        for present, missing in (("x", "ad#2"), ("y", "ad ")):
            with pytest.raises(FileError, match="1 of what it was made from") as caught:
                ao.run(made, out=tmp_path / "again", inputs=store / present)
            assert missing in str(caught.value) and "--inputs DIR" in str(caught.value)
        with pytest.raises(FileError, match="2 of what it was made from"):
            ao.run(made, out=tmp_path / "again", inputs=store / "models")
        assert not (tmp_path / "again").exists()

    def test_a_changed_input_is_a_missing_one(self, store, made, tmp_path):
        for name in ("x", "y"):
            shutil.copytree(store / name, tmp_path / "in" / name)
        config = tmp_path / "in" / "x" / "ad" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
        with pytest.raises(FileError, match=r"ad \(sha256"):
            ao.run(made, out=tmp_path / "again", inputs=tmp_path / "in")

    def test_models_that_are_missing(self, store, tmp_path):
        compressed("x/ad", max_error=0.4, metric="relative", base="models/base")(
            store, tmp_path / "made"
        )
        with pytest.raises(FileError, match=r"the base \(sampled sha256"):
            ao.run(tmp_path / "made", out=tmp_path / "again", inputs=store / "x")

    def test_a_base_with_another_config(self, store, tmp_path):
        ao.bake(store / "models/base", store / "x/ad", out=tmp_path / "made")
        shutil.copytree(store / "x", tmp_path / "in" / "x")
        shutil.copytree(store / "models/base", tmp_path / "in" / "base")
        config = tmp_path / "in" / "base" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 3.0}))
        with pytest.raises(IncompatibleError, match="another config"):
            ao.run(tmp_path / "made", out=tmp_path / "again", inputs=tmp_path / "in")

    def test_pickles_are_opened_where_that_is_allowed(self, store, tmp_path):
        torch = pytest.importorskip("torch")
        folder = write_peft(tmp_path / "in" / "p", bake_models.factors(1, rank=2))
        from safetensors.numpy import load_file

        found = load_file(folder / MAIN)
        torch.save(
            {n: torch.from_numpy(v.copy()) for n, v in found.items()}, folder / "adapter_model.bin"
        )
        (folder / MAIN).unlink()
        ao.merge([folder], out=tmp_path / "made", allow_pickle=True)
        with pytest.raises(PickleRefusedError):
            ao.run(tmp_path / "made", out=tmp_path / "again", inputs=tmp_path / "in")
        ao.run(tmp_path / "made", out=tmp_path / "again", inputs=tmp_path / "in", allow_pickle=True)
        assert tensors(tmp_path / "made") == tensors(tmp_path / "again")


class TestOutputs:
    def test_by_folder_file_and_sidecar(self, store, made, tmp_path):
        for number, name in enumerate(("", MAIN, "adapterops.json")):
            ao.run(made / name, out=tmp_path / f"again{number}", inputs=store)
            assert tensors(made) == tensors(tmp_path / f"again{number}")

    def test_a_single_file_whose_header_was_lost_has_its_sidecar(self, store, tmp_path):
        ao.merge([store / "l.safetensors"], out=tmp_path / "m.safetensors", dtype="float16")
        (tmp_path / "m.safetensors").write_bytes((store / "l.safetensors").read_bytes())
        ao.run(tmp_path / "m.safetensors", out=tmp_path / "again.safetensors", inputs=store)
        assert (tmp_path / "again.safetensors").is_file()

    def test_the_command(self, store, made, tmp_path):
        done = call("run", made, "--inputs", store, "-o", "again", cwd=tmp_path)
        assert "again" in done.stdout and tensors(made) == tensors(tmp_path / "again")
        failed = call("run", made, "--inputs", store, cwd=tmp_path, code=2)
        assert "merge needs out" in failed.stderr

    def test_what_says_nothing_of_its_making(self, store, tmp_path):
        for path in (store / "x" / "ad", store / "l.safetensors"):
            with pytest.raises(UsageError, match="carries no provenance of adapterops"):
                ao.run(path, out=tmp_path / "again", inputs=store)
        with pytest.raises(FileError):
            ao.run(tmp_path / "gone.safetensors", out=tmp_path / "again")


def altered(made: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A sidecar with another provenance."""
    document = json.loads((made / "adapterops.json").read_text())
    change(document["provenance"])
    target = made.parent / "altered" / "adapterops.json"
    target.parent.mkdir()
    target.write_text(json.dumps(document))
    return target


ALTERED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[AdapterOpsError], str]] = {
    "unknown verb": (lambda p: p.update(verb="cluster"), UsageError, "was made by 'cluster'"),
    "unknown option": (
        lambda p: p["options"].update(moon=3),
        UsageError,
        "with moon = 3, which version",
    ),
    "option of another type": (
        lambda p: p["options"].update(rank="x"),
        UsageError,
        "rank: is the text 'x'; expected a whole number or same",
    ),
    "unknown method": (
        lambda p: p["options"].update(method="moon"),
        UsageError,
        "there is no method 'moon'",
    ),
    "pattern": (
        lambda p: p["options"].update(modules="(a+)+b"),
        UsageError,
        "could be searched for without end",
    ),
    "rule with a pattern": (
        lambda p: p["options"].update(module_weights=["re:(a+)+b: 1,1"]),
        UsageError,
        "could be searched for without end",
    ),
    "alpha": (
        lambda p: p["options"].update(alpha={"0": "x"}),
        UsageError,
        "its provenance has the alpha {'0': 'x'}",
    ),
    "no inputs": (lambda p: p.pop("inputs"), FormatError, "its provenance is damaged"),
    "weight": (lambda p: p["inputs"][0].update(weight="1"), FormatError, "is damaged"),
    "NaN": (lambda p: p["inputs"][0].update(weight=float("nan")), FormatError, "is damaged"),
    "name": (lambda p: p["inputs"][0].update(name=None), FormatError, "is damaged"),
    "options": (lambda p: p.update(options=[1]), FormatError, "is damaged"),
    "activations of another verb": (
        lambda p: (p.update(verb="convert"), p.update(options={"activations": ""})),
        UsageError,
        "made by convert of version",
    ),
    "the base of another verb": (
        lambda p: p["options"].update(base="x"),
        UsageError,
        "with base = 'x', which version",
    ),
    "the hash of nothing": (
        lambda p: p["inputs"][0].update(sha256="", name="") or p["inputs"][0].pop("config_sha256"),
        FileError,
        "1 of what it was made from",
    ),
    "a name that is no text": (
        lambda p: p["inputs"][0].update(name="\ud800"),
        FormatError,
        "is damaged",
    ),
    "nothing went in": (lambda p: p.update(inputs=[]), FormatError, "is damaged"),
    "a number that is none": (
        lambda p: p["inputs"][0].update(weight=10**400),
        FormatError,
        "is damaged",
    ),
    "an option that is no number": (
        lambda p: p["options"].update(energy=10**400),
        UsageError,
        "energy: is ",
    ),
    "alphas": (lambda p: p["options"].update(alpha=[1]), UsageError, "the alpha [1]"),
    "an alpha of nothing": (
        lambda p: p["options"].update(alpha={"7": 1.0}),
        UsageError,
        "the alpha {'7': 1.0}",
    ),
    "labels": (lambda p: p["options"].update(labels=["a"]), UsageError, "labels: is a list"),
}


def _tree(**node: Any) -> list[Any]:
    return [[1.0, {"method": "tsv", "of": [[1.0, 0], [1.0, 1]], **node}]]


def _deep(levels: int) -> list[Any]:
    node: Any = 0
    for _ in range(levels):
        node = {"method": "linear", "of": [[1.0, node]]}
    return [[1.0, node]]


_RULED = {"module_weights": ["attn: 1,2"], "at": 0}
TREES: dict[str, tuple[Any, str]] = {
    "text": ("a", "sum: is the text 'a'"),
    "nothing": ([], "sum: is a list"),
    "pairs": ([[1.0]], "sum[0]: is a list"),
    "weight": ([["1", 0]], "sum[0]: is a list"),
    "infinite weight": ([[float("inf"), 0]], "sum[0]: is a list"),
    "large weight": ([[10**400, 0]], "sum[0]: is a list"),
    "place": ([[1.0, 2]], "sum[0][1]: is the number 2; expected"),
    "negative place": ([[1.0, -1]], "sum[0][1]: is the number -1"),
    "switch": ([[1.0, True]], "sum[0][1]: is the switch true"),
    "lost": ([[1.0, None]], "is of an adapter that is not recorded"),
    "unknown method": (_tree(method="moon"), "there is no method 'moon'"),
    "method that is none": (_tree(method=[1]), "sum[0][1].method: is a list"),
    "no method": ([[1.0, {"of": [[1.0, 0]]}]], "sum[0][1].method: is nothing"),
    "unknown key": (_tree(moon=1), "sum[0][1].moon: "),
    "parameters": (_tree(parameters=3), "sum[0][1].parameters: is the number 3"),
    "unknown parameter": (_tree(parameters={"moon": 1}), "no parameter 'moon'"),
    "value": (_tree(method="svd", parameters={"rank": 10**400}), "rank is "),
    "space": (_tree(method="ties", space=[1]), "sum[0][1].space: is a list"),
    "unknown space": (_tree(method="ties", space="moon"), "--space 'moon': expected one of"),
    "seed": (_tree(method="dare", seed=-1), "--seed -1"),
    "too many": (_tree(method="slerp", of=[[1.0, 0]] * 3), "takes 2 adapters; there are 3"),
    "nothing within": (_tree(of=[]), "sum[0][1].of: is a list"),
    "pattern": (_tree(modules="(a+)+b"), "could be searched for without end"),
    "modules": (_tree(modules=3), "sum[0][1].modules: "),
    "activations": (_tree(method="regmean", activations=["x"]), "activations (digest x)"),
    "activations that are none": (_tree(method="regmean", activations=3), ".activations: is the"),
    "activations for nothing": (_tree(activations=["x"]), "activations (digest x)"),
    "rules": (
        [[1.0, {**_RULED, "module_weights": ["re:(a+)+b: 1,1"], "of": [[1, 0], [1, 1]]}]],
        "could be searched for without end",
    ),
    "rules that are none": (
        [[1.0, {**_RULED, "module_weights": 3, "of": [[1, 0], [1, 1]]}]],
        "sum[0][1].module_weights: ",
    ),
    "unknown rule": (
        [[1.0, {**_RULED, "module_weights": ["attm: 1,2"], "of": [[1, 0], [1, 1]]}]],
        "did you mean attn?",
    ),
    "which of them": ([[1.0, {**_RULED, "at": 2, "of": [[1, 0], [1, 1]]}]], ".at: is the number 2"),
    "too deep": (_deep(70), "has more than 200 levels"),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_that_anybody_could_have_written(store, made, tmp_path, name):
    tree, message = TREES[name]

    def change(provenance: dict[str, Any]) -> None:
        provenance["options"] = {"sum": tree}

    with pytest.raises(AdapterOpsError, match=re.escape(message)):
        ao.run(altered(made, change), out=tmp_path / "again", inputs=store)
    assert not (tmp_path / "again").exists()


def test_trees_as_deep_as_they_may_be(store, made, tmp_path):
    def change(provenance: dict[str, Any]) -> None:
        provenance["options"] = {"sum": _deep(50)}

    ao.run(altered(made, change), out=tmp_path / "again", inputs=store)
    ao.merge(store / "x/ad", out=tmp_path / "plain")
    one, two = (ao.open_adapter(tmp_path / name) for name in ("again", "plain"))
    assert (one - two).norm() < 1e-6 * two.norm()


def test_a_tree_beside_a_method_is_not_guessed_at(store, made, tmp_path):
    with pytest.raises(UsageError, match="sum: stands beside method"):
        ao.run(
            altered(made, lambda p: p["options"].update(sum=[[1.0, 0]])),
            out=tmp_path / "again",
            inputs=store,
        )


def test_part_of_what_rules_were_given_is_not_repeated(store, tmp_path):
    """Rules speak of all adapters that they were given; one alone does not say what they were."""
    both = [store / "x/ad", store / "y/ad"]
    whole = ao.combine("linear", both, [1, 1], module_weights=RULES)
    type(whole)(whole.terms[:1]).save(tmp_path / "made")
    with pytest.raises(UsageError, match="is of an adapter that is not recorded"):
        ao.run(tmp_path / "made", out=tmp_path / "again", inputs=store)


@pytest.mark.parametrize("name", ALTERED)
def test_what_cannot_be_repeated_is_named(store, made, tmp_path, name):
    change, kind, message = ALTERED[name]
    with pytest.raises(kind, match=re.escape(message)):
        ao.run(altered(made, change), out=tmp_path / "again", inputs=store)
    assert not (tmp_path / "again").exists()


def test_another_version_is_a_warning(store, made, tmp_path):
    sidecar = altered(made, lambda p: p.update(version="0.0.1"))
    report = ao.run(sidecar, out=tmp_path / "again", inputs=store)
    assert "was made by version 0.0.1" in report.warnings[0]
    assert tensors(made) == tensors(tmp_path / "again")


def test_saved_sums_with_options_of_compress(store, tmp_path):
    total = ao.open_adapter(store / "x/ad") - 0.5 * ao.open_adapter(store / "y/ad")
    total.save(tmp_path / "made", form="svd", rank=3)
    found = prepared(tmp_path / "made", out="x", inputs=store)
    assert found.verb.name == "compress"
    ao.run(tmp_path / "made", out=tmp_path / "again", inputs=store)
    one, two = ((tmp_path / name / MAIN).read_bytes() for name in ("made", "again"))
    data = [x[8 + int.from_bytes(x[:8], "little") :] for x in (one, two)]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a", "a#2", "b", "a#3"], ["a", "a", "b", "a"]),
        (["a#2", "a"], ["a#2", "a"]),
        (["a", "a#3"], ["a", "a#3"]),
        (["b#2", "b#2#2"], ["b#2", "b#2"]),
        ([], []),
    ],
)
def test_numbers_of_equal_names_are_taken_off(names, wanted):
    assert undistinct(names) == wanted


def test_what_run_takes_of_a_verbs_options_means_the_same():
    """Overrides have the names that the verbs have."""
    overrides = set(inspect.signature(ao.run).parameters) - {"recipe", "inputs", "progress"}
    assert overrides <= set(inspect.signature(ao.merge).parameters)
