"""check finds each planted defect, that one only, and nothing in what is healthy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.checking.findings import RULES
from adapterops.formats import grammar
from tests import defects, defects_config, kinds


def found(report: ao.CheckReport) -> set[str]:
    return {finding.code for finding in report.findings}


CASES = [*defects.DEFECTS, *defects_config.DEFECTS]
NEAR = [*defects.NEAR, *defects_config.NEAR]


def checked(case: defects.Case, folder: Path) -> ao.CheckReport:
    paths = case.build(folder)
    options: dict[str, Any] = {
        key: value(folder) if callable(value) else value for key, value in case.options.items()
    }
    return ao.check(paths, jobs=1, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}: {case.title}")
def test_each_planted_defect_is_found_and_nothing_else(case: defects.Case, tmp_path: Path) -> None:
    report = checked(case, tmp_path)
    assert found(report) - case.also == {case.code}, report.findings
    assert case.also <= found(report)
    planted = [finding for finding in report.findings if finding.code == case.code]
    rule = RULES[case.code]
    for finding in planted:
        assert finding.severity == rule.severity
        assert finding.message and finding.path
    assert report.exit_code >= (rule.exit_code if rule.severity == "error" else 0)


@pytest.mark.parametrize("case", NEAR, ids=lambda case: f"{case.code}: {case.title}")
def test_what_resembles_a_defect_is_not_one(case: defects.Case, tmp_path: Path) -> None:
    report = checked(case, tmp_path)
    assert case.code not in case.also
    assert found(report) <= case.also, report.findings


@pytest.mark.parametrize("name", defects_config.CLEAN)
def test_nothing_is_found_in_a_healthy_adapter(name: str, tmp_path: Path) -> None:
    report = ao.check(defects_config.CLEAN[name](tmp_path), jobs=1)
    assert report.findings == () and report.exit_code == 0
    assert report.clean == len(report.adapters) == 1


def test_every_code_is_planted() -> None:
    """Codes of the base, of provenance and of sets have tests of their own."""
    planted = {case.code for case in CASES}
    of_files = {code for code, rule in RULES.items() if rule.scope == "file"}
    assert of_files - planted == {"unexpected", "out-of-memory", "remark", "config-shared"}
    assert len(planted) >= 30


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.title)
def test_every_kind_is_clean(kind: kinds.Kind, tmp_path: Path) -> None:
    modules = {f"lora_unet_down_blocks_{n}_conv": kind.draw(n, 2) for n in range(3)}
    path = kinds.write(tmp_path / "x.safetensors", modules, dict.fromkeys(modules, 2.0))
    assert ao.check(path, jobs=1).findings == ()


@pytest.mark.parametrize("options", [{}, {"rank": 16}, {"dtype": "bfloat16"}, {"rank": "same"}])
def test_what_we_write_is_clean_for_all_engines(options: Any, tmp_path: Path) -> None:
    """Zero padding included: it is no lack of rank."""
    third = defects.llama(3, rank=2)
    third.drop("down_proj")
    assert third.config
    third.config["target_modules"] = ["q_proj", "v_proj"]
    drafts = {"a": defects.llama(1, rank=6), "b": defects.llama(2, rank=8), "c": third}
    inputs = [draft.write(tmp_path / name) for name, draft in drafts.items()]
    ao.merge(inputs, [1.0, 0.5, 0.25], out=tmp_path / "out", **options)
    report = ao.check(tmp_path / "out", engine="portable", jobs=1)
    assert report.findings == ()


def test_factors_of_which_none_can_be_read(tmp_path: Path) -> None:
    """Such an adapter is not clean, and its dialect is told by its names all the same."""
    path = defects.factors_in_integers(tmp_path)
    report = ao.check(path, jobs=1)
    assert report.exit_code == 3 and report.clean == 0
    [adapter] = report.adapters
    assert (adapter.dialect, adapter.modules) == ("peft", 0)
    assert ao.inspect(path).dialect == "peft"
    assert "lora_A.weight' is of type I64" in report.findings[0].message


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.title)
def test_the_same_tensor_is_named_every_time(kind: kinds.Kind, tmp_path: Path) -> None:
    """Of several that cannot be read the first by role, whatever order sets have in this run."""
    module = {suffix: x.astype(np.int64) for suffix, x in kind.draw(1, 2).items()}
    path = kinds.write(tmp_path / "x.safetensors", {"lora_unet_a": module})
    [finding] = [f for f in ao.check(path, jobs=1).findings if f.code == "factor-type"]
    named = finding.message.split("'")[1]
    roles = {key.role: key for name in module if (key := grammar.parse(f"lora_unet_a.{name}"))}
    assert grammar.parse(named) == roles[min(roles)]
