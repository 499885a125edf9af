"""`--to`: the same modules under another dialect's names, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import IncompatibleError
from adapterops.formats.names import translate
from tests.support import (
    dense,
    distance,
    load_file,
    pairs,
    read_kohya,
    read_peft,
    write_kohya,
    write_peft,
)

UNET = [
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "unet.mid_block.attentions.0.proj_in",
    "unet.up_blocks.3.resnets.2.time_emb_proj",
    "unet.up_blocks.3.resnets.2.conv_shortcut",
    "unet.down_blocks.1.downsamplers.0.conv",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "unet.time_embedding.linear_1",
    "unet.conv_in",
]
TEXT = [
    "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc2",
]


def test_flattening_and_back():
    flat = translate(UNET + TEXT, "diffusers", "kohya")
    assert flat is not None
    assert flat[UNET[1]] == "lora_unet_" + UNET[1].removeprefix("unet.").replace(".", "_")
    assert flat[TEXT[1]] == "lora_te_text_model_encoder_layers_0_mlp_fc2"
    back = translate(list(flat.values()), "kohya", "diffusers")
    assert back == {name: stem for stem, name in flat.items()}


def test_two_text_encoders_have_numbers():
    stems = [TEXT[0], TEXT[0].replace("text_encoder", "text_encoder_2")]
    flat = translate(stems, "diffusers", "kohya")
    assert flat is not None and [n[:9] for n in flat.values()] == ["lora_te1_", "lora_te2_"]
    assert list(translate(list(flat.values()), "kohya", "diffusers").values()) == stems


@pytest.mark.parametrize(
    ("stem", "source", "target"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "kohya", "diffusers"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "kohya", "diffusers"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", "kohya", "peft"),
        ("model.layers.0.self_attn.q_proj", "peft", "kohya"),
        ("model.layers.0.self_attn.q_proj", "peft", "diffusers"),
        ("transformer.transformer_blocks.0.attn.to_q", "diffusers", "kohya"),
        ("diffusion_model.blocks.0.self_attn.q", "diffusers", "peft"),
    ],
)
def test_names_without_a_counterpart(stem, source, target):
    assert translate([stem], source, target) is None


def test_round_trip_keeps_the_delta(tmp_path: Path):
    shapes = dict.fromkeys(UNET[:4], (12, 16))
    factors = pairs(1, shapes, 3)
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B
    save_file(tensors, tmp_path / "d.safetensors")
    ao.merge([tmp_path / "d.safetensors"], [0.5], out=tmp_path / "k.safetensors", to="kohya")
    written = read_kohya(tmp_path / "k.safetensors")
    flat = translate(sorted(shapes), "diffusers", "kohya")
    exact = {flat[name]: value for name, value in dense(factors, 0.5).items()}
    assert distance(written, exact) < 1e-6
    ao.merge([tmp_path / "k.safetensors"], out=tmp_path / "p", to="peft")
    paths = {name.removeprefix("unet."): value for name, value in dense(factors, 0.5).items()}
    assert distance(read_peft(tmp_path / "p"), paths) < 1e-6
    ao.merge([tmp_path / "p"], out=tmp_path / "e.safetensors", to="diffusers")
    assert {k.rpartition(".lora_")[0] for k in load_file(tmp_path / "e.safetensors")} == set(shapes)


def test_refusals_name_the_reason(tmp_path: Path):
    write_peft(tmp_path / "llm", pairs(1, {"model.layers.0.q_proj": (8, 8)}, 2))
    with pytest.raises(IncompatibleError, match=r"--to kohya.*model\.layers\.0\.q_proj"):
        ao.merge([tmp_path / "llm"], out=tmp_path / "x.safetensors", to="kohya")
    sdxl = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    write_kohya(tmp_path / "xl.safetensors", pairs(1, {sdxl: (640, 2048)}, 2), alpha=2)
    with pytest.raises(IncompatibleError, match="SGM"):
        ao.merge([tmp_path / "xl.safetensors"], out=tmp_path / "y.safetensors", to="diffusers")
    head = {"base_model.model.head.weight": np.ones(3, np.float32)}
    write_peft(tmp_path / "h", pairs(1, {"mid_block.attentions.0.proj_in": (8, 8)}, 2), extras=head)
    with pytest.raises(IncompatibleError, match=r"head\.weight"):
        ao.merge([tmp_path / "h"], out=tmp_path / "z.safetensors", to="diffusers")
