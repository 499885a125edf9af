"""Tensors that adapters carry whole, resized vocabularies, and heads tied to embeddings."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapterops import casts
from adapterops.baking.beside import carried
from adapterops.basemodel import BaseModel, open_model
from adapterops.changes import entries
from adapterops.changes.mapping import changes
from adapterops.changes.targets import Changes, Target, Values
from adapterops.errors import FormatError, IncompatibleError, UnsupportedError
from adapterops.formats import open_adapter_file
from tests.checkpoints import encode

Q = ["q_proj"]
IDS = np.array([[3, 5, 7, 1, 9, 3]])


def tiny(kind: str, folder: Path, **config: Any) -> Any:
    """A model of transformers with fixed random weights, saved to and read from a folder."""
    import torch
    import transformers as t

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    more = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llava":
        text = t.LlamaConfig(**sizes, **more, **tokens, **config)
        eyes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 8}
        sight = t.CLIPVisionConfig(**eyes, num_attention_heads=2, patch_size=4)
        both = t.LlavaConfig(vision_config=sight, text_config=text, image_token_index=31)
        model = t.LlavaForConditionalGeneration(both)
    elif kind == "gpt2":
        wide = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
        model = t.GPT2LMHeadModel(t.GPT2Config(**wide, **tokens, **config))
    elif kind == "gemma":
        model = t.GemmaForCausalLM(t.GemmaConfig(**sizes, **more, **tokens, head_dim=8, **config))
    elif kind == "t5":
        small = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        model = t.T5ForConditionalGeneration(t.T5Config(**small, vocab_size=32, **config))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **more, **tokens, **config))
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.double().numpy()


def adapter(model: Any, folder: Path, seed: int = 5, resize: int = 0, **config: Any) -> np.ndarray:
    """An adapter as PEFT saves it, what is trained being random; the logits that it gives."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights, among others: what is tested here
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in adapted.parameters():
                if value.requires_grad:
                    value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(folder)
        return logits(adapted)


def plan(base: Path, *folders: Path, **options: Any) -> tuple[BaseModel, Changes, list[Any]]:
    """Base, changes and inputs; weights 1."""
    model, inputs = open_model(base), [open_adapter_file(folder) for folder in folders]
    return model, changes(model, inputs, [1.0] * len(inputs), **options), inputs


def bake(base: Path, out: Path, *folders: Path, **options: Any) -> Changes:
    """The base with the adapters' changes in float32, written plainly: five lines of numpy each."""
    model, found, inputs = plan(base, *folders, **options)
    tensors = {name: ref.read() for name, ref in model.tensors.items()}
    tensors |= {name: ref.read() for name, ref in found.copies.items()}
    tensors |= {name: _given(values) for name, values in found.values.items()}
    tensors |= {name: _changed(target) for name, target in found.targets.items()}
    out.mkdir()
    (out / "model.safetensors").write_bytes(encode(tensors, "F32"))
    for file in carried(model, inputs, found)[0]:
        content = Path(file.source).read_bytes() if file.source else file.content
        (out / file.name).write_bytes(content)
    return found


def _given(values: Values) -> np.ndarray:
    given = casts.decode(
        np.frombuffer(values.extra.read(), np.uint8), values.extra.dtype, values.extra.shape
    )
    if values.rows is None:
        return given
    result = np.array(values.ref.read())
    result[list(values.rows)] = given
    return result


def _changed(target: Target) -> np.ndarray:
    result = np.array(target.ref.read()).reshape(target.matrix)
    for term in target.terms:
        B, A = term.factors()
        delta = (B @ A).T if term.turned else B @ A
        result[term.rows, term.columns] += term.coefficient * delta
    for dense in target.dense:
        result += dense.coefficient * dense.change.rows(0, target.matrix[0])
    return result.reshape(target.ref.shape)


def reloaded(folder: Path, kind: str) -> Any:
    """The baked model; every tensor must find its place."""
    import transformers as t

    name = {
        "gpt2": "GPT2LMHeadModel",
        "gemma": "GemmaForCausalLM",
        "llava": "LlavaForConditionalGeneration",
    }.get(kind, "LlamaForCausalLM")
    model, info = getattr(t, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def are_one(model: Any) -> bool:
    one, other = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return one.data_ptr() == other.data_ptr()


E, H = "embed_tokens", "lm_head"
# name: model, is the base tied, is the result, options
LIVE: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {
    "embedding": ("llama", True, False, {"target_modules": [*Q, E]}),
    "head": ("llama", True, False, {"target_modules": [*Q, H]}),
    "both-differently": ("llama", True, False, {"target_modules": [*Q, E, H]}),
    "both-tied": ("llama", True, True, {"target_modules": [E], "ensure_weight_tying": True}),
    "head-tied": ("llama", True, True, {"target_modules": [H], "ensure_weight_tying": True}),
    "saved-embedding": ("llama", True, False, {"target_modules": Q, "modules_to_save": [E]}),
    "saved-head": ("llama", True, False, {"target_modules": Q, "modules_to_save": [H]}),
    "saved-both": ("llama", True, False, {"target_modules": Q, "modules_to_save": [E, H]}),
    "saved-tied": (
        *("llama", True, True),
        {"target_modules": Q, "modules_to_save": [E], "ensure_weight_tying": True},
    ),
    "tokens": ("llama", True, True, {"target_modules": Q, "trainable_token_indices": [7, 3]}),
    "tokens-by-name": (
        *("llama", True, True),
        {"target_modules": Q, "trainable_token_indices": {E: [3, 9], H: [3, 9]}},
    ),
    "tokens-of-the-head": (
        *("llama", True, False),
        {"target_modules": Q, "trainable_token_indices": {H: [3, 9]}},
    ),
    "tokens-of-each": (
        *("llama", True, False),
        {"target_modules": Q, "trainable_token_indices": {E: [3, 9], H: [3, 5]}},
    ),
    "tokens-grown": (
        *("llama", True, True),
        {"target_modules": Q, "trainable_token_indices": [33, 3], "resize": 36},
    ),
    "grown": ("llama", True, True, {"target_modules": Q, "resize": 36}),
    "shrunk": ("llama", True, True, {"target_modules": Q, "resize": 28}),
    "grown-embedding": ("llama", True, False, {"target_modules": [*Q, E], "resize": 36}),
    "untied-tokens": ("llama", False, False, {"target_modules": Q, "trainable_token_indices": [3]}),
    "untied-grown": ("llama", False, False, {"target_modules": Q, "resize": 36}),
    "untied-grown-both": ("llama", False, False, {"target_modules": [E, H], "resize": 36}),
    "untied-saved": ("llama", False, False, {"target_modules": Q, "modules_to_save": [E, "norm"]}),
    "biases": ("llama", False, False, {"target_modules": Q, "bias": "all"}),
    "biases-of-lora": ("llama", False, False, {"target_modules": Q, "bias": "lora_only"}),
    "gpt2-embedding": ("gpt2", True, False, {"target_modules": ["wte"]}),
    "gpt2-head": ("gpt2", True, False, {"target_modules": ["c_attn", H]}),
    "gpt2-tokens": (
        *("gpt2", True, True),
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 5]}},
    ),
    "gpt2-biases": ("gpt2", True, True, {"target_modules": ["c_attn"], "bias": "all"}),
    "gemma-embedding": ("gemma", True, False, {"target_modules": [*Q, E]}),
    "gemma-head": ("gemma", True, False, {"target_modules": [H]}),
    "llava-embedding": ("llava", True, False, {"target_modules": [E]}),
    "llava-head": ("llava", True, False, {"target_modules": [H]}),
    "llava-grown": (
        *("llava", True, False),
        {"target_modules": r".*language.*q_proj", "modules_to_save": [E, H], "resize": 36},
    ),
    "gemma-tokens": ("gemma", True, True, {"target_modules": Q, "trainable_token_indices": [3]}),
}


@pytest.mark.parametrize("case", LIVE)
def test_the_baked_model_does_what_the_adapter_does_unmerged(case: str, tmp_path: Path) -> None:
    kind, tied, stays, options = LIVE[case]
    bias = {"attention_bias": True} if "biases" in case and kind == "llama" else {}
    with_tie = {} if kind not in ("llama", "llava") else {"tie_word_embeddings": tied}
    plain = logits(tiny(kind, tmp_path / "base", **with_tie, **bias))
    model = tiny(kind, tmp_path / "base", **with_tie, **bias)
    live = adapter(model, tmp_path / "adapter", **options)
    bake(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    result = reloaded(tmp_path / "out", kind)
    given = logits(result)
    assert given.shape == live.shape
    assert np.abs(given - live).max() <= 1e-5 * np.abs(live).max()
    width = min(live.shape[-1], plain.shape[-1])
    assert np.abs(live[..., :width] - plain[..., :width]).max() > 1e-3 * np.abs(live).max()
    assert are_one(result) == stays
    assert result.config.tie_word_embeddings == stays
    assert result.config.get_text_config().vocab_size == options.get("resize", 32)


def test_a_task_s_head_is_added_and_its_classes_are_named(tmp_path: Path) -> None:
    import torch
    import transformers as t

    tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    model = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    live = adapter(model, tmp_path / "a", target_modules=Q, task_type="SEQ_CLS")
    found = bake(tmp_path / "base", tmp_path / "out", tmp_path / "a")
    result = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert np.allclose(logits(result), live, rtol=0, atol=1e-5)
    assert result.config.num_labels == 5
    assert any("'score.weight'" in note and "new" in note for note in found.notes)


def test_a_classifier_s_embedding_leaves_the_model_tied(tmp_path: Path) -> None:
    import transformers as t

    tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    model = t.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "a", target_modules=[E], task_type="SEQ_CLS")
    _, found, _ = plan(tmp_path / "base", tmp_path / "a")
    assert not found.copies and "lm_head.weight" not in {*found.targets, *found.values}
    assert any("no language model's head" in note for note in found.notes)


def test_a_copy_of_the_base_s_embedding_is_no_value(tmp_path: Path) -> None:
    """PEFT saves it beside LoRA on it, here in another type."""
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter(model, tmp_path / "a", target_modules=[E])
    tensors = read(tmp_path / "a")
    copied = next(name for name in tensors if ".base_layer." in name)
    write(tmp_path / "half", tensors, tmp_path / "a", dtype={copied: "BF16"})
    for folder in ("a", "half"):
        _, found, _ = plan(tmp_path / "base", tmp_path / folder)
        assert not found.values and list(found.targets) == ["model.embed_tokens.weight"]
    tensors[copied][0, 0] += 1
    write(tmp_path / "other", tensors, tmp_path / "a")
    _, found, _ = plan(tmp_path / "base", tmp_path / "other")
    assert found.targets["model.embed_tokens.weight"].ref.name == copied


# Hostile or contradictory adapters: what is done to a good one, the error, a part of its message.


def read(folder: Path) -> dict[str, np.ndarray]:
    file = open_adapter_file(folder)
    return {name: np.array(ref.read()) for name, ref in file.tensors.items()}


def write(
    folder: Path, tensors: dict[str, np.ndarray], like: Path, dtype: Any = None, **config: Any
) -> Path:
    folder.mkdir()
    parts = {name: (value, (dtype or {}).get(name, "F32")) for name, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(mixed(parts))
    given = json.loads((like / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**given, **config}))
    return folder


def mixed(parts: dict[str, tuple[np.ndarray, str]]) -> bytes:
    """A safetensors file of tensors of several types."""
    header, data = {}, b""
    for name, (value, dtype) in parts.items():
        raw = bytes(casts.stored_bytes(casts.store(np.asarray(value, np.float64), dtype)))
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
SAVED = "base_model.model.lm_head.weight"
BAD: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], type[Exception], str]] = {
    "token-beyond": (
        {"trainable_token_indices": [3, 32]},
        {ROWS: np.ones((2, 16))},
        IncompatibleError,
        "has token 32, 'model.embed_tokens.weight' of the base has 32 rows",
    ),
    "token-twice": (
        {"trainable_token_indices": [3, 3]},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "lists token 3 twice",
    ),
    "token-negative": (
        {"trainable_token_indices": [3, -1]},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "no list of token numbers",
    ),
    "token-true": (
        {"trainable_token_indices": [3, True]},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "no list of token numbers",
    ),
    "token-float": (
        {"trainable_token_indices": {"embed_tokens": 3.0}},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "no list of token numbers",
    ),
    "tokens-unnamed": ({}, {ROWS: np.ones((2, 16))}, FormatError, "no trainable_token_indices"),
    "tokens-of-another-module": (
        {"trainable_token_indices": {"lm_head": [1, 2]}},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "no trainable_token_indices",
    ),
    "tokens-too-few": (
        {"trainable_token_indices": [3]},
        {ROWS: np.ones((2, 16))},
        FormatError,
        "has 2 rows, trainable_token_indices lists 1",
    ),
    "tokens-narrow": (
        {"trainable_token_indices": [3, 4]},
        {ROWS: np.ones((2, 15))},
        IncompatibleError,
        "[2, 15]",
    ),
    "head-of-another-width": ({}, {SAVED: np.ones((32, 17))}, IncompatibleError, "[32, 17]"),
    "head-of-another-form": ({}, {SAVED: np.ones((32, 4, 4))}, IncompatibleError, "[32, 4, 4]"),
    "head-resized-alone": ({}, {SAVED: np.ones((36, 16))}, IncompatibleError, "36 tokens"),
    "embedding-resized-alone": (
        {},
        {"base_model.model.model.embed_tokens.weight": np.ones((36, 16))},
        IncompatibleError,
        "36 tokens",
    ),
    "vocabulary-of-nothing": (
        {},
        {SAVED: np.ones((0, 16)), "base_model.model.model.embed_tokens.weight": np.ones((0, 16))},
        IncompatibleError,
        "[0, 16]",
    ),
    "norm-of-another-size": (
        {},
        {"base_model.model.model.norm.weight": np.ones(17)},
        IncompatibleError,
        "[17]",
    ),
    "unknown-tensor": (
        {},
        {"base_model.model.model.gate.weight": np.ones((2, 16))},
        IncompatibleError,
        "has no tensor",
    ),
    "score-of-another-width": (
        {"task_type": "SEQ_CLS"},
        {"base_model.model.score.weight": np.ones((3, 17))},
        IncompatibleError,
        "hidden size is 16",
    ),
    "another-base-beneath": (
        {},
        {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": np.ones((16, 16))},
        IncompatibleError,
        "has other numbers there",
    ),
    "saved-twice": (
        {},
        {SAVED: np.ones((32, 16)), SAVED.replace("head.", "head.modules_to_save."): np.eye(32, 16)},
        FormatError,
        "differ",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Bases, tied and not, and a plain adapter."""
    root = tmp_path_factory.mktemp("made")
    tiny("llama", root / "tied", tie_word_embeddings=True)
    adapter(tiny("llama", root / "base", tie_word_embeddings=False), root / "q", target_modules=Q)
    return SimpleNamespace(
        base=root / "base", tied=root / "tied", plain=root / "q", tensors=read(root / "q")
    )


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("case", BAD)
def test_bad_extras(case: str, tied: bool, made: SimpleNamespace, tmp_path: Path) -> None:
    config, extras, error, message = BAD[case]
    folder = write(tmp_path / "a", {**made.tensors, **extras}, made.plain, **config)
    with pytest.raises(error) as raised:
        plan(made.tied if tied else made.base, folder)
    assert type(raised.value) is error and message in str(raised.value)


def test_dropped_extras_are_named_and_not_looked_at(made: SimpleNamespace, tmp_path: Path) -> None:
    extras = {ROWS: np.ones((2, 15)), "base_model.model.strange.weight": np.ones(3)}
    folder = write(tmp_path / "a", {**made.tensors, **extras}, made.plain)
    _, found, _ = plan(made.base, folder, extras="drop")
    assert not found.values and set(found.dropped) == set(extras)


def test_of_two_heads_the_policy_decides(made: SimpleNamespace, tmp_path: Path) -> None:
    one = write(tmp_path / "1", {**made.tensors, SAVED: np.full((32, 16), 1.0)}, made.plain)
    two = write(tmp_path / "2", {**made.tensors, SAVED: np.full((32, 16), 3.0)}, made.plain)
    with pytest.raises(IncompatibleError, match="differs"):
        plan(made.base, one, two)
    for policy, number in (("first", 1.0), ("average", 2.0)):
        _, found, _ = plan(made.base, one, two, extras=policy)
        assert np.all(_given(found.values["lm_head.weight"]) == number)


def test_a_head_is_carried_whole_at_any_weight(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = write(tmp_path / "1", {**made.tensors, SAVED: np.full((32, 16), 2.0)}, made.plain)
    base, file = open_model(made.base), open_adapter_file(folder)
    found = changes(base, [file], [0.5])
    assert np.all(_given(found.values["lm_head.weight"]) == 2.0)
    assert any("0.5" in note and "does not apply" in note for note in found.notes)
    found = changes(base, [file, open_adapter_file(made.plain)], [0.0, 1.0])
    assert not found.values


def test_one_adapter_replaces_what_another_changes(made: SimpleNamespace, tmp_path: Path) -> None:
    head = write(tmp_path / "1", {**made.tensors, SAVED: np.ones((32, 16))}, made.plain)
    base = tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter(base, tmp_path / "lora", target_modules=[H])
    with pytest.raises(IncompatibleError, match="changed by an adapter and replaced"):
        plan(made.base, tmp_path / "lora", head)


def test_an_embedding_that_grew_without_its_head_is_refused(tmp_path: Path) -> None:
    """PEFT saves no head beside LoRA on a resized embedding of an untied model."""
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter(model, tmp_path / "a", resize=36, target_modules=[E])
    with pytest.raises(IncompatibleError, match="36 tokens"):
        plan(tmp_path / "base", tmp_path / "a")


def test_trained_tokens_of_a_head_that_is_changed_too_are_refused(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    for name, options in {
        "rows": {"target_modules": Q, "trainable_token_indices": [3]},
        "head": {"target_modules": [H]},
    }.items():
        model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
        adapter(model, tmp_path / name, **options)
    with pytest.raises(UnsupportedError, match="train tokens"):
        plan(tmp_path / "base", tmp_path / "rows", tmp_path / "head")


def test_a_head_that_the_encoder_shares_too_is_not_untied(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = tiny("t5", tmp_path / "t5", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[H]))
        torch.nn.init.ones_(adapted.base_model.model.lm_head.lora_B.default.weight)
        adapted.save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="encoder, decoder and head share it"):
        plan(tmp_path / "t5", tmp_path / "a")


def test_models_that_cannot_be_untied_are_refused(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter(model, tmp_path / "a", target_modules=[E])
    alone = tmp_path / "alone"
    alone.mkdir()
    os.link(tmp_path / "base" / "model.safetensors", alone / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"no config\.json"):
        plan(alone / "model.safetensors", tmp_path / "a")
    given = json.loads((tmp_path / "base" / "config.json").read_text())
    for change, message in (
        ({"is_encoder_decoder": True}, "encoder, decoder and head share it"),
        ({"model_type": "git"}, "is not known here"),
        ({"architectures": ["BertForMaskedLM"]}, "is not known here"),
    ):
        (alone / "config.json").write_text(json.dumps({**given, **change}))
        with pytest.raises(UnsupportedError, match=message):
            plan(alone, tmp_path / "a")


def test_a_checkpoint_without_prefixes_is_untied(tmp_path: Path) -> None:
    """The names that GPT-2 was published with."""
    model = tiny("gpt2", tmp_path / "base")
    live = adapter(model, tmp_path / "a", target_modules=["c_attn", "lm_head"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: np.array(ref.read()) for name, ref in open_model(file).tensors.items()}
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    file.write_bytes(encode(bare))
    bake(tmp_path / "base", tmp_path / "out", tmp_path / "a")
    assert np.allclose(logits(reloaded(tmp_path / "out", "gpt2")), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stays", "options"),
    [
        (True, {"target_modules": Q, "trainable_token_indices": [3, 9]}),
        (True, {"target_modules": [E], "ensure_weight_tying": True}),
        (False, {"target_modules": [E]}),
        (False, {"target_modules": [H]}),
    ],
    ids=["tokens", "ensured", "embedding", "head"],
)
def test_a_tied_head_that_is_stored_all_the_same(
    stays: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    live = adapter(model, tmp_path / "a", **options)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: np.array(ref.read()) for name, ref in open_model(file).tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    file.write_bytes(encode(tensors))
    found = bake(tmp_path / "base", tmp_path / "out", tmp_path / "a")
    assert not found.copies
    result = reloaded(tmp_path / "out", "llama")
    assert np.allclose(logits(result), live, rtol=0, atol=1e-5)
    assert result.config.tie_word_embeddings == stays == are_one(result)


def test_a_tied_change_of_which_half_is_missing(tmp_path: Path) -> None:
    """PEFT gives the head what the embedding has; the other way round it is not said."""
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter(model, tmp_path / "a", target_modules=[E], ensure_weight_tying=True)
    tensors = read(tmp_path / "a")
    for half in (E, H):
        kept = {name: value for name, value in tensors.items() if f".{half}." in name}
        write(tmp_path / half, kept, tmp_path / "a")
    _, found, _ = plan(tmp_path / "base", tmp_path / E)
    assert list(found.targets) == ["model.embed_tokens.weight"]
    assert not found.copies and not found.config
    with pytest.raises(UnsupportedError, match="ensure_weight_tying"):
        plan(tmp_path / "base", tmp_path / H)


def test_values_get_the_type_of_the_base(tmp_path: Path) -> None:
    import torch

    model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter(model, tmp_path / "a", target_modules=Q, modules_to_save=[H, "norm"])
    tiny("llama", tmp_path / "base", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    _, found, _ = plan(tmp_path / "base", tmp_path / "a")
    assert {v.dtype for v in found.values.values()} == {"BF16"}
    assert {"lm_head.weight", "model.norm.weight"} <= set(found.values)
    assert any("rounded from float32 to bfloat16" in note for note in found.notes)


def test_code_of_its_own_is_told_apart(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter(model, tmp_path / "a", target_modules=[E])
    file = tmp_path / "base" / "config.json"
    own = {**json.loads(file.read_text()), "auto_map": {"AutoModelForCausalLM": "own.Model"}}
    file.write_text(json.dumps(own))
    _, found, _ = plan(tmp_path / "base", tmp_path / "a")
    assert any("code of its own" in note for note in found.notes)


@pytest.mark.parametrize(
    ("config", "tied", "untied"),
    [
        ({"tie_word_embeddings": True}, True, {"tie_word_embeddings": False}),
        ({"model_type": "gpt2"}, True, {"tie_word_embeddings": False}),
        ({"model_type": "llama"}, False, {"tie_word_embeddings": False}),
        ({"model_type": "new"}, None, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": False}, False, {}),
        (
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
            True,
            {"text_config": {"tie_word_embeddings": False}},
        ),
        (
            {"thinker_config": {"text_config": {}, "audio_config": {"vocab_size": 3}}},
            None,
            {
                "tie_word_embeddings": False,
                "thinker_config": {
                    "tie_word_embeddings": False,
                    "text_config": {"tie_word_embeddings": False},
                },
            },
        ),
    ],
    ids=["said", "gpt2", "llama", "unknown", "untied", "below", "far-below"],
)
def test_what_configs_say_of_tied_weights(
    config: dict[str, Any], tied: bool | None, untied: dict[str, Any]
) -> None:
    assert entries.tied(config) is tied
    assert entries.untied(config) == untied


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"vocab_size": 32}, {"vocab_size": 36}),
        ({"vocab_size": 36}, {}),
        ({"text_config": {}}, {"text_config": {"vocab_size": 36}}),
        (
            {"vocab_size": 32, "text_config": {"vocab_size": 32}, "vision_config": {}},
            {"vocab_size": 36, "text_config": {"vocab_size": 36}},
        ),
    ],
    ids=["plain", "right", "silent", "both"],
)
def test_a_resized_vocabulary_is_said_wherever_it_was(
    config: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert entries.vocabulary(config, 36) == changed
