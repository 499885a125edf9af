"""What models call a language model's head that is no `lm_head`, and its embedding.

Names are those of `_tied_weights_keys` of every class of transformers 5.23 that ties its head. A
saved model lacks a tied head, so that the names of a file do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BERT = "cls.predictions.decoder"
_ROBERTA = "lm_head.decoder"
# By `model_type`: the path that the head ends in.
_HEADS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("bert", "big_bird", "blip", "blip_text_model", "deberta", "deberta-v2", "ernie"),
            *("fnet", "layoutlm", "lxmert", "megatron-bert", "mobilebert", "mra", "nomic_bert"),
            *("nystromformer", "roc_bert", "roformer", "squeezebert", "tapas", "visual_bert"),
            "yoso",
        ),
        _BERT,
    ),
    **dict.fromkeys(
        (
            *("bert-generation", "camembert", "data2vec-text", "esm", "gte", "ibert"),
            *("jina_embeddings_v3", "longformer", "mpnet", "roberta", "roberta-prelayernorm"),
            *("xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
        _ROBERTA,
    ),
    **dict.fromkeys(
        ("canary", "cohere_asr", "moonshine", "moonshine_streaming", "whisper"), "proj_out"
    ),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj"),
    **dict.fromkeys(("flaubert", "xlm"), "pred_layer.proj"),
    **dict.fromkeys(("biogpt", "trocr", "fsmt"), "output_projection"),
    **dict.fromkeys(("convbert", "electra"), "generator_lm_head"),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), "decoder"),
    **dict.fromkeys(("bridgetower", "vilt"), "mlm_score.decoder"),
    "albert": "predictions.decoder",
    "distilbert": "vocab_projector",
    "git": "output",
    "neomme": "unembedding_projection",
    "rwkv": "head",
    "ultrabert": "head.decoder",
    "xlnet": "lm_loss",
}
_EMBEDDINGS: Mapping[str, str] = {
    **dict.fromkeys(("flaubert", "rwkv", "xlm"), "embeddings"),
    "xlnet": "word_embedding",
}
# Of those above, the kinds that compute the same with a head of their own, of equal numbers, and
# read it back: tried one by one with transformers 5.23 and PEFT 0.21.2.
APART = frozenset(
    [
        *("albert", "bert", "bert-generation", "biogpt", "camembert", "convbert", "data2vec-text"),
        *("deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "flaubert", "fnet"),
        *("gte", "longformer", "megatron-bert", "modernbert", "modernbert-decoder", "moonshine"),
        *("mpnet", "nomic_bert", "roberta", "roformer", "trocr", "whisper", "xlm", "xlm-roberta"),
        "xlnet",
    ]
)


def head(config: Mapping[str, Any]) -> str | None:
    """The path that the head of a model of this config ends in, None for `lm_head` and its like."""
    return _HEADS.get(str(config.get("model_type")))


def embedding(config: Mapping[str, Any]) -> str | None:
    """The last word of the embedding's path where it is one that others use otherwise."""
    return _EMBEDDINGS.get(str(config.get("model_type")))
