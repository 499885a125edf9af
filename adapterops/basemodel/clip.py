"""Names of text encoders inside image checkpoints: transformers' own, and open_clip's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterops.basemodel.parts import Modules, Named, Part, Shapes, split, stacked

_INNER = {  # inside a block; the fused projection of attention aside
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(?P<number>\d+)\.(?P<inner>.+)")
_PARTS = ("q_proj", "k_proj", "v_proj")
FUSED = "attn.in_proj_weight"
PARAMETERS = (FUSED, "positional_embedding", "text_projection")  # not called .weight


def is_open_clip(modules: Modules) -> bool:
    """Whether the modules of a model are those of a text encoder with open_clip's names."""
    return f"transformer.resblocks.0.{FUSED}" in modules


def from_open_clip(modules: Modules, shapes: Shapes) -> Iterator[Named]:
    """transformers' names of a text encoder stored with open_clip's.

    open_clip multiplies by `text_projection` from the right: it is stored (in, out).
    """
    for path, tensor in modules.items():
        found = _BLOCK.fullmatch(path)
        if path == "text_projection":
            yield path, (Part(tensor, turned=True),)
        elif path in _OUTSIDE:
            yield _OUTSIDE[path], (Part(tensor),)
        elif found and found["inner"] == FUSED:
            attention = f"text_model.encoder.layers.{found['number']}.self_attn"
            names = tuple(f"{attention}.{part}" for part in _PARTS)
            yield from split(names, tensor, stacked(shapes[tensor][0], len(_PARTS)))
            yield path.removesuffix(".in_proj_weight"), (Part(tensor),)  # MultiheadAttention itself
        elif found and found["inner"] in _INNER:
            layer = f"text_model.encoder.layers.{found['number']}"
            yield f"{layer}.{_INNER[found['inner']]}", (Part(tensor),)
