"""What PEFT itself saves is clean, and fits the model it was saved from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from tests import dialects

ROWS = [(row.kind, row.model, config) for row in dialects.PEFT for config in (row.a, row.b)]
ROWS += [
    (kind, "tiny", {"target_modules": ["linear"], **config})
    for kind, config in dialects.EXTRAS.items()
]
# The weights are random and large; square ones, rsLoRA and the rest of the model are said aloud.
FINE = {"diverged", "base-coverage", "base-square", "rslora"}


@pytest.mark.parametrize(("kind", "model", "config"), ROWS, ids=lambda x: str(x)[:40])
def test_an_adapter_of_PEFT_is_clean(
    kind: str, model: str, config: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    from tests.peft_models import base, quiet, trained

    adapter = trained(tmp_path / "a", 1, model, **{"r": 3, "lora_alpha": 6, **config})
    with quiet():
        weights = {name: x.clone() for name, x in base(model).state_dict().items()}
    save_file(weights, tmp_path / "base.safetensors")
    report = ao.check(adapter, base=tmp_path / "base.safetensors", jobs=1)
    assert {finding.code for finding in report.findings} <= FINE
