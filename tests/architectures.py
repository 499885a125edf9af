"""Tiny models of transformers that are no plain causal ones, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np

_SIZES = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {
    **_SIZES,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
}
_SEQUENCES = {
    **_SIZES,
    "d_model": 24,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 36),
    "decoder_start_token_id": 1,
}
_OPT = {"ffn_dim": 36, "word_embed_proj_dim": 24, "tie_word_embeddings": True}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_T5 = {**_SIZES, "d_model": 24, "d_kv": 12, "d_ff": 36, "num_layers": 1, "num_heads": 2}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
_CTRL = {**_SIZES, "n_positions": 20, "n_embd": 24, "dff": 36, "n_layer": 1, "n_head": 2}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", {**_BODY, **_OPT}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", {**_BODY, "tie_word_embeddings": True}),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {**_CTRL, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BODY),
    "gpt_neox_tied": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BODY, "tie_word_embeddings": True},
    ),
    "roberta_causal": ("RobertaForCausalLM", "RobertaConfig", {**_BODY, "is_decoder": True}),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _BODY),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_BODY, **_DEBERTA, "max_relative_positions": 16},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SEQUENCES, "max_position_embeddings": 20},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQUENCES, "max_source_positions": 30, "max_target_positions": 20, "num_mel_bins": 8},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_BODY, **_IMAGE}),
}


def model(kind: str) -> Any:
    """A model of this kind with fixed random weights, large enough that all of them count."""
    import torch
    import transformers as t

    cls, config, sizes = _KINDS[kind]
    torch.manual_seed(1)
    known = {} if kind == "vit" else sizes
    if kind == "vit":
        known = {k: v for k, v in sizes.items() if not k.endswith("_token_id") and "vocab" not in k}
    made = getattr(t, cls)(getattr(t, config)(**known)).eval()
    with torch.no_grad():
        for value in made.parameters():
            if value.ndim > 1:
                value.mul_(4.0)
    return made


def output(kind: str, host: Any) -> np.ndarray:
    """The logits for a fixed input."""
    import torch

    tokens = torch.arange(12)[None] * 5 % 29 + 3
    inputs: dict[str, Any] = {"input_ids": tokens}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = tokens
    elif kind == "whisper":
        generator = torch.Generator().manual_seed(1)
        sound = torch.randn(1, 8, 60, generator=generator)
        inputs = {"input_features": sound, "decoder_input_ids": tokens}
    elif kind == "vit":
        inputs = {"pixel_values": torch.arange(192.0).view(1, 3, 8, 8).sin()}
    with torch.no_grad():
        result: np.ndarray = host(**inputs).logits.double().numpy()
    return result
