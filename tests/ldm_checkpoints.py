"""Image checkpoints in one file: names and shapes as their authors' constructors make them.

Built from the layout of `openaimodel.py` (CompVis, Stability), open_clip's TextTransformer and
BFL's `model.py`, not from any table of names: diffusers' conversion is the judge of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Unet:
    """Sizes of a U-Net; `depths` are the transformer blocks of each attention, by resolution.

    0 at a resolution without attention. `middle` is None where there is no middle block.
    """

    channels: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    middle: int | None
    context: int
    layers: int = 2
    inputs: int = 4
    linear: bool = False
    label: int = 0

    def up_depths(self, level: int) -> tuple[int, ...]:
        """On the way up there is one layer more; diffusers repeats the last depth."""
        return (*self.depths[level], self.depths[level][-1])


SD15 = Unet((320, 640, 1280, 1280), ((1, 1), (1, 1), (1, 1), (0, 0)), 1, 768)
SD21 = Unet((320, 640, 1280, 1280), ((1, 1), (1, 1), (1, 1), (0, 0)), 1, 1024, linear=True)
SDXL = Unet((320, 640, 1280), ((0, 0), (2, 2), (10, 10)), 10, 2048, linear=True, label=2816)
INPAINTING = Unet((320, 640, 1280, 1280), ((1, 1), (1, 1), (1, 1), (0, 0)), 1, 768, inputs=9)
PRUNED = Unet((64, 128, 256), ((0,), (2,), (4,)), None, 32, layers=1, linear=True, label=24)
TINY = Unet((32, 32), ((1,), (0,)), 1, 16, layers=1)


def unet(size: Unet) -> Shapes:
    """The U-Net's weights and biases, by LDM's names."""
    found: Shapes = {}
    width, time = size.channels[0], 4 * size.channels[0]

    def add(name: str, out: int, *shape: int) -> None:
        found[f"{UNET}{name}.weight"] = (out, *shape)
        found[f"{UNET}{name}.bias"] = (out,)

    def resnet(name: str, inputs: int, out: int) -> None:
        add(f"{name}.in_layers.0", inputs)
        add(f"{name}.in_layers.2", out, inputs, 3, 3)
        add(f"{name}.emb_layers.1", out, time)
        add(f"{name}.out_layers.0", out)
        add(f"{name}.out_layers.3", out, out, 3, 3)
        if inputs != out:
            add(f"{name}.skip_connection", out, inputs, 1, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        kernel = () if size.linear else (1, 1)
        add(f"{name}.norm", width)
        add(f"{name}.proj_in", width, width, *kernel)
        for nth in range(depth):
            block = f"{name}.transformer_blocks.{nth}"
            for attention, inputs in (("attn1", width), ("attn2", size.context)):
                found[f"{UNET}{block}.{attention}.to_q.weight"] = (width, width)
                found[f"{UNET}{block}.{attention}.to_k.weight"] = (width, inputs)
                found[f"{UNET}{block}.{attention}.to_v.weight"] = (width, inputs)
                add(f"{block}.{attention}.to_out.0", width, width)
            add(f"{block}.ff.net.0.proj", 8 * width, width)
            add(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                add(f"{block}.{norm}", width)
        add(f"{name}.proj_out", width, width, *kernel)

    add("time_embed.0", time, width)
    add("time_embed.2", time, time)
    if size.label:
        add("label_emb.0.0", time, size.label)
        add("label_emb.0.2", time, time)
    add("input_blocks.0.0", width, size.inputs, 3, 3)
    skips, here, number = [width], width, 1
    for level, out in enumerate(size.channels):
        for nth in range(size.layers):
            resnet(f"input_blocks.{number}.0", here, out)
            here, depth = out, size.depths[level][nth]
            if depth:
                transformer(f"input_blocks.{number}.1", here, depth)
            skips.append(here)
            number += 1
        if level + 1 < len(size.channels):
            add(f"input_blocks.{number}.0.op", here, here, 3, 3)
            skips.append(here)
            number += 1
    if size.middle is not None:
        resnet("middle_block.0", here, here)
        transformer("middle_block.1", here, size.middle)
        resnet("middle_block.2", here, here)
    number = 0
    for level in reversed(range(len(size.channels))):
        for nth, depth in enumerate(size.up_depths(level)):
            child = 1
            resnet(f"output_blocks.{number}.0", here + skips.pop(), size.channels[level])
            here = size.channels[level]
            if depth:
                transformer(f"output_blocks.{number}.1", here, depth)
                child = 2
            if level and nth == size.layers:
                add(f"output_blocks.{number}.{child}.conv", here, here, 3, 3)
            number += 1
    add("out.0", width)
    add("out.2", 4, width, 3, 3)
    return found


def unet_config(size: Unet) -> dict[str, Any]:
    """The configuration of the same model in diffusers."""
    attends = [any(depth) for depth in size.depths]
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": size.inputs,
        "block_out_channels": size.channels,
        "layers_per_block": size.layers,
        "down_block_types": [f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": size.context,
        "transformer_layers_per_block": [max(depths[0], 1) for depths in size.depths],
        "use_linear_projection": size.linear,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    if size.middle is None:
        config["mid_block_type"] = None
    if size.label:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        config["projection_class_embeddings_input_dim"] = size.label
    return config


def clip(prefix: str, width: int, layers: int) -> Shapes:
    """A text encoder with transformers' names."""
    found: Shapes = {}
    root = f"{prefix}text_model."
    found[f"{root}embeddings.token_embedding.weight"] = (50, width)
    found[f"{root}embeddings.position_embedding.weight"] = (7, width)
    for name, shape in _clip_layers(range(layers), width).items():
        found[f"{root}encoder.layers.{name}"] = shape
    return {**found, **_affine(f"{root}final_layer_norm", width)}


def _clip_layers(numbers: Sequence[int], width: int) -> Shapes:
    found: Shapes = {}
    for n in numbers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _affine(f"{n}.self_attn.{name}", width, width)
        found |= _affine(f"{n}.mlp.fc1", 4 * width, width)
        found |= _affine(f"{n}.mlp.fc2", width, 4 * width)
        found |= {**_affine(f"{n}.layer_norm1", width), **_affine(f"{n}.layer_norm2", width)}
    return found


def _affine(name: str, out: int, *inputs: int) -> Shapes:
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def open_clip(prefix: str, width: int, layers: int) -> Shapes:
    """A text encoder with open_clip's names."""
    found: Shapes = {
        f"{prefix}positional_embedding": (7, width),
        f"{prefix}text_projection": (width, width),
        f"{prefix}logit_scale": (),
        f"{prefix}token_embedding.weight": (50, width),
    }
    for n in range(layers):
        block = f"{prefix}transformer.resblocks.{n}"
        found[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        found[f"{block}.attn.in_proj_bias"] = (3 * width,)
        found |= _affine(f"{block}.attn.out_proj", width, width)
        found |= _affine(f"{block}.mlp.c_fc", 4 * width, width)
        found |= _affine(f"{block}.mlp.c_proj", width, 4 * width)
        found |= {**_affine(f"{block}.ln_1", width), **_affine(f"{block}.ln_2", width)}
    return {**found, **_affine(f"{prefix}ln_final", width)}


def flux(prefix: str, hidden: int, doubles: int, singles: int) -> Shapes:
    """A Flux transformer with BFL's names."""
    found: Shapes = {}

    def add(name: str, out: int, inputs: int) -> None:
        found.update(_affine(f"{prefix}{name}", out, inputs))

    add("img_in", hidden, 64)
    add("txt_in", hidden, 48)
    for name, inputs in (("time_in", 256), ("vector_in", 32), ("guidance_in", 256)):
        add(f"{name}.in_layer", hidden, inputs)
        add(f"{name}.out_layer", hidden, hidden)
    for n in range(doubles):
        for stream in ("img", "txt"):
            block = f"double_blocks.{n}.{stream}"
            add(f"{block}_mod.lin", 6 * hidden, hidden)
            add(f"{block}_attn.qkv", 3 * hidden, hidden)
            add(f"{block}_attn.proj", hidden, hidden)
            add(f"{block}_mlp.0", 4 * hidden, hidden)
            add(f"{block}_mlp.2", hidden, 4 * hidden)
            for norm in ("query_norm", "key_norm"):
                found[f"{prefix}{block}_attn.norm.{norm}.scale"] = (128,)
    for n in range(singles):
        block = f"single_blocks.{n}"
        add(f"{block}.linear1", 7 * hidden, hidden)
        add(f"{block}.linear2", hidden, 5 * hidden)
        add(f"{block}.modulation.lin", 3 * hidden, hidden)
        for norm in ("query_norm", "key_norm"):
            found[f"{prefix}{block}.norm.{norm}.scale"] = (128,)
    add("final_layer.linear", 64, hidden)
    add("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return found


VAE: Shapes = {
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
}


def sd1(size: Unet = SD15, width: int = 768, layers: int = 12) -> Shapes:
    """Stable Diffusion 1 in one file."""
    return {**unet(size), **clip("cond_stage_model.transformer.", width, layers), **VAE}


def sd2(size: Unet = SD21, width: int = 1024, layers: int = 24) -> Shapes:
    """Stable Diffusion 2 in one file."""
    return {**unet(size), **open_clip("cond_stage_model.model.", width, layers), **VAE}


def sdxl(size: Unet = SDXL, widths: tuple[int, int] = (768, 1280)) -> Shapes:
    """SDXL in one file."""
    one = clip("conditioner.embedders.0.transformer.", widths[0], 12)
    two = open_clip("conditioner.embedders.1.model.", widths[1], 32)
    return {**unet(size), **one, **two, **VAE}
