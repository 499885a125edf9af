"""Configs and provenance that somebody else wrote: findings, no crash, no code that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.files.output import PROVENANCE_KEY
from tests.support import pairs, write_peft

SHAPES = {"layers.0.q_proj": (12, 8), "layers.1.q_proj": (12, 8)}


def codes(report: ao.CheckReport) -> list[str]:
    return [finding.code for finding in report.findings]


def merged(folder: Path, **options: Any) -> Path:
    for seed in (1, 2):
        write_peft(folder / f"in{seed}", pairs(seed, SHAPES, 2))
    ao.merge([folder / "in1", folder / "in2"], [0.7, 0.3], out=folder / "out", **options)
    return folder / "out"


def rewrite(out: Path, change: dict[str, Any]) -> None:
    """Other options in the provenance of an output."""
    file = out / "adapter_model.safetensors"
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata())
    made = json.loads(metadata[PROVENANCE_KEY])
    made["options"] |= change
    save_file(load_file(file), file, metadata | {PROVENANCE_KEY: json.dumps(made)})


def test_a_scale_that_was_changed_afterwards(tmp_path: Path) -> None:
    """The tensors are those that were written; what they do is not."""
    out = merged(tmp_path)
    assert codes(ao.check(out, recompute=True, inputs=tmp_path)) == ["recompute-equal"]
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 40}))
    found = ao.check(out, recompute=True, inputs=tmp_path)
    assert codes(found) == ["recompute-differs"]
    assert found.exit_code == 4


@pytest.mark.parametrize(
    "change",
    [
        {"energy": "abc"},
        {"modules": 5},
        {"modules": "(a+)+b"},
        {"alpha": [1]},
        {"size": [1]},
        {"dtype": [1]},
        {"rank": True},
        {"to": {}},
    ],
    ids=str,
)
def test_options_of_a_forged_header(change: dict[str, Any], tmp_path: Path) -> None:
    out = merged(tmp_path)
    rewrite(out, change)
    found = ao.check(out, recompute=True, inputs=tmp_path)
    assert codes(found) == ["recompute-failed"]
    assert next(iter(change)) in found.findings[0].message


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "null", "[]", '{"verb": "merge"}'])
def test_a_provenance_that_is_none(text: str, tmp_path: Path) -> None:
    out = merged(tmp_path)
    file = out / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", PROVENANCE_KEY: text})
    (out / "adapterops.json").unlink()
    [found] = ao.check(out, recompute=True, inputs=tmp_path).findings
    assert found.code == "recompute-failed" and "damaged" in found.message


def test_a_sidecar_speaks_for_a_header_that_was_lost(tmp_path: Path) -> None:
    out = merged(tmp_path)
    file = out / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    assert codes(ao.check(out, recompute=True, inputs=tmp_path)) == ["recompute-equal"]


def test_a_header_that_says_an_adapter_was_baked(tmp_path: Path) -> None:
    """Nobody's base model is baked for what an adapter says of itself."""
    out = merged(tmp_path)
    file = out / "adapter_model.safetensors"
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata())
    made = json.loads(metadata[PROVENANCE_KEY]) | {"verb": "bake"}
    save_file(load_file(file), file, metadata | {PROVENANCE_KEY: json.dumps(made)})
    [found] = ao.check(out, recompute=True, inputs=tmp_path).findings
    assert found.code == "recompute-failed" and "which writes models" in found.message


def test_a_pickled_input_is_opened_on_request_only(tmp_path: Path) -> None:
    import torch

    source = write_peft(tmp_path / "in", pairs(1, SHAPES, 2))
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, source / "adapter_model.bin")
    out = tmp_path / "out"
    ao.merge([source], [0.5], out=out, allow_pickle=True)
    refused = ao.check(out, recompute=True, inputs=tmp_path)
    assert codes(refused) == ["recompute-failed"]
    assert "pickle" in refused.findings[0].message
    allowed = ao.check(out, recompute=True, inputs=tmp_path, allow_pickle=True)
    assert codes(allowed) == ["recompute-equal"]


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": 5},
        {"modules_to_save": "head"},
        {"r": float("inf")},
        {"alpha_pattern": {".*q_proj": [1, 2]}},
        {"lora_alpha": 0},
        {"target_parameters": 3},
        {"rank_pattern": {"(a+)+": 2}},
    ],
    ids=str,
)
def test_odd_configs_are_findings(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", pairs(1, SHAPES, 2), **config)
    engines = ("vllm", "sglang", "lorax", "tgi", "trtllm", "portable")
    found = codes(ao.check(folder, engine=engines))
    assert found and "unexpected" not in found


def test_the_same_tensors_with_another_alpha_are_two_adapters(tmp_path: Path) -> None:
    factors = pairs(1, SHAPES, 2)
    a = write_peft(tmp_path / "a", factors, alpha=8)
    b = write_peft(tmp_path / "b", factors, alpha=80)
    report = ao.check([a, b])
    [found] = [item for item in report.between if item.code == "duplicate-tensors"]
    assert found.hint is None


def test_kinship_does_not_depend_on_the_gauge(tmp_path: Path) -> None:
    one, two = pairs(1, SHAPES, 4), pairs(2, SHAPES, 4)
    shared = {name: (B, one[name][1]) for name, (B, _) in two.items()}
    grown = {
        name: (B * np.float32([4, 4, 1, 1]), A / np.float32([[4], [4], [1], [1]]))
        for name, (B, A) in shared.items()
    }
    a = write_peft(tmp_path / "a", one)
    figures = []
    for name, factors in (("b", shared), ("c", grown)):
        pair = ao.diff([a, write_peft(tmp_path / name, factors)]).pair
        assert pair is not None
        figures.append(pair.verdict.evidence["shared_rows"].value)
    assert figures[0] == pytest.approx(1.0)
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
