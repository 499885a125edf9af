"""The restated merges are PEFT's to the last bit, and what went wrong in the broken ones did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import checkpoints, merges, peft_models, support

SHAPES = {f"model.layers.{i}.self_attn.{x}_proj": (24, 24) for i in (0, 1) for x in "qo"}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture
def model(tmp_path):
    """A sharded base and two adapters on it."""
    weights = {
        f"{name}.weight": 0.02 * np.random.default_rng(3).standard_normal((24, 24))
        for name in SHAPES
    }
    weights |= {"model.norm.weight": np.ones(24), "lm_head.weight": np.full((8, 24), 0.5)}
    base = checkpoints.write(tmp_path / "base", weights, "BF16", {"vocab_size": 8}, shards=2)
    adapters = [
        support.write_peft(tmp_path / name, support.pairs(seed, SHAPES, 4), alpha=8)
        for seed, name in enumerate("ab")
    ]
    return base, *adapters


def by_peft(W, pairs, *, safe=False, half=False):
    """PEFT's own merge of a linear layer."""
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)

    options = {"autocast_adapter_dtype": False} if half else {}
    names = [f"a{index}" for index in range(len(pairs))]
    with peft_models.quiet():
        config = LoraConfig(r=pairs[0][1].shape[0], lora_alpha=1, target_modules=["q_proj"])
        model = get_peft_model(Model(), config, adapter_name=names[0], **options)
        for name in names[1:]:
            model.add_adapter(name, config, **options)
        layer = model.base_model.model.q_proj
        layer.base_layer.weight.data = W.clone()
        for name, (B, A, scale) in zip(names, pairs, strict=True):
            kind = W.dtype if half else torch.float32
            layer.lora_B[name].weight.data = B.to(kind)
            layer.lora_A[name].weight.data = A.to(kind)
            layer.scaling[name] = scale
        model.merge_adapter(names, safe_merge=safe)
    return layer.base_layer.weight.data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("style", ["peft_unsafe", "peft_safe", "peft_half_factors"])
def test_peft_styles_are_pefts(style, count, dtype):
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(48, 40, generator=generator).to(DTYPES[dtype])
    pairs = [
        (
            0.02 * torch.randn(48, 4, generator=generator).half(),
            0.2 * torch.randn(4, 40, generator=generator).half(),
            1.4 + index,
        )
        for index in range(count)
    ]
    safe, half = style == "peft_safe", style == "peft_half_factors"
    expected = by_peft(W, pairs, safe=safe, half=half)
    assert torch.equal(merges.STYLES[style](W, pairs), expected)


@pytest.mark.parametrize("style", merges.STYLES)
def test_every_style_comes_near_the_exact_sum(style):
    generator = torch.Generator().manual_seed(1)
    W = 0.02 * torch.randn(64, 32, generator=generator).bfloat16()
    pairs = [
        (
            0.1 * torch.randn(64, 4, generator=generator),
            0.1 * torch.randn(4, 32, generator=generator),
            0.5,
        )
        for _ in range(2)
    ]
    before = W.clone()
    exact = W.double() + sum(s * (B.double() @ A.double()) for B, A, s in pairs)
    got = merges.STYLES[style](W, pairs)
    assert torch.equal(W, before)
    assert got.dtype == W.dtype
    assert got.is_contiguous()
    assert float((got.double() - exact).norm() / exact.norm()) < 0.01


def test_merge_checkpoint_changes_its_modules_only(model, tmp_path):
    base, a, b = model
    out = merges.merge_checkpoint(base, [a, b], tmp_path / "out", "axolotl")
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()}
    index = json.loads((out / checkpoints.INDEX).read_text())["weight_map"]
    for name, shard in index.items():
        same = torch.equal(load_file(out / shard)[name], load_file(base / shard)[name])
        assert same == (name.removesuffix(".weight") not in SHAPES)


@pytest.mark.parametrize("defect", merges.BROKEN)
def test_every_defect_differs_from_the_right_merge(model, tmp_path, defect):
    base, a, b = model
    right = merges.merge_checkpoint(base, [a], tmp_path / "right")
    wrong = merges.broken_checkpoint(defect, base, a, tmp_path / "wrong", other=b)
    different = set()
    for shard in base.glob("*.safetensors"):
        one, other = load_file(right / shard.name), load_file(wrong / shard.name)
        different |= {n for n in one if n not in other or not torch.equal(one[n], other[n])}
    counts = {"wrong_scale": 4, "twice": 4, "other": 4}
    assert len(different) == counts.get(defect, 1)
    spoilt = {"zeroed_norm": "model.norm.weight", "lost_head": "lm_head.weight"}
    assert spoilt.get(defect, *sorted(different)[:1]) in different
    if defect == "lost_head":
        assert "lm_head" not in (wrong / checkpoints.INDEX).read_text()
