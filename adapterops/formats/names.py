"""One module's name in another dialect, where the two name the same thing.

PEFT knows module paths, diffusers puts the component in front (`unet.`), kohya flattens the dots to
underscores behind a prefix of its own. Flattening loses the dots; they come back only where every
piece of the name is one that the U-Net or the text encoder has. Fused projections, SGM block names
and language models have no counterpart here.
"""

from __future__ import annotations

import re

from adapterops.formats import diffusers

_KOHYA_PREFIX = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_UNET_HEADS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.")
_TRANSFORMER_HEADS = ("transformer_blocks.", "single_transformer_blocks.")
_TEXT_HEADS = ("text_model.",)

# Pieces of U-Net and CLIP module paths, longest first so that to_out is not read as to + out.
_PIECES = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks attn1 attn2 to_q to_k to_v
    to_out ff net proj proj_in proj_out conv1 conv2 conv conv_in conv_out conv_shortcut
    time_emb_proj time_embedding linear_1 linear_2 downsamplers upsamplers text_model encoder layers
    self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
"""
_PIECE = re.compile(rf"({'|'.join(sorted(_PIECES.split(), key=len, reverse=True))}|\d+)(?:_|$)")


def translate(stems: list[str], source: str, target: str) -> dict[str, str] | None:
    """stem -> its name in the target dialect, or None if some stem has none there."""
    paths = {stem: _to_diffusers(stem, source) for stem in stems}
    parts = {diffusers.component(path) for path in paths.values() if path}
    if None in paths.values():
        return None
    result: dict[str, str] = {}
    for stem, path in paths.items():
        name = _from_diffusers(path or "", target, parts)
        if name is None or name in result.values():
            return None
        result[stem] = name
    return result


def _to_diffusers(stem: str, source: str) -> str | None:
    if source == "diffusers":
        return stem if diffusers.component(stem) else None
    if source == "peft":
        for heads, part in (
            (_UNET_HEADS, "unet"),
            (_TRANSFORMER_HEADS, "transformer"),
            (_TEXT_HEADS, "text_encoder"),
        ):
            if stem.startswith(heads):
                return f"{part}.{stem}"
        return None
    for prefix, part in _KOHYA_PREFIX.items():
        if stem.startswith(prefix):
            path = _unflatten(stem.removeprefix(prefix))
            return None if path is None else f"{part}.{path}"
    return None


def _unflatten(flat: str) -> str | None:
    """Dots for underscores where every piece is known: `attn1_to_out_0` is `attn1.to_out.0`."""
    pieces = []
    position = 0
    while position < len(flat):
        found = _PIECE.match(flat, position)
        if found is None:
            return None
        pieces.append(found[1])
        position = found.end()
    return ".".join(pieces)


def _from_diffusers(path: str, target: str, parts: set[str]) -> str | None:
    part = diffusers.component(path)
    inner = path.removeprefix(part + ".")
    if target == "diffusers":
        return path
    if target == "peft":
        return inner if len(parts) == 1 else None
    two_encoders = "text_encoder_2" in parts
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if two_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }.get(part)
    return None if prefix is None else prefix + inner.replace(".", "_")
