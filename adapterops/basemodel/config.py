"""What a base model's config.json says of its weights: shapes, orientation, a tied head.

Shapes are known for architectures of known layout.

Layouts are those of transformers 5 (`modeling_llama.py` and kin); weights are (out, in), GPT-2's
Conv1D (in, out).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapterops.errors import FormatError, UnsupportedError

Shapes = dict[str, tuple[int, ...]]
_Size = Callable[..., int]
_Weights = Iterator[tuple[str, tuple[int, ...]]]


def _attention(size: _Size) -> tuple[int, int, int]:
    """hidden size, width of all queries, width of all keys."""
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    width = size("head_dim", hidden // max(heads, 1))
    return hidden, heads * width, size("num_key_value_heads", heads) * width


def _llama(size: _Size) -> _Weights:
    hidden, queries, keys = _attention(size)
    inner = size("intermediate_size")
    yield "model.embed_tokens", (size("vocab_size"), hidden)
    for layer in range(size("num_hidden_layers")):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj", (queries, hidden)
        yield f"{at}.self_attn.k_proj", (keys, hidden)
        yield f"{at}.self_attn.v_proj", (keys, hidden)
        yield f"{at}.self_attn.o_proj", (hidden, queries)
        yield f"{at}.mlp.gate_proj", (inner, hidden)
        yield f"{at}.mlp.up_proj", (inner, hidden)
        yield f"{at}.mlp.down_proj", (hidden, inner)
    yield "lm_head", (size("vocab_size"), hidden)


def _phi3(size: _Size) -> _Weights:
    hidden, queries, keys = _attention(size)
    inner = size("intermediate_size")
    yield "model.embed_tokens", (size("vocab_size"), hidden)
    for layer in range(size("num_hidden_layers")):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.qkv_proj", (queries + 2 * keys, hidden)
        yield f"{at}.self_attn.o_proj", (hidden, queries)
        yield f"{at}.mlp.gate_up_proj", (2 * inner, hidden)
        yield f"{at}.mlp.down_proj", (hidden, inner)
    yield "lm_head", (size("vocab_size"), hidden)


def _gpt2(size: _Size) -> _Weights:
    hidden = size("n_embd")
    inner = size("n_inner", 4 * hidden)
    yield "transformer.wte", (size("vocab_size"), hidden)
    for layer in range(size("n_layer")):
        at = f"transformer.h.{layer}"
        yield f"{at}.attn.c_attn", (hidden, 3 * hidden)
        yield f"{at}.attn.c_proj", (hidden, hidden)
        yield f"{at}.mlp.c_fc", (hidden, inner)
        yield f"{at}.mlp.c_proj", (inner, hidden)
    yield "lm_head", (size("vocab_size"), hidden)


def _bert(root: str) -> Callable[[_Size], _Weights]:
    def weights(size: _Size) -> _Weights:
        hidden, inner = size("hidden_size"), size("intermediate_size")
        yield f"{root}.embeddings.word_embeddings", (size("vocab_size"), hidden)
        for layer in range(size("num_hidden_layers")):
            at = f"{root}.encoder.layer.{layer}"
            for name in ("query", "key", "value"):
                yield f"{at}.attention.self.{name}", (hidden, hidden)
            yield f"{at}.attention.output.dense", (hidden, hidden)
            yield f"{at}.intermediate.dense", (inner, hidden)
            yield f"{at}.output.dense", (hidden, inner)

    return weights


def _fused(
    root: str, block: str, attention: str, ends: tuple[str, str]
) -> Callable[[_Size], _Weights]:
    """BLOOM's and GPT-NeoX' design: one fused projection, a plain MLP."""

    def weights(size: _Size) -> _Weights:
        hidden = size("hidden_size")
        inner = size("intermediate_size", 4 * hidden)
        yield f"{root}.{ends[0]}", (size("vocab_size"), hidden)
        for layer in range(size("num_hidden_layers")):
            at = f"{root}.{block}.{layer}"
            yield f"{at}.{attention}.query_key_value", (3 * hidden, hidden)
            yield f"{at}.{attention}.dense", (hidden, hidden)
            yield f"{at}.mlp.dense_h_to_4h", (inner, hidden)
            yield f"{at}.mlp.dense_4h_to_h", (hidden, inner)
        yield ends[1], (size("vocab_size"), hidden)

    return weights


_BLOOM = _fused("transformer", "h", "self_attention", ("word_embeddings", "lm_head"))
_NEOX = _fused("gpt_neox", "layers", "attention", ("embed_in", "lm_head"))
_LAYOUTS: Mapping[str, Callable[[_Size], _Weights]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _llama),
    "phi3": _phi3,
    "gpt2": _gpt2,
    "bert": _bert("bert"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _bert("roberta")),
    "bloom": _BLOOM,
    "gpt_neox": _NEOX,
}
_ALIASES = {  # names that a config may have for another
    "hidden_size": ("n_embed", "n_embd", "d_model"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
}
# Models (`model_type`) whose linear layers are transformers' Conv1D, stored (in, out). Qwen 1,
# GPT-BigCode and GPT-Neo use the same names for Linear layers: a name alone decides nothing.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = re.compile(r"(.*\.)?h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)")
_MOST_LAYERS = 10_000
_TIED = {"gpt2", "gemma", "gemma2", "bloom"}  # where the config is silent


def shapes(config: Mapping[str, Any], path: str) -> Shapes:
    """module path -> shape of its weight.

    Raises UnsupportedError for an architecture that is not known here, FormatError for sizes that
    are missing or no numbers.
    """
    kind = config.get("model_type")
    layout = _LAYOUTS.get(str(kind))
    if layout is None:
        raise UnsupportedError(
            f"shapes of the architecture {kind!r} do not follow from its config alone",
            path=path,
            hint="give --base the checkpoint itself; only its headers are read",
        )

    def size(name: str, default: int | None = None) -> int:
        given = (config.get(key) for key in (name, *_ALIASES.get(name, ())))
        value = next((value for value in given if value is not None), default)
        limit = _MOST_LAYERS if "layer" in name else 1 << 40
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise FormatError(f"{name} in the config is {json.dumps(value)}", path=path)
        return value

    return dict(layout(size))


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether embedding and head are one weight; None where nothing says so."""
    given = config.get("tie_word_embeddings")
    if given is not None:
        return bool(given)
    kind = config.get("model_type")
    return kind in _TIED if kind in _LAYOUTS else None


def is_conv1d_name(stem: str) -> bool:
    """Whether GPT-2 and its kin, whose weights are (in, out), have a module of this name."""
    return _CONV1D_NAMES.fullmatch(stem) is not None
