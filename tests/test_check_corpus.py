"""What check says of each real adapter, by name; whatever a stranger writes gets findings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import adapterops as ao
from adapterops.checking.findings import RULES
from tests.defects import CONFIG, at, kohya, llama

ROBERTA = "paulohenriquecrs__RoBERTa_SEQ_CLS_LoRA_Portuguese"
AGNEWS = "AguLeon__LoRA_RoBERTa_AGNews"
SD = "catundchat__stable-diffusion-v1.5-lora"
MLX = "wyek1n__MLX-CLI"
# path -> codes; what is not named here must be clean.
EXPECTED: dict[str, set[str]] = {
    **{f"{AGNEWS}/checkpoint-{step}": set() for step in (500, 1000, 1200)},
    **{f"{ROBERTA}/checkpoint-{step}": set() for step in (500, 2000, 5000, 8500, 8610)},
    SD: {"stale-twin", "scale-assumed"},
    "cloneofsimo__lora/analog_svd_rank4.safetensors": {"scale-assumed"},
    "cloneofsimo__lora/lora_disney_inpainting.safetensors": {"scale-assumed"},
    "cloneofsimo__lora/lora_pop.pt": {"scale-assumed", "dead-modules"},
    "wujindou__BLOOM-LORA": {"fan-in-fan-out", "config-key"},
    f"{MLX}/0000100": {"base-path", "mlx-alpha"},
    f"{MLX}/0000200": {"base-path", "mlx-alpha"},
}


@pytest.fixture(scope="module")
def report(corpus: Path) -> ao.CheckReport:
    return ao.check(corpus, allow_pickle=True, jobs=2)


def findings(report: ao.CheckReport, path: str) -> dict[str, ao.Finding]:
    [adapter] = [a for a in report.adapters if a.path.endswith(path)]
    return {finding.code: finding for finding in adapter.findings}


def test_each_file_by_name(report: ao.CheckReport, corpus: Path) -> None:
    found = {
        str(Path(adapter.path).relative_to(corpus)): {f.code for f in adapter.findings}
        for adapter in report.adapters
    }
    assert found == EXPECTED
    assert report.between == () and report.exit_code == 0


def test_the_twin_of_catundchat_is_another_adapter(report: ao.CheckReport, corpus: Path) -> None:
    assert "has other values" in findings(report, SD)["stale-twin"].message
    closed = ao.check(corpus / SD, jobs=1)
    [twin] = [f for f in closed.findings if f.code == "stale-twin"]
    assert "--allow-pickle compares them" in (twin.hint or "")


def test_the_alpha_of_MLX_has_no_effect(report: ao.CheckReport) -> None:
    message = findings(report, f"{MLX}/0000100")["mlx-alpha"].message
    assert "scale is 10, alpha / rank would be 2" in message


def test_BLOOM_is_no_Conv1D(report: ao.CheckReport) -> None:
    found = findings(report, "wujindou__BLOOM-LORA")
    assert "fan_in_fan_out is true, and 24 modules" in found["fan-in-fan-out"].message
    assert found["config-key"].message.startswith("enable_lora, merge_weights")


def test_pickles_without_permission(corpus: Path) -> None:
    for path in ("wujindou__BLOOM-LORA", "cloneofsimo__lora/lora_pop.pt"):
        report = ao.check(corpus / path, jobs=1)
        assert [f.code for f in report.findings] == ["pickle"] and report.exit_code == 3


def test_one_family_on_its_base_by_config(corpus: Path, tmp_path: Path) -> None:
    """roberta-base's own sizes: every module fits; with others none does."""
    config = {"model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072}
    config |= {"num_hidden_layers": 12, "vocab_size": 50265}
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = corpus / AGNEWS / "checkpoint-500"
    report = ao.check(adapter, base=tmp_path, jobs=1)
    [coverage] = report.findings
    assert coverage.code == "base-coverage"
    assert "changes 36 of the 72 weight matrices" in coverage.message
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 1024}))
    found = {f.code for f in ao.check(adapter, base=tmp_path, jobs=1).findings}
    assert "base-shape" in found


def test_engines_on_a_real_adapter(corpus: Path) -> None:
    report = ao.check(corpus / AGNEWS / "checkpoint-500", engine="vllm", jobs=1)
    assert report.exit_code == 3
    rules = {f.rule.partition(": ")[2] for f in report.findings if f.severity == "error"}
    assert "bias-config" in rules
    assert all(f.rule.startswith("vllm ") for f in report.findings)


# Strangers' files: every kind of value in every field, names made of pieces.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "q_proj", "(", ".*", "a+)+", "\x1b[31m", "score", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = st.dictionaries(
    st.sampled_from([*CONFIG, "lora_parameters", "merge_weights", "model"]), JSON, max_size=4
)


@given(FIELDS)
@example({"layers_to_transform": [None, -1, [0]]})
@settings(max_examples=150)
def test_no_config_makes_it_stumble(tmp_path_factory: Any, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    draft = llama(layers=2)
    assert draft.config is not None
    draft.config.update(fields)
    report = ao.check(draft.write(folder / "a"), engine="portable", jobs=1)
    assert {finding.code for finding in report.findings} <= RULES.keys() - {"unexpected"}


PIECES = ["model", "layers", "0", "1", "q_proj", "lora_A", "lora_B", "weight", "alpha", "default"]
PIECES += ["lora_unet_", "lora_down", "lora_up", "hada_w1_a", "base_layer", "bias", "diff", ""]
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(".".join)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(st.dictionaries(NAMES, SHAPES, max_size=6), st.booleans())
@settings(max_examples=150)
def test_no_names_make_it_stumble(tmp_path_factory: Any, tensors: Any, whole: bool) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    draft = kohya() if whole else llama(layers=1)
    draft.tensors |= {name: np.ones(shape, np.float32) for name, shape in tensors.items() if name}
    report = ao.check(draft.write(folder / "a"), jobs=1)
    assert {finding.code for finding in report.findings} <= RULES.keys() - {"unexpected"}


def test_the_healthy_adapter_of_the_fuzzer_is_healthy(tmp_path: Path) -> None:
    assert at(0) in llama(layers=2).tensors
    assert ao.check(llama(layers=2).write(tmp_path / "a"), jobs=1).findings == ()
