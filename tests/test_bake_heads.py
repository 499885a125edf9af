"""Tied heads that are no `lm_head`: a saved model has no tensor of their name.

The oracle is PEFT's model, unmerged: the baked one, with embedding and head apart, computes the
same.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.basemodel import open_model
from adapterops.changes.mapping import changes
from adapterops.errors import UnsupportedError
from adapterops.formats import read_adapter
from adapterops.verbs.bake import bake
from adapterops.verbs.drift import drift
from adapterops.verbs.unbake import unbake
from tests import test_bake_names as names

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **TOKENS,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
CAUSAL = {**TEXT, "is_decoder": True}
XLM = {"emb_dim": 24, "n_layers": 1, "n_heads": 2, "n_words": 40, "max_position_embeddings": 24}
ONE = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers",)}
WHISPER = {
    **TOKENS,
    **ONE,
    "d_model": 24,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}
TROCR = {
    **TOKENS,
    "d_model": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 24,
}
XLNET = {**TOKENS, "d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 20}
DISTILBERT = {"vocab_size": 40, "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 20}
HEADS = [
    pytest.param("WhisperForConditionalGeneration", "Whisper", WHISPER, "proj_out", id="whisper"),
    pytest.param("FlaubertWithLMHeadModel", "Flaubert", XLM, "pred_layer.proj", id="flaubert"),
    pytest.param("XLMWithLMHeadModel", "XLM", XLM, "pred_layer.proj", id="xlm"),
    pytest.param("BioGptForCausalLM", "BioGpt", TEXT, "output_projection", id="biogpt"),
    pytest.param("TrOCRForCausalLM", "TrOCR", TROCR, "output_projection", id="trocr"),
    pytest.param("XLNetLMHeadModel", "XLNet", XLNET, "lm_loss", id="xlnet"),
    pytest.param("ElectraForCausalLM", "Electra", CAUSAL, "generator_lm_head", id="electra"),
    pytest.param("BertLMHeadModel", "Bert", CAUSAL, "cls.predictions.decoder", id="bert"),
    pytest.param("BertForMaskedLM", "Bert", TEXT, "cls.predictions.decoder", id="masked"),
    pytest.param("RobertaForCausalLM", "Roberta", CAUSAL, "lm_head.decoder", id="roberta"),
    pytest.param(
        "DistilBertForMaskedLM", "DistilBert", DISTILBERT, "vocab_projector", id="distilbert"
    ),
]


def inputs(kind: str) -> dict[str, Any]:
    tokens = torch.arange(3, 11)[None]
    if kind != "Whisper":
        return {"input_ids": tokens}
    sound = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(2))
    return {"input_features": sound, "decoder_input_ids": tokens}


def logits(model: Any, kind: str) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs(kind)).logits


def adapted(cls: str, kind: str, sizes: dict[str, Any], target: str | None, folder: Path) -> Any:
    """Base and adapter on disk, of the embedding where no `target` is given; PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = names.made(cls, f"{kind}Config", sizes)
        model.save_pretrained(folder / "base")
        tokens = model.get_input_embeddings()
        own = next(name for name, module in model.named_modules() if module is tokens)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[target or own])
        found = peft.get_peft_model(model, config)
        names.randomise(found)
        found.save_pretrained(folder / "adapter")
    return found


@pytest.mark.parametrize("which", ["head", "embedding"])
@pytest.mark.parametrize(("cls", "kind", "sizes", "head"), HEADS)
def test_one_of_the_two(
    cls: str, kind: str, sizes: dict[str, Any], head: str, which: str, tmp_path: Path
) -> None:
    live = adapted(cls, kind, sizes, head if which == "head" else None, tmp_path)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "baked"))
    assert f"{head}.weight" not in open_model(base).tensors
    bake(base, adapter, out=out, reversible=True)
    assert f"{head}.weight" in open_model(out).tensors
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    again = getattr(transformers, cls).from_pretrained(out)
    wanted = logits(live, kind)
    torch.testing.assert_close(logits(again, kind), wanted, rtol=0, atol=1e-5)
    untouched = logits(getattr(transformers, cls).from_pretrained(base), kind)
    assert float((wanted - untouched).abs().max()) > 0.01
    assert drift(base, adapter, out).implementation == "ok"
    [checked] = ao.check(adapter, base=base).adapters
    assert not {"base-names", "base-module", "base-shape"} & {f.code for f in checked.findings}
    unbake(out, out=tmp_path / "back")
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "head", "encoder"),
    [
        pytest.param("rwkv", "head", False, id="rwkv"),
        pytest.param("cohere_asr", "proj_out", True, id="not shared with the encoder"),
    ],
)
def test_models_that_nobody_tried_are_refused_by_the_reason(
    kind: str, head: str, encoder: bool, tmp_path: Path
) -> None:
    config = {"model_type": kind, "tie_word_embeddings": True, "is_encoder_decoder": encoder}
    config |= {"architectures": ["ForConditionalGeneration"]}
    base = names.based(tmp_path, {"model.decoder.embed_tokens.weight": (40, 6)}, config)
    names.adapter(tmp_path, {head: (40, 6)})
    with pytest.raises(UnsupportedError, match=r"one weight.*reads a head of its own is not known"):
        changes(base, [read_adapter(tmp_path / "adapter")], [1.0])


def test_the_same_word_elsewhere_is_no_head(tmp_path: Path) -> None:
    """`decoder` is ModernBERT's head, and a part of other models."""
    config = {"model_type": "modernbert", "tie_word_embeddings": True}
    base = names.based(tmp_path, {"model.embeddings.tok_embeddings.weight": (40, 6)}, config)
    assert base.is_head("decoder.weight") and not base.is_head("model.decoder.0.weight")
    assert not base.is_head("lm_decoder.weight") and not base.is_head("decoder.bias")
