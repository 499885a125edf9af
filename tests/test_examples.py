"""The example adapters, merged and checked on SmolLM2-135M itself."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

import adapterops as ao

EXAMPLES = Path(__file__).parent.parent / "examples"
INPUTS = [EXAMPLES / "adapters" / name for name in ("code-seed0", "docs-seed0")]
NAMES = ("code-seed0", "code-seed1", "docs-seed0", "docs-seed1")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


@pytest.fixture(scope="module")
def compare():
    """`compare(merged, inputs, weights)` of the example script, the real model read once."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import verify_on_model
    finally:
        sys.path.remove(str(EXAMPLES))
    read = cache(verify_on_model.load_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_on_model, "load_model", lambda dtype: deepcopy(read(dtype)))
        patch.setattr(verify_on_model, "load_tokenizer", cache(verify_on_model.load_tokenizer))
        yield verify_on_model.compare


def test_float32_merge_gives_the_logits_of_the_exact_sum(tmp_path, compare):
    report = ao.merge(INPUTS, [0.7, 0.3], out=tmp_path / "m", dtype="float32")
    found = compare(tmp_path / "m", INPUTS, [0.7, 0.3])
    assert found["base_to_exact"]["max_logit_difference"] > 1e-2  # the adapters do something
    assert found["max_logit_difference"] < 1e-5
    assert found["top1_agreement"] == 1.0
    assert report.error < 1e-7


def test_float16_merge_is_off_by_its_certificate(tmp_path, compare):
    report = ao.merge(INPUTS, [0.7, 0.3], out=tmp_path / "m", rank="same")
    found = compare(tmp_path / "m", INPUTS, [0.7, 0.3])
    assert found["delta_relative_error"] == pytest.approx(report.error, rel=1e-4)
    assert found["mean_kl"] < found["base_to_exact"]["mean_kl"] / 10


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_adapters_are_what_is_said(name):
    folder = EXAMPLES / "adapters" / name
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < 1_500_000
    adapter = ao.open_adapter(folder)
    assert len(adapter) == 60 and all(factors.rank == 8 for factors in adapter.values())
    made = json.loads((EXAMPLES / "adapters" / "training.json").read_text())["adapters"][name]
    domain = made["domain"]
    before, after = made["held_out_loss_base"][domain], made["held_out_loss_adapted"][domain]
    assert after < before - 0.1
