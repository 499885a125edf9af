"""What cannot be merged is refused by name, with the exit code and the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import AdapterOpsError, IncompatibleError
from tests.dialects import REFUSED, Refusal
from tests.support import pairs, write_peft

PAIRS = {
    "peft": ("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"),
    "kohya": ("lora_unet_mid_q.lora_down.weight", "lora_unet_mid_q.lora_up.weight"),
    "diffusers": ("unet.mid_q.lora_A.weight", "unet.mid_q.lora_B.weight"),
}


def write(folder: Path, case: Refusal) -> Path:
    """The refused adapter: PEFT as a directory, the other dialects as a file."""
    tensors = {name: np.full(shape, case.fill) for name, shape in case.tensors.items()}
    if case.pair:
        A, B = PAIRS[case.dialect]
        tensors = {A: np.ones((4, 6)), B: np.ones((8, 4)), **tensors}
    metadata = {"format": "pt"}
    if case.dialect == "diffusers" and case.config:
        metadata["lora_adapter_metadata"] = json.dumps(
            {"unet.r": 4, "unet.lora_alpha": 4, **case.config}
        )
    if case.dialect == "peft" and case.config is not None:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **case.config}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    single = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(single, folder / "adapter_model.safetensors", metadata)
    return folder if case.dialect == "peft" else folder / "adapter_model.safetensors"


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.dialect}: {case.kind}")
def test_is_refused_by_name(case: Refusal, tmp_path: Path) -> None:
    source = write(tmp_path, case)
    with pytest.raises(AdapterOpsError) as caught:
        ao.merge([source], out=tmp_path / "out")
    assert type(caught.value) is case.error
    assert case.says in str(caught.value)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case", [c for c in REFUSED if c.pair and c.dialect != "diffusers"], ids=lambda case: case.kind
)
def test_the_same_pair_without_the_reason_is_read(case: Refusal, tmp_path: Path) -> None:
    """The refusals above are about what they name, not about the pair itself."""
    plain = Refusal(case.dialect, case.kind, case.error, case.says)
    assert ao.open_adapter(write(tmp_path, plain))


@pytest.mark.parametrize(
    "kind", ["no scale", "two scales that disagree", "config rank is not the tensors'"]
)
def test_the_alpha_that_the_message_asks_for_helps(kind: str, tmp_path: Path) -> None:
    case = next(item for item in REFUSED if item.kind == kind)
    source = write(tmp_path, case)
    with pytest.raises(IncompatibleError) as caught:
        ao.open_adapter(source)
    named = re.search(r"--alpha (\S+)=X", str(caught.value))
    alpha = {named[1]: 8.0} if named else 8.0
    report = ao.merge([str(source)], out=tmp_path / "out", alpha=alpha)
    assert report.inputs[0].scale.startswith("2: --alpha 8")


def test_shapes_that_differ(tmp_path: Path) -> None:
    a = write_peft(tmp_path / "a", pairs(1, {"layers.0.q_proj": (12, 8)}, 2))
    b = write_peft(tmp_path / "b", pairs(2, {"layers.0.q_proj": (12, 9)}, 2))
    with pytest.raises(IncompatibleError, match=r"layers\.0\.q_proj: .*in=8.*in=9"):
        ao.merge([a, b], [1, 1], out=tmp_path / "out")


def test_dialects_that_differ(tmp_path: Path) -> None:
    a, b = (Refusal(dialect, "", IncompatibleError, "") for dialect in ("peft", "kohya"))
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(IncompatibleError, match=r"peft dialect, .* in kohya"):
        ao.merge([write(tmp_path / "a", a), write(tmp_path / "b", b)], [1, 1], out=tmp_path / "out")
