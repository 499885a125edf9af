"""Names of image checkpoints: each weight where diffusers' conversion puts it, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as stems_of
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.numpy import save_file

from adapterops.basemodel import ldm, open_model
from adapterops.basemodel.parts import Part
from adapterops.errors import FormatError
from adapterops.formats import open_adapter_file
from tests import ldm_checkpoints as models

UNETS = {
    "SD 1": models.SD15,
    "SD 2": models.SD21,
    "SDXL": models.SDXL,
    "inpainting": models.INPAINTING,
    "pruned": models.PRUNED,
}
each_unet = pytest.mark.parametrize("size", UNETS.values(), ids=UNETS)
FLUX = models.flux("", 3072, 2, 2)  # diffusers' conversion knows this width only


def marked(shapes: models.Shapes) -> dict[str, torch.Tensor]:
    """A column for each tensor, every row another number: what tells where rows went."""
    start, made = 0, {}
    for name, shape in shapes.items():
        height = shape[0] if shape else 1
        made[name] = torch.arange(start, start + height)[:, None]
        start += height
    return made


def stored(parts: tuple[Part, ...], columns: dict[str, torch.Tensor], height: int) -> torch.Tensor:
    """The weight that an adapter's ΔW of `height` rows is added to, row by row."""
    weight = torch.full((height, 1), -1)
    for part in parts:
        weight[part.of or slice(None)] = columns[part.tensor][part.rows or slice(None)]
    return weight


def check(
    columns: dict[str, torch.Tensor],
    converted: dict[str, torch.Tensor],
    component: str,
    table: dict[str, tuple[Part, ...]],
) -> None:
    """Every weight of the converted model is where the table says that its ΔW belongs."""
    weights = {n.removesuffix(".weight"): v for n, v in converted.items() if n.endswith(".weight")}
    assert weights
    for path, value in weights.items():
        parts = ldm.find(f"{component}.{path}", table)
        assert parts is not None, path
        value = value.T if parts[0].turned else value
        assert torch.equal(stored(parts, columns, len(value)), value), path


@pytest.fixture(scope="module")
def unets() -> Callable[[models.Unet], Any]:
    """U-Nets of diffusers without numbers."""
    made: dict[int, Any] = {}

    def make(size: models.Unet) -> Any:
        if id(size) not in made:
            with torch.device("meta"):
                made[id(size)] = UNet2DConditionModel(**models.unet_config(size))
        return made[id(size)]

    return make


@each_unet
def test_unet_of_one_file(size, unets):
    shapes = models.unet(size)
    columns = marked(shapes)
    converted = convert_ldm_unet_checkpoint(dict(columns), models.unet_config(size))
    model = {name: value.shape for name, value in unets(size).state_dict().items()}
    assert {n: len(v) for n, v in converted.items()} == {n: s[0] for n, s in model.items()}
    table = ldm.paths(shapes)
    check(columns, converted, "unet", table)
    for name, shape in shapes.items():  # by its own names too
        path = name.removeprefix(models.UNET).removesuffix(".weight")
        flat = "lora_unet_" + path.replace(".", "_")
        if name.endswith(".weight"):
            assert ldm.find(name.removesuffix(".weight"), table) == (Part(name),)
            assert ldm.find(flat, table) == (Part(name),)
        else:
            assert ldm.find(path, table) is None, shape


@each_unet
def test_unet_of_a_folder_by_ldm_names(size, unets):
    columns = marked(models.unet(size))
    converted = convert_ldm_unet_checkpoint(dict(columns), models.unet_config(size))
    folder = {f"unet.{name}": tuple(v.shape) for name, v in unets(size).state_dict().items()}
    table = ldm.paths(folder)
    mine = {f"unet.{name}": value for name, value in converted.items()}
    for name, value in columns.items():
        path = name.removeprefix(models.UNET).removesuffix(".weight")
        if name.endswith(".weight"):
            for stem in (path, "lora_unet_" + path.replace(".", "_"), f"diffusion_model.{path}"):
                parts = ldm.find(stem, table)
                assert parts is not None, stem
                assert torch.equal(stored(parts, mine, len(value)), value), stem
    alone = {name.removeprefix("unet."): shape for name, shape in folder.items()}
    assert len(ldm.paths(alone) or ()) > len(alone)


SPELLINGS = {
    **{f"{name} by diffusers": (size, False) for name, size in UNETS.items()},
    "SDXL by SGM": (models.SDXL, True),  # sd-scripts' way, for SDXL only
    "pruned by SGM": (models.PRUNED, True),
}


@pytest.mark.parametrize(("size", "sgm"), SPELLINGS.values(), ids=SPELLINGS)
def test_kohya_stems_of_a_unet(size, sgm, unets):
    """A flat stem and the path that diffusers' loader makes of it are one weight."""
    shapes = models.unet(size)
    table = ldm.paths(shapes)
    weights = [name.removeprefix(models.UNET) for name, s in shapes.items() if len(s) > 1]
    if not sgm:
        weights = [name for name, v in unets(size).state_dict().items() if v.dim() > 1]
    stems = ["lora_unet_" + n.removesuffix(".weight").replace(".", "_") for n in weights]
    state = {}
    for nth, stem in enumerate(stems):
        state[f"{stem}.lora_down.weight"] = state[f"{stem}.lora_up.weight"] = torch.tensor(nth)
    config = SimpleNamespace(layers_per_block=size.layers)
    state = stems_of._maybe_map_sgm_blocks_to_diffusers(state, config)
    state, _ = stems_of._convert_non_diffusers_lora_to_diffusers(state)
    bare = {name.removeprefix("unet."): value for name, value in state.items()}
    renamed = convert_unet_state_dict_to_peft(bare)
    modules = dict(unets(size).named_modules())
    unknown = set()
    for name, value in renamed.items():
        stem, path = stems[int(value)], name.rpartition(".lora_")[0]
        if path in modules:
            assert ldm.find(stem, table) == ldm.find(f"unet.{path}", table) is not None, stem
        else:
            unknown.add(path)
    assert unknown <= {"add.embedding.linear"}  # diffusers drops the number of this spelling
    assert len(renamed) == 2 * len(stems) - 2 * bool(unknown)


def text_model(width: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(hidden_size=width))


TEXTS = {
    "SD 1": (models.sd1(models.TINY, 16, 2), "cond_stage_model.transformer.", "text_encoder"),
    "SD 2": (models.sd2(models.TINY, 16, 3), "cond_stage_model.model.", "text_encoder"),
    "SDXL 1": (
        models.sdxl(models.TINY, (16, 24)),
        "conditioner.embedders.0.transformer.",
        "text_encoder",
    ),
    "SDXL 2": (
        models.sdxl(models.TINY, (16, 24)),
        "conditioner.embedders.1.model.",
        "text_encoder_2",
    ),
    "refiner": (
        {**models.unet(models.TINY), **models.open_clip("conditioner.embedders.0.model.", 16, 2)},
        "conditioner.embedders.0.model.",
        "text_encoder_2",
    ),
}


@pytest.mark.parametrize(("shapes", "prefix", "component"), TEXTS.values(), ids=TEXTS)
def test_text_encoders(shapes, prefix, component):
    columns = marked(shapes)
    if prefix.endswith("transformer."):
        converted = convert_ldm_clip_checkpoint(columns)
    else:
        width = shapes[f"{prefix}text_projection"][0]
        converted = convert_open_clip_checkpoint(text_model(width), columns, prefix)
    table = ldm.paths(shapes)
    check(columns, converted, component, table)
    number = "2" if component.endswith("2") else "1"
    for name in converted:
        path = name.removesuffix(".weight")
        if path == name:
            continue
        parts = ldm.find(f"{component}.{path}", table)
        assert ldm.find(f"lora_te{number}_{path}".replace(".", "_"), table) == parts
        short = path.removeprefix("text_model.")  # as transformers 5 has it
        assert ldm.find(f"{component}.{short}", table) == parts
    own = [n for n in shapes if n.startswith(prefix) and n.endswith(".weight")]
    assert all(ldm.find(n.removesuffix(".weight"), table) == (Part(n),) for n in own)


def test_text_projection_is_stored_by_inputs():
    shapes = models.sdxl(models.TINY, (16, 24))
    [part] = ldm.find("lora_te2_text_projection", ldm.paths(shapes))
    assert part == Part("conditioner.embedders.1.model.text_projection", turned=True)
    values = {name: torch.rand(shape) for name, shape in shapes.items()}
    prefix = "conditioner.embedders.1.model."
    converted = convert_open_clip_checkpoint(text_model(24), values, prefix)
    assert torch.equal(converted["text_projection.weight"], values[part.tensor].T)


def test_names_of_two_encoders_are_left_out():
    table = ldm.paths(models.sdxl(models.TINY, (16, 24)))
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    assert ldm.find(path, table) is None
    one, two = (ldm.find(f"{part}.{path}", table) for part in ("text_encoder", "text_encoder_2"))
    assert one[0].rows is None and two[0].rows == slice(0, 24) and one != two
    assert ldm.find(path, ldm.paths(models.sd1(models.TINY, 16, 2))) is not None


def test_encoders_saved_without_a_level():
    """As transformers 5 names CLIP, and as some SD 1 checkpoints do."""
    full = models.sd1(models.TINY, 16, 2)
    flat = {name.replace("text_model.", ""): shape for name, shape in full.items()}
    table, other = ldm.paths(full), ldm.paths(flat)
    seen = 0
    for name, parts in table.items():
        if parts[0].tensor.startswith("cond_stage_model") and not name.startswith("cond_stage"):
            seen += 1
            assert other[name] == (Part(parts[0].tensor.replace("text_model.", "")),)
    assert seen > 100


def test_text_encoders_of_flux():
    t5 = "text_encoders.t5xxl.transformer."
    shapes = {
        **{f"model.diffusion_model.{name}": shape for name, shape in FLUX.items()},
        **models.clip("text_encoders.clip_l.transformer.", 16, 2),
        f"{t5}encoder.block.0.layer.0.SelfAttention.q.weight": (32, 32),
        f"{t5}shared.weight": (50, 32),
    }
    table = ldm.paths(shapes)
    [part] = ldm.find("lora_te1_text_model_encoder_layers_1_self_attn_out_proj", table)
    assert part.tensor.endswith(
        "clip_l.transformer.text_model.encoder.layers.1.self_attn.out_proj.weight"
    )
    expected = (Part(f"{t5}encoder.block.0.layer.0.SelfAttention.q.weight"),)
    for number in (2, 3):
        stem = f"lora_te{number}_encoder_block_0_layer_0_SelfAttention_q"
        assert ldm.find(stem, table) == expected


def test_biases_have_the_rows_of_their_weights():
    shapes = models.sd2(models.TINY, 16, 1)
    table = ldm.paths(shapes)
    [key] = ldm.find("text_encoder.text_model.encoder.layers.0.self_attn.k_proj", table)
    assert (key.bias, key.rows) == (
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias",
        slice(16, 32),
    )
    assert ldm.find("unet.conv_in", table)[0].bias == f"{models.UNET}input_blocks.0.0.bias"
    assert ldm.find("text_encoder.text_projection", table)[0].bias is None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_flux_of_one_file(prefix):
    shapes = {f"{prefix}{name}": shape for name, shape in FLUX.items()}
    columns = marked(shapes)
    bare = {name.removeprefix(prefix): value for name, value in columns.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(bare)
    table = ldm.paths(shapes)
    check(columns, converted, "transformer", table)
    for name in shapes:
        path = name.removeprefix(prefix)
        if path.endswith(".weight"):
            path = path.removesuffix(".weight")
            for stem in ("lora_unet_" + path.replace(".", "_"), path, f"diffusion_model.{path}"):
                assert ldm.find(stem, table) == (Part(name),)


def test_flux_of_a_folder_by_fused_names():
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )
    columns = marked(FLUX)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(columns))
    folder = {f"transformer.{name}": tuple(v.shape) for name, v in model.state_dict().items()}
    mine = {f"transformer.{name}": value for name, value in converted.items()}
    assert {n: len(v) for n, v in mine.items()} == {n: s[0] for n, s in folder.items()}
    table = ldm.paths(folder)
    for name, value in columns.items():
        path = name.removesuffix(".weight").removesuffix(".scale")
        if path != name:
            parts = ldm.find("lora_unet_" + path.replace(".", "_"), table)
            assert parts is not None, path
            assert torch.equal(stored(parts, mine, len(value)), value), path


def test_stems_of_flux():
    """Each flat stem that diffusers translates, and the modules that it makes of it."""
    table = ldm.paths(models.flux("", 3072, 19, 38))
    heights = {"qkv": 3 * 3072, "linear1": 7 * 3072}
    for convert, stems in ((stems_of._convert_kohya_flux_lora_to_diffusers, flux_stems()),):
        for stem in stems:
            height = next((h for end, h in heights.items() if stem.endswith(end)), 6)
            state = {
                f"{stem}.lora_down.weight": torch.ones(4, 2),
                f"{stem}.lora_up.weight": torch.arange(4.0 * height).reshape(height, 4),
                f"{stem}.alpha": torch.tensor(4.0),
            }
            [whole] = ldm.find(stem, table)
            start = 0
            for name, value in convert(dict(state)).items():
                if name.endswith(".lora_B.weight"):
                    [part] = ldm.find(name.removesuffix(".lora_B.weight"), table)
                    assert part.tensor == whole.tensor
                    rows = slice(start, start + len(value))
                    assert (part.rows or rows) == rows
                    start = rows.stop
            assert start == height


def flux_stems() -> list[str]:
    double = ["img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mlp_2", "img_mod_lin"]
    double += [name.replace("img", "txt") for name in double]
    single = ["linear1", "linear2", "modulation_lin"]
    return [
        *(f"lora_unet_double_blocks_18_{name}" for name in double),
        *(f"lora_unet_single_blocks_37_{name}" for name in single),
    ]


XLABS = {
    "double_blocks.0.processor.qkv_lora1": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "double_blocks.0.processor.qkv_lora2": [
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
    ],
    "double_blocks.1.processor.proj_lora1": ["attn.to_out.0"],
    "double_blocks.1.processor.proj_lora2": ["attn.to_add_out"],
    "single_blocks.0.processor.qkv_lora": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "single_blocks.1.processor.proj_lora": ["proj_out"],
}


@pytest.mark.parametrize("stem", XLABS)
def test_xlabs_stems(stem):
    up = torch.arange(3.0 * 3072 if "qkv" in stem else 4.0)[:, None]
    state = {f"{stem}.down.weight": torch.ones(1, 2), f"{stem}.up.weight": up}
    converted = stems_of._convert_xlabs_flux_lora_to_diffusers(state)
    names = [name.removesuffix(".lora_B.weight") for name in converted if "lora_B" in name]
    block = "single_" if stem.startswith("single") else ""
    number = stem.split(".")[1]
    expected = [f"transformer.{block}transformer_blocks.{number}.{name}" for name in XLABS[stem]]
    assert names == expected
    table = ldm.paths(FLUX)
    [whole] = ldm.find(stem, table)
    inner = [ldm.find(name, table)[0] for name in names]
    assert {part.tensor for part in inner} == {whole.tensor}
    if len(inner) == 3:
        first, last = inner[0].rows, inner[-1].rows
        assert (whole.rows or slice(0, 3 * 3072)) == slice(first.start, last.stop)
    columns = convert_flux_transformer_checkpoint_to_diffusers(marked(FLUX))
    folder = {f"transformer.{name}": tuple(value.shape) for name, value in columns.items()}
    parts = ldm.find(stem, ldm.paths(folder))
    assert [part.tensor for part in parts] == [f"{name}.weight" for name in names]
    starts = [3072 * nth for nth in range(3)] if len(parts) == 3 else [None]
    assert [part.of and part.of.start for part in parts] == starts


PREFIXES = [
    "lora_unet_",
    "lora_unet__",
    "lora_unet_unet_",
    "lora_transformer_",
    "lycoris_",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_the_wild(prefix):
    table = ldm.paths(FLUX)
    parts = ldm.find("transformer.transformer_blocks.1.attn.to_k", table)
    assert parts == (Part("double_blocks.1.img_attn.qkv.weight", slice(3072, 6144)),)
    assert ldm.find(f"{prefix}transformer_blocks_1_attn_to_k", table) == parts
    assert ldm.find(f"{prefix}transformer_blocks_2_attn_to_k", table) is None


@pytest.mark.parametrize(
    "names",
    [
        {"model.layers.0.self_attn.q_proj.weight": (4, 4)},
        {"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)},
        models.clip("cond_stage_model.transformer.", 16, 2),
        models.VAE,
        {"transformer.h.0.attn.c_attn.weight": (4, 12), "transformer.wte.weight": (9, 4)},
        {},
    ],
    ids=["llama", "clip", "encoder alone", "vae", "gpt2", "empty"],
)
def test_other_models_have_no_table(names):
    assert ldm.paths(names) is None


@pytest.mark.parametrize("gone", ["input_blocks.2.", "output_blocks.0."])
def test_missing_blocks_are_an_error(gone):
    shapes = {n: s for n, s in models.unet(models.SD15).items() if gone not in n}
    with pytest.raises(FormatError, match=f"no {gone.removesuffix('.')}"):
        ldm.paths(shapes)


def test_missing_blocks_of_a_folder_are_an_error(unets):
    names = unets(models.SD15).state_dict()
    shapes = {n: tuple(v.shape) for n, v in names.items() if "up_blocks.1.resnets.1" not in n}
    with pytest.raises(FormatError, match=r"no up_blocks\.1\.resnets\.1"):
        ldm.paths(shapes)


def test_a_single_file_is_opened_and_its_names_found(tmp_path):
    shapes = models.sdxl(models.TINY, (16, 24))
    file = tmp_path / "model.safetensors"
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, file)
    base = open_model(file)
    table = ldm.paths({name: ref.shape for name, ref in base.tensors.items()})
    stems = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (32, 32),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (256, 32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 16),
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj": (24, 24),
    }
    for stem, shape in stems.items():
        [part] = ldm.find(stem, table)
        rows = part.rows or slice(0, base.tensors[part.tensor].shape[0])
        assert (rows.stop - rows.start, base.tensors[part.tensor].shape[1]) == shape, stem


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"])
def test_corpus_adapters_of_stable_diffusion(corpus: Path, name: str) -> None:
    folder = corpus / "catundchat__stable-diffusion-v1.5-lora"
    file = open_adapter_file(str(folder / name), allow_pickle=True)
    shapes = models.sd1()
    table = ldm.paths(shapes)
    assert file.sites
    for stem, site in file.sites.items():
        [part] = ldm.find(stem, table)
        assert shapes[part.tensor][0] == site.shape[0], stem
        assert np.prod(shapes[part.tensor][1:]) == site.shape[1], stem
