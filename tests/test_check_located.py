"""check --base finds modules where bake does: experts, parameters, fused and packed weights.

The models are of transformers, the adapters of PEFT.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.basemodel import open_model
from adapterops.changes.mapping import changes
from adapterops.errors import FormatError
from adapterops.formats import open_adapter_file
from tests import ldm_checkpoints
from tests.checkpoints import encode
from tests.defects import PREFIX, Draft, llama, write_file

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
MIXTRAL = {"num_local_experts": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Mixtral": ("mixtral", MIXTRAL, EXPERTS),
    "Mixtral, one parameter": ("mixtral", MIXTRAL, {"target_parameters": ["experts.down_proj"]}),
    "Mixtral, w1, w2 and w3": ("mixtral", MIXTRAL, {"target_modules": ["w1", "w2", "w3"]}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8},
        EXPERTS,
    ),
    "GLM4-MoE": (
        "glm4_moe",
        {"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        EXPERTS,
    ),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, EXPERTS),
    "a Linear's weight": (
        "llama",
        {},
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    ),
    "Phi-3": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def trained(
    kind: str, sizes: dict[str, Any], targets: dict[str, Any], folder: Path, vocabulary: int = 0
) -> None:
    """A tiny checkpoint and an adapter that PEFT saves of it, with random factors.

    `vocabulary`: the rows of its embedding, if resized for training.
    """
    import peft
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES, **sizes)
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what the two libraries are going to rename
        if vocabulary:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **targets))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder / "a")


def of_base(report: ao.CheckReport) -> set[str]:
    """Codes of the base, without what is said of every adapter."""
    found = {finding.code for finding in report.findings if finding.code.startswith("base-")}
    return found - {"base-coverage", "base-path"}


def message(report: ao.CheckReport, code: str) -> str:
    [finding] = [finding for finding in report.findings if finding.code == code]
    return finding.message


def is_placed(folder: Path) -> bool:
    """Whether bake has a place for every module."""
    file = open_adapter_file(folder / "a")
    return changes(open_model(folder / "base"), [file], [1.0]).modules == len(file.sites)


@pytest.mark.parametrize("name", CASES)
def test_what_bake_places_is_there(name: str, tmp_path: Path) -> None:
    trained(*CASES[name], tmp_path)
    report = ao.check(tmp_path / "a", base=tmp_path / "base", jobs=1)
    assert of_base(report) == set() and report.exit_code == 0
    assert is_placed(tmp_path)


def lora(shapes: dict[str, tuple[int, int]], **config: Any) -> Draft:
    """A PEFT adapter of rank 2 of modules of any name."""
    rng = np.random.default_rng(1)
    tensors = {}
    for stem, (out, columns) in shapes.items():
        tensors[f"{PREFIX}{stem}.lora_A.weight"] = rng.standard_normal((2, columns))
        tensors[f"{PREFIX}{stem}.lora_B.weight"] = rng.standard_normal((out, 2))
    leaves = sorted({stem.rpartition(".")[2] for stem in shapes})
    named = {**(llama().config or {}), "r": 2, "target_modules": leaves, **config}
    return Draft({name: x.astype(np.float32) for name, x in tensors.items()}, named)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """Adapters of earlier transformers, whose experts were modules w1, w2 and w3."""
    trained("mixtral", MIXTRAL, {"target_modules": ["q_proj"]}, tmp_path)
    block = "model.layers.1.block_sparse_moe.experts"
    modules = {f"{block}.{n}.w1": (48, 32) for n in range(4)}
    modules |= {f"{block}.{n}.w2": (32, 48) for n in range(4)}
    lora(modules).write(tmp_path / "b")
    report = ao.check(tmp_path / "b", base=tmp_path / "base", jobs=1)
    assert of_base(report) == set() and report.exit_code == 0
    lora(modules | {f"{block}.4.w1": (48, 32)}).write(tmp_path / "c")
    report = ao.check(tmp_path / "c", base=tmp_path / "base", jobs=1)
    assert of_base(report) == {"base-module"} and report.exit_code == 4
    assert message(report, "base-module").startswith("1 of 9 modules are not in base: ")
    lora({f"{block}.{n}.w1": (40, 32) for n in range(4)}).write(tmp_path / "d")
    report = ao.check(tmp_path / "d", base=tmp_path / "base", jobs=1)
    assert "4 modules change a weight of 40 x 32" in message(report, "base-shape")


def test_another_number_of_experts(tmp_path: Path) -> None:
    """More here than there, and fewer: both are another model's."""
    trained("mixtral", MIXTRAL, EXPERTS, tmp_path)
    for count, code in ((2, "base-shape"), (8, "base-module")):
        trained("mixtral", {"num_local_experts": count}, EXPERTS, tmp_path / "other")
        report = ao.check(tmp_path / "other" / "a", base=tmp_path / "base", jobs=1)
        assert of_base(report) == {code} and report.exit_code == 4
        if code == "base-shape":
            every = [f.message for f in report.findings if f.code == code]
            assert any(text.endswith("base has more experts, of 48 x 32") for text in every)


def test_nothing_found_is_no_better_than_something(tmp_path: Path) -> None:
    base = write_file(tmp_path / "b.safetensors", {"a.0.x.weight": np.zeros((8, 8), np.float32)})
    for modules, code in (
        ({"a.0.x": (8, 8), "a.0.y": (8, 8)}, "base-module"),
        ({"a.0.y": (8, 8)}, "base-names"),
    ):
        report = ao.check(lora(modules).write(tmp_path / code), base=base, jobs=1)
        assert of_base(report) == {code} and report.exit_code == 4


def test_a_renamed_head_of_which_some_is_missing(tmp_path: Path) -> None:
    """What is there is compared all the same."""
    shapes = {f"model.h.{n}.q": np.zeros((8, 8), np.float32) for n in range(3)}
    base = write_file(
        tmp_path / "b.safetensors", {f"{name}.weight": x for name, x in shapes.items()}
    )
    modules = {"h.0.q": (8, 8), "h.1.q": (8, 6), "h.2.q": (8, 8), "h.3.q": (8, 8)}
    report = ao.check(lora(modules).write(tmp_path / "a"), base=base, jobs=1)
    assert of_base(report) == {"base-module", "base-shape"}
    assert message(report, "base-module").endswith("1 of 4 modules are not in b.safetensors: h.3.q")
    assert message(report, "base-shape").startswith("1 module change a weight of 8 x 6")


def test_modules_that_may_be_two_weights(tmp_path: Path) -> None:
    weights = {f"{part}.layers.0.q.weight": np.zeros((8, 8), np.float32) for part in ("a", "b")}
    base = write_file(tmp_path / "b.safetensors", weights)
    report = ao.check(lora({"layers.0.q": (8, 8)}).write(tmp_path / "a"), base=base, jobs=1)
    assert of_base(report) == {"base-place"} and report.exit_code == 4
    assert "both hold them all" in message(report, "base-place")


def packed(path: str) -> dict[str, np.ndarray]:
    """A weight as GPTQ stores it."""
    scales = np.ones((1, 64), np.float16)
    return {f"{path}.qweight": np.zeros((8, 64), np.int64), f"{path}.scales": scales}


def test_packed_experts_and_projections(tmp_path: Path) -> None:
    """Names only: of stacks in MXFP4, of experts by number, of a fused projection."""
    block = "model.layers.0"
    rng = np.random.default_rng(1)
    stem = f"{PREFIX}{block}.mlp.experts"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((6, 32)).astype(np.float32),
        f"{stem}.lora_B.weight": rng.standard_normal((64, 6)).astype(np.float32),
    }
    config = {**(llama().config or {}), "r": 2, "target_modules": []}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    experts = Draft(tensors, config).write(tmp_path / "experts")
    blocks = f"{block}.mlp.experts.gate_up_proj"
    mxfp4 = {
        f"{blocks}_blocks": np.zeros((3, 64, 1, 16), np.uint8),
        f"{blocks}_scales": np.zeros((3, 64, 1), np.uint8),
    }
    numbered: dict[str, np.ndarray] = {}
    for n in range(3):
        for leaf in ("gate_proj", "up_proj"):
            numbered |= packed(f"{block}.mlp.experts.{n}.{leaf}")
    split = {f"{block}.self_attn.{leaf}_proj": (8, 8) for leaf in "qo"}
    attention = lora(split).write(tmp_path / "attention")
    fused = packed(f"{block}.self_attn.qkv_proj") | packed(f"{block}.self_attn.o_proj")
    for adapter, weights, count in (
        (experts, mxfp4, 3),
        (experts, numbered, 3),
        (attention, fused, 2),
    ):
        file = tmp_path / "packed.safetensors"
        file.write_bytes(encode(weights))
        report = ao.check(adapter, base=file, jobs=1)
        assert of_base(report) == {"base-packed"} and report.exit_code == 0
        assert message(report, "base-packed").startswith(f"{count} weights of packed")
    file.write_bytes(encode(packed(f"{block}.self_attn.qkv_proj")))
    report = ao.check(attention, base=file, jobs=1)
    assert of_base(report) == {"base-packed", "base-module"}  # o_proj is no part of it


def test_full_deltas_are_modules_too(tmp_path: Path) -> None:
    path = "model.diffusion_model.blocks.0"
    weights = {f"{path}.{leaf}.weight": np.zeros((8, 8), np.float32) for leaf in ("q", "norm")}
    base = write_file(tmp_path / "b.safetensors", weights)
    tensors = {
        f"{path}.q.lora_A.weight": np.ones((2, 8), np.float32),
        f"{path}.q.lora_B.weight": np.ones((8, 2), np.float32),
    }
    for shape, leaf, code in (((8, 8), "norm", None), ((8, 4), "norm", "base-shape"),
                              ((8, 8), "other", "base-module")):  # fmt: skip
        more = {f"{path}.{leaf}.diff": np.ones(shape, np.float32)}
        adapter = write_file(tmp_path / "x.safetensors", tensors | more)
        report = ao.check(adapter, base=base, jobs=1)
        assert of_base(report) == ({code} if code else set()), report.findings
    assert message(report, "base-module").startswith("1 of 2 modules are not in b.safetensors")


def test_a_vocabulary_that_the_adapter_brings_along(tmp_path: Path) -> None:
    """PEFT saves a resized embedding beneath its factors, and bake puts it in place."""
    trained("llama", {}, {"target_modules": ["embed_tokens", "lm_head"]}, tmp_path, 100)
    assert any(".base_layer." in name for name in open_adapter_file(tmp_path / "a").extras)
    report = ao.check(tmp_path / "a", base=tmp_path / "base", jobs=1)
    assert of_base(report) == set() and report.exit_code == 0
    assert is_placed(tmp_path)


def test_one_part_packed_and_another_of_another_shape(tmp_path: Path) -> None:
    """A weight of no known shape may be meant, one of another shape is not."""
    weights = packed("text.layers.0.q") | {"vision.layers.0.q.weight": np.zeros((8, 6))}
    file = tmp_path / "packed.safetensors"
    file.write_bytes(encode(weights))
    report = ao.check(lora({"layers.0.q": (64, 64)}).write(tmp_path / "a"), base=file, jobs=1)
    assert of_base(report) == {"base-packed"}


def test_an_image_model_in_one_file(tmp_path: Path) -> None:
    """diffusers' and kohya's names of LDM's and open_clip's weights, one stored as (in, out)."""
    shapes = ldm_checkpoints.sd2(ldm_checkpoints.TINY, 16, 2)
    shapes["cond_stage_model.model.text_projection"] = (16, 24)
    file = tmp_path / "sd.safetensors"
    write_file(file, {name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    modules = {f"unet.{block}": (32, 16), "text_encoder.text_projection": (24, 16)}
    attention = "text_encoder.text_model.encoder.layers.1.self_attn"
    modules |= {f"{attention}.{leaf}_proj": (16, 16) for leaf in "qv"}
    draft = lora(modules)
    draft.tensors = {name.removeprefix(PREFIX): x for name, x in draft.tensors.items()}
    draft.config = None
    report = ao.check(draft.write(tmp_path / "a"), base=file, jobs=1)
    assert of_base(report) == set(), report.findings
    rng = np.random.default_rng(1)
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    flat: dict[str, np.ndarray] = {}
    for stem, out in ((f"lora_unet_{block.replace('.', '_')}", 32), (text, 64)):
        flat[f"{stem}.lora_down.weight"] = rng.standard_normal((2, 16)).astype(np.float16)
        flat[f"{stem}.lora_up.weight"] = rng.standard_normal((out, 2)).astype(np.float16)
        flat[f"{stem}.alpha"] = np.array(2.0, np.float16)
    report = ao.check(write_file(tmp_path / "x.safetensors", flat), base=file, jobs=1)
    assert of_base(report) == set(), report.findings


def test_an_image_model_without_some_blocks_is_the_bases_error(tmp_path: Path) -> None:
    shapes = ldm_checkpoints.unet(ldm_checkpoints.TINY)
    weights = {n: np.zeros(x, np.float16) for n, x in shapes.items() if "output_blocks.0." not in n}
    file = write_file(tmp_path / "sd.safetensors", weights)
    with pytest.raises(FormatError, match="no output_blocks"):
        ao.check(lora({"a.0.q": (8, 8)}).write(tmp_path / "a"), base=file, jobs=1)
