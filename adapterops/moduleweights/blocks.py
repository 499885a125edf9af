"""Which block of an image model a module lies in, by kohya's, diffusers' and LDM's names.

LDM numbers a U-Net's blocks through, diffusers by resolution: three to each, of which the last on
the way down is the downsampler. SD 1, SD 2 and SDXL agree in that. What lies in no block (the
embeddings of time and size, the last convolution) no tool's vector reaches; sd-scripts alone counts
time and size of SDXL as IN00, where it trains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterops.formats.names import flatten

_UNET = re.compile(r"((down|up|input|output)_blocks|mid_block|middle_block)_")
_FLUX = re.compile(r"(double_blocks|single_blocks|single_transformer_blocks)_")
_LDM = re.compile(r"(?P<side>in|out)put_blocks_(?P<number>\d{1,2})_")
_DIFFUSERS = re.compile(
    r"(?P<side>down|up)_blocks_(?P<block>\d)_"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)_(?P<child>\d)_"
)
_MIDDLE = re.compile(r"(mid|middle)_block_")
_DOUBLE = re.compile(r"(double|transformer)_blocks_(?P<number>\d{1,3})_")
_SINGLE = re.compile(r"single_(transformer_)?blocks_(?P<number>\d{1,3})_")
_FLUX_IN = re.compile(
    r"(img|txt|time|vector|guidance)_in(_|$)|(x|context)_embedder$|time_text_embed_"
)
_FLUX_OUT = re.compile(r"final_layer_|norm_out_linear$|proj_out$")
_PER_RESOLUTION = 3

# What only one of the families has; SD's transformers are one block deep.
_SD_ONLY = re.compile(
    r"(down|up)_blocks_3_|down_blocks_0_attentions_|up_blocks_2_attentions_"
    r"|(in|out)put_blocks_(9|10|11)_|input_blocks_[12]_1_"
)
_SDXL_ONLY = re.compile(r".*attentions_\d_transformer_blocks_[1-9]|.*_1_transformer_blocks_[1-9]")
_CONTEXT = re.compile(r".*_attn2_to_[kv]$")
_WIDTHS = {768: "sd", 1024: "sd", 2048: "sdxl"}  # of the text encoders' output


def family(modules: Mapping[str, int]) -> str | None:
    """Which of `layouts.FAMILIES` the modules (stem -> width of their input, or 0) belong to.

    "" where they are text encoders' only, None where their names are no image model's.
    """
    flat = {stem: flatten(stem) for stem in modules}
    denoiser = {stem: name for stem, (root, name) in flat.items() if root == "denoiser"}
    if any(_FLUX.match(name) for name in denoiser.values()):
        return "flux"
    if not any(_UNET.match(name) for name in denoiser.values()):
        return "" if any(_is_text(root, name) for root, name in flat.values()) else None
    for stem, name in denoiser.items():
        if _CONTEXT.fullmatch(name) and modules[stem] in _WIDTHS:
            return _WIDTHS[modules[stem]]
    if any(_SD_ONLY.match(name) for name in denoiser.values()):
        return "sd"
    two_encoders = any(root == "text_encoder2" for root, _ in flat.values())
    if two_encoders or any(_SDXL_ONLY.match(name) for name in denoiser.values()):
        return "sdxl"
    return "unet"


def block(stem: str, *, flux: bool) -> str | None:
    """The block that a module of a U-Net, or of Flux, lies in; None for one that is in none."""
    root, name = flatten(stem)
    if _is_text(root, name):
        if not flux:
            return "BASE"
        return "CLIP" if root in ("text_encoder", "") else "T5"
    if root != "denoiser":
        return None
    return _of_flux(name) if flux else _of_unet(name)


def _is_text(root: str, name: str) -> bool:
    return root.startswith("text_encoder") or (root == "" and name.startswith("text_model_"))


def _of_unet(name: str) -> str | None:
    if name == "conv_in":
        return "IN00"
    if _MIDDLE.match(name):
        return "MID"
    found = _LDM.match(name)
    if found:
        return f"{found['side'].upper()}{int(found['number']):02}"
    found = _DIFFUSERS.match(name)
    if found is None:
        return None
    down = found["side"] == "down"
    child, first = int(found["child"]), int(found["block"]) * _PER_RESOLUTION
    sampler = "samplers" in found["kind"]
    if child >= (1 if sampler else _PER_RESOLUTION - down):
        return None  # more layers to a resolution than these models have
    if down:  # input block 0 is conv_in
        return f"IN{first + (_PER_RESOLUTION if sampler else 1 + child):02}"
    return f"OUT{first + (_PER_RESOLUTION - 1 if sampler else child):02}"


def _of_flux(name: str) -> str | None:
    for pattern, letter in ((_DOUBLE, "D"), (_SINGLE, "S")):
        found = pattern.match(name)
        if found:
            return f"{letter}{int(found['number']):02}"
    if _FLUX_IN.match(name):
        return "IN"
    return "OUT" if _FLUX_OUT.match(name) else None
