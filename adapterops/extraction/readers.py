"""What reads a token embedding: whether a change of it reaches all of a model through an adapter.

An adapter names modules; a weight that several modules share must be written for each of them,
under the name that a loader has for it. Known are causal models whose head is `lm_head`. Names of
heads and embeddings are those of every class of transformers 5.23 that ends in a language model.
"""

from __future__ import annotations

from adapterops.basemodel import BaseModel
from adapterops.basemodel import config as configs
from adapterops.basemodel.renamed import RENAMED

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_OTHER_HEADS = (
    "BioGptForCausalLM",
    "GPTNeoXJapaneseForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
)
# Classes without a language model's head: their embedding is read once.
_BODIES = ("Model", "Classification", "QuestionAnswering", "MultipleChoice", "SentencePrediction")
_WITH_HEADS = ("LMHeadModel", "HeadsModel")


def ties(model: BaseModel) -> bool:
    """Whether a changed embedding of the model is the `lm_head` too, stored once."""
    return model.is_tied and model.is_causal and model.head is None


def unknown_reader(name: str, model: BaseModel) -> str:
    """Why an adapter cannot change the embedding module `name` everywhere, "" where it can.

    `name` is the path of an embedding with a row for each token, as a loader knows it.
    """
    leaf = name.rpartition(".")[2]
    encoder = leaf == "shared" or f".{name}".endswith(".encoder.embed_tokens")
    if model.config.get("is_encoder_decoder") or encoder:
        return (
            "encoder, decoder and head share it under names of their own (encoder.embed_tokens, "
            "decoder.embed_tokens)"
        )
    if configs.is_tied(model.config) is False or model.head is not None:
        return ""
    kind = model.architecture
    if not kind:
        return "no config.json says whether it is the head too"
    if kind.endswith(_BODIES) and not kind.endswith(_WITH_HEADS):
        return ""
    plain = leaf in _EMBEDDINGS and ".embeddings." not in f".{name}"
    renamed = model.config.get("model_type") in RENAMED
    if model.is_causal and plain and not renamed and kind not in _OTHER_HEADS:
        return ""
    return f"{kind} may use it as its head too, under a name that does not follow from the file"
