"""What a module's path says about its place in a language model: the layer, attention or MLP.

The names are those of the models in transformers, and of T5's and ChatGLM's own code.
"""

from __future__ import annotations

import re

GROUPS = ("attn", "mlp")

# T5 has a list of layers within each block: the first number counts.
_LAYER = re.compile(
    r"(?:^|[._])(?:layers?|h|blocks?|transformer_blocks|joint_blocks|resblocks)[._](\d{1,9})(?!\d)"
)
# Modules that hold the projections.
_HOLDERS = {
    "attn": """
        attn self_attn cross_attn encoder_attn linear_attn attention self_attention cross_attention
        crossattention inter_attention SelfAttention EncDecAttention rel_attn att
    """,
    "mlp": """
        mlp ffn ff feed_forward feedforward DenseReluDense intermediate shared_mlp block_sparse_moe
        moe experts shared_expert shared_experts switch_mlp
    """,
}
# Projections, for layers that do not wrap them.
_PROJECTIONS = {
    "attn": """
        q_proj k_proj v_proj o_proj qkv_proj qkv Wqkv wqkv query key value query_key_value c_attn
    """,
    "mlp": """
        fc1 fc2 fc_in fc_out gate_proj up_proj down_proj gate_up_proj dense_h_to_4h dense_4h_to_h
        ffn_output
    """,
}
_HOLDER = {name: group for group, names in _HOLDERS.items() for name in names.split()}
_PROJECTION = {name: group for group, names in _PROJECTIONS.items() for name in names.split()}
_KNOWN = "|".join(sorted(_HOLDER | _PROJECTION, key=len, reverse=True))
_FLAT = re.compile(rf"(?<![^_])({_KNOWN})(?=_|$)")
_AFTER_ATTENTION = re.compile(r"layer[._]\d+[._]output[._]dense$")  # BERT's and ViT's MLP


def layer(path: str) -> int | None:
    """The number of the layer that a module lies in; None outside of layers."""
    found = _LAYER.search(path)
    return int(found[1]) if found else None


def group(path: str) -> str | None:
    """`attn`, `mlp`, or None for what is neither, such as the head."""
    bare = path.partition("[")[0]  # without the number of an expert
    names = bare.split(".") if "." in bare else _FLAT.findall(bare)
    for name in names:  # from the outside: experts may hold anything
        if name in _HOLDER:
            return _HOLDER[name]
    if _AFTER_ATTENTION.search(bare):
        return "mlp"
    return _PROJECTION.get(names[-1]) if names else None
