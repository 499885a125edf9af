"""Names of Flux transformers: Black Forest Labs', with fused projections, and diffusers'.

BFL's modulation of the last layer gives shift and scale, diffusers' scale and shift: one weight is
the other with its halves exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterops.basemodel.parts import Modules, Named, Part, Shapes, split, stacked

# BFL's path -> diffusers' paths, several where BFL stacks their rows.
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
_OUTSIDE = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_EXCHANGED = "final_layer.adaLN_modulation.1"
_BFL_BLOCK = re.compile(r"(?P<kind>double|single)_blocks\.(?P<number>\d+)\.(?P<inner>.+)")
_BLOCK = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.")
# XLabs' adapters name the attention processor: a double block's image is 1, its text 2.
_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}


def is_bfl(modules: Modules) -> bool:
    """Whether the modules of a model are those of a Flux transformer with BFL's names."""
    return "double_blocks.0.img_attn.qkv" in modules


def is_diffusers(modules: Modules) -> bool:
    """Whether the modules of a model are those of a Flux transformer with diffusers' names."""
    return "transformer_blocks.0.attn.add_q_proj" in modules and any(
        path.startswith("single_transformer_blocks.") for path in modules
    )


def from_bfl(modules: Modules, shapes: Shapes) -> Iterator[Named]:
    """diffusers' and XLabs' names of a transformer stored with BFL's."""
    for path, tensor in modules.items():
        names = _counterparts(path)
        shape = shapes[tensor]
        if len(names) == 1:
            yield names[0], _whole(path, tensor, shape[0])
        elif len(names) == 3:
            yield from split(names, tensor, stacked(shape[0], 3))
        elif len(names) == 4:  # q, k, v as wide as the block's input, then the MLP
            yield from split(
                names, tensor, [*stacked(3 * shape[1], 3), slice(3 * shape[1], shape[0])]
            )
        found = _BFL_BLOCK.fullmatch(path)
        if found and found["inner"] in _XLABS:
            rows = slice(0, 3 * shape[1]) if found["inner"] == "linear1" else None
            yield _xlabs(found), (Part(tensor, rows),)


def from_diffusers(modules: Modules, shapes: Shapes) -> Iterator[Named]:
    """BFL's and XLabs' names of a transformer stored with diffusers'."""
    for path in _bfl_names(modules):
        names = _counterparts(path)
        if any(name not in modules for name in names):
            continue
        tensors = [modules[name] for name in names]
        heights = [shapes[tensor][0] for tensor in tensors]
        single = len(tensors) == 1
        parts = _whole(path, tensors[0], heights[0]) if single else _stack(tensors, heights)
        yield path, parts
        found = _BFL_BLOCK.fullmatch(path)
        if found and found["inner"] in _XLABS:
            yield _xlabs(found), parts[:3]  # of linear1, XLabs changes q, k and v


def _counterparts(path: str) -> tuple[str, ...]:
    """diffusers' names for BFL's `path`."""
    found = _BFL_BLOCK.fullmatch(path)
    if found is None:
        return _OUTSIDE.get(path, ())
    single = found["kind"] == "single"
    inner = (_SINGLE if single else _DOUBLE).get(found["inner"], ())
    there = f"{'single_' if single else ''}transformer_blocks.{found['number']}"
    return tuple(f"{there}.{name}" for name in inner)


def _bfl_names(modules: Modules) -> list[str]:
    """BFL's names of all that a transformer stored with diffusers' may hold."""
    blocks = {
        (found["number"], found["single"] is not None)
        for path in modules
        if (found := _BLOCK.match(path))
    }
    inner = [
        f"{'single' if single else 'double'}_blocks.{number}.{name}"
        for number, single in sorted(blocks)
        for name in (_SINGLE if single else _DOUBLE)
    ]
    return [*_OUTSIDE, *inner]


def _xlabs(found: re.Match[str]) -> str:
    return f"{found['kind']}_blocks.{found['number']}.{_XLABS[found['inner']]}"


def _whole(path: str, tensor: str, height: int) -> tuple[Part, ...]:
    """A weight under its other name: all of it, or with its halves exchanged."""
    if path != _EXCHANGED:
        return (Part(tensor),)
    first, second = stacked(height, 2)
    return Part(tensor, second, of=first), Part(tensor, first, of=second)


def _stack(tensors: list[str], heights: list[int]) -> tuple[Part, ...]:
    """One ΔW whose rows belong to several tensors, from the top down."""
    starts = [sum(heights[:nth]) for nth in range(len(heights))]
    return tuple(
        Part(tensor, of=slice(start, start + height))
        for tensor, start, height in zip(tensors, starts, heights, strict=True)
    )
