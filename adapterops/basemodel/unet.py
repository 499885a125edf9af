"""Names of the Stable Diffusion U-Nets: CompVis' and Stability's ("LDM", "SGM") and diffusers'.

LDM numbers its blocks through, each a list of layers: 0 a ResBlock or a downsampler, 1 a
transformer, 1 or 2 an upsampler. diffusers has a block for each resolution, with lists of resnets
and attentions and one sampler. How many there are of each is read off the names, so pruned
U-Nets (SSD-1B) and those with other inputs (inpainting) need nothing of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from adapterops.basemodel.parts import Modules, Named, Part
from adapterops.errors import FormatError

# Inside a layer: LDM's name -> diffusers'. Transformers have the same names in both.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_DOWN = {"op": "conv"}
_UP = {"conv": "conv"}
_OUTSIDE = (  # what is in no block; a label is SDXL's size and crop, or unCLIP's noise level
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("label_emb.0.0", "class_embedding.linear_1"),
    ("label_emb.0.2", "class_embedding.linear_2"),
    ("label_emb", "class_embedding"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_LDM_LAYER = re.compile(
    r"(?P<layer>(?P<list>(in|out)put_blocks)\.(?P<block>\d+)\.(?P<child>\d+))\.(?P<inner>.+)"
)
_MIDDLE_LAYER = re.compile(r"(?P<layer>middle_block\.(?P<child>\d+))\.(?P<inner>.+)")
_LAYER = re.compile(
    r"(?P<layer>((?P<list>down_blocks|up_blocks)\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<child>\d+))\.(?P<inner>.+)"
)


@dataclass(frozen=True, slots=True)
class _Block:
    """One of diffusers' blocks: whether an attention follows each resnet; a sampler at the end."""

    attentions: tuple[bool, ...]
    sampler: bool


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's two names, and those inside it, None where they are the same."""

    ldm: str
    diffusers: str
    inner: Mapping[str, str] | None


def is_ldm(modules: Modules) -> bool:
    """Whether the modules of a model are those of a U-Net with LDM's names."""
    return "input_blocks.0.0" in modules and "input_blocks.1.0.in_layers.2" in modules


def is_diffusers(modules: Modules) -> bool:
    """Whether the modules of a model are those of a U-Net with diffusers' names."""
    return "conv_in" in modules and "down_blocks.0.resnets.0.conv1" in modules


def from_ldm(modules: Modules) -> Iterator[Named]:
    """diffusers' names of a U-Net stored with LDM's.

    Raises FormatError where blocks are missing, which would shift the others.
    """
    for ldm, diffusers in _OUTSIDE:
        if ldm in modules:
            yield diffusers, (Part(modules[ldm]),)
    layers = {layer.ldm: layer for layer in _layers(*_ldm_blocks(modules))}
    for path, tensor in modules.items():
        found = _LDM_LAYER.fullmatch(path) or _MIDDLE_LAYER.fullmatch(path)
        layer = layers.get(found["layer"]) if found else None
        if found and layer:
            inner = found["inner"] if layer.inner is None else layer.inner.get(found["inner"])
            if inner:
                yield f"{layer.diffusers}.{inner}", (Part(tensor),)


def from_diffusers(modules: Modules) -> Iterator[Named]:
    """LDM's names, which sd-scripts' adapters of SDXL have, of a U-Net stored with diffusers'.

    Raises FormatError where blocks are missing, which would shift the others.
    """
    for ldm, diffusers in _OUTSIDE:
        if diffusers in modules:
            yield ldm, (Part(modules[diffusers]),)
    layers = {layer.diffusers: layer for layer in _layers(*_diffusers_blocks(modules))}
    for path, tensor in modules.items():
        found = _LAYER.fullmatch(path)
        layer = layers.get(found["layer"]) if found else None
        if found and layer:
            names = None if layer.inner is None else {v: k for k, v in layer.inner.items()}
            inner = found["inner"] if names is None else names.get(found["inner"])
            if inner:
                yield f"{layer.ldm}.{inner}", (Part(tensor),)


def _layers(down: list[_Block], up: list[_Block]) -> Iterator[_Layer]:
    """Every layer of a U-Net by both names."""
    number = 1  # input block 0 is conv_in
    for index, block in enumerate(down):
        there = f"down_blocks.{index}"
        for nth, attends in enumerate(block.attentions):
            yield _Layer(f"input_blocks.{number}.0", f"{there}.resnets.{nth}", _RESNET)
            if attends:
                yield _Layer(f"input_blocks.{number}.1", f"{there}.attentions.{nth}", None)
            number += 1
        if block.sampler:  # a block of its own in LDM
            yield _Layer(f"input_blocks.{number}.0", f"{there}.downsamplers.0", _DOWN)
            number += 1
    # ResBlock, transformer, ResBlock: even layers are resnets, odd ones attentions.
    yield _Layer("middle_block.0", "mid_block.resnets.0", _RESNET)
    yield _Layer("middle_block.1", "mid_block.attentions.0", None)
    yield _Layer("middle_block.2", "mid_block.resnets.1", _RESNET)
    number = 0
    for index, block in enumerate(up):
        there = f"up_blocks.{index}"
        for nth, attends in enumerate(block.attentions):
            yield _Layer(f"output_blocks.{number}.0", f"{there}.resnets.{nth}", _RESNET)
            if attends:
                yield _Layer(f"output_blocks.{number}.1", f"{there}.attentions.{nth}", None)
            if block.sampler and nth + 1 == len(block.attentions):  # behind the last layer in LDM
                after = 2 if attends else 1
                yield _Layer(f"output_blocks.{number}.{after}", f"{there}.upsamplers.0", _UP)
            number += 1


def _ldm_blocks(modules: Modules) -> tuple[list[_Block], list[_Block]]:
    """What blocks a U-Net with LDM's names has, on the way down and up."""
    layers: dict[str, dict[int, dict[int, set[str]]]] = {
        "input_blocks": defaultdict(lambda: defaultdict(set)),
        "output_blocks": defaultdict(lambda: defaultdict(set)),
    }
    for path in modules:
        found = _LDM_LAYER.fullmatch(path)
        if found:
            block = layers[found["list"]][int(found["block"])]
            block[int(found["child"])].add(found["inner"])
    _check_complete("input_blocks", layers["input_blocks"], first=1)
    _check_complete("output_blocks", layers["output_blocks"])
    return _grouped(layers["input_blocks"], "op"), _grouped(layers["output_blocks"], "conv")


def _grouped(blocks: Mapping[int, Mapping[int, set[str]]], sampler: str) -> list[_Block]:
    """LDM's blocks, one resnet or downsampler each, up to a sampler are one of diffusers'."""
    grouped: list[_Block] = []
    attentions: list[bool] = []
    for _, layers in sorted(blocks.items()):
        if any("in_layers.2" in inner for inner in layers.values()):
            attentions.append(any("proj_in" in inner for inner in layers.values()))
        if any(sampler in inner for inner in layers.values()):
            grouped.append(_Block(tuple(attentions), True))
            attentions = []
    return [*grouped, _Block(tuple(attentions), False)] if attentions else grouped


def _diffusers_blocks(modules: Modules) -> tuple[list[_Block], list[_Block]]:
    """What blocks a U-Net with diffusers' names has, on the way down and up."""
    layers: dict[str, dict[int, dict[str, set[int]]]] = {
        "down_blocks": defaultdict(lambda: defaultdict(set)),
        "up_blocks": defaultdict(lambda: defaultdict(set)),
    }
    for path in modules:
        found = _LAYER.fullmatch(path)
        if found and found["list"]:
            block = layers[found["list"]][int(found["block"])]
            block[found["kind"]].add(int(found["child"]))
    blocks = []
    for name, sampler in (("down_blocks", "downsamplers"), ("up_blocks", "upsamplers")):
        _check_complete(name, layers[name])
        for index, block in layers[name].items():
            _check_complete(f"{name}.{index}.resnets", block["resnets"])
        blocks.append(
            [
                _Block(
                    tuple(nth in block["attentions"] for nth in sorted(block["resnets"])),
                    bool(block[sampler]),
                )
                for _, block in sorted(layers[name].items())
            ]
        )
    return blocks[0], blocks[1]


def _check_complete(name: str, numbers: Collection[int], first: int = 0) -> None:
    missing = sorted({*range(first, max(numbers, default=0) + 1)} - {*numbers})
    if missing:
        raise FormatError(
            f"has {name}.{max(numbers)} but no {name}.{missing[0]}, and blocks are named by their "
            "order",
            hint="give the complete checkpoint",
        )
