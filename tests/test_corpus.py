"""Real adapters: each is read, or refused by name; families merge to the dense float64 sum."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError
from tests.support import distance, read_peft, weighted

CONVENTIONS = {
    "peft": "peft",
    "diffusers-attnproc": "diffusers",
    "MergedLinear+peft": "peft",
    "cloneofsimo-st": "cloneofsimo",
    "cloneofsimo-list(up,down)": "cloneofsimo",
    "mlx": "mlx",
}
FAMILIES = {
    "AguLeon__LoRA_RoBERTa_AGNews": (500, 1000, 1200),
    "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese": (500, 2000, 5000, 8500, 8610),
}


@pytest.fixture(scope="module")
def manifest(corpus: Path) -> dict[str, Any]:
    """The entries of manifest.json by file."""
    entries = json.loads((corpus / "manifest.json").read_text())
    return {entry["file"]: entry for entry in entries}


def test_every_file_is_read(corpus: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest.items():
        [(weight, file)] = ao.open_adapter(corpus / name, allow_pickle=True).terms
        assert (weight, file.dialect) == (1.0, CONVENTIONS[entry["conv"]])
        assert not file.deltas and not file.problems


def test_ranks_scales_and_norms_are_the_manifests(corpus: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest.items():
        adapter = ao.open_adapter(corpus / name, allow_pickle=True)
        [(_, file)] = adapter.terms
        ranks = Counter(str(site.rank) for site in file.sites.values())
        assert ranks == entry["ranks"]
        assert {site.scale for site in file.sites.values()} == set(entry["scale"])
        assert len(file.extras) == entry["extra_keys"]
        norm = math.hypot(*(factors.norm() for factors in adapter.values()))
        assert norm == pytest.approx(entry["fro"], rel=1e-6)


def test_pickles_need_permission(corpus: Path, manifest: dict[str, Any]) -> None:
    for name in manifest:
        if Path(name).suffix in (".bin", ".pt"):
            with pytest.raises(FormatError, match="--allow-pickle"):
                ao.open_adapter(corpus / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_a_family_merge_exactly(family: str, corpus: Path, tmp_path: Path) -> None:
    folders = [corpus / family / f"checkpoint-{step}" for step in FAMILIES[family]]
    for index, (a, b) in enumerate(itertools.pairwise(folders)):
        out = tmp_path / str(index)
        report = ao.merge([a, b], [0.7, 0.3], out=out, extras="first", dtype="float32")
        assert report.error < 1e-6
        wanted = weighted((0.7, dense(a)), (0.3, dense(b)))
        assert distance(read_peft(out), wanted) < 1e-6
        before, after = (load_file(x / "adapter_model.safetensors") for x in (a, out))
        extras = {name for name in before if ".lora_" not in name}
        assert extras == {name for name in after if ".lora_" not in name}
        assert all(np.array_equal(before[name], after[name]) for name in extras)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_disagree_are_refused(family: str, corpus: Path, tmp_path: Path) -> None:
    folders = [corpus / family / f"checkpoint-{step}" for step in FAMILIES[family][:2]]
    with pytest.raises(IncompatibleError, match="--extras first, average or drop") as caught:
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "m").exists()


def test_adapters_of_different_owners_on_one_base(corpus: Path, tmp_path: Path) -> None:
    """Different ranks, targets and heads: modules that one lacks count as zero for it."""
    a, b = (corpus / name / f"checkpoint-{steps[0]}" for name, steps in FAMILIES.items())
    report = ao.merge([a, b], [1.0, -0.5], out=tmp_path / "m", extras="first", dtype="float32")
    assert len(report.modules) == 36
    wanted = weighted((1.0, dense(a)), (-0.5, dense(b)))
    assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6


def dense(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of a PEFT directory with one alpha and rank for all, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): scale
        * (B.astype(np.float64) @ tensors[name.replace("lora_B", "lora_A")].astype(np.float64))
        for name, B in tensors.items()
        if name.endswith(".lora_B.weight")
    }
