"""Block vectors: which block a module is in, by every name it goes by, and what presets mean."""

from __future__ import annotations

import re

import pytest

from adapterops.basemodel import flux, unet
from adapterops.errors import UnsupportedError, UsageError
from adapterops.formats import open_adapter_file
from adapterops.moduleweights.apply import apply
from adapterops.moduleweights.blocks import block, family
from adapterops.moduleweights.layouts import LAYOUTS, PRESETS
from tests import ldm_checkpoints as models
from tests.support import pairs, write_kohya

# The presets as the web UI's extension ships them.
SHIPPED = """
NONE:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0
ALL:1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1
INS:1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0
IND:1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0
INALL:1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0
MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0
OUTD:1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0
OUTS:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1
OUTALL:1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1
ALL0.5:0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5
"""
OF_12 = {"INALL": "1,1,1,1,1,0,0,0,0,0,0,0", "OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1"}
OF_20 = {
    "INALL": "1,1,1,1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "OUTALL": "1,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}
OF_26 = {
    "INALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "OUTALL": "1,0,0,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1",
}
POSITIONS = {
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 "
    "OUT11",
    20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 "
    "OUT06 OUT07 OUT08",
    26: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 MID OUT00 OUT01 OUT02 "
    "OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
}


def values(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@pytest.mark.parametrize("length", POSITIONS)
def test_positions(length):
    assert " ".join(LAYOUTS[length].blocks) == POSITIONS[length]


def test_positions_of_flux():
    blocks = LAYOUTS[61].blocks
    assert blocks[:4] == ("CLIP", "T5", "IN", "D00") and blocks[21:23] == ("D18", "S00")
    assert blocks[59:] == ("S37", "OUT") and len(set(blocks)) == 61


@pytest.mark.parametrize("line", SHIPPED.split(), ids=lambda line: line.partition(":")[0])
def test_presets_of_17(line):
    name, _, text = line.partition(":")
    assert PRESETS[name][17] == values(text)


def test_presets_of_other_lengths():
    for length, table in ((12, OF_12), (20, OF_20), (26, OF_26)):
        for name, text in table.items():
            assert PRESETS[name][length] == values(text)
    for name, value in (("NONE", 0.0), ("ALL", 1.0), ("ALL0.5", 0.5)):
        assert PRESETS[name] == {n: (value,) * n for n in (12, 17, 20, 26, 61)}
    assert all(PRESETS[name].keys() == {17} for name in ("INS", "IND", "MIDD", "OUTD", "OUTS"))
    for name, vectors in PRESETS.items():
        said: dict[str, float] = {}
        for length, vector in vectors.items():
            for each, value in zip(LAYOUTS[length].blocks, vector, strict=True):
                assert said.setdefault(each, value) == value, name
    assert PRESETS["FLUXALL"] == {61: (1.0,) * 61}


# Real names -> block, by hand.
NAMES = {
    "lora_te_text_model_encoder_layers_3_mlp_fc1": "BASE",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "BASE",
    "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "BASE",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "BASE",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "BASE",
    "lora_unet_conv_in": "IN00",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "IN01",
    "unet.down_blocks.0.attentions.1.proj_in": "IN02",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
    "lora_unet_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": "IN04",
    "lora_unet_down_blocks_1_resnets_1_conv1": "IN05",
    "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2": "IN08",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "IN09",
    "lora_unet_down_blocks_3_resnets_1_time_emb_proj": "IN11",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": "MID",
    "unet.mid_block.resnets.1.conv2": "MID",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": "MID",
    "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "OUT00",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "OUT02",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "OUT03",
    "up_blocks.2.attentions.2.proj_out": "OUT08",
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v": "OUT11",
    "lora_unet_input_blocks_0_0": "IN00",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": "IN04",
    "lora_unet_input_blocks_11_0_in_layers_2": "IN11",
    "lora_unet_output_blocks_0_1_proj_in": "OUT00",
    "diffusion_model.output_blocks.10.1.transformer_blocks.0.attn2.to_v": "OUT10",
    "lycoris_down_blocks_1_attentions_1_proj_out": "IN05",
    "lora_unet_time_embedding_linear_1": None,
    "lora_unet_label_emb_0_0": None,
    "lora_unet_conv_out": None,
    "lora_unet_up_blocks_1_resnets_3_conv1": None,
    "lora_unet_down_blocks_1_resnets_2_conv1": None,
    "lora_unet_down_blocks_1_downsamplers_1_conv": None,
    "model.layers.0.self_attn.q_proj": None,
}
FLUX_NAMES = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "CLIP",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "CLIP",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "T5",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": "T5",
    "lora_unet_img_in": "IN",
    "lora_unet_guidance_in_in_layer": "IN",
    "transformer.x_embedder": "IN",
    "transformer.time_text_embed.text_embedder.linear_2": "IN",
    "lora_unet_double_blocks_0_img_attn_qkv": "D00",
    "lora_unet_double_blocks_18_txt_mlp_2": "D18",
    "diffusion_model.double_blocks.7.img_mod.lin": "D07",
    "double_blocks.3.processor.qkv_lora1": "D03",
    "transformer.transformer_blocks.9.ff.net.0.proj": "D09",
    "lora_transformer_transformer_blocks_1_attn_to_q": "D01",
    "lora_unet_single_blocks_37_linear1": "S37",
    "transformer.single_transformer_blocks.0.proj_mlp": "S00",
    "lycoris_single_blocks_4_linear2": "S04",
    "lora_unet_final_layer_linear": "OUT",
    "transformer.proj_out": "OUT",
    "transformer.norm_out.linear": "OUT",
}


@pytest.mark.parametrize("stem", NAMES)
def test_block_of_a_unet(stem):
    assert block(stem, flux=False) == NAMES[stem]


@pytest.mark.parametrize("stem", FLUX_NAMES)
def test_block_of_flux(stem):
    assert block(stem, flux=True) == FLUX_NAMES[stem]


@pytest.mark.parametrize("size", [models.SD15, models.SD21, models.SDXL], ids=["1", "2", "xl"])
def test_both_names_of_a_unet_are_in_one_block(size):
    """Over all of a model: LDM's own number is the block's, and diffusers' name is in the same."""
    modules = {
        name.removeprefix(models.UNET).removesuffix(".weight"): name
        for name in models.unet(size)
        if name.endswith(".weight")
    }
    own = {tensor: path for path, tensor in modules.items()}
    seen = set()
    for path, parts in unet.from_ldm(modules):
        ldm = own[parts[0].tensor]
        found = re.match(r"(in|out)put_blocks\.(\d+)\.|(middle)_block\.", ldm)
        wanted = None if found is None else "MID"
        if found and found[1]:
            wanted = f"{found[1].upper()}{int(found[2]):02}"
        names = (
            "unet." + path,
            "lora_unet_" + path.replace(".", "_"),
            "lora_unet_" + ldm.replace(".", "_"),
            "diffusion_model." + ldm,
        )
        assert {block(name, flux=False) for name in names} == {wanted}, names
        seen.add(wanted)
    count = 26 if len(size.channels) == 4 else 20
    assert seen - {None} == set(LAYOUTS[count].blocks) - {"BASE"}


def test_both_names_of_flux_are_in_one_block():
    shapes = models.flux("", 64, 19, 38)
    modules = {
        re.sub(r"\.(weight|scale)$", "", name): name
        for name in shapes
        if not name.endswith(".bias")
    }
    own = {tensor: path for path, tensor in modules.items()}
    seen = set()
    for path, parts in flux.from_bfl(modules, shapes):
        one = block("lora_unet_" + own[parts[0].tensor].replace(".", "_"), flux=True)
        assert block("transformer." + path, flux=True) == one, path
        seen.add(one)
    assert seen == set(LAYOUTS[61].blocks[2:])


CROSS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SELF = CROSS.replace("attn2", "attn1")
FAMILY = {
    "SD 1": ({CROSS: 768}, "sd"),
    "SD 2": ({CROSS: 1024}, "sd"),
    "SDXL": ({CROSS: 2048}, "sdxl"),
    "SGM's names": ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": 640}, "sdxl"),
    "two text encoders": ({SELF: 640, "lora_te2_text_model_encoder_layers_0_mlp_fc1": 9}, "sdxl"),
    "a block of SD": ({SELF: 640, "lora_unet_up_blocks_3_resnets_0_conv1": 9}, "sd"),
    "self-attention": ({SELF: 640}, "unet"),
    "text encoder": ({"lora_te_text_model_encoder_layers_0_mlp_fc1": 768}, ""),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_qkv": 3072}, "flux"),
    "Flux of diffusers": ({"transformer.single_transformer_blocks.0.attn.to_q": 3072}, "flux"),
    "Qwen-Image": ({"transformer.transformer_blocks.0.img_mlp.net.2": 3072}, None),
    "language model": ({"model.layers.0.self_attn.q_proj": 64}, None),
    "GPT-2": ({"transformer.h.0.attn.c_attn": 64}, None),
    "numbers": ({"unet:12": 320, "text_encoder:0": 768}, None),
}


@pytest.mark.parametrize("case", FAMILY)
def test_family(case):
    modules, wanted = FAMILY[case]
    assert family(modules) == wanted


ATTENTION = "transformer_blocks_0_attn2_to_k"


def kohya(tmp_path, *stems, width=768, name="a"):
    made = pairs(3, dict.fromkeys(stems, (8, width)), 2)
    return open_adapter_file(write_kohya(tmp_path / f"{name}.safetensors", made, alpha=2.0))


def sd(tmp_path, *more):
    downs = [f"lora_unet_down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    ups = [f"lora_unet_up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    mid = "lora_unet_mid_block_attentions_0"
    stems = [f"{each}_{ATTENTION}" for each in (*downs, mid, *ups)]
    return kohya(tmp_path, "lora_te_text_model_encoder_layers_0_mlp_fc1", *stems, *more)


def sdxl(tmp_path, *more):
    layers = ["input_blocks_4", "input_blocks_5", "input_blocks_7", "input_blocks_8"]
    layers += ["middle_block", *(f"output_blocks_{n}" for n in range(6))]
    stems = [f"lora_unet_{each}_1_{ATTENTION}" for each in layers]
    text = [f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1" for n in (1, 2)]
    return kohya(tmp_path, *text, *stems, *more, width=2048)


def factors(file, *specs):
    """What each block's weight was multiplied by."""
    (made,), weights = apply([file], [0.75], specs)
    flux = family({stem: site.shape[1] for stem, site in file.sites.items()}) == "flux"
    found: dict[str, float] = {}
    for stem in file.sites:
        site = made.sites.get(stem) if weights[0] else None
        value = site.factor if site else 0.0
        assert found.setdefault(block(stem, flux=flux), value) == value
    assert weights == [0.75 if any(found.values()) else 0.0]
    return found


@pytest.mark.parametrize("line", SHIPPED.split(), ids=lambda line: line.partition(":")[0])
def test_a_preset_on_sd(tmp_path, line):
    name, _, text = line.partition(":")
    wanted = dict(zip(POSITIONS[17].split(), values(text), strict=True))
    assert factors(sd(tmp_path), f"blocks[1]={name}") == wanted
    assert factors(sd(tmp_path), f"blocks[*]={text}") == wanted
    assert factors(sd(tmp_path), f"blocks[a.safetensors] = {text}") == wanted


@pytest.mark.parametrize("name", OF_12)
def test_a_preset_on_sdxl(tmp_path, name):
    wanted = dict(zip(POSITIONS[12].split(), values(OF_12[name]), strict=True))
    assert factors(sdxl(tmp_path), f"blocks[1]={name}") == wanted
    assert factors(sdxl(tmp_path), f"blocks[1]={OF_12[name]}") == wanted


@pytest.mark.parametrize("length", [12, 20, 26])
def test_a_vector_of_every_length_on_sdxl(tmp_path, length):
    given = [round(0.1 * n - 1, 1) or 3.0 for n in range(length)]
    table = dict(zip(POSITIONS[length].split(), given, strict=True))
    found = factors(sdxl(tmp_path), "blocks[1]=" + ",".join(map(str, given)))
    assert found == {name: table[name] for name in POSITIONS[12].split()}


def test_a_vector_of_26_on_locon(tmp_path):
    more = ["conv_in", "down_blocks_0_downsamplers_0_conv", "up_blocks_0_resnets_1_conv1"]
    file = sd(tmp_path, *(f"lora_unet_{each}" for each in more))
    given = [1 + n / 8 for n in range(26)]
    table = dict(zip(POSITIONS[26].split(), given, strict=True))
    present = [*POSITIONS[17].split(), "IN00", "IN03", "OUT01"]
    found = factors(file, "blocks[1]=" + ",".join(map(str, given)))
    assert found == {name: table[name] for name in present}
    table = dict(zip(POSITIONS[26].split(), values(OF_26["INALL"]), strict=True))
    assert factors(file, "blocks[1]=INALL") == {name: table[name] for name in present}


def test_a_vector_of_61_on_flux(tmp_path):
    stems = [f"lora_unet_double_blocks_{n}_img_attn_qkv" for n in range(19)]
    stems += [f"lora_unet_single_blocks_{n}_linear1" for n in range(38)]
    stems += ["lora_unet_txt_in", "lora_unet_final_layer_linear"]
    stems += ["lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    stems += ["lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    file = kohya(tmp_path, *stems)
    given = [0.5 + n / 64 for n in range(61)]
    wanted = dict(zip(LAYOUTS[61].blocks, given, strict=True))
    assert factors(file, "blocks[1]=" + ",".join(map(str, given))) == wanted
    assert factors(file, "blocks[1]=FLUXALL") == dict.fromkeys(wanted, 1.0)
    with pytest.raises(UsageError, match="INALL is defined for 12 and 17 and 20 and 26 blocks"):
        factors(file, "blocks[1]=INALL")


def test_modules_in_no_block_keep_their_weight_and_are_named(tmp_path):
    file = sd(tmp_path, "lora_unet_time_embedding_linear_1", "lora_unet_conv_out")
    (made,), _ = apply([file], [1.0], ["blocks[1]=" + ",".join(["0.5"] * 17)])
    outside = {stem for stem, site in made.sites.items() if site.factor == 1.0}
    assert outside == {"lora_unet_time_embedding_linear_1", "lora_unet_conv_out"}
    says = "no block of the vector holds lora_unet_conv_out and 1 more: the weight stays there"
    assert says in made.notes[-1]
    assert len(made.notes) == len(file.notes) + 1


WRONG = {
    "left out": (
        lambda path: sd(path, "lora_unet_down_blocks_0_downsamplers_0_conv"),
        "blocks[1]=" + ",".join("1" * 17),
        r"downsamplers_0_conv.*the vector of 17 has no value for IN03 .*give 26 values",
    ),
    "left out by a preset": (
        lambda path: sd(path, "lora_unet_down_blocks_0_downsamplers_0_conv"),
        "blocks[1]=IND",
        r"has no value for IN03",
    ),
    "another model's": (
        sdxl,
        "blocks[1]=" + ",".join("1" * 17),
        "17 values are for SD 1 and 2 LoRA, .* those of SDXL; give 12 or 20 or 26 values",
    ),
    "another model's preset": (
        sdxl,
        "blocks[1]=IND",
        "the preset IND is defined for 17 blocks, and the modules are those of SDXL",
    ),
    "Flux' vector": (sd, "blocks[1]=" + ",".join("1" * 61), "61 values are for Flux"),
    "a longer model": (
        lambda path: kohya(path, "lora_unet_double_blocks_19_img_attn_qkv"),
        "blocks[1]=ALL",
        "the vector of 61 has no value for D19 .*re:REGEX",
    ),
    "unknown which": (
        lambda path: kohya(path, SELF),
        "blocks[1]=IND",
        "do not tell for which model, SD or SDXL; give the values themselves",
    ),
    "in no block": (
        lambda path: kohya(path, "lora_unet_conv_out", "lora_unet_up_blocks_9_foo"),
        "blocks[1]=ALL",
        "none of the 2 modules lies in a block; the first is 'lora_unet_",
    ),
    "a language model": (
        lambda path: kohya(path, "lora_unet_blocks_0_self_attn_q"),
        "blocks[1]=ALL",
        "is no name of a U-Net's or of Flux' module",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_vectors_that_do_not_fit(tmp_path, case):
    made, spec, says = WRONG[case]
    with pytest.raises((UsageError, UnsupportedError), match=says):
        apply([made(tmp_path)], [1.0], [spec])


def test_unknown_family_where_the_preset_means_one_thing(tmp_path):
    assert factors(kohya(tmp_path, SELF), "blocks[1]=OUTALL") == {"IN04": 0.0}
    assert factors(kohya(tmp_path, SELF), "blocks[1]=INALL") == {"IN04": 1.0}
    one_of_17 = "0,0,0,7,0,0,0,0,0,0,0,0,0,0,0,0,0"
    assert factors(kohya(tmp_path, SELF), f"blocks[1]={one_of_17}") == {"IN04": 7.0}


def test_presets_on_a_real_adapter(corpus):
    path = corpus / "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors"
    file = open_adapter_file(path)
    (made,), weights = apply([file], [0.5], ["blocks[1]=OUTD"])
    assert weights == [0.5]
    # OUT03 to OUT06: all three attentions of up block 1, and the first of up block 2.
    kept = r"unet\.up_blocks\.(1\.attentions\.[012]|2\.attentions\.0)\..*"
    assert set(made.sites) == {stem for stem in file.sites if re.fullmatch(kept, stem)}
    assert len(made.sites) == 4 * 8 and len(file.sites) == 16 * 8
