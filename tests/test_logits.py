"""Predictions of baked models against the adapter on the fly: PEFT in float32 is the oracle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterops import casts
from adapterops.basemodel import open_model
from adapterops.changes.mapping import changes
from adapterops.errors import IncompatibleError, UnsupportedError, UsageError
from adapterops.inputs import open_for_base
from adapterops.judging.logits import LogitsReport, compare_logits
from adapterops.judging.texts import SENTENCES, random_tokens, text_tokens
from tests import checkpoints, peft_models

KINDS = ("llama", "gpt2")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Tiny models in every type, with weights of usual sizes."""
    result = {}
    for kind in KINDS:
        for dtype in ("bfloat16", "float16", "float32"):
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            model = checkpoints.language_model(kind, **_ends(kind), initializer_range=0.2)
            with peft_models.quiet():
                model.to(getattr(torch, dtype)).save_pretrained(folder)
            result[kind, dtype] = folder
    return result


def _ends(kind: str) -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 1} if kind == "gpt2" else {}


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapter(base: Path, folder: Path, kind: str, size: float = 0.02, **config: Any) -> Path:
    """A random adapter as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    with peft_models.quiet():
        options = {"r": 2, "target_modules": TARGETS[kind], **config}
        adapted = get_peft_model(loaded(base, torch.float32), LoraConfig(**options))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_magnitude" in name:
                    value.mul_(1 + size * torch.rand(value.shape, generator=generator))
                elif "lora_" in name:
                    value.copy_(size**0.5 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder


def on_the_fly(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel

    with peft_models.quiet():
        return (
            PeftModel.from_pretrained(
                loaded(base, dtype), str(folder), autocast_adapter_dtype=False
            )
            .eval()
            .to(dtype)
        )


def baked(base: Path, folder: Path, out: Path, scale: float = 1.0) -> Path:
    """PEFT's deltas times `scale`, added in float64 and rounded once."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    model = on_the_fly(base, folder)
    for name, delta in peft_models.deltas(model).items():
        W = tensors[f"{name}.weight"]
        form = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[W.dtype]
        tensors[f"{name}.weight"] = casts.store(W.double() + scale * torch.from_numpy(delta), form)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def compared(base: Path, folder: Path, merged: Path, **options: Any) -> LogitsReport:
    model = open_model(base)
    ((_, file),) = open_for_base([folder], model)[0].terms
    found = changes(model, [file], [1.0])
    return compare_logits(model, found, open_model(merged), **options)


def agreement(reference: Any, other: Any, tokens: list[torch.Tensor]) -> tuple[float, float]:
    """Mean KL and equal first choices, by the definition."""
    divergences, same = [], []
    with torch.no_grad():
        for ids in tokens:
            one, two = (model(ids[None]).logits[0].double() for model in (reference, other))
            p, q = torch.softmax(one, -1), torch.softmax(two, -1)
            divergences += (p * (p.log() - q.log())).sum(-1).tolist()
            same += (one.argmax(-1) == two.argmax(-1)).tolist()
    return float(np.mean(divergences)), float(np.mean(same))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_peft(tmp_path, bases, kind, dtype):
    base = bases[kind, dtype]
    folder = adapter(base, tmp_path / "a", kind)
    merged = baked(base, folder, tmp_path / "m")
    report = compared(base, folder, merged)
    assert report.dtype == dtype and report.text is None and report.notes == ()
    found = report.random
    tokens = random_tokens(32, 16 if kind == "gpt2" else None)
    assert found.positions == sum(map(len, tokens)) == (64 if kind == "gpt2" else 192)
    reference = on_the_fly(base, folder)
    form = getattr(torch, dtype)
    for mine, other, tolerance in (
        (found.baked, loaded(merged, torch.float32), 1e-3),
        (found.in_dtype, loaded(merged, form), 1e-3),
        (found.floor, on_the_fly(base, folder, form), 0.5),  # PEFT rounds A·x, here D is rounded
    ):
        kl, top1 = agreement(reference, other, tokens)
        assert mine.kl == pytest.approx(kl, rel=tolerance)
        assert mine.top1 == pytest.approx(top1, abs=0.02 if tolerance > 0.1 else 1e-9)
        assert mine.largest >= mine.kl > 0
    assert found.baked.kl < found.in_dtype.kl


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_nothing_is_lost(tmp_path, bases, kind):
    base = bases[kind, "float32"]
    folder = adapter(base, tmp_path / "a", kind)
    report = compared(base, folder, baked(base, folder, tmp_path / "m"))
    for each in (report.random.baked, report.random.in_dtype, report.random.floor):
        assert each.kl < 1e-10 and each.top1 == 1.0
    assert report.notes == ()


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0], ids=["not applied", "sign", "twice"])
def test_a_wrong_merge_is_far_above_the_floor(tmp_path, bases, scale):
    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama", size=0.1)
    report = compared(base, folder, baked(base, folder, tmp_path / "m", scale))
    assert report.random.in_dtype.kl > 20 * report.random.floor.kl
    assert report.random.baked.top1 < 0.9
    assert len(report.notes) == 1
    assert "times as far from the adapter on the fly" in report.notes[0]
    again = compared(base, folder, tmp_path / "m")
    assert again == report  # the same tokens, the same figures
    assert json.loads(json.dumps(report.to_dict()))["random"]["positions"] == 192


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"lora_bias": True, "target_modules": ["c_fc"]},
    ],
    ids=["embedding", "dora", "head", "bias"],
)
def test_changes_of_other_kinds(tmp_path, bases, config):
    """W + D is what PEFT computes for them too, and the floor has a hook for each."""
    kind = "gpt2" if "lora_bias" in config else "llama"
    base = bases[kind, "bfloat16"]
    folder = adapter(base, tmp_path / "a", kind, **config)
    merged = tmp_path / "m"
    shutil.copytree(base, merged)
    report = compared(base, folder, merged)  # the base itself: how far the adapter goes
    tokens = random_tokens(32, 16 if kind == "gpt2" else None)
    reference = on_the_fly(base, folder)
    kl, _ = agreement(reference, loaded(merged, torch.float32), tokens)
    assert report.random.baked.kl == pytest.approx(kl, rel=1e-3)
    floor, _ = agreement(reference, on_the_fly(base, folder, torch.bfloat16), tokens)
    assert report.random.floor.kl == pytest.approx(floor, rel=0.6)
    assert not any("rounded in" in note for note in report.notes)


def tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of single words, most of them unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = sorted({word for text in SENTENCES for word in text.split()})[: words - 1]
    vocabulary = {word: index for index, word in enumerate(["?", *found])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder)


def test_plain_text_where_there_is_a_tokenizer(tmp_path, bases, capfd):
    base = shutil.copytree(bases["llama", "bfloat16"], tmp_path / "b")
    tokenizer(base, 32)
    folder = adapter(base, tmp_path / "a", "llama")
    merged = baked(base, folder, tmp_path / "m")
    capfd.readouterr()
    report = compared(base, folder, merged)
    assert capfd.readouterr() == ("", "")  # no progress bars, no reports
    tokens, problem = text_tokens(base, 32, None)
    assert (len(tokens), problem) == (len(SENTENCES), "")
    assert report.text.positions == sum(map(len, tokens)) > 100
    kl, top1 = agreement(on_the_fly(base, folder), loaded(merged, torch.float32), tokens)
    assert report.text.baked.kl == pytest.approx(kl, rel=1e-3)
    assert report.text.baked.top1 == pytest.approx(top1)
    assert report.random == compared(bases["llama", "bfloat16"], folder, merged).random


@pytest.mark.parametrize(
    ("damage", "said"),
    [("large", "is of another model: it has more tokens"), ("broken", "cannot be used")],
    ids=["large", "broken"],
)
def test_a_tokenizer_that_is_not_the_models_is_said(tmp_path, damage, said):
    tokenizer(tmp_path, 60)
    if damage == "broken":
        (tmp_path / "tokenizer.json").write_text("{")
    tokens, problem = text_tokens(tmp_path, 32, None)
    assert tokens == [] and said in problem
    assert "\n" not in problem


def test_token_sets_do_not_change():
    tokens = random_tokens(1000, None)
    assert [len(ids) for ids in tokens] == [48] * 4
    assert tokens[0][:6].tolist() == random_tokens(1000, 6)[0].tolist()
    assert all(0 <= int(ids.min()) <= int(ids.max()) < 1000 for ids in tokens)
    assert not torch.equal(tokens[0], random_tokens(1000, None, seed=1)[0])
    raw = np.random.Philox(key=0).random_raw(2)
    assert tokens[0][:2].tolist() == [int(word) % 1000 for word in raw]


def test_a_single_file_takes_the_folder_of_its_config(tmp_path, bases):
    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama")
    merged = baked(base, folder, tmp_path / "m")
    alone = tmp_path / "alone"
    alone.mkdir()
    file = shutil.copy(base / "model.safetensors", alone / "weights.safetensors")
    with pytest.raises(UsageError, match=r"alone: holds no config\.json"):
        compared(Path(file), folder, merged)
    assert compared(Path(file), folder, merged, model=base) == compared(base, folder, merged)


def test_without_transformers(tmp_path, bases, monkeypatch):
    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'adapterops\[models\]'"):
        compared(base, folder, base)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
        {"model_type": "unheard-of", "architectures": ["UnheardOfForCausalLM"]},
        {"model_type": "vit"},
        {},
    ],
    ids=["classifier", "unknown", "no-language", "nothing"],
)
def test_models_that_are_no_causal_language_models(tmp_path, bases, config):
    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama")
    other = tmp_path / "config"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="only the predictions of causal language models"):
        compared(base, folder, base, model=other)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_merge_that_does_not_make_up_the_model(tmp_path, bases, damage):
    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama")
    merged = shutil.copytree(base, tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    value = tensors.pop(name)
    if damage == "shape":
        tensors[name] = value.T.contiguous()
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"up_proj\.weight"):
        compared(base, folder, merged)


def test_logits_beyond_the_type_are_none(tmp_path, bases):
    base = shutil.copytree(bases["llama", "float16"], tmp_path / "b")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() * 1e5).clamp(-6e4, 6e4).half()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = adapter(base, tmp_path / "a", "llama")
    report = compared(base, folder, baked(base, folder, tmp_path / "m"))
    assert report.random.in_dtype.kl is report.random.floor.top1 is None
    assert report.random.baked.kl is not None
    assert report.notes == ("logits in float16 are not finite",)


def test_settings_are_restored(tmp_path, bases):
    import transformers

    base = bases["llama", "bfloat16"]
    folder = adapter(base, tmp_path / "a", "llama")
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads())
    compared(base, folder, base)
    after = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads())
    assert after == before
    assert torch.is_grad_enabled()
