"""Engine rules: a file that trips each row, its near miss, a clean set, ranks and memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from adapterops.errors import UsageError
from adapterops.formats import AdapterFile, read_adapter
from adapterops.serving import ENGINES, ROWS, gpu_bytes, judge
from adapterops.serving.advice import WAYS_OUT
from tests.support import save_file, write_kohya

PREFIX = "base_model.model."
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ALL = ("vllm", "sglang", "lorax", "tgi", "trtllm")
PLAIN = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny/llama",
    "lora_alpha": 32,
    "bias": "none",
    "init_lora_weights": True,
}


def llama(
    folder: Path,
    *,
    leaves: Mapping[str, tuple[int, int]] | list[str] = SHAPES,
    layers: int = 2,
    rank: int | Callable[[str], int] = 16,
    without: tuple[str, ...] = (),
    named: Callable[[str], str] = lambda module: f"{PREFIX}{module}",
    extra: Mapping[str, tuple[int, ...]] | None = None,
    lacks: tuple[str, ...] = (),
    dtype: Any = np.float16,
    beside: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """A PEFT directory as PEFT would train it on a small Llama.

    `leaves` are modules of each layer, a "/" in front makes one outside the layers; `extra` are
    further tensors, `lacks` keys left out of the config, `beside` empty files beside the weights.
    """
    rng = np.random.default_rng(1)
    shapes = leaves if isinstance(leaves, Mapping) else {name: SHAPES[name] for name in leaves}
    modules = {name[1:]: shape for name, shape in shapes.items() if name[0] == "/"}
    for layer in range(layers):
        for name, shape in shapes.items():
            if name[0] != "/":
                modules[f"model.layers.{layer}.{name}"] = shape
    tensors = {}
    for module, (out, columns) in modules.items():
        if module in without:
            continue
        r = rank if isinstance(rank, int) else rank(module)
        tensors[f"{named(module)}.lora_A.weight"] = rng.standard_normal((r, columns)).astype(dtype)
        tensors[f"{named(module)}.lora_B.weight"] = rng.standard_normal((out, r)).astype(dtype)
    for name, shape in (extra or {}).items():
        tensors[name] = rng.standard_normal(shape).astype(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in modules})
    r = rank if isinstance(rank, int) else max(map(rank, modules))
    text = {**PLAIN, "r": r, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in text.items() if key not in lacks})
    )
    for name in beside:
        (folder / name).write_text("{}")
    return folder


def rules(file: AdapterFile, engine: str, **limits: int) -> dict[str, str]:
    return {o.rule: o.severity for o in judge(file, engine, **limits)}


@dataclass(frozen=True)
class Case:
    """A file that trips `rule` at `engines` (all others serve it), and one that just does not.

    `words` are in the message of each: where, and both values.
    """

    rule: str
    engines: Mapping[str, str]
    trips: Mapping[str, Any]
    misses: Mapping[str, Any]
    words: tuple[str, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    write: Callable[..., Path] = llama


def every(severity: str, **other: str) -> dict[str, str]:
    return dict.fromkeys(ALL, severity) | other


def bare(folder: Path, *, inside: bool = False, **options: Any) -> Path:
    """The weights of an adapter under another name, the config in their header."""
    made = llama(folder, **options)
    if inside:
        config = made / "adapter_config.json"
        data = (made / "adapter_model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["__metadata__"] = {"lora_adapter_metadata": config.read_text()}
        text = json.dumps(header).encode()
        (made / "adapter_model.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + data[8 + size :]
        )
        config.unlink()
    return made


def renamed(folder: Path, *, weights: str, **options: Any) -> Path:
    made = llama(folder, **options)
    old = made / "adapter_model.safetensors"
    if weights.endswith((".bin", ".ckpt")):
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(old), made / weights)
        old.unlink()
    else:
        old.rename(made / weights)
    return made


def pickled(folder: Path, *, weights: str) -> Path:
    """The path of a file that is named itself, its config beside it."""
    return renamed(folder, weights=weights) / weights


def fp8(folder: Path, **options: Any) -> Path:
    """Factors of eight bits."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    made = llama(folder, **options)
    path = made / "adapter_model.safetensors"
    save({name: t.to(torch.float8_e4m3fn) for name, t in load_file(path).items()}, path)
    return made


def kohya(folder: Path, *, to: str) -> Path:
    if to == "peft":
        return llama(folder)
    folder.mkdir(parents=True)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = (np.ones((8, 4), np.float16), np.ones((4, 8), np.float16))
    return write_kohya(folder / "x.safetensors", {name: pair}, alpha=4)


def other_kind(folder: Path, *, kind: str) -> Path:
    """One module of a kind that PEFT saves under its own names."""
    module = "model.layers.0.self_attn.q_proj"
    tensors: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if kind == "loha":
        shapes = {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4)}
        tensors = {**shapes, "hada_w2_b": (4, 32)}
        config = {"peft_type": "LOHA", "r": 4, "alpha": 4}
    elif kind == "adalora":
        tensors = {"lora_A": (4, 32), "lora_B": (32, 4), "lora_E": (4, 1)}
        config = {"peft_type": "ADALORA", "r": 4, "lora_alpha": 4}
    elif kind == "merged_linear":
        tensors = {"lora_A.weight": (8, 32), "lora_B.weight": (64, 4, 1)}
        config = {"r": 4, "enable_lora": [True, False, True]}
    else:
        tensors = {"lora_A.weight": (16, 32), "lora_B.weight": (32, 16)}
        tensors |= {"lora_magnitude_vector": (32,)} if kind == "dora" else {}
        config = {"r": 16}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    save_file(
        {
            f"{PREFIX}{module}.{name}": rng.standard_normal(shape).astype(np.float16)
            for name, shape in tensors.items()
        },
        folder / "adapter_model.safetensors",
    )
    text = {**PLAIN, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(text))
    return folder


def flag(rule: str, key: str, value: Any, engines: Mapping[str, str], *words: str) -> Case:
    """A config field that is set, beside one that is there and says nothing."""
    falsy = False if value is True else None
    return Case(rule, engines, {key: value}, {key: falsy}, (key, "expected", *words))


HEAD = f"{PREFIX}score.weight"
Q, K, V, OUT = (f"self_attn.{x}_proj" for x in "qkvo")
UNSEEN = {engine: "misread" for engine in ALL if engine != "vllm"}
CASES = (
    Case(
        "dialect", every("reject"), {"to": "kohya"}, {"to": "peft"}, ("kohya", "peft"), write=kohya
    ),
    Case(
        "config-missing",
        every("reject"),
        {"inside": True},
        {"inside": False},
        ("no config", "'adapter_config.json'"),
        write=bare,
    ),
    Case(
        "config-key",
        {"vllm": "reject", "sglang": "reject", "trtllm": "reject"},
        {"lacks": ("r",)},
        {"lacks": ("bias",)},
        ("lacks r", "has "),
    ),
    Case(
        "config-key",
        {"sglang": "reject"},
        {"lacks": ("peft_type",)},
        {"lacks": ("init_lora_weights",)},
        ("lacks peft_type", "has r"),
    ),
    Case(
        "weights-file",
        {"lorax": "reject", "tgi": "reject"},
        {"weights": "adapter_model.bin"},
        {"weights": "other.safetensors"},
        ("'adapter_model.bin'", "*.safetensors"),
        write=renamed,
    ),
    Case(
        "weights-file",
        {"vllm": "reject", "trtllm": "reject"},
        {"weights": "other.safetensors"},
        {"weights": "adapter_model.bin"},
        ("'other.safetensors'", "adapter_model.safetensors"),
        write=renamed,
    ),
    Case(
        "weights-file",
        every("reject"),
        {"weights": "x.ckpt"},
        {"weights": "adapter_model.safetensors"},
        ("'x.ckpt'", "expected"),
        write=pickled,
    ),
    Case(
        "fp8-rank",
        {"trtllm": "reject"},
        {"rank": 8},
        {"rank": 16},
        ("FP8 factors of rank 8", "multiple of 16"),
        write=fp8,
    ),
    Case(
        "kind",
        every("reject", lorax="misread"),
        {"kind": "loha"},
        {"kind": "lora"},
        ("loha", "expected lora"),
        write=other_kind,
    ),
    Case(
        "adalora",
        every("reject", lorax="misread", tgi="misread"),
        {"kind": "adalora"},
        {"kind": "lora"},
        ("adalora", "expected lora"),
        write=other_kind,
    ),
    Case(
        "merged-linear",
        every("misread", vllm="reject", sglang="reject"),
        {"kind": "merged_linear"},
        {"kind": "lora"},
        ("merged_linear", "expected lora"),
        write=other_kind,
    ),
    Case(
        "deltas",
        every("reject", lorax="misread", tgi="misread"),
        {"extra": {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": (48, 32)}, "leaves": [Q, V]},
        {"leaves": [Q, V]},
        ("mlp_fc1.diff", "expected factors"),
    ),
    flag("dora", "use_dora", True, every("misread", vllm="reject", sglang="reject"), "false"),
    Case(
        "dora",
        every("misread", vllm="reject", sglang="reject"),
        {"kind": "dora"},
        {"kind": "lora"},
        ("magnitudes",),
        write=other_kind,
    ),
    Case(
        "lora-bias",
        every("reject", lorax="misread", tgi="misread"),
        {"extra": {f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.bias": (48,)}, "lora_bias": True},
        {"lora_bias": False},
        ("model.layers.0.mlp.up_proj", "expected none"),
    ),
    flag("bias-config", "bias", "all", {"vllm": "reject"}, '"all"', "none"),
    Case(
        "bias-tensors",
        {"sglang": "reject", "lorax": "misread", "tgi": "misread", "trtllm": "reject"},
        {
            "extra": {f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": (32,)},
            "bias": "lora_only",
        },
        {"bias": "lora_only"},
        ("base_layer.bias'", "expected factors only"),
    ),
    Case(
        "init",
        {"vllm": "reject"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "eva"},
        ('"pissa_niter_4"', "expected true"),
    ),
    Case(
        "init-moved",
        UNSEEN,
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        ('"olora"', "expected true"),
    ),
    Case(
        "init-moved",
        every("misread"),
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "orthogonal"},
        ('"lora_ga"', "expected true"),
    ),
    flag("alora", "alora_invocation_tokens", [5, 7], UNSEEN | {"vllm": "reject"}, "[5, 7]", "null"),
    flag("layer-replication", "layer_replication", [[0, 2], [1, 2]], UNSEEN | {"vllm": "reject"}),
    flag(
        "bd-lora",
        "use_bdlora",
        {"nblocks": 2},
        every("misread", vllm="reject", sglang="reject"),
        '{"nblocks": 2}',
    ),
    flag("qa-lora", "use_qalora", True, every("misread", vllm="reject", sglang="reject")),
    Case(
        "modules-to-save",
        {"vllm": "reject"},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["score"]},
        ('["head"]', "expected null"),
    ),
    Case(
        "heads",
        {"sglang": "misread", "lorax": "misread", "tgi": "misread", "trtllm": "reject"},
        {"extra": {HEAD: (3, 32)}, "modules_to_save": ["score"]},
        {"modules_to_save": ["score"]},
        (HEAD, "expected factors only"),
    ),
    Case(
        "heads",
        every("misread", vllm="reject", trtllm="reject"),
        {"extra": {f"{PREFIX}classifier.dense.weight": (3, 32)}, "modules_to_save": ["classifier"]},
        {"modules_to_save": ["classifier"]},
        ("classifier.dense.weight", "expected factors only"),
    ),
    Case(
        "saved-embeddings",
        every("misread", vllm="reject"),
        {"extra": {f"{PREFIX}lm_head.weight": (99, 32)}, "modules_to_save": ["lm_head"]},
        {},
        ("lm_head.weight", "expected factors only"),
    ),
    Case(
        "token-rows",
        every("misread", vllm="reject"),
        {"extra": {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32)}},
        {},
        ("trainable_tokens_delta", "expected factors only"),
    ),
    Case(
        "embedding-copy",
        every("misread"),
        {"extra": {f"{PREFIX}model.embed_tokens.base_layer.weight": (99, 32)}},
        {},
        ("base_layer.weight", "expected factors only"),
    ),
    Case(
        "added-tokens",
        {"sglang": "note"},
        {"beside": ("added_tokens.json",)},
        {"beside": ("tokenizer.json",)},
        ("added_tokens.json", "vocabulary"),
    ),
    Case(
        "names",
        {"lorax": "misread", "tgi": "misread"},
        {"named": str},
        {},
        ("'model.layers.0.mlp.down_proj.lora_A.weight'", "base_model.model.", "merge --to peft"),
    ),
    Case(
        "names",
        {"sglang": "misread", "tgi": "misread"},
        {"named": lambda module: PREFIX + module.replace("model.layers", "transformer.h")},
        {},
        ("transformer.h.0.mlp.down_proj", "layers.<n>", "serve it elsewhere"),
    ),
    Case(
        "names",
        {"trtllm": "reject", "tgi": "misread"},
        {"leaves": {"q_proj": (32, 32), "v_proj": (32, 32)}},
        {"leaves": [Q, V]},
        ("model.layers.0.q_proj", "<module>"),
    ),
    Case(
        "names",
        every("misread", vllm="reject", trtllm="reject", sglang=""),
        {
            "extra": {
                f"{PREFIX}model.layers.0.x.o_proj.lora_{s}.default.weight": (16, 16) for s in "AB"
            },
            "leaves": [],
        },
        {"leaves": [OUT]},
        ("lora_A.default.weight'", "expected"),
    ),
    Case(
        "embedding",
        {"lorax": "misread", "tgi": "misread", "trtllm": "misread"},
        {
            "extra": {
                f"{PREFIX}model.embed_tokens.lora_embedding_A": (16, 99),
                f"{PREFIX}model.embed_tokens.lora_embedding_B": (32, 16),
            }
        },
        {},
        ("model.embed_tokens", "99 tokens"),
    ),
    Case(
        "untargeted",
        {"sglang": "misread"},
        {"leaves": {**SHAPES, "/lm_head": (99, 32)}, "target_modules": ["q_proj"]},
        {"leaves": {**SHAPES, "/lm_head": (99, 32)}},
        ("lm_head", "['q_proj']"),
    ),
    Case(
        "lm-head",
        {"lorax": "note", "tgi": "misread", "trtllm": "misread"},
        {"leaves": {**SHAPES, "/lm_head": (99, 32)}},
        {},
        ("lm_head", "99 tokens"),
    ),
    Case(
        "vocabulary",
        {"vllm": "reject"},
        {"leaves": {"/lm_head": (258_049, 2)}},
        {"leaves": {"/lm_head": (258_048, 2)}},
        ("258049", "258048"),
    ),
    Case(
        "conv",
        {"vllm": "reject"},
        {
            "leaves": [],
            "extra": {
                f"{PREFIX}model.layers.0.mlp.conv.lora_A.weight": (16, 8, 3),
                f"{PREFIX}model.layers.0.mlp.conv.lora_B.weight": (8, 16, 1),
            },
        },
        {"leaves": [OUT]},
        ("mlp.conv", "expected linear"),
    ),
    Case(
        "module",
        every("misread", vllm="", sglang="reject"),
        {"leaves": {"mlp.router": (8, 32)}},
        {"leaves": ["mlp.down_proj"]},
        ("mlp.router", "down_proj"),
    ),
    flag(
        "target-parameters",
        "target_parameters",
        ["mlp.experts.down_proj"],
        {
            "vllm": "note",
            "sglang": "reject",
            "lorax": "misread",
            "tgi": "misread",
            "trtllm": "misread",
        },
        '["mlp.experts.down_proj"]',
    ),
    Case(
        "experts",
        {"vllm": "note", "lorax": "misread", "tgi": "misread", "trtllm": "note"},
        {
            "leaves": {
                f"block_sparse_moe.experts.{e}.w{i}": (32, 32) for e in (0, 1) for i in (1, 2, 3)
            }
        },
        {"leaves": {f"mlp.shared_expert.{x}_proj": (32, 32) for x in ("gate", "up", "down")}},
        ("experts.0.w1 and 11 more",),
    ),
    Case(
        "target-modules",
        {"sglang": "reject"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        ("(q|v)_proj", "a list of names"),
    ),
    Case(
        "siblings",
        {"sglang": "reject"},
        {"leaves": [Q]},
        {"leaves": [Q, V]},
        ("q_proj without v_proj",),
    ),
    Case(
        "siblings",
        {"sglang": "reject"},
        {"leaves": [Q, K]},
        {"leaves": [Q, K, V]},
        ("q_proj without v_proj",),
    ),
    Case(
        "siblings",
        {"sglang": "reject"},
        {"leaves": [V]},
        {"leaves": [OUT]},
        ("v_proj without q_proj",),
    ),
    Case(
        "siblings",
        {"sglang": "reject"},
        {"leaves": [K]},
        {"leaves": ["mlp.down_proj"]},
        ("k_proj without q_proj and v_proj",),
    ),
    Case(
        "siblings",
        {"sglang": "reject"},
        {"leaves": ["mlp.up_proj"]},
        {"leaves": ["mlp.gate_proj"]},
        ("up_proj without gate_proj",),
    ),
    Case(
        "missing-layers",
        {"lorax": "misread", "tgi": "misread"},
        {"layers": 5, "without": ("model.layers.1.mlp.up_proj", "model.layers.4.mlp.up_proj")},
        {"layers": 5},
        ("mlp.up_proj: in 3 of at least 5 layers, not in 1, 4",),
    ),
    Case(
        "missing-layers",
        {"lorax": "misread", "tgi": "misread"},
        {"without": tuple(f"model.layers.0.{name}" for name in SHAPES)},
        {"layers": 1},
        ("self_attn.q_proj and 6 more: in 1 of at least 2 layers, not in 0",),
    ),
    Case(
        "rank-limit",
        {"vllm": "reject", "sglang": "reject", "trtllm": "reject"},
        {"rank": 33},
        {"rank": 32},
        ("rank 33", "32"),
        limits={"max_lora_rank": 32},
    ),
    Case(
        "rank-default",
        {"vllm": "note"},
        {"rank": 17},
        {"rank": 16},
        ("rank 17", "above 16", "--max-lora-rank 32"),
    ),
    Case(
        "rank-default",
        {"vllm": "note", "trtllm": "note"},
        {"rank": 65},
        {"rank": 16},
        ("rank 65", "above", "start it with"),
    ),
    Case(
        "rank-default",
        {"vllm": "note"},
        {"rank_pattern": {"nothing": 64}},
        {"rank_pattern": {"nothing": 8}},
        ("rank 64", "above 16"),
    ),
    Case("rank-cap", {"vllm": "reject"}, {"rank": 513}, {"rank": 512}, ("rank 513", "512")),
    Case("rank-slot", {"vllm": "note"}, {"rank": 12}, {"rank": 8}, ("rank 12", "rank 16")),
    Case(
        "rank-slow",
        {"lorax": "note", "tgi": "note"},
        {"rank": 144},
        {"rank": 128},
        ("rank 144", "128"),
    ),
    Case(
        "mixed-ranks",
        {"sglang": "reject", "trtllm": "misread"},
        {"rank": lambda m: 8 if "q_proj" in m else 16, "rank_pattern": {"q_proj": 8}},
        {"rank": 8},
        ("rank 8 in model.layers.0.self_attn.q_proj", "rank 16"),
    ),
    Case(
        "mixed-type",
        {"lorax": "reject", "tgi": "reject"},
        {
            "rank": lambda m: 8 if "0.self_attn.q" in m else 16,
            "rank_pattern": {"layers.0.self_attn.q_proj": 8},
        },
        {
            "rank": lambda m: 12 if "0.self_attn.q" in m else 16,
            "rank_pattern": {"layers.0.self_attn.q_proj": 12},
        },
        ("rank 8 after padding in model.layers.0.self_attn.q_proj", "16 in"),
    ),
    Case(
        "scale-rslora",
        {"sglang": "misread", "lorax": "misread"},
        {"use_rslora": True},
        {"use_rslora": False},
        ("scale 8, served with 2, 4 times too weak",),
    ),
    Case(
        "scale-patterns",
        {"sglang": "misread", "lorax": "misread", "tgi": "misread", "trtllm": "misread"},
        {"alpha_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 32}},
        ("q_proj and 1 more", "scale 0.5, served with 2, 4 times too strong"),
    ),
    Case(
        "scale-padding",
        {"lorax": "misread", "tgi": "misread"},
        {"rank": 4, "lora_alpha": 8},
        {"rank": 8, "lora_alpha": 16},
        ("k_proj and 11 more", "scale 2, served with 1, 2 times too weak", "--rank 8"),
    ),
    Case(
        "scale-padding",
        {"lorax": "misread", "tgi": "misread"},
        {"rank": 24, "lora_alpha": 24},
        {"rank": 48, "lora_alpha": 48},
        ("scale 1, served with 0.75, 1.333 times too weak", "--rank 32"),
    ),
    Case(
        "scale-padding",
        {"lorax": "misread", "tgi": "misread"},
        {},
        {"rank": 32, "lora_alpha": 32},
        ("scale 2, served with 1, 2 times too weak, on 4 GPUs", "--rank 32"),
        limits={"tensor_parallel": 4},
    ),
    Case(
        "scale-rounding",
        {"vllm": "note", "lorax": "note", "tgi": "note", "trtllm": "note"},
        {"lora_alpha": 24},
        {"lora_alpha": 4},
        ("scale 1.5", "power of two"),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_rule_and_its_near_miss(tmp_path, case):
    tripped = read_adapter(case.write(tmp_path / "trips", **case.trips), allow_pickle=True)
    missed = read_adapter(case.write(tmp_path / "misses", **case.misses), allow_pickle=True)
    expected = {engine: severity for engine, severity in case.engines.items() if severity}
    found = {engine: rules(tripped, engine, **case.limits).get(case.rule) for engine in ALL}
    assert {engine: severity for engine, severity in found.items() if severity} == expected
    for engine in expected:
        assert case.rule not in rules(missed, engine, **case.limits)
        found = [o for o in judge(tripped, engine, **case.limits) if o.rule == case.rule]
        text = "\n".join(o.message for o in found)
        assert all(word in text for word in case.words), text
        for o in found:
            assert f": {ENGINES[engine].title} {ENGINES[engine].version} " in o.message
            assert set(o.modules) <= set(tripped.sites)


def test_every_row_is_tripped_by_some_case():
    tripped = {
        (engine, case.rule, severity)
        for case in CASES
        for engine, severity in case.engines.items()
        if severity
    }
    assert tripped == {(r.engine, r.rule, r.severity) for r in ROWS if r.engine != "portable"}


def test_rows_are_dated_and_say_where():
    keys = [(row.engine, row.rule) for row in ROWS]
    assert len(keys) == len(set(keys))
    for row in ROWS:
        assert row.version == ENGINES[row.engine].version and row.does
        assert re.fullmatch(r"[\w/]+\.(py: .+|md)", row.source), row.source
        assert row.evidence in ("read", "run")
        assert WAYS_OUT.get(row.rule) or row.rule in ("rank-default", "rank-slot")
    assert {rule for _, rule in keys} >= WAYS_OUT.keys()
    for engine in ENGINES.values():
        assert engine.version and engine.dated <= engine.read == "2026-11-22"


def merged(folder: Path, inputs: list[Path], **options: Any) -> AdapterFile:
    weights = None if len(inputs) == 1 else [1 / len(inputs)] * len(inputs)
    ao.merge(inputs, weights, out=folder, **options)
    return read_adapter(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_said_of_a_clean_file(tmp_path, engine):
    one = llama(tmp_path / "a")
    assert judge(read_adapter(one), engine) == []
    assert judge(merged(tmp_path / "copy", [one]), engine) == []
    two = llama(tmp_path / "b", rank=8, lora_alpha=8, use_rslora=True)
    sum_ = merged(tmp_path / "sum", [one, two], rank=16)
    assert judge(sum_, engine) == [] and sum_.rank == 16
    wide = merged(tmp_path / "bf16", [two], rank="same", dtype="bfloat16")
    assert judge(wide, engine) == []


def test_what_merge_writes_above_the_default_rank(tmp_path):
    wide = {"leaves": dict.fromkeys(SHAPES, (96, 96))}
    one = llama(tmp_path / "a", **wide)
    two = llama(tmp_path / "b", rank=8, lora_alpha=4, **wide)
    file = merged(tmp_path / "m", [one, two])
    assert file.rank == 24
    assert rules(file, "vllm") == {"rank-default": "note"}
    assert rules(file, "vllm", max_lora_rank=32) == {"rank-slot": "note"}
    assert rules(file, "vllm", max_lora_rank=16) == {"rank-limit": "reject"}
    assert rules(file, "sglang") == rules(file, "trtllm") == {}
    assert rules(file, "lorax") == {"scale-padding": "misread"}


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({"use_rslora": True}, {"rank": "same"}),
        ({"alpha_pattern": {"q_proj": 8}, "lora_alpha": 24}, {"rank": "same"}),
        (
            {"rank": lambda m: 8 if "q_proj" in m else 16, "rank_pattern": {"q_proj": 8}},
            {"rank": "same"},
        ),
        ({"rank": 4, "lora_alpha": 4}, {"rank": 8}),
        ({"named": str}, {"to": "peft"}),
        (
            {"extra": {f"{PREFIX}score.weight": (3, 32)}, "modules_to_save": ["score"]},
            {"extras": "drop"},
        ),
        ({"leaves": {**SHAPES, "/lm_head": (99, 32)}}, {"modules": r"model\.layers.*"}),
        ({"target_modules": r".*_proj"}, {"rank": "same"}),
        ({"dtype": np.float32}, {"dtype": "bfloat16"}),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_the_advice_helps(tmp_path, made, options):
    assert judge(read_adapter(llama(tmp_path / "a", **made)), "portable")
    file = merged(tmp_path / "out", [tmp_path / "a"], **options)
    assert judge(file, "portable") == []


def test_padding_changes_the_scale_of_every_later_type(tmp_path):
    """LoRAX loads q, k, v, o, gate, up, down and divides by the padded rank of the type before."""
    for rank in (1, 5, 8, 9, 16, 20, 32):
        file = read_adapter(llama(tmp_path / str(rank), rank=rank, lora_alpha=3 * rank))
        padded = 8 if rank <= 8 else 16 * -(-rank // 16)
        wrong = [o for o in judge(file, "lorax") if o.rule == "scale-padding"]
        assert bool(wrong) == (padded != rank)
        for o in wrong:
            assert o.modules == tuple(
                f"model.layers.{i}.{leaf}" for leaf in list(SHAPES)[1:] for i in (0, 1)
            )
            assert f"scale 3, served with {3 * rank / padded:.6g}, " in o.message


def test_a_type_of_another_rank_sets_the_divisor_of_the_next(tmp_path):
    small = {"rank": lambda m: 8 if "q_proj" in m else 16, "rank_pattern": {"q_proj": 8}}
    file = read_adapter(llama(tmp_path / "a", **small))
    found = {o.rule: o for o in judge(file, "tgi") if o.rule.startswith("scale")}
    assert "q_proj and 1 more: scale 4, served with 2, 2 times too weak" in (
        found["scale-patterns"].message
    )
    assert "k_proj and 1 more: scale 2, served with 4, 2 times too strong" in (
        found["scale-padding"].message
    )


def test_an_lm_head_is_scaled_where_it_is_served(tmp_path):
    head = {**SHAPES, "/lm_head": (99, 32)}
    file = read_adapter(llama(tmp_path / "a", rank=4, leaves=head, use_rslora=True))
    for engine, there in (("sglang", True), ("lorax", True), ("tgi", False), ("trtllm", False)):
        scaled = [o for o in judge(file, engine) if o.rule.startswith("scale")]
        assert any("lm_head" in o.modules for o in scaled) == there, engine


def test_layers_are_counted_for_each_stack(tmp_path):
    pair = {"A": (16, 32), "B": (32, 16)}
    tower = {
        f"{PREFIX}vision.layers.{i}.self_attn.o_proj.lora_{side}.weight": shape
        for i in range(4)
        for side, shape in pair.items()
    }
    file = read_adapter(llama(tmp_path / "a", extra=tower))
    assert rules(file, "lorax") == {}
    kept = {name: shape for name, shape in tower.items() if "layers.2" not in name}
    (o,) = judge(read_adapter(llama(tmp_path / "b", extra=kept)), "lorax")
    assert "self_attn.o_proj: in 3 of at least 4 layers, not in 2" in o.message
    assert o.modules == tuple(f"vision.layers.{i}.self_attn.o_proj" for i in (0, 1, 3))


def test_the_bias_of_a_head_is_part_of_the_head(tmp_path):
    head = {f"{PREFIX}score.{name}": shape for name, shape in (("weight", (3, 32)), ("bias", (3,)))}
    made = llama(tmp_path / "a", extra=head, bias="all", modules_to_save=["score"])
    assert rules(read_adapter(made), "trtllm") == {"heads": "reject"}
    assert rules(read_adapter(made), "vllm") == {"bias-config": "reject"}


def test_types_that_are_left_out_do_not_touch_the_rank(tmp_path):
    gone = ("model.layers.1.self_attn.q_proj",)
    file = read_adapter(llama(tmp_path / "a", rank=4, without=gone))
    found = {o.rule: o for o in judge(file, "lorax")}
    assert found["missing-layers"].modules == ("model.layers.0.self_attn.q_proj",)
    assert found["scale-padding"].modules[0] == "model.layers.0.self_attn.v_proj"


def test_both_causes_of_a_wrong_scale_count(tmp_path):
    """rsLoRA of rank 4 in LoRAX: alpha / 4 for alpha / √4, then alpha / 8."""
    file = read_adapter(llama(tmp_path / "a", rank=4, lora_alpha=8, use_rslora=True))
    messages = {o.rule: o.message for o in judge(file, "lorax")}
    assert "scale 4, served with 2, 2 times too weak" in messages["scale-rslora"]
    assert "scale 4, served with 1, 4 times too weak" in messages["scale-padding"]
    (tgi,) = (o.message for o in judge(file, "tgi") if o.rule == "scale-padding")
    assert "scale 4, served with 2.82843, 1.414 times too weak" in tgi


def test_the_portable_profile_stores_16_bits(tmp_path):
    for name, write, options in (("F8_E4M3", fp8, {}), ("F32", llama, {"dtype": np.float32})):
        (o,) = judge(read_adapter(write(tmp_path / name, **options)), "portable")
        assert o.rule == "dtype" and name in o.message and "BF16 and F16" in o.message


def test_portable_asks_all_engines_and_has_ranks_of_its_own(tmp_path):
    file = read_adapter(llama(tmp_path / "a", rank=24, use_rslora=True, lora_alpha=24))
    found = judge(file, "portable")
    assert {o.engine for o in found} == {*ENGINES}
    for name in ALL:
        assert [o for o in found if o.engine == name] == judge(file, name)
    (own,) = (o for o in found if o.engine == "portable")
    assert own.rule == "rank-portable" and "rank 24" in own.message and "32" in own.message
    grave = [("reject", "misread", "note").index(o.severity) for o in found]
    assert grave == sorted(grave)


def test_nothing_is_read_but_the_description(tmp_path):
    file = read_adapter(llama(tmp_path / "a", rank=4))
    before = {engine: judge(file, engine) for engine in ENGINES}
    shutil.rmtree(tmp_path / "a")
    assert before == {engine: judge(file, engine) for engine in ENGINES}


def test_an_unknown_engine_is_named_with_the_known_ones(tmp_path):
    file = read_adapter(llama(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"'ollama': expected one of vllm, sglang, .*portable"):
        judge(file, "ollama")


def test_real_adapters_are_judged(corpus):
    roberta = next(corpus.glob("AguLeon*/checkpoint-500"))
    found = rules(read_adapter(roberta), "vllm")
    assert found == {"bias-config": "reject", "heads": "reject", "rank-slot": "note"}
    bloom = read_adapter(next(corpus.glob("*BLOOM*")), allow_pickle=True)
    assert rules(bloom, "tgi") == {"weights-file": "reject", "merged-linear": "misread"}
    mlx = read_adapter(next(corpus.glob("*MLX*/0000100")))
    assert rules(mlx, "sglang") == {"dialect": "reject"}


RANKS = {
    # engine: {rank of a file: (padded, slot, legal)}
    "vllm": {1: (1, 1, 1), 10: (10, 16, 10), 321: (321, 512, 321), 513: (513, None, None)},
    "sglang": {10: (10, 10, 10), 1000: (1000, 1000, 1000)},
    "lorax": {1: (8, 8, 8), 8: (8, 8, 8), 9: (16, 16, 16), 24: (32, 32, 32), 129: (144, 144, 144)},
    "trtllm": {10: (10, 10, 10)},
    "portable": {1: (8, 8, 8), 9: (16, 16, 16), 48: (48, 48, 64), 129: (144, 144, None)},
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks(name):
    engine = ENGINES[name]
    for rank, expected in RANKS[name].items():
        figures = engine.padded_rank(rank), engine.slot_rank(rank), engine.legal_rank(rank)
        assert figures == expected, rank


def test_a_legal_rank_is_left_alone_by_all_gpus():
    for parallel in (1, 2, 4, 8):
        for rank in range(1, 130):
            for name in ("lorax", "tgi", "portable"):
                legal = ENGINES[name].legal_rank(rank, parallel)
                if legal is not None:
                    assert legal >= rank
                    assert ENGINES["lorax"].padded_rank(legal, parallel) == legal
    assert ENGINES["portable"].legal_rank(8, 4) == 32
    assert ENGINES["portable"].legal_rank(65, 16) == 128


def test_memory_of_llama_3_8b():
    """32 slots of all linear layers: 2.7 GB at rank 16, 10.7 at 64, 21.5 at 128."""
    hidden, kv, mlp = 4096, 1024, 14336
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes = 32 * [*layer, (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    for rank, gigabytes in ((16, 2.7), (64, 10.7), (128, 21.5), (100, 21.5)):
        size = gpu_bytes(ENGINES["vllm"], shapes, adapters=32, rank=rank)
        assert size is not None and round(size / 1e9, 1) == gigabytes
    assert gpu_bytes(ENGINES["vllm"], shapes, adapters=1, rank=600) is None
    assert gpu_bytes(ENGINES["trtllm"], shapes, adapters=1, rank=16) is None
    one = gpu_bytes(ENGINES["lorax"], shapes, adapters=1, rank=9)
    assert one == gpu_bytes(ENGINES["sglang"], shapes, adapters=1, rank=16)
