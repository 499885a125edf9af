"""Encoders whose files keep names that transformers 5 renames in memory, where PEFT takes its own.

The oracle is transformers with PEFT: what it loads, trains and merges must be what is baked.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import adapterops as ao
from adapterops.basemodel.loaded import loaded
from adapterops.changes.mapping import changes
from adapterops.errors import IncompatibleError
from adapterops.formats import read_adapter
from adapterops.verbs.bake import bake
from adapterops.verbs.drift import drift
from adapterops.verbs.unbake import unbake
from tests import test_bake_names as names

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = {**{key: TINY[key] for key in list(TINY)[:4]}, "vocab_size": 40, "pad_token_id": 0}
STAGES = {"depths": [1, 1], "num_heads": [1, 2]}
SWIN = {**STAGES, "embed_dim": 8, "image_size": 16, "patch_size": 2, "window_size": 2}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 20,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
AUDIO = {"max_length": 32, "num_mel_bins": 16}
VIDEO = {"num_frames": 2, "tubelet_size": [1, 8, 8]}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": RESNET,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
}
MORE = ["proj", "sequence_reduction.sequence_reduction", "linear_projections.0.proj"]
FAMILIES = [
    pytest.param("ViTForImageClassification", "ViT", TINY, [*ALL, "projection"], id="vit"),
    pytest.param("ViTModel", "ViT", TINY, ALL, id="vit without a head"),
    pytest.param("DeiTForImageClassification", "DeiT", TINY, ALL, id="deit"),
    pytest.param("BeitForImageClassification", "Beit", TINY, ALL, id="beit"),
    pytest.param("ASTForAudioClassification", "AST", {**TINY, **AUDIO}, ALL, id="ast"),
    pytest.param("IJepaForImageClassification", "IJepa", TINY, ALL, id="ijepa"),
    pytest.param("ViTMAEForPreTraining", "ViTMAE", {**TINY, **DECODER}, ALL, id="vit_mae"),
    pytest.param("ViTMSNForImageClassification", "ViTMSN", TINY, ALL, id="vit_msn"),
    pytest.param("VivitForVideoClassification", "Vivit", {**TINY, **VIDEO}, ALL, id="vivit"),
    pytest.param("PixioModel", "Pixio", TINY, ALL, id="pixio"),
    pytest.param("Dinov2ForImageClassification", "Dinov2", TINY, ALL, id="dinov2"),
    pytest.param(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", TINY, ALL, id="dinov2-r"
    ),
    pytest.param(
        "Dinov2Model",
        "Dinov2",
        {**TINY, "use_swiglu_ffn": True},
        ["q_proj", "gate_proj", "up_proj", "down_proj"],
        id="dinov2 with fused gate and up",
    ),
    pytest.param("SwinForImageClassification", "Swin", SWIN, ALL, id="swin"),
    pytest.param(
        "SegformerForSemanticSegmentation", "Segformer", SEGFORMER, [*ALL, *MORE], id="segformer"
    ),
    pytest.param("NomicBertModel", "NomicBert", TEXT, GATED, id="nomic_bert"),
    pytest.param("GteModel", "Gte", TEXT, GATED, id="gte"),
    pytest.param("JinaEmbeddingsV3Model", "JinaEmbeddingsV3", TEXT, ALL, id="jina"),
    pytest.param("DetrForObjectDetection", "Detr", DETR, ALL, id="detr"),
    pytest.param(
        "ConditionalDetrForObjectDetection",
        "ConditionalDetr",
        DETR,
        [*ALL, "q_content_proj", "k_pos_proj", "q_pos_sine_proj"],
        id="conditional_detr",
    ),
]


def trained(cls: str, kind: str, sizes: dict[str, Any], targets: list[str], folder: Path) -> Any:
    """Base, adapter and PEFT's merge on disk; the class that they were made with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = names.made(cls, f"{kind}Config", sizes)
        names.trained(model, folder, target_modules=targets)
    return getattr(transformers, cls)


@pytest.mark.parametrize(("cls", "kind", "sizes", "targets"), FAMILIES)
def test_as_PEFT_merges(
    cls: str, kind: str, sizes: dict[str, Any], targets: list[str], tmp_path: Path
) -> None:
    """Baked, drifted, checked, loaded and taken back."""
    made = trained(cls, kind, sizes, targets, tmp_path)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "baked"))
    names.assert_as_peft(tmp_path)
    report = bake(base, adapter, out=out, reversible=True)
    assert any("transformers 5" in note for note in report.notes)
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-5, err_msg=name)
    again = made.from_pretrained(out).state_dict()
    merged = made.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in again.items():
        torch.testing.assert_close(value, merged[name].to(value.dtype), rtol=0, atol=1e-5)
    verdict = drift(base, adapter, out)
    assert verdict.implementation == "ok", verdict.summary
    unbake(out, out=tmp_path / "back")
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    [checked] = ao.check(adapter, base=base).adapters
    codes = {finding.code for finding in checked.findings}
    assert not codes & {"base-names", "base-module", "base-shape"}, checked.findings


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"use_dora": True, "target_modules": ["q_proj", "fc2"]}, id="DoRA"),
        pytest.param({"target_modules": ["v_proj"], "modules_to_save": ["fc1"]}, id="saved whole"),
        pytest.param({"target_modules": ["q_proj"], "bias": "all"}, id="biases"),
        pytest.param({"target_modules": ["fc1"], "lora_bias": True}, id="lora_bias"),
    ],
)
def test_what_is_beside_factors(config: dict[str, Any], tmp_path: Path) -> None:
    """Magnitudes are relative to the base's weights; whole tensors go by the new names too."""
    model = names.made("ViTForImageClassification", "ViTConfig", TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names.trained(model, tmp_path, **config)
    bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "baked")
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    found = load_file(tmp_path / "baked" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-5, err_msg=name)


def test_an_encoder_inside_another_model(tmp_path: Path) -> None:
    """BERT's names, which are ViT's but for a word, stay as they are."""
    parts = {
        "encoder": transformers.ViTConfig(**TINY).to_dict(),
        "decoder": transformers.BertConfig(
            **TEXT, is_decoder=True, add_cross_attention=True, bos_token_id=1
        ).to_dict(),
    }
    trained("VisionEncoderDecoderModel", "VisionEncoderDecoder", parts, ["q_proj", "fc1"], tmp_path)
    names.assert_as_peft(tmp_path)
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "merged")
    shutil.rmtree(tmp_path / "adapter")
    trained(
        "VisionEncoderDecoderModel", "VisionEncoderDecoder", parts, ["query", "o_proj"], tmp_path
    )
    names.assert_as_peft(tmp_path)


VIT = {
    f"vit.encoder.layer.{layer}.{name}": (6, 6)
    for layer in (0, 1)
    for name in ("attention.attention.query", "attention.output.dense", "output.dense")
}


@pytest.mark.parametrize("front", ["vit.", ""], ids=["of the class", "of the encoder alone"])
@pytest.mark.parametrize(
    ("layers", "name", "stored"),
    [
        ("encoder.layer", "attention.attention.query", "attention.attention.query"),
        ("layers", "attention.q_proj", "attention.attention.query"),
        ("layers", "attention.o_proj", "attention.output.dense"),
        ("layers", "mlp.fc2", "output.dense"),
    ],
)
def test_old_names_and_new(front: str, layers: str, name: str, stored: str, tmp_path: Path) -> None:
    """transformers 4 names modules as the file does; an encoder alone has no prefix."""
    parts = names.adapter(tmp_path, {f"{front}{layers}.1.{name}": (6, 6)})
    tensors = {f"{path}.weight": shape for path, shape in VIT.items()}
    found = names.changed(tmp_path, names.based(tmp_path, tensors, {"model_type": "vit"}))
    [(module, value)] = found.items()
    assert module == f"vit.encoder.layer.1.{stored}.weight"
    np.testing.assert_allclose(value, parts[f"{front}{layers}.1.{name}"], rtol=0, atol=1e-7)


def test_new_names_are_said(tmp_path: Path) -> None:
    names.adapter(tmp_path, {"vit.layers.0.mlp.fc2": (6, 6), "vit.layers.1.mlp.fc2": (6, 6)})
    tensors = {f"{path}.weight": shape for path, shape in VIT.items()}
    base = names.based(tmp_path, tensors, {"model_type": "vit"})
    [note] = changes(base, [read_adapter(tmp_path / "adapter")], [1.0]).notes
    assert "2 modules, 'vit.layers.0.mlp.fc2' as 'vit.encoder.layer.0.output.dense'" in note


@pytest.mark.parametrize("config", [None, {}, {"model_type": "bert"}], ids=str)
def test_only_the_kinds_that_are_renamed(config: dict[str, Any] | None, tmp_path: Path) -> None:
    names.adapter(tmp_path, {"vit.layers.0.mlp.fc2": (6, 6)})
    tensors = {f"{path}.weight": shape for path, shape in VIT.items()}
    with pytest.raises(IncompatibleError, match="not in"):
        names.changed(tmp_path, names.based(tmp_path, tensors, config))


def test_no_name_stands_for_two_modules() -> None:
    config = {"": {"model_type": "vit"}}
    paths = ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    assert loaded(paths, config) == {f"layers.{i}.mlp.fc2": path for i, path in enumerate(paths)}
    assert loaded([*paths, "layers.0.mlp.fc2"], config) == {"layers.1.mlp.fc2": paths[1]}
    both = ["encoder.layer.1.mlp.fc2", *paths]
    assert loaded(both, config) == {"layers.0.mlp.fc2": paths[0]}


def test_models_of_a_pipeline_have_rules_of_their_own() -> None:
    paths = ["image_encoder.encoder.layer.0.output.dense", "text.encoder.layer.0.output.dense"]
    configs = {"image_encoder": {"model_type": "dinov2"}, "text": {"model_type": "bert"}}
    assert loaded(paths, configs) == {}
    configs["image_encoder"] = {"of": {"model_type": "deit"}}
    assert loaded(paths, configs) == {"image_encoder.layers.0.mlp.fc2": paths[0]}
