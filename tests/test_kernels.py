"""LoHa, LoKr and their like on convolutions: their matrices do not show a kernel, the base does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterops as ao
from tests.support import distance

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
SHORT = "resnet.encoder.stages.1.layers.0.shortcut.convolution"  # 1 x 1
SPATIAL = "resnet.encoder.stages.1.layers.0.layer.0.convolution"  # 3 x 3
HEAD = "classifier.1"


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=12
    )
    return transformers.ResNetForImageClassification(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "resnet"
    network().save_pretrained(folder)
    return folder


def trained(kind: str, folder: Path) -> Path:
    config = getattr(peft, f"{kind}Config")(r=2, alpha=3, target_modules=[SHORT, SPATIAL, HEAD])
    model = peft.get_peft_model(network(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def merged(folder: Path) -> dict[str, np.ndarray]:
    """What PEFT makes of the model's weights with an adapter: the changes, flattened."""
    model = peft.PeftModel.from_pretrained(network(), folder).merge_and_unload()
    before = network().state_dict()
    return {
        name: (value - before[name]).double().numpy().reshape(len(value), -1)
        for name, value in model.state_dict().items()
        if name.removesuffix(".weight") in (SHORT, SPATIAL, HEAD)
    }


def codes(report: Any) -> set[str]:
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize("kind", ("LoHa", "LoKr"))
def test_with_the_base_peft_loads_what_convert_wrote(kind: str, base: Path, tmp_path: Path) -> None:
    source = trained(kind, tmp_path / "a")
    report = ao.convert(source, out=tmp_path / "c", base=base, rank=8)
    assert not any("convolution" in warning for warning in report.warnings)
    shapes = {
        name: t.shape for name, t in load_file(tmp_path / "c/adapter_model.safetensors").items()
    }
    assert shapes[f"base_model.model.{SHORT}.lora_A.weight"][2:] == (1, 1)
    assert shapes[f"base_model.model.{SPATIAL}.lora_A.weight"][2:] == (3, 3)
    assert len(shapes[f"base_model.model.{HEAD}.lora_A.weight"]) == 2
    gap = distance(merged(tmp_path / "c"), merged(source))
    assert gap == pytest.approx(report.error, abs=1e-6)
    assert "base-kernel" not in codes(ao.check(tmp_path / "c", base=base))


def test_without_the_base_it_is_said(base: Path, tmp_path: Path) -> None:
    """By name where it tells, never of the linear layer; the base shows what came of it."""
    source = trained("LoHa", tmp_path / "a")
    for name, made in (
        ("c", ao.convert(source, out=tmp_path / "c", rank=8)),
        ("m", ao.merge(source, out=tmp_path / "m", rank=8)),
        ("t", ao.merge([source, source], out=tmp_path / "t", rank=8, method="ties")),
    ):
        [warning] = [text for text in made.warnings if "convolution, its factors" in text]
        assert SHORT in warning and HEAD not in warning and "--base MODEL" in warning
        report = ao.check(tmp_path / name, base=base)
        [finding] = [one for one in report.findings if one.code == "base-kernel"]
        assert finding.module in (SHORT, SPATIAL) and finding.message.startswith("2 modules")
    assert "base-kernel" not in codes(ao.check(source, base=base))  # a LoHa is none the worse


def loha(file: Path, stems: dict[str, tuple[int, int]], dialect: str, **more: Any) -> Path:
    """A LoHa of dimension 1, its halves matrices."""
    rng = np.random.default_rng(1)
    tensors = dict(more)
    for stem, (out, columns) in stems.items():
        for role, shape in (("a", (out, 1)), ("b", (1, columns))):
            for half in (1, 2):
                values = rng.standard_normal(shape).astype(np.float32)
                tensors[f"{stem}.hada_w{half}_{role}"] = values
        if dialect == "kohya":
            tensors[f"{stem}.alpha"] = np.array(1, np.float32)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("convolutions", (False, True), ids=("language model", "beside kernels"))
def test_only_where_there_are_convolutions_others_are_suspected(
    convolutions: bool, tmp_path: Path
) -> None:
    stems = {
        "lycoris_layers_0_downsample_0": (16, 8),
        "lycoris_layers_0_self_attn_q_proj": (16, 8),
        "lycoris_layers_0_mlp_fc1": (16, 8),
    }
    more = {}
    if convolutions:
        more = {
            "lycoris_stem_0.lora_down.weight": np.ones((1, 3, 3, 3), np.float32),
            "lycoris_stem_0.lora_up.weight": np.ones((8, 1, 1, 1), np.float32),
            "lycoris_stem_0.alpha": np.array(1, np.float32),
        }
    file = loha(tmp_path / "a.safetensors", stems, "kohya", **more)
    report = ao.convert(file, out=tmp_path / "b.safetensors")
    said = [text for text in report.warnings if "convolution" in text]
    assert len(said) == convolutions
    assert all(text.startswith("lycoris_layers_0_downsample_0:") for text in said)


def test_kernels_of_a_unet_under_kohyas_names(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests import image_models

    image_models.model("unet").save_pretrained(tmp_path / "base")
    flat = "lora_unet_down_blocks_0_attentions_0_"
    stems = {f"{flat}proj_in": (32, 32), f"{flat}transformer_blocks_0_attn1_to_q": (32, 32)}
    file = loha(tmp_path / "a.safetensors", stems, "kohya")
    report = ao.convert(file, out=tmp_path / "b.safetensors", base=tmp_path / "base")
    assert not report.warnings
    found = load_file(tmp_path / "b.safetensors")
    assert found[f"{flat}proj_in.lora_down.weight"].shape == (1, 32, 1, 1)
    assert found[f"{flat}transformer_blocks_0_attn1_to_q.lora_down.weight"].shape == (1, 32)
    [warning] = ao.convert(file, out=tmp_path / "c.safetensors").warnings
    assert f"{flat}proj_in:" in warning


def test_a_base_that_lacks_the_module_leaves_the_question_open(base: Path, tmp_path: Path) -> None:
    source = trained("LoHa", tmp_path / "a")
    save_file({"other.weight": np.ones((2, 2), np.float32)}, tmp_path / "base.safetensors")
    report = ao.convert(source, out=tmp_path / "c", base=tmp_path / "base.safetensors", rank=8)
    assert any(SHORT in warning for warning in report.warnings)
