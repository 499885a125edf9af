"""Every registered method gives the same tensor bytes from every surface, on real adapters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.rules.registry import METHODS
from tests import bake_models
from tests.method_surfaces import (
    CALIBRATIONS,
    NORMS,
    SAVED,
    SPACES,
    WEIGHTS,
    Case,
    assert_one,
    bakes,
    by_merge,
    digest,
    every_surface,
    expression,
    options,
)

ROOT = Path(__file__).parent.parent
PAIR = ("code-seed0", "docs-seed0")
FEW = r"model\.layers\.[03]\.self_attn\.v_proj"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODULE_WEIGHTS = (
    ("layers 0: 1,0.5",),
    ("re:.*layers\\.3.*: 0.3, 0.9",),
    ("attn: 0.4,-0.8", "layers 3-: 1,0"),
)
TURNS = (0, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two of the examples, what `few` has of them, inputs of those modules, and a base of them."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 3)]
    (folder / "few").mkdir()
    for name in PAIR:
        shutil.copytree(ROOT / "examples" / "adapters" / name, folder / name)
        ao.merge(folder / name, modules=FEW, out=folder / "few" / name)
        samples = {each: ("samples", rng.standard_normal((40, 576))) for each in names}
        write_activations(folder / f"{name}.safetensors", samples, tokens=40, model=BASE)
    tensors = {f"{name}.weight": 0.02 * rng.standard_normal((192, 576)) for name in names}
    bake_models.model(folder / "base", tensors)
    return folder


def case_of(name: str, turn: int, store: Path) -> Case:
    method, place = METHODS[name], sorted(METHODS).index(name) + turn
    fields = options(method, turn)
    files = [store / f"{each}.safetensors" for each in PAIR[: 1 + turn]]
    return Case(
        name,
        tuple(store / each for each in PAIR),
        WEIGHTS[place % len(WEIGHTS)][:2],
        activations=tuple(files) if "activations" in method.needs else (),
        module_weights=MODULE_WEIGHTS[place % 3] if turn else (),
        **{**fields, "saved": {**fields["saved"], "modules": FEW}},
    )


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_surface_writes_the_same_tensors(name, turn, store, tmp_path):
    case = case_of(name, turn, store)
    first = assert_one(every_surface(case, tmp_path))
    assert (first.code == 0) == case.is_valid


def test_every_option_is_among_the_cases():
    cases = [case_of(name, turn, Path("store")) for name in METHODS for turn in TURNS]
    valid = [case for case in cases if case.is_valid]
    for key, values in (("space", SPACES[1:]), ("calibrate", CALIBRATIONS), ("match_norm", NORMS)):
        assert {case.general.get(key) for case in valid} >= set(values)
    assert {case.module_weights for case in valid} == {(), *MODULE_WEIGHTS}
    assert {case.normalize for case in valid} == {True, False}
    assert {key for case in valid for key in case.saved} >= {key for each in SAVED for key in each}
    given = {(case.method, name) for case in valid for name in case.parameters}
    assert given == {(m.name, each.name) for m in METHODS.values() for each in m.parameters}
    assert {case.method for case in valid if not case.module_weights} == set(METHODS)  # in calc
    seeded = {case.method for case in valid if "seed" in case.general}
    assert seeded == {m.name for m in METHODS.values() if "seed" in m.needs}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bake_writes_the_same_tensors_from_every_surface(name, store, tmp_path):
    case = case_of(name, sorted(METHODS).index(name) % 2, store)
    few = tuple(store / "few" / path.name for path in case.adapters)
    case = replace(case, adapters=few, normalize=False, saved={})
    first = assert_one(bakes(case, store / "base", tmp_path))
    assert (first.code == 0) == case.is_valid
    assert first.digest != digest(store / "base")


@pytest.mark.parametrize("name", ["linear", "tsv", "dare", "peft_linear"])
def test_another_process_writes_the_same_tensors(name, store, tmp_path):
    """One method of each signature; sets are in another order there, and threads are others."""
    case = case_of(name, 0, store)
    named = [f"{letter}={path}" for letter, path in zip("ab", case.adapters, strict=True)]
    flags = [word for k, v in case.saved.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    words = ["calc", expression(case), *named, *flags, "-o", str(tmp_path / "there"), "-q", "-j2"]
    settings = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "adapterops", *words]
    subprocess.run(command, check=True, cwd=ROOT, env=settings, timeout=120)
    assert by_merge(case, tmp_path / "here").digest == digest(tmp_path / "there")


def test_the_cases_can_differ(store, tmp_path):
    """What is compared: another weight, seed or parameter is another digest."""
    case = replace(case_of("dare", 0, store), general={"seed": 1})
    others = (
        case,
        replace(case, weights=(case.weights[0], 2 * case.weights[1])),
        replace(case, general={"seed": 2}),
        replace(case, parameters={**case.parameters, "density": 0.4}),
        replace(case, module_weights=MODULE_WEIGHTS[0]),
    )
    found = [by_merge(each, tmp_path / str(i)).digest for i, each in enumerate(others)]
    assert len(set(found)) == len(found) and "" not in found
    sidecar = json.loads((tmp_path / "0" / "adapterops.json").read_text())
    assert sidecar["provenance"]["options"]["seed"] == 1
