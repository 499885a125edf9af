"""drift as a library and a command: other tools' merges of whole checkpoints, and our own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops.activations import write_activations
from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FormatError,
    IncompatibleError,
    UnsupportedError,
    UsageError,
)
from adapterops.verbs.bake import bake
from adapterops.verbs.drift import drift
from tests import bake_models, checkpoints, peft_models
from tests import test_bake_names as names
from tests import test_bake_values as values
from tests.bake_models import factors, weights
from tests.inspecting import call
from tests.merges import (
    BROKEN,
    STYLES,
    broken_checkpoint,
    merge_checkpoint,
    read_adapter,
    scaled,
)
from tests.support import dense, pairs, write_peft

SIZES = {"rows": 192, "columns": 128}
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ROUNDS = ("exact", "nearest", "stochastic", "compensated")
Q = "model.layers.0.self_attn.q_proj"


def base(folder: Path, dtype: str = "BF16", layout: str = "folder") -> Path:
    return bake_models.model(folder, weights(**SIZES), dtype, layout)


def adapter(folder: Path, seed: int = 1, size: float = 2e-3, **options: Any) -> Path:
    return write_peft(folder, factors(seed, size, **SIZES), **options)


def judged(*given: Any, **options: Any) -> Any:
    """The report, after looking at its document."""
    report = drift(*given, **options)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema"] == "adapterops.drift/1"
    assert document["exit_code"] == report.exit_code
    return report


def right(report: Any) -> bool:
    wrong = [*report.summary, *(f for f in report.findings if f.fails)]
    assert (report.implementation, report.exit_code, wrong) == ("ok", 0, [])
    return True


class TestRightMerges:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("style", STYLES)
    def test_every_style(self, style: str, dtype: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m", dtype, "shards" if style < "n" else "folder")
        one = adapter(tmp_path / "a", alpha=5.6)
        report = judged(model, one, merge_checkpoint(model, [one], tmp_path / "o", style))
        assert right(report) and len(report.tensors) == 6
        assert report.total.gain == pytest.approx(1, abs=0.02)
        assert report.identical == len(bake_models.stored(model)) - 6

    @pytest.mark.parametrize("style", STYLES)
    def test_two_at_once(self, style: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        both = [adapter(tmp_path / "a"), adapter(tmp_path / "b", 2)]
        assert right(judged(model, both, merge_checkpoint(model, both, tmp_path / "o", style)))

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("size", [2e-5, 2e-4])
    def test_small_changes(self, size: float, dtype: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", dtype), adapter(tmp_path / "a", size=size)
        report = judged(model, one, merge_checkpoint(model, [one], tmp_path / "o"))
        assert right(report)
        lost = [said for said in report.warnings if "lost" in said]
        assert (report.representation == "lossy") == (len(lost) == 1)
        assert report.representation == ("lossy" if size < 1e-4 and dtype != "F32" else "ok")
        assert all("merge into float32" in said for said in lost)

    @pytest.mark.parametrize("prefix", ["", "language_model.model.", "transformer."])
    def test_other_prefixes(self, prefix: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        file = model / "model.safetensors"
        kept = {n: t for n, t in load_file(file).items() if n.count(".") > 1 or "lm_head" in n}
        save_file(kept, file)
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        tensors = load_file(merged / "model.safetensors")
        tensors = {
            prefix + n.removeprefix("model.") if n.startswith("model.") else n: t
            for n, t in tensors.items()
        }
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        report = judged(model, one, merged)
        assert right(report) and report.renamed == len(tensors) - 1

    @pytest.mark.parametrize("own", TYPES)
    @pytest.mark.parametrize("saved", TYPES)
    def test_saved_in_another_type(self, own: str, saved: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", own), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o", "axolotl")
        file = merged / "model.safetensors"
        tensors = {
            n: t.to(TYPES[saved]) if t.is_floating_point() else t
            for n, t in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
        report = judged(model, one, merged)
        before = {n: t.dtype for n, t in bake_models.stored(model).items()}
        changed = [n for n in before if n not in report.tensors and before[n][0] in "BF"]
        other = [n for n in changed if before[n] not in ("BOOL", saved)]
        assert right(report) and sum(report.converted.values()) == len(other)

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("given", ["file", "folder", "index", "shards", "hub"])
    def test_of_every_layout(self, given: str, shards: int, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", layout=given), adapter(tmp_path / "a")
        plain = base(tmp_path / "n", layout="shards" if shards > 1 else "folder")
        merged = merge_checkpoint(plain, [one], tmp_path / "o")
        assert right(judged(model, one, merged))

    def test_weights_and_modules(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        half = {n: p for n, p in scaled(read_adapter(one), -0.5).items() if "q_proj" in n}
        merged = merge_checkpoint(model, [half], tmp_path / "o")
        assert right(judged(model, one, merged, [-0.5], modules=".*q_proj"))
        report = judged(model, one, merged, modules=".*q_proj")
        assert report.exit_code == 5 and "subtracted, 0.5 times as strong" in report.summary[0]
        report = judged(model, one, merged, [-0.5])
        assert report.exit_code == 5 and "not applied" in str(report.summary)


def by_peft(folder: Path, kind: str, dtype: torch.dtype, safe: bool, **config: Any) -> None:
    """A base, an adapter of it and PEFT's merge, in folders."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    sizes = {"initializer_range": 0.1}
    if kind == "llama":
        sizes |= {"hidden_size": 96, "intermediate_size": 128}
    else:
        sizes |= {"n_embd": 96, "bos_token_id": 0, "eos_token_id": 1}
    with names.quiet():
        model = checkpoints.language_model(kind, **sizes).to(dtype)
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    value.copy_(0.05 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(folder / "adapter")
        fresh = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        merged = PeftModel.from_pretrained(fresh, str(folder / "adapter"))
        merged.merge_and_unload(safe_merge=safe).save_pretrained(folder / "merged")


PEFT = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
}


class TestPeft:
    @pytest.mark.parametrize("safe", [False, True], ids=["default", "safe"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("case", ["llama", "gpt2"])
    def test_plain(self, case: str, dtype: torch.dtype, safe: bool, tmp_path: Path) -> None:
        kind, config = PEFT[case]
        by_peft(tmp_path, kind, dtype, safe, **config)
        report = judged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert right(report)
        assert report.total.gain == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("case", [case for case in PEFT if case not in ("llama", "gpt2")])
    def test_kinds(self, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
        kind, config = PEFT[case]
        by_peft(tmp_path, kind, dtype, False, **config)
        assert right(judged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"))

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_configs_that_savers_rewrite(self, kind: str, tmp_path: Path) -> None:
        """A base whose config transformers 4 wrote; the merge's is newer."""
        from transformers import AutoModelForCausalLM

        by_peft(tmp_path, kind, torch.bfloat16, False, **PEFT[kind][1])
        file = tmp_path / "base" / "config.json"
        config = json.loads(file.read_text())
        config["torch_dtype"] = config.pop("dtype", "bfloat16")
        config["transformers_version"] = "4.31.0"
        if kind == "llama":
            config.pop("rope_parameters", None)
            config.pop("head_dim", None)
            config |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        file.write_text(json.dumps(config))
        with names.quiet():
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
            again.save_pretrained(tmp_path / "again")
        shutil.copy(tmp_path / "again" / "config.json", tmp_path / "merged" / "config.json")
        given = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
        report = judged(*given)
        assert right(report) and not [f for f in report.findings if f.kind == "config"]
        there = tmp_path / "merged" / "config.json"
        config = json.loads(there.read_text())
        if kind == "llama":
            config["rope_parameters"].pop("rope_theta")
        else:
            config["activation_function"] = "relu"
        there.write_text(json.dumps(config))
        report = judged(*given)
        assert report.exit_code == 5 and "config.json has " in report.summary[0]

    def test_the_unmerged_model(self, tmp_path: Path) -> None:
        """Its base's weights, to the last bit."""
        by_peft(tmp_path, "llama", torch.bfloat16, False, **PEFT["llama"][1])
        report = judged(tmp_path / "base", tmp_path / "adapter", tmp_path / "base")
        assert report.exit_code == 5 and "not applied" in report.summary[0]
        assert report.summary[0].startswith("all 14 tensors")


class TestOwn:
    """What `bake` wrote, however it was rounded."""

    @pytest.mark.parametrize("mode", ROUNDS)
    @pytest.mark.parametrize("dtype", TYPES)
    def test_every_rounding(self, mode: str, dtype: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m", dtype)
        both = [adapter(tmp_path / "a"), adapter(tmp_path / "b", 2, 1e-4)]
        made = bake(model, both, [0.7, -0.4], out=tmp_path / "o", round=mode)
        report = judged(model, both, tmp_path / "o", [0.7, -0.4])
        assert right(report)
        for name in ("gain", "error", "subspace_error", "norm", "swallowed"):
            assert getattr(report.total, name) == pytest.approx(
                getattr(made.total, name), rel=1e-3, abs=1e-6
            )
        if mode == "exact":
            assert report.rung == 0

    @pytest.mark.parametrize("mode", ["stochastic", "compensated"])
    def test_a_small_change_is_judged_by_its_representation(
        self, mode: str, tmp_path: Path
    ) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a", size=2e-5)
        bake(model, one, out=tmp_path / "o", round=mode)
        report = judged(model, one, tmp_path / "o")
        assert right(report) and report.representation == "lossy" and report.warnings

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("mode", ["stochastic", "compensated"])
    def test_without_the_sidecar(self, mode: str, dtype: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", dtype), adapter(tmp_path / "a")
        bake(model, one, out=tmp_path / "o", round=mode)
        (tmp_path / "o" / "adapterops.json").unlink()
        report = judged(model, one, tmp_path / "o")
        assert right(report)
        assert mode != "compensated" or dtype == "F32" or "without its" in report.model
        assert judged(model, one, tmp_path / "o", [1.05]).exit_code == 5

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_a_file(self, mode: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", layout="file"), adapter(tmp_path / "a")
        bake(model, one, out=tmp_path / "o", round=mode)
        assert right(judged(model, one, tmp_path / "o.safetensors"))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("own", TYPES)
    @pytest.mark.parametrize("mode", ["exact", "stochastic"])
    def test_in_another_type(self, mode: str, own: str, dtype: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", own), adapter(tmp_path / "a")
        bake(model, one, out=tmp_path / "o", dtype=dtype, round=mode)
        assert right(judged(model, one, tmp_path / "o"))

    @pytest.mark.parametrize(
        ("first", "second"),
        [*zip(ROUNDS, ROUNDS, strict=True), ("exact", "stochastic"), ("compensated", "nearest")],
    )
    def test_one_after_the_other(self, first: str, second: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        both = [adapter(tmp_path / "a"), adapter(tmp_path / "b", 2)]
        bake(model, both[0], out=tmp_path / "o", round=first)
        bake(tmp_path / "o", both[1], out=tmp_path / "p", round=second)
        assert right(judged(model, both, tmp_path / "p"))
        assert judged(model, both[0], tmp_path / "p").exit_code == 5
        assert right(judged(tmp_path / "o", both[1], tmp_path / "p"))

    @pytest.mark.parametrize(
        "case",
        ["embedding", "head", "both-tied", "saved-both", "saved-tied", "tokens", "tokens-of-each",
         "tokens-grown", "grown", "shrunk", "grown-embedding", "untied-grown-both", "biases",
         "gpt2-embedding", "gpt2-biases"],
    )  # fmt: skip
    def test_values_and_ties(self, case: str, tmp_path: Path) -> None:
        kind, tied, _, options = values.LIVE[case]
        bias = {"attention_bias": True} if "biases" in case and kind == "llama" else {}
        with_tie = {"tie_word_embeddings": tied} if kind == "llama" else {}
        model = values.tiny(kind, tmp_path / "base", **with_tie, **bias)
        values.adapter(model, tmp_path / "adapter", **options)
        bake(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "o")
        report = judged(tmp_path / "base", tmp_path / "adapter", tmp_path / "o")
        assert right(report)

    @pytest.mark.parametrize("mode", ["exact", "compensated"])
    @pytest.mark.parametrize(
        ("cls", "config", "sizes", "options"),
        [
            pytest.param("LlamaForCausalLM", "LlamaConfig", {**names.SIZES, **names.APART},
                         {"use_dora": True, "target_modules": names.ALL}, id="dora"),
            pytest.param("LlamaForCausalLM", "LlamaConfig", {**names.SIZES, **names.APART},
                         {"init_lora_weights": "pissa", "target_modules": ["v_proj"]}, id="pissa"),
            pytest.param("Phi3ForCausalLM", "Phi3Config", {**names.SIZES, **names.APART},
                         {"target_modules": names.ALL}, id="fused"),
            pytest.param("MixtralForCausalLM", "MixtralConfig", {**names.SIZES, **names.EXPERTS},
                         {"target_modules": ["q_proj"], "target_parameters": names.PARAMETERS},
                         id="experts"),
            pytest.param("GPT2LMHeadModel", "GPT2Config", names.GPT2,
                         {"target_modules": ["c_attn", "c_proj", "c_fc", "wpe"]}, id="turned"),
        ],
    )  # fmt: skip
    def test_kinds(
        self, cls: str, config: str, sizes: Any, options: Any, mode: str, tmp_path: Path
    ) -> None:
        names.trained(names.made(cls, config, sizes), tmp_path, **options)
        given = tmp_path / "base", tmp_path / "adapter"
        bake(*given, out=tmp_path / "o", round=mode, dtype="bfloat16")
        assert right(judged(*given, tmp_path / "o"))


# the defect: kind of the cause, tensors it strikes, a word that is said
SAID = {
    "not_applied": ("not-applied", 1, "not applied"),
    "wrong_scale": ("wrong-scale", 6, "alpha/√r"),
    "transposed": ("transposed", 1, "transpose"),
    "sign": ("sign", 1, "subtracted"),
    "partial": ("partial-rank", 1, "4 of the change's 8 directions"),
    "twice": ("twice", 6, "merged twice"),
    "other": ("another-adapter", 6, "another change"),
    "zeroed_norm": (None, 0, "zeros"),
    "lost_head": (None, 0, "lm_head.weight is missing"),
}


class TestBroken:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("defect", BROKEN)
    def test_what_went_wrong(self, defect: str, dtype: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m", dtype, "shards")
        one, other = (
            write_peft(tmp_path / f"a{seed}", factors(seed, 2e-3, rank=8, **SIZES))
            for seed in (1, 2)
        )
        merged = broken_checkpoint(defect, model, one, tmp_path / "o", other=other)
        report = judged(model, one, merged)
        kind, count, said = SAID[defect]
        assert (report.implementation, report.exit_code) == ("failed", 5)
        wrong = [t for t in report.tensors.values() if t.implementation == "failed"]
        assert [t.cause.kind for t in wrong] == [kind] * count
        assert said in report.summary[0]
        names = list(report.tensors)
        assert all(report.tensors[n].implementation == "failed" for n in names[:count])

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda s: s.update({"model.norm.weight": s["model.norm.weight"] * 1.01}), "differ"),
            (lambda s: s.pop("model.norm.weight"), "missing"),
            (lambda s: s.update(extra=torch.zeros(3)), "extra is not in the base"),
            (lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(3)}), "adapter's"),
            (lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"] * torch.nan}), "NaN"),
            (lambda s: s.pop(f"{Q}.weight"), "the adapters change it"),
            (lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"][:5].clone()}), "another shape"),
            (
                lambda s: s.update({"model.embed_tokens.weight": s["model.embed_tokens.weight"][:9]
                                    .clone()}),
                "another shape",
            ),
        ],
        ids=["norm", "lost", "extra", "beside", "nan", "lost target", "shape", "vocabulary"],
    )  # fmt: skip
    def test_other_tensors(
        self, spoil: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path
    ) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        tensors = load_file(merged / "model.safetensors")
        spoil(tensors)
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        report = judged(model, one, merged)
        assert report.exit_code == 5 and said in " ".join(report.summary)

    @pytest.mark.parametrize("factor", [1.001, 1.04, 2.0, -1.0, 0.01])
    def test_scales(self, factor: float, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m", "F32"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [scaled(read_adapter(one), factor)], tmp_path / "o")
        report = judged(model, one, merged)
        assert report.exit_code == 5
        found = [t.cause.factor for t in report.tensors.values()]
        assert found == pytest.approx([factor] * 6, rel=2e-3)

    def test_the_baked_model_of_another_base(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        other = bake_models.model(tmp_path / "n", weights(9, **SIZES))
        report = judged(model, one, merge_checkpoint(other, [one], tmp_path / "o"))
        assert report.exit_code == 5 and "another base" in report.summary[0]


class TestOptions:
    def test_max_drift(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a", size=1e-4)
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        found = judged(model, one, merged).total.subspace_error
        assert judged(model, one, merged, max_drift=1.01 * found).exit_code == 0
        report = judged(model, one, merged, max_drift=0.99 * found)
        assert (report.exit_code, report.implementation) == (5, "ok")
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError):
                drift(model, one, merged, max_drift=bad)

    def test_strict(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a", size=1e-4)
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        assert judged(model, one, merged).exit_code == 0
        assert judged(model, one, merged, strict=True).exit_code == 5

    def test_nothing_to_tell_a_merge_by(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a", size=1e-13)
        report = judged(model, one, model)
        assert (report.implementation, report.exit_code) == ("undetermined", 0)
        assert "swallows all" in report.warnings[0]
        assert judged(model, one, model, strict=True).exit_code == 5

    def test_an_adapter_without_effect(self, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        none = {n: (0 * B, A) for n, (B, A) in factors(1, **SIZES).items()}
        report = judged(model, write_peft(tmp_path / "a", none), model)
        assert right(report) and len(report.unchanged) == 6 and report.total is None

    def test_adapters_in_memory(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        two = adapter(tmp_path / "b", 2)
        lazy = 0.5 * ao.open_adapter(one) - 0.25 * ao.open_adapter(two)
        bake(model, lazy, out=tmp_path / "o")
        assert right(judged(os.fspath(model), lazy, tmp_path / "o"))
        assert right(judged(model, [one, two], tmp_path / "o", [0.5, -0.25]))
        assert judged(model, [lazy], tmp_path / "o", [2.0]).exit_code == 5

    @pytest.mark.parametrize("jobs", [1, 2])
    @pytest.mark.parametrize("memory", [None, "64MB"])
    def test_threads_and_memory(self, jobs: int, memory: str | None, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        said: list[tuple[str, int, int]] = []
        first = judged(model, one, merged).to_dict()
        again = judged(
            model, one, merged, jobs=jobs, memory=memory, progress=lambda *a: said.append(a)
        )
        assert again.to_dict() == first
        assert said[-1][1] == said[-1][2] == len(said)

    @pytest.mark.parametrize("kind", ["gram", "samples"])
    def test_activations(self, kind: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        rng = np.random.default_rng(4)
        X = {n: rng.standard_normal((300, A.shape[1])) for n, (_, A) in factors(1, **SIZES).items()}
        gone = next(iter(X))
        X.pop(gone)
        given = {n: (kind, x.T @ x / 300 if kind == "gram" else x) for n, x in X.items()}
        write_activations(tmp_path / "x.safetensors", given, tokens=300, model="tiny")
        report = judged(model, one, merged, activations=tmp_path / "x.safetensors")
        assert right(report) and set(report.forward.modules) == {f"{n}.weight" for n in X}
        assert [gone in name for name in report.forward.without] == [True]
        before, after = bake_models.stored(model), bake_models.stored(merged)
        error = change = 0.0
        for name, D in dense(factors(1, 2e-3, **SIZES)).items():
            if name in X:
                E = after[f"{name}.weight"].values - before[f"{name}.weight"].values - D
                error += np.sum((E @ X[name].T) ** 2)
                change += np.sum((D @ X[name].T) ** 2)
        assert report.forward.to_change == pytest.approx((error / change) ** 0.5, rel=1e-3)

    def test_activations_of_nothing(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        with pytest.raises(FileError):
            drift(model, one, model, activations=tmp_path / "none.safetensors")
        with pytest.raises(FormatError):
            drift(model, one, model, activations=one / "adapter_model.safetensors")


class TestLogits:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_of_a_language_model(self, kind: str, tmp_path: Path) -> None:
        by_peft(tmp_path, kind, torch.bfloat16, False, **PEFT[kind][1])
        given = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
        report = judged(*given, logits=tmp_path / "base")
        assert right(report)
        found = report.logits.random
        assert 0 < found.baked.kl <= 4 * found.floor.kl
        unmerged = judged(*given[:2], tmp_path / "base", logits=tmp_path / "base")
        assert unmerged.logits.random.baked.kl > 10 * found.baked.kl

    def test_no_language_model(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        with pytest.raises(AdapterOpsError) as caught:
            drift(model, one, merged, logits=tmp_path / "a")
        assert caught.value.exit_code in (2, 3, 4)


def planted(folder: Path, dtype: str = "F32") -> tuple[Path, Path]:
    """A base, and an adapter that puts a strange direction on top of two weights."""
    model = bake_models.model(folder / "m", weights(**SIZES), dtype)
    rng = np.random.default_rng(7)
    found = {}
    for name, (B, A) in factors(1, 2e-4, **SIZES).items():
        if "q_proj" in name:
            u, v = rng.standard_normal((len(B), 1)), rng.standard_normal((1, A.shape[1]))
            B = np.concatenate([B[:, :3], 3 * u / np.linalg.norm(u)], 1).astype("f4")
            A = np.concatenate([A[:3], v / np.linalg.norm(v)]).astype("f4")
        found[name] = B, A
    return model, write_peft(folder / "a", found)


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """ΔW of each module of an adapter."""
    found = read_adapter(folder)
    return {
        name: scale * (B.double() @ A.double()).numpy() for name, (B, A, scale) in found.items()
    }


class TestIntruders:
    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_planted_ones_are_found(self, dtype: str, tmp_path: Path) -> None:
        model, one = planted(tmp_path, dtype)
        bake(model, one, out=tmp_path / "o")
        said: list[str] = []
        report = judged(
            model, one, tmp_path / "o", intruders=True, progress=lambda what, *_: said.append(what)
        )
        assert right(report) and "decompositions" in said
        assert {n: len(i.dims) for n, i in report.intruders.items()} == {
            n: int("q_proj" in n) for n in report.tensors
        }

    @pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
    def test_mitigation(self, weight: float, tmp_path: Path) -> None:
        model, one = planted(tmp_path)
        out = tmp_path / "b"
        report = judged(model, one, weights=[weight], mitigate=out, strength=0.0)
        assert report.mitigated == os.fspath(out) and report.notes[-1].startswith("2 intruders")
        before, after = deltas(one), deltas(out)
        changed = {n for n in before if np.abs(before[n] - after[n]).max() > 1e-6}
        assert changed == {n for n in before if "q_proj" in n}
        bake(model, out, [weight], out=tmp_path / "o")
        again = judged(model, out, tmp_path / "o", [weight], intruders=True)
        assert right(again) and sum(len(i.dims) for i in again.intruders.values()) == 0

    def test_mitigated_adapters_load(self, tmp_path: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        by_peft(tmp_path, "llama", torch.float32, False, **PEFT["llama"][1])
        out = tmp_path / "mitigated"
        judged(tmp_path / "base", tmp_path / "adapter", mitigate=out, strength=0.0)
        with names.quiet():
            fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            found = peft_models.deltas(PeftModel.from_pretrained(fresh, str(out)))
        mine = deltas(out)
        assert found.keys() == mine.keys()
        for name, delta in found.items():
            np.testing.assert_allclose(delta, mine[name], atol=1e-6)

    def test_what_mitigation_refuses(self, tmp_path: Path) -> None:
        model, one = planted(tmp_path)
        with pytest.raises(UsageError, match="one adapter"):
            drift(model, [one, one], mitigate=tmp_path / "b")
        with pytest.raises(UsageError):
            drift(model, one, mitigate=tmp_path / "a")
        with pytest.raises(UsageError):
            drift(model, one, mitigate=tmp_path / "b", strength=float("nan"))
        assert not (tmp_path / "b").exists()


class TestChain:
    @pytest.mark.parametrize("with_baked", [False, True])
    def test_the_error_grows_with_the_root(self, with_baked: bool, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        several = [adapter(tmp_path / f"a{k}", k, 1e-3) for k in range(4)]
        merged = merge_checkpoint(model, several, tmp_path / "o") if with_baked else None
        report = judged(model, several, merged, chain=True)
        assert [step.adapters for step in report.chain.steps] == [1, 2, 3, 4]
        growth = [step.growth for step in report.chain.steps]
        assert growth[0] == 1 and growth[-1] == pytest.approx(2, rel=0.25)
        if with_baked:
            assert right(report) and report.rung > 1
            last = report.chain.steps[-1].sequential
            assert last.error == pytest.approx(report.total.error * report.total.norm, rel=0.05)
        else:
            assert report.implementation == "undetermined" and report.exit_code == 0
            assert report.baked == "" and report.total is None

    @pytest.mark.parametrize("mode", ROUNDS)
    def test_is_what_baking_in_turn_comes_to(self, mode: str, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        both = [adapter(tmp_path / "a"), adapter(tmp_path / "b", 2)]
        step = judged(model, both, chain=True, round=mode, seed=3).chain.steps[-1]
        bake(model, both[0], out=tmp_path / "o", round=mode, seed=3)
        bake(tmp_path / "o", both[1], out=tmp_path / "p", round=mode, seed=4)
        total = judged(model, both, tmp_path / "p").total
        assert step.sequential.relative_error == pytest.approx(total.error, rel=1e-3)
        assert step.sequential.gain == pytest.approx(total.gain, rel=1e-4)

    def test_intruders(self, tmp_path: Path) -> None:
        model, one = planted(tmp_path)
        two = adapter(tmp_path / "b", 2, 1e-4)
        report = judged(model, [two, one], chain=True, intruders=True)
        assert [step.sequential.intruders for step in report.chain.steps] == [0, 2]


class TestErrors:
    def test_files_that_are_not_there(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        for given in ((tmp_path / "x", one, model), (model, tmp_path / "x", model),
                      (model, one, tmp_path / "x")):  # fmt: skip
            with pytest.raises(AdapterOpsError) as caught:
                drift(*given)
            assert caught.value.exit_code == 6

    def test_another_models_adapter(self, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        odd = {"rows": 64, "columns": 32}
        one = write_peft(tmp_path / "a", factors(1, **odd))
        with pytest.raises(IncompatibleError) as caught:
            drift(model, one, model)
        assert caught.value.exit_code == 4
        one = write_peft(tmp_path / "b", pairs(1, {"transformer.h.0.attn": (24, 24)}, 2))
        with pytest.raises(IncompatibleError):
            drift(model, one, model)

    @pytest.mark.parametrize("which", ["base", "baked"])
    def test_quantised(self, which: str, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        other = tmp_path / "q"
        shutil.copytree(model, other)
        config = json.loads((other / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match="gptq") as caught:
            drift(*((other, one, model) if which == "base" else (model, one, other)))
        assert caught.value.exit_code == 4

    def test_a_baked_model_that_is_an_adapter(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        with pytest.raises(AdapterOpsError) as caught:
            drift(model, one, one)
        assert caught.value.exit_code in (3, 4)

    def test_a_truncated_model(self, tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        merged = merge_checkpoint(model, [one], tmp_path / "o")
        os.truncate(merged / "model.safetensors", 90000)
        with pytest.raises(FormatError) as caught:
            drift(model, one, merged)
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize(
        "options",
        [{}, {"max_drift": 0.1, "chain": True}, {"activations": "x", "chain": True},
         {"logits": "x", "mitigate": "y"}, {"chain": True, "round": "up"},
         {"chain": True, "seed": -1}, {"chain": True, "extras": "none"},
         {"mitigate": "y", "intruders": True}, {"chain": True, "weights": [1.0, 2.0]}],
        ids=lambda options: ",".join(options) or "none",
    )  # fmt: skip
    def test_usage(self, options: dict[str, Any], tmp_path: Path) -> None:
        model, one = base(tmp_path / "m"), adapter(tmp_path / "a")
        with pytest.raises(UsageError):
            drift(model, one, **options)

    def test_no_adapters(self, tmp_path: Path) -> None:
        model = base(tmp_path / "m")
        with pytest.raises(UsageError):
            drift(model, [], model)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a base `m`, adapters `a` and `b`, and merges of a, of both, and a wrong one."""
    model = base(tmp_path / "m")
    one, two = (
        write_peft(tmp_path / name, factors(seed, 2e-3, rank=8, **SIZES))
        for seed, name in ((1, "a"), (2, "b"))
    )
    merge_checkpoint(model, [one], tmp_path / "o")
    merge_checkpoint(model, [one, two], tmp_path / "both")
    broken_checkpoint("wrong_scale", model, one, tmp_path / "wrong")
    return tmp_path


class TestCommand:
    @pytest.mark.parametrize("verb", ["drift", "verify"])
    def test_a_right_merge(self, verb: str, here: Path) -> None:
        done = call(verb, "m", "a", "o", cwd=here)
        assert done.stdout.startswith("o  implementation right") and "gain" in done.stdout
        assert "identical" in done.stdout

    def test_a_wrong_merge(self, here: Path) -> None:
        done = call("drift", "m", "a", "wrong", cwd=here, code=5)
        assert "WRONG" in done.stdout and "alpha/√r" in done.stdout
        document = json.loads(call("drift", "m", "a", "wrong", "--json", cwd=here, code=5).stdout)
        assert document["implementation"] == "failed" and document["exit_code"] == 5

    def test_what_is_wrong_beside_the_targets_is_said_once(self, here: Path) -> None:
        """A summary names three, the rest follows."""
        tensors = load_file(here / "o" / "model.safetensors")
        lost = sorted(name for name in tensors if ".layers." in name)[:5]
        for name in lost:
            del tensors[name]
        save_file(tensors, here / "o" / "model.safetensors")
        out = call("drift", "m", "a", "o", cwd=here, code=5).stdout
        assert [out.count(f"{name} is missing") for name in lost] == [1] * 5
        assert "and 2 more like these" in out

    def test_weights(self, here: Path) -> None:
        call("drift", "m", "a", "b", "both", cwd=here)
        call("drift", "m", "a:1", "b:1.0", "both", cwd=here)
        call("drift", "m", "a:1", "b", "both", cwd=here, code=2)
        call("drift", "m", "a", "b", "both", "-w", "1,1", cwd=here)
        done = call("drift", "m", "a:0.5", "b:1", "both", cwd=here, code=5)
        assert "2 times as strong" in done.stdout
        call("drift", "m", "a", "both", cwd=here, code=5)
        call("drift", "m", "a:1", "b", "both", "-w", "1,1", cwd=here, code=2)
        call("drift", "m", "a", "b", "both", "-w", "1", cwd=here, code=2)

    def test_json_is_one_document(self, here: Path) -> None:
        done = call("drift", "m", "a", "b", "both", "--json", "--intruders", "--chain", cwd=here)
        document = json.loads(done.stdout)
        assert document["schema"] == "adapterops.drift/1" and document["exit_code"] == 0
        assert document["adapters"] == [["a", 1.0], ["b", 1.0]] and document["baked"] == "both"
        assert len(document["chain"]["steps"]) == 2 and len(document["intruders"]) == 6
        tensor = document["tensors"][f"{Q}.weight"]
        assert tensor["shape"] == [128, 128] and tensor["dtype"] == "bfloat16"

    def test_quiet_and_verbose(self, here: Path) -> None:
        done = call("drift", "m", "a", "o", "-q", cwd=here)
        assert done.stdout == ""
        assert call("drift", "m", "a", "wrong", "-q", cwd=here, code=5).stdout == ""
        done = call("drift", "m", "a", "o", "-v", cwd=here)
        assert all(f"{name}.weight" in done.stdout for name in factors(1, **SIZES))

    def test_max_drift_and_strict(self, here: Path) -> None:
        done = call("drift", "m", "a", "o", "--max-drift", "1e-9", cwd=here, code=5)
        assert "above --max-drift" in done.stdout
        call("drift", "m", "a", "o", "--max-drift", "0.5", cwd=here)
        call("drift", "m", "a", "o", "--max-drift", "-1", cwd=here, code=2)
        adapter(here / "s", size=1e-4)
        merge_checkpoint(here / "m", [here / "s"], here / "t")
        assert "warning: " in call("drift", "m", "s", "t", cwd=here).stderr
        call("drift", "m", "s", "t", "--strict", cwd=here, code=5)

    def test_a_chain(self, here: Path) -> None:
        done = call("drift", "m", "a", "b", "--chain", cwd=here)
        assert "one by one" in done.stdout and "implementation" not in done.stdout
        done = call("drift", "m", "a:0.5", "b:2", "--chain", "--round", "stochastic", cwd=here)
        assert "growth" in done.stdout
        done = call("drift", "m", "a", "b", "both", "--chain", cwd=here)
        assert "one by one" in done.stdout and "implementation right" in done.stdout

    def test_mitigate(self, here: Path) -> None:
        done = call("drift", "m", "a", "--mitigate", "c", cwd=here)
        assert "intruders scaled by 0.75 in c" in done.stdout
        assert (here / "c" / "adapter_config.json").is_file()
        call("drift", "m", "a", "--mitigate", "c", cwd=here, code=2)
        call("drift", "m", "a", "--mitigate", "c", "--overwrite", cwd=here)
        call("drift", "m", "a", "--mitigate", "a", "--overwrite", cwd=here, code=2)
        call("drift", "m", "a", "b", "--mitigate", "d", cwd=here, code=2)

    @pytest.mark.parametrize(
        ("given", "code"),
        [("m a", 2), ("m a none", 6), ("m none o", 6), ("none a o", 6), ("m a a", 3),
         ("m a o --modules (", 2), ("m a o --modules nothing", 2), ("m a o --bogus", 2),
         ("m a:nan o", 2), ("m a o --activations none", 6), ("m a o --extras x", 2)],
    )  # fmt: skip
    def test_codes(self, given: str, code: int, here: Path) -> None:
        done = call("drift", *given.split(), cwd=here, code=code)
        assert done.stdout == "" and "rror" in done.stderr

    def test_errors_are_json_too(self, here: Path) -> None:
        done = call("drift", "m", "none", "o", "--json", cwd=here, code=6)
        assert done.stdout == "" or json.loads(done.stdout)
