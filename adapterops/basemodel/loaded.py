"""What loaders call modules that a checkpoint has other names for.

transformers 5 gave image and audio encoders, detectors and a few others new names for their
modules; it translates as it loads a checkpoint, and back as it saves one, so files kept the old
names. PEFT names an adapter's modules as they are in memory. Taken on 2026-11-22 from transformers
5.23 (`conversion_mapping`, entries that rename whole tensors), and compared there for every class
of these models, made without weights. A fused projection is renamed to where its parts are.
Prefixes alone (`language_model.model`) need no table: they are found as heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

_Rules = tuple[tuple[str, str], ...]  # expression in the file's path, what loaders have there


def _attention(file: str, loader: str = "attention.") -> _Rules:
    """Renamed query, key and value, of the words before them in the file."""
    return tuple(
        (rf"\b{file}{old}\b", f"{loader}{new}")
        for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    )


_OUTPUT = (r"\battention\.output\.dense\b", "attention.o_proj")
_MLP = ((r"\bintermediate\.dense\b", "mlp.fc1"), (r"(?<!attention\.)\boutput\.dense\b", "mlp.fc2"))
_VIT = (
    *_attention(r"attention\.attention\."),
    *(_OUTPUT, *_MLP),
    (r"encoder\.layer\b", "layers"),  # of decoder_layers too: saved as decoder_encoder.layer
)
_DINO = (
    *_attention(r"attention\.attention\."),
    _OUTPUT,
    (r"\bmlp\.weights_out\b", "mlp.down_proj"),
)
_SWIN = (*_attention(r"attention\.self\."), _OUTPUT, *_MLP)
_SEGFORMER = (
    *_attention(r"attention\.self\."),
    (r"\battention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
    (r"\battention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
    _OUTPUT,
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
    (r"\bencoder\.patch_embeddings\.(\d+)\b", r"stages.\1.patch_embeddings"),
    (r"\bencoder\.block\.(\d+)\b", r"stages.\1.blocks"),
    (r"\bencoder\.layer_norm\.(\d+)\b", r"stages.\1.layer_norm"),
    (r"\blayer_norm_1\b", "layernorm_before"),
    (r"\blayer_norm_2\b", "layernorm_after"),
    (r"\bdecode_head\.linear_c\b", "decode_head.linear_projections"),
)
_FEEDFORWARD = (r"\blayers\.(\d+)\.fc([12])\b", r"layers.\1.mlp.fc\2")
_DETR = (
    (r"\bbackbone\.conv_encoder\b", "backbone"),
    (r"\b(self_attn|encoder_attn)\.out_proj\b", r"\1.o_proj"),
    _FEEDFORWARD,
    (r"\bbbox_attention\.([qk])_linear\b", r"bbox_attention.\1_proj"),
)
_CONDITIONAL = (
    *_DETR,
    (r"\bsa_([qk])(content|pos)_proj\b", r"self_attn.\1_\2_proj"),
    (r"\bca_([qk])(content|pos)_proj\b", r"encoder_attn.\1_\2_proj"),
    (r"\bsa_v_proj\b", "self_attn.v_proj"),
    (r"\bca_v_proj\b", "encoder_attn.v_proj"),
    (r"\bca_qpos_sine_proj\b", "encoder_attn.q_pos_sine_proj"),
)
_AIFI = (r"\bencoder\.encoder\.(\d+)\.layers\b", r"encoder.aifi.\1.layers")
_RT_DETR = ((r"\b(self_attn|encoder_attn)\.out_proj\b", r"\1.o_proj"), _FEEDFORWARD, _AIFI)
_D_FINE = (
    _RT_DETR[0],
    (r"\blayers\.(\d+)\.fc1\b", r"layers.\1.mlp.layers.0"),
    (r"\blayers\.(\d+)\.fc2\b", r"layers.\1.mlp.layers.1"),
    _AIFI,
)
_LAYERS = (r"\bencoder\.layers\b", "layers")
_POST = ((r"\bnorm1\b", "post_attention_layernorm"), (r"\bnorm2\b", "post_mlp_layernorm"))
_NOMIC = (("fc11", "up_proj"), ("fc12", "gate_proj"), ("fc2", "down_proj"))
_TO = ((r"\bself_attn\.to_([qkv])\b", r"self_attn.\1_proj"),)
_BELOW = r"(?=encoder\.|embeddings\.|layernorm\b)"  # of a backbone, which loaders put a level lower


def _backbone(at: str, name: str) -> _Rules:
    return ((rf"\b{at}\.{_BELOW}", f"{at}.{name}.".replace("\\", "")),)


_MASK = _backbone(r"pixel_level_module\.encoder", "swin")
_GROUNDING = _backbone(r"conv_encoder\.model", "swin")

RULES: Mapping[str, _Rules] = {  # by `model_type`, of the model or of a model inside it
    **dict.fromkeys(("vit", "deit", "beit", "ijepa", "vit_mae", "vit_msn", "vivit"), _VIT),
    "audio-spectrogram-transformer": _VIT,
    "pixio": (
        (rf"^encoder\.{_BELOW}", "pixio."),
        *_VIT,
        (r"\bnorm1\b", "layernorm_before"),
        (r"\bnorm2\b", "layernorm_after"),
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINO),
    **dict.fromkeys(
        ("lw_detr", "lw_detr_vit"),
        (*_attention(r"attention\.attention\."), (r"\battention\.output\b", "attention.o_proj")),
    ),
    "zoedepth": _backbone("backbone", "beit"),
    "swin": _SWIN,
    **dict.fromkeys(("mask2former", "maskformer", "oneformer"), _MASK),
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), _GROUNDING),
    "segformer": _SEGFORMER,
    **dict.fromkeys(("detr", "deformable_detr"), _DETR),
    "conditional_detr": _CONDITIONAL,
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "pp_doclayout_v2", "pp_doclayout_v3"), _RT_DETR),
    "pp_doclayout_v4": (
        *_RT_DETR,
        (r"\bdecoder_roor_order_head\b", "decoder.successor_order_head.proj"),
        (r"\bdecoder_roor_global_pointer\b", "decoder.successor_order_head.global_pointer"),
        (r"\bdecoder_order_head\b", "decoder.relative_order_head.proj"),
        (r"\bdecoder_global_pointer\b", "decoder.relative_order_head.global_pointer"),
    ),
    "d_fine": _D_FINE,
    "timesfm2_5": ((r"\bff0\b", "fc1"), (r"\bff1\b", "fc2")),
    "cohere_asr": (
        (r"\bpre_encode\.conv\b", "subsampling.layers"),
        (r"\bpre_encode\.out\b", "subsampling.linear"),
        (r"\btransf_decoder\._embedding\.token_embedding\b", "decoder.embed_tokens"),
        (r"\btransf_decoder\._embedding\.layer_norm\b", "decoder.embedding_layernorm"),
        (r"\btransf_decoder\._decoder\.final_layer_norm\b", "decoder.norm"),
        (r"\btransf_decoder\._decoder\.layers\b", "decoder.layers"),
        (r"\bencoder_decoder_proj\b", "decoder.proj"),
        (r"\bself_attn\.linear_([qkv])\b", r"self_attn.\1_proj"),
        (r"\bself_attn\.linear_out\b", "self_attn.o_proj"),
        (r"\bself_attn\.linear_pos\b", "self_attn.relative_k_proj"),
        (r"\bfirst_sub_layer\b", "self_attn"),
        (r"\bsecond_sub_layer\b", "encoder_attn"),
        (r"\b(self|encoder)_attn\.(q)uery_net\b", r"\1_attn.\2_proj"),
        (r"\b(self|encoder)_attn\.(k)ey_net\b", r"\1_attn.\2_proj"),
        (r"\b(self|encoder)_attn\.(v)alue_net\b", r"\1_attn.\2_proj"),
        (r"\b(self|encoder)_attn\.out_projection\b", r"\1_attn.o_proj"),
        (r"\bthird_sub_layer\.dense_in\b", "mlp.fc1"),
        (r"\bthird_sub_layer\.dense_out\b", "mlp.fc2"),
        (r"\blayer_norm_1\b", "input_layernorm"),
        (r"\blayer_norm_2\b", "post_attention_layernorm"),
        (r"\blayer_norm_3\b", "final_layernorm"),
        (r"\bconv\.batch_norm\b", "conv.norm"),
        (r"\blog_softmax\.mlp\.layer0\b", "proj_out"),
    ),
    "bailing_hybrid": (
        (r"\bword_embeddings\b", "embed_tokens"),
        (r"\battention\b", "self_attn"),
        (r"\bself_attn\.f_proj\b", "self_attn.forget_gate.f_proj"),
        (r"\bself_attn\.dense\b", "self_attn.o_proj"),
    ),
    "cosmos3_edge": (
        *_TO,
        (r"\bself_attn\.to_out\b", "self_attn.o_proj"),
        (r"\bmlp\.up_proj\b", "mlp.fc1"),
        (r"\bmlp\.down_proj\b", "mlp.fc2"),
    ),
    "cosmos3_omni": (
        (r"^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\b", r"model.visual.\1"),
        (r"^(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
        *_TO,
        (r"\bself_attn\.to_out\b", "self_attn.o_proj"),
        (r"\bself_attn\.norm_([qk])\b", r"self_attn.\1_norm"),
    ),
    "axk2": (
        (r"\bW_down\b", "mlp.fc1"),
        (r"\bW_up\b", "mlp.fc2"),
        (r"\bself_attn\.q_b_proj\b", "self_attn.q_gate_proj"),
    ),
    "hy_v4": ((r"\blinear_gate\b", "gate_proj"),),
    "nomic_bert": (
        (r"\bemb_ln\b", "embeddings.LayerNorm"),
        (r"\battn\.out_proj\b", "self_attn.o_proj"),
        (r"\battn\.Wqkv\b", "self_attn.Wqkv"),
        *((rf"\b{old}\b", new) for old, new in _NOMIC),
        _LAYERS,
        *_POST,
    ),
    "jina_embeddings_v3": (
        (r"\bemb_ln\b", "embeddings.LayerNorm"),
        (r"\bmixer\.out_proj\b", "self_attn.o_proj"),
        (r"\bmixer\.Wqkv\b", "self_attn.Wqkv"),
        _LAYERS,
        *_POST,
    ),
    "gte": (
        (r"\battention\.(o|qkv)_proj\b", r"self_attn.\1_proj"),
        (r"\bencoder\.layer\b", "layers"),
        (r"\battn_ln\b", "post_attention_layernorm"),
        (r"\bmlp_ln\b", "post_mlp_layernorm"),
        (r"\blm_head\.norm\b", "lm_head.layer_norm"),
    ),
    "lfm3_vl_vision": (
        (r"\bpatchifier\b", "patch_embed"),
        (r"\b([qk])_layernorm\b", r"\1_norm"),
    ),
    "lfm3": ((r"\bself_attn\.gate_proj\b", "self_attn.g_proj"),),
    "hy_v3": ((r"\bshared_mlp\b", "shared_experts"), (r"\bmlp\.router\.gate\b", "mlp.gate")),
    "phimoe": ((r"\bblock_sparse_moe\.gate\b", "mlp.router"),),
}


def loaded(paths: Collection[str], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What loaders call a module -> its path in a checkpoint, where the two differ.

    `paths` are all of the checkpoint's, `configs` those of its models by the folder of a pipeline,
    "" for a single model. A name that another module of the file has, or that two would get, is
    left out.
    """
    found: dict[str, str] = {}
    twice: set[str] = set()
    there = set(paths)
    for part, config in configs.items():
        rules = [(re.compile(old), new) for kind in _kinds(config) for old, new in RULES[kind]]
        if not rules:
            continue
        front = f"{part}." if part else ""
        for path in sorted(there):
            if not path.startswith(front):
                continue
            name = front + _renamed(path.removeprefix(front), rules)
            if name == path or name in there:
                continue
            if name in found:
                twice.add(name)
            found[name] = path
    return {name: path for name, path in found.items() if name not in twice}


def _renamed(path: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for old, new in rules:
        path = old.sub(new, path, count=1)
    return path


def _kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of a model, and of those inside it, that have rules; the outermost first."""
    found: dict[str, None] = {}
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        given = waiting.pop(0)
        kind = given.get("model_type")
        if isinstance(kind, str) and kind in RULES:
            found[kind] = None
        waiting += [value for value in given.values() if isinstance(value, dict)]
    yield from found
