"""Planted defects of configs and of what lies beside the weights, and near misses of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.defects import (
    CONFIG,
    PREFIX,
    SHAPES,
    Case,
    Draft,
    _into,
    _with,
    at,
    gpt2,
    kohya,
    llama,
    mlx,
    write_file,
)

DEFECTS: list[Case] = []
NEAR: list[Case] = []


def plants(code: str, *, also: str = "", **options: Any) -> Any:
    """Registers a builder of a defect; `options` are passed to `check`."""
    return _into(DEFECTS, code, also, options)


def near(code: str, *, also: str = "", **options: Any) -> Any:
    """Registers a builder of something healthy that resembles the defect `code`."""
    return _into(NEAR, code, also, options)


# Files beside the weights.


@plants("stale-twin")
def an_old_bin_beside_the_safetensors(folder: Path) -> Path:
    llama().write(folder / "a")
    (folder / "a" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    return folder / "a"


@plants("stale-twin")
def a_second_download_of_another_version(folder: Path) -> Path:
    llama().write(folder / "a")
    llama(2).write(folder / "a", "adapter_model (1).safetensors")
    return folder / "a"


@plants("stale-twin")
def an_old_copy_of_a_single_file(folder: Path) -> Path:
    kohya().write(folder, "style.safetensors")
    kohya(2).write(folder, "style_old.safetensors")
    return folder / "style.safetensors"


@plants("twin-copy")
def a_second_download_of_the_same(folder: Path) -> Path:
    llama().write(folder / "a")
    llama().write(folder / "a", "adapter_model (1).safetensors")
    return folder / "a"


@near("stale-twin")
def files_that_are_no_twins(folder: Path) -> Path:
    llama().write(folder / "a")
    llama(2).write(folder / "a", "other_model.safetensors")
    (folder / "a" / "optimizer.pt").write_bytes(b"x")
    (folder / "a" / "training_args.bin").write_bytes(b"x")
    return folder / "a"


@plants("renamed-weights")
def a_second_download_alone(folder: Path) -> Path:
    return llama().write(folder / "a", "adapter_model (1).safetensors")


@near("renamed-weights")
def MLX_calls_its_weights_otherwise(folder: Path) -> Path:
    return mlx().write(folder / "a", "adapters.safetensors")


@near("renamed-weights", also="config-shared")
def a_single_file_may_have_any_name(folder: Path) -> Path:
    return llama().write(folder / "a", "tenant-7.safetensors") / "tenant-7.safetensors"


@plants("config-broken")
def a_config_that_is_no_json(folder: Path) -> Path:
    llama().write(folder / "a")
    (folder / "a" / "adapter_config.json").write_text('{"r": 4,')
    return folder / "a"


@plants("config-broken")
def an_alpha_that_is_a_word(folder: Path) -> Path:
    return _with(llama(), folder, lora_alpha="16")


@plants("config-broken")
def a_target_that_is_no_expression(folder: Path) -> Path:
    return _with(llama(), folder, target_modules="(q_proj")


@plants("config-broken")
def a_list_that_is_none(folder: Path) -> Path:
    return _with(llama(), folder, modules_to_save="score")


@plants("unsafe")
def a_pattern_that_runs_for_ever(folder: Path) -> Path:
    return _with(llama(), folder, rank_pattern={"(a+)+b": 4})


# The config by itself.


@plants("config-key")
def a_key_that_PEFT_does_not_know(folder: Path) -> Path:
    return _with(llama(), folder, merge_weights=False)


@plants("config-default")
def no_peft_type(folder: Path) -> Path:
    draft = llama()
    assert draft.config
    del draft.config["peft_type"]
    return draft.write(folder / "a")


@plants("config-default")
def no_r_at_rank_4(folder: Path) -> Path:
    return _with(llama(), folder, r=None)


@near("config-default")
def no_r_at_rank_8(folder: Path) -> Path:
    return _with(llama(rank=8), folder, r=None)


@plants("config-default")
def no_target_modules(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=None)


@plants("repeated-entry")
def a_target_listed_twice(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=["q_proj", "v_proj", "q_proj", "down_proj"])


@plants("empty-list")
def empty_for_null(folder: Path) -> Path:
    return _with(llama(), folder, modules_to_save=[])


@plants("base-path")
def a_windows_path(folder: Path) -> Path:
    return _with(llama(), folder, base_model_name_or_path=r"C:\models\Llama-3.2-1B")


@plants("base-path")
def a_path_of_a_cluster(folder: Path) -> Path:
    return _with(llama(), folder, base_model_name_or_path="/mnt/models/llama")


@plants("base-path")
def a_relative_path(folder: Path) -> Path:
    return _with(llama(), folder, base_model_name_or_path="../llama")


@near("base-path")
def a_short_name(folder: Path) -> Path:
    return _with(llama(), folder, base_model_name_or_path="roberta-base")


# Targets, patterns, layers.


@plants("unmatched-target")
def a_target_without_modules(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])


@plants("untargeted")
def modules_that_no_target_names(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=["q_proj", "v_proj"])


@plants("untargeted")
def an_expression_that_matches_part_of_a_path(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=r"model\.layers\.\d\.self_attn\.[qv]_proj|mlp")


@near("untargeted")
def an_expression_that_matches_whole_paths(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=r".*\.([qv]_proj|down_proj)")


@near("untargeted")
def all_linear(folder: Path) -> Path:
    return _with(llama(), folder, target_modules="all-linear")


@near("untargeted")
def targets_by_their_whole_paths(folder: Path) -> Path:
    paths = [f"model.layers.{n}.{module}" for n in range(8) for module in SHAPES]
    return _with(llama(), folder, target_modules=paths)


@plants("untargeted")
def modules_that_are_excluded(folder: Path) -> Path:
    return _with(llama(), folder, exclude_modules=["layers.3.self_attn.v_proj"])


@near("untargeted")
def an_exclusion_of_what_is_not_there(folder: Path) -> Path:
    return _with(llama(), folder, exclude_modules=["o_proj", "proj"])


@plants("untargeted")
def factors_of_a_saved_module(folder: Path) -> Path:
    draft = llama()
    rng = np.random.default_rng(1)
    for side, shape in (("A", (4, 64)), ("B", (32, 4))):
        x = 0.02 * rng.standard_normal(shape)
        draft.tensors[f"{PREFIX}score.lora_{side}.weight"] = x.astype(np.float16)
    draft.tensors[f"{PREFIX}score.weight"] = np.ones((32, 64), np.float16)
    targets = ["q_proj", "v_proj", "down_proj", "score"]
    return _with(draft, folder, modules_to_save=["score"], target_modules=targets)


@plants("unmatched-pattern")
def a_rank_pattern_for_nothing(folder: Path) -> Path:
    return _with(llama(), folder, rank_pattern={"o_proj": 16})


@plants("unmatched-pattern")
def a_pattern_that_starts_within_a_name(folder: Path) -> Path:
    return _with(llama(), folder, alpha_pattern={"roj": 16})


@near("unmatched-pattern")
def patterns_that_match(folder: Path) -> Path:
    patterns = {r"layers\.0\..*q_proj": 4, "down_proj": 4, "^model.layers.7.self_attn.v_proj": 4}
    return _with(llama(), folder, rank_pattern=patterns)


@plants("pattern-conflict")
def two_alpha_patterns_for_one_module(folder: Path) -> Path:
    return _with(llama(), folder, alpha_pattern={"q_proj": 16, ".*self_attn.*": 4})


@plants("pattern-conflict")
def two_rank_patterns_of_which_the_tensors_know_one(folder: Path) -> Path:
    return _with(llama(), folder, rank_pattern={"q_proj": 4, ".*self_attn.*": 8, "v_proj": 4})


@near("pattern-conflict")
def two_patterns_that_agree(folder: Path) -> Path:
    return _with(llama(), folder, alpha_pattern={"q_proj": 16, r"layers\.0\.self_attn\.q_proj": 16})


@plants("layer-unlisted")
def a_layer_outside_layers_to_transform(folder: Path) -> Path:
    return _with(llama(), folder, layers_to_transform=[0, 1, 2, 3, 4, 5, 6])


@plants("layer-empty")
def a_layer_that_was_to_be_transformed(folder: Path) -> Path:
    return _with(llama(), folder, layers_to_transform=list(range(9)))


@near("layer-unlisted")
def layers_that_fit(folder: Path) -> Path:
    return _with(llama(), folder, layers_to_transform=list(range(8)), layers_pattern="layers")


@near("layer-unlisted")
def a_single_layer(folder: Path) -> Path:
    return _with(llama(layers=1), folder, layers_to_transform=0)


@near("layer-unlisted")
def an_expression_beside_layers_to_transform(folder: Path) -> Path:
    return _with(llama(), folder, target_modules=".*_proj", layers_to_transform=[0])


# Orientation.


@plants("fan-in-fan-out")
def a_llama_that_claims_to_be_transposed(folder: Path) -> Path:
    return _with(llama(), folder, fan_in_fan_out=True)


@plants("fan-in-fan-out")
def GPT2_that_claims_not_to_be(folder: Path) -> Path:
    return _with(gpt2(), folder, fan_in_fan_out=False)


@plants("fan-in-fan-out")
def GPT2_under_a_name_of_its_own(folder: Path) -> Path:
    return _with(gpt2(), folder, fan_in_fan_out=False, base_model_name_or_path="acme/chat")


@near("fan-in-fan-out")
def GPT2_as_it_should_be(folder: Path) -> Path:
    return gpt2().write(folder / "a")


@near("fan-in-fan-out")
def Qwen1_has_the_same_names(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    stem = f"{PREFIX}transformer.h.0.attn.c_attn"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((4, 2048)).astype(np.float16),
        f"{stem}.lora_B.weight": (0.001 * rng.standard_normal((6144, 4))).astype(np.float16),
    }
    named = {"base_model_name_or_path": "Qwen/Qwen-1_8B", "target_modules": ["c_attn"]}
    return Draft(tensors, {**CONFIG, **named}).write(folder / "a")


# What travels with the factors.


def _head(draft: Draft, name: str = "score") -> Draft:
    draft.tensors[f"{PREFIX}{name}.weight"] = np.full((3, 64), 0.5, np.float32)
    return draft


@plants("head-unlisted")
def a_head_that_the_config_does_not_name(folder: Path) -> Path:
    return _head(llama()).write(folder / "a")


@near("head-unlisted")
def a_head_that_follows_from_the_task(folder: Path) -> Path:
    return _with(_head(llama()), folder, task_type="SEQ_CLS")


@near("head-unlisted")
def a_resized_embedding(folder: Path) -> Path:
    draft = llama()
    draft.tensors[f"{PREFIX}model.embed_tokens.weight"] = np.full((70, 64), 0.5, np.float16)
    draft.tensors[f"{PREFIX}lm_head.weight"] = np.full((70, 64), 0.5, np.float16)
    return draft.write(folder / "a")


@plants("head-missing")
def a_head_that_is_promised(folder: Path) -> Path:
    return _with(llama(), folder, modules_to_save=["lm_head"])


@plants("head-missing")
def a_classifier_without_a_head(folder: Path) -> Path:
    return _with(llama(), folder, task_type="SEQ_CLS")


@near("head-missing")
def one_of_the_heads_that_PEFT_lists(folder: Path) -> Path:
    heads = ["classifier", "score"]
    return _with(_head(llama()), folder, task_type="SEQ_CLS", modules_to_save=heads)


@plants("bias-unlisted")
def biases_that_bias_none_denies(folder: Path) -> Path:
    draft = llama()
    name = at(0).replace("lora_B.weight", "base_layer.bias")
    draft.tensors[name] = np.full(32, 0.5, np.float16)
    return draft.write(folder / "a")


@near("bias-unlisted")
def biases_that_were_trained(folder: Path) -> Path:
    draft = llama(bias="all")
    name = at(0).replace("lora_B.weight", "base_layer.bias")
    draft.tensors[name] = np.full(32, 0.5, np.float16)
    return draft.write(folder / "a")


@near("bias-unlisted")
def the_bias_of_a_head(folder: Path) -> Path:
    draft = _head(llama())
    draft.tensors[f"{PREFIX}score.bias"] = np.full(3, 0.5, np.float32)
    return _with(draft, folder, task_type="SEQ_CLS")


@plants("bias-unlisted")
def lora_B_biases_without_lora_bias(folder: Path) -> Path:
    draft = llama()
    for name in list(draft.tensors):
        if "lora_B" in name:
            rows = len(draft.tensors[name])
            draft.tensors[name.replace(".weight", ".bias")] = np.ones(rows, np.float16)
    return draft.write(folder / "a")


@plants("bias-missing")
def biases_that_are_promised(folder: Path) -> Path:
    return _with(llama(), folder, bias="lora_only")


def _dora(draft: Draft, layers: int) -> Draft:
    for name in list(draft.tensors):
        if "lora_B" in name and int(name.split(".")[4]) < layers:
            key = name.replace("lora_B.weight", "lora_magnitude_vector")
            draft.tensors[key] = np.full(len(draft.tensors[name]), 1.5, np.float16)
    return draft


@plants("dora-incomplete", also="not-a-delta")
def DoRA_without_magnitudes(folder: Path) -> Path:
    return _with(llama(), folder, use_dora=True)


@plants("dora-incomplete", also="not-a-delta")
def DoRA_with_magnitudes_in_some_layers(folder: Path) -> Path:
    return _with(_dora(llama(), 7), folder, use_dora=True)


@plants("dora-unlisted", also="not-a-delta")
def magnitudes_without_use_dora(folder: Path) -> Path:
    return _dora(llama(), 8).write(folder / "a")


def _rows(draft: Draft, count: int) -> Draft:
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    draft.tensors[name] = np.full((count, 64), 0.5, np.float32)
    return draft


@plants("token-rows")
def more_rows_than_tokens(folder: Path) -> Path:
    return _with(_rows(llama(), 3), folder, trainable_token_indices=[5, 2])


@plants("token-rows")
def rows_of_which_no_list_speaks(folder: Path) -> Path:
    return _rows(llama(), 2).write(folder / "a")


@plants("token-rows")
def a_list_of_tokens_without_rows(folder: Path) -> Path:
    return _with(llama(), folder, trainable_token_indices={"embed_tokens": [1, 2]})


@near("token-rows")
def a_row_for_each_token(folder: Path) -> Path:
    return _with(_rows(llama(), 2), folder, trainable_token_indices={"embed_tokens": [5, 2]})


@plants("added-tokens")
def a_token_beyond_the_embedding(folder: Path) -> Path:
    resized = a_resized_embedding(folder)
    (resized / "added_tokens.json").write_text(json.dumps({"<a>": 69, "<b>": 70}))
    return resized


@near("added-tokens")
def tokens_within_the_embedding(folder: Path) -> Path:
    resized = a_resized_embedding(folder)
    (resized / "added_tokens.json").write_text(json.dumps({"<a>": 68, "<b>": 69}))
    return resized


# What an engine minds; its own rules have their own tests.


@plants("engine-reject", also="not-a-delta", engine="vllm")
def DoRA_for_vLLM(folder: Path) -> Path:
    return _with(_dora(llama(rank=8), 8), folder, use_dora=True)


@plants("engine-misread", also="rslora", engine=["sglang"])
def rsLoRA_for_SGLang(folder: Path) -> Path:
    return _with(llama(rank=8), folder, use_rslora=True)


@plants("engine-note", engine="vllm")
def a_rank_that_pays_for_a_larger_slot(folder: Path) -> Path:
    return llama(rank=4).write(folder / "a")


@near("engine-note", engine="vllm")
def what_vLLM_takes_as_it_is(folder: Path) -> Path:
    return llama(rank=8).write(folder / "a")


# Healthy adapters of every dialect, one by one.

CLEAN: dict[str, Any] = {
    "PEFT, float16": lambda folder: llama().write(folder / "a"),
    "PEFT, bfloat16": lambda folder: llama(2, dtype="bfloat16").write(folder / "a"),
    "PEFT, float32": lambda folder: llama(3, dtype=np.float32).write(folder / "a"),
    "PEFT, rank 1, 40 layers": lambda folder: llama(4, layers=40, rank=1).write(folder / "a"),
    "PEFT, one layer": lambda folder: llama(5, layers=1).write(folder / "a"),
    "GPT-2": lambda folder: gpt2().write(folder / "a"),
    "kohya": lambda folder: _file(kohya(), folder),
    "kohya, no text encoder": lambda folder: _file(kohya(2, text=False), folder),
    "MLX": lambda folder: mlx().write(folder / "a", "adapters.safetensors"),
    "float8": lambda folder: _float8(folder),
}


def _file(draft: Draft, folder: Path) -> Path:
    draft.write(folder, "x.safetensors")
    return folder / "x.safetensors"


def _float8(folder: Path) -> Path:
    """Factors in float8, whose codes 8 to 119 are normal numbers."""
    draft = kohya()
    rng = np.random.default_rng(1)
    for name, x in draft.tensors.items():
        if ".alpha" not in name:
            draft.tensors[name] = rng.integers(24, 32, x.shape).astype(np.uint8)
    return write_file(folder / "x.safetensors", draft.tensors)
