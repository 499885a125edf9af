"""extract: the difference of two checkpoints as a LoRA, with its error, reloaded by PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterops.certificate import PlanReport, Report
from adapterops.errors import (
    BudgetError,
    FileError,
    FormatError,
    IncompatibleError,
    NumericsError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from adapterops.verbs.extract import extract
from tests import architectures, checkpoints, image_models
from tests.peft_models import quiet
from tests.support import load_file, read_peft


def made(base: Path, tuned: Path, out: Path, **options: Any) -> Report:
    report = extract(base, tuned, out=out, **{"rank": 4, "jobs": 1, **options})
    assert isinstance(report, Report)
    return report


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model's folder in float64."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x.astype(float) for file in files for name, x in load_file(file).items()}


def deltas(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """tuned − base of every matrix."""
    one, other = values(base), values(tuned)
    return {
        name.removesuffix(".weight"): other[name] - one[name]
        for name in other
        if other[name].ndim == 2
    }


def two(tmp_path: Path, dtype: str = "F32", rank: int = 4, **options: Any) -> tuple[Path, Path]:
    plain = checkpoints.weights()
    base = checkpoints.write(tmp_path / "base", plain, dtype)
    changed = checkpoints.plus(plain, rank, **options)
    return base, checkpoints.write(tmp_path / "tuned", changed, dtype)


class TestFigures:
    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    @pytest.mark.parametrize("rank", [2, 4])
    def test_the_error_is_that_of_what_was_written(self, dtype: str, rank: int, tmp_path: Path):
        base, tuned = two(tmp_path, dtype)
        report = made(base, tuned, tmp_path / "out", rank=rank)
        exact, written = deltas(base, tuned), read_peft(tmp_path / "out")
        assert exact.keys() == written.keys() == report.modules.keys()
        whole = sum(np.sum(x**2) for x in exact.values())
        lost = sum(np.sum((written[k] - x) ** 2) for k, x in exact.items())
        best = sum(np.sum(np.linalg.svd(x)[1][rank:] ** 2) for x in exact.values())
        assert report.norm == pytest.approx(np.sqrt(whole), rel=1e-12)
        assert report.error == pytest.approx(np.sqrt(lost / whole), rel=1e-6)
        assert report.truncation == pytest.approx(np.sqrt(best / whole), rel=1e-4)
        for stem, module in report.modules.items():
            gap = np.linalg.norm(written[stem] - exact[stem]) / np.linalg.norm(exact[stem])
            assert module.error == pytest.approx(gap, rel=1e-6)
            kept = np.sum(written[stem] * exact[stem]) / np.sum(exact[stem] ** 2)
            assert module.retention[0] == pytest.approx(kept, rel=1e-9)
            assert module.changed == np.mean(exact[stem] != 0)

    @pytest.mark.parametrize(
        ("dtype", "limit"), [("F32", 1e-6), ("BF16", 1e-2), ("F16", 1e-3)], ids=str
    )
    def test_a_planted_delta_comes_back(self, dtype: str, limit: float, tmp_path: Path):
        """Up to the rounding of the tuned weights and of the factors."""
        plain = checkpoints.weights(rows=96, columns=80)
        changed = checkpoints.plus(plain, 8, size=3e-2)
        base = checkpoints.write(tmp_path / "base", plain, dtype)
        tuned = checkpoints.write(tmp_path / "tuned", changed, dtype)
        made(base, tuned, tmp_path / "out", rank=8)
        for stem, written in read_peft(tmp_path / "out").items():
            planted = changed[f"{stem}.weight"] - plain[f"{stem}.weight"]
            assert np.linalg.norm(written - planted) < limit * np.linalg.norm(planted)

    def test_energy_max_error_and_size_choose_the_rank(self, tmp_path: Path):
        base, tuned = two(tmp_path, rank=12)
        exact = deltas(base, tuned)
        squares = sum(np.linalg.svd(x)[1] ** 2 for x in exact.values())
        kept = np.cumsum(squares) / np.sum(squares)
        by_energy = made(base, tuned, tmp_path / "e", rank=None, energy=0.9)
        assert by_energy.rank == int(np.argmax(kept >= 0.9)) + 1
        by_error = made(base, tuned, tmp_path / "m", rank=None, max_error=0.2)
        assert by_error.rank == int(np.argmax(1 - kept <= 0.04)) + 1 and by_error.error <= 0.2
        by_size = made(base, tuned, tmp_path / "s", rank=None, size=9000)
        assert (tmp_path / "s" / "adapter_model.safetensors").stat().st_size == by_size.size <= 9000
        assert 1 <= by_size.rank < by_energy.rank

    def test_only_the_first_directions_are_computed(self, tmp_path: Path):
        """With --max-rank far below the size, what is beyond is known as one number."""
        plain = checkpoints.weights(rows=300, columns=260, layers=1)
        base = checkpoints.write(tmp_path / "base", plain)
        rng = np.random.default_rng(0)
        noisy = {k: v + 1e-4 * rng.standard_normal(v.shape) for k, v in plain.items()}
        tuned = checkpoints.write(tmp_path / "tuned", checkpoints.plus(noisy, 6, size=1e-3))
        options = {"rank": None, "max_rank": 16, "vectors": "drop"}
        report = made(base, tuned, tmp_path / "out", max_error=0.1, **options)
        assert report.rank <= 6 and report.error <= 0.1
        with pytest.raises(BudgetError, match=r"max-error 0.001.*allow a larger error$"):
            made(base, tuned, tmp_path / "no", max_error=1e-3, **options)
        assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_rounding_is_the_reason_only_of_coarse_checkpoints(self, dtype: str, tmp_path: Path):
        base, tuned = two(tmp_path, dtype, rank=20)
        with pytest.raises(BudgetError) as caught:
            made(base, tuned, tmp_path / "no", rank=None, energy=0.9999, max_rank=4)
        assert ("what rounding to bfloat16 left" in str(caught.value)) is (dtype == "BF16")

    def test_a_size_that_nothing_fits_has_a_way_out_that_extract_has(self, tmp_path: Path):
        base, tuned = two(tmp_path, "BF16")
        with pytest.raises(BudgetError, match=r"narrower --dtype$") as caught:
            made(base, tuned, tmp_path / "no", rank=None, size=100)
        assert "allocate" not in str(caught.value)

    @pytest.mark.parametrize("form", ["svd", "orthonormal-a", "orthonormal-b"])
    def test_forms(self, form: Any, tmp_path: Path):
        base, tuned = two(tmp_path)
        report = made(base, tuned, tmp_path / "out", form=form)
        assert report.error < 1e-6
        side = "A" if form == "orthonormal-a" else "B"
        for name, factor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
            if f"lora_{side}" in name and form != "svd":
                wide = factor if side == "A" else factor.T
                np.testing.assert_allclose(wide @ wide.T, np.eye(4), atol=1e-6)


class TestRounding:
    def test_a_difference_of_rounding_alone_is_said(self, tmp_path: Path):
        """bfloat16 weights moved by less than half of their last place and rounded again."""
        plain = {k: v for k, v in checkpoints.weights().items() if "norm" not in k}
        base = checkpoints.write(tmp_path / "base", plain, "F32")
        tuned = checkpoints.write(tmp_path / "tuned", plain, "BF16")
        report = made(base, tuned, tmp_path / "out")
        assert any("times what rounding to bfloat16 alone makes" in note for note in report.notes)
        for module in report.modules.values():
            assert module.noise is not None and module.norm == pytest.approx(module.noise, rel=0.1)

    def test_a_trained_difference_is_not(self, tmp_path: Path):
        base, tuned = two(tmp_path, "BF16", size=0.1)
        assert not any("rounding" in note for note in made(base, tuned, tmp_path / "out").notes)

    def test_single_modules_at_the_level_of_rounding_are_named(self, tmp_path: Path):
        plain = {k: v for k, v in checkpoints.weights().items() if "norm" not in k}
        base = checkpoints.write(tmp_path / "base", plain, "F32")
        changed = checkpoints.plus(plain, 4, part="q_proj", size=0.1)
        tuned = checkpoints.write(tmp_path / "tuned", changed, "BF16")
        [note] = [n for n in made(base, tuned, tmp_path / "out").notes if "rounding" in n]
        assert note.startswith("3 modules") and "model.layers.0.o_proj" in note

    def test_the_noise_of_numbers_whose_squares_overflow(self, tmp_path: Path):
        plain = {"q_proj.weight": np.full((8, 8), 1e30)}
        base = checkpoints.write(tmp_path / "base", plain)
        tuned = checkpoints.write(tmp_path / "tuned", checkpoints.plus(plain, 2, size=1e30))
        report = made(base, tuned, tmp_path / "out")
        assert not any("rounding" in note for note in report.notes)
        ulp = 2.0 ** (np.floor(np.log2(1e30)) - 23)
        noise = report.modules["q_proj"].noise
        assert noise is not None and 0.1 < noise / (8 * ulp / 12**0.5) < 10


class TestDeterminism:
    @pytest.mark.parametrize(
        "options",
        [{"jobs": 3}, {"memory": "1MB"}, {"jobs": 2, "memory": "40MB"}],
        ids=["jobs", "memory", "both"],
    )
    def test_the_same_bytes(self, options: dict[str, Any], tmp_path: Path):
        base, tuned = two(tmp_path, "BF16", rank=20)
        for name, more in (("one", {"jobs": 1}), ("two", options)):
            made(base, tuned, tmp_path / name, **more)
        files = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_sharded_and_single_give_the_same_tensors(self, tmp_path: Path):
        plain = checkpoints.weights()
        changed = checkpoints.plus(plain, 20)
        written = []
        for shards, other in ((1, 3), (4, 1), (3, 2)):
            base = checkpoints.write(tmp_path / f"b{shards}", plain, shards=shards)
            tuned = checkpoints.write(tmp_path / f"t{shards}", changed, shards=other)
            made(base, tuned, tmp_path / f"o{shards}")
            written.append(load_file(tmp_path / f"o{shards}" / "adapter_model.safetensors"))
        for other_tensors in written[1:]:
            assert written[0].keys() == other_tensors.keys()
            assert all((written[0][k] == other_tensors[k]).all() for k in written[0])

    def test_a_single_file_an_index_and_a_link(self, tmp_path: Path):
        """Hub caches are folders of links to files of other names."""
        plain = checkpoints.weights()
        base = checkpoints.write(tmp_path / "base", plain, shards=2)
        tuned = checkpoints.write(tmp_path / "tuned", checkpoints.plus(plain, 4))
        cache = tmp_path / "models--org--tuned" / "snapshots" / "0a1b"
        cache.mkdir(parents=True)
        (tuned / "model.safetensors").rename(tmp_path / "blob")
        (cache / "model.safetensors").symlink_to(tmp_path / "blob")
        one = made(base / checkpoints.INDEX, cache, tmp_path / "one")
        two = made(base, cache / "model.safetensors", tmp_path / "two")
        assert one.error == two.error and one.inputs[0].name == "tuned − base"


class TestLanguageModels:
    """The adapter on the base computes what the tuned model computes, as PEFT 0.21 loads it."""

    def reloaded(self, kind: str, folder: Path, **config: Any) -> Any:
        from peft import PeftModel

        model = checkpoints.language_model(kind, **config)
        with quiet():
            return PeftModel.from_pretrained(model, str(folder)).eval()

    @pytest.mark.parametrize(
        ("kind", "config", "wanted"),
        [
            ("llama", {}, ""),
            ("llama", {"tie_word_embeddings": True}, ""),
            ("llama", {"attention_bias": True, "mlp_bias": True}, ""),
            ("llama", {}, "layers.1"),
            ("llama", {"attention_bias": True}, "self_attn.q_proj"),
            ("gpt2", {}, ""),
            ("gpt2", {"tie_word_embeddings": False}, ""),
            ("gpt2", {}, "h.0.attn"),
            ("bert", {}, ""),
            ("bert", {}, "encoder.layer.1"),
        ],
        ids=[
            "llama",
            "llama-tied",
            "llama-biases",
            "llama-one-layer",
            "llama-biases-in-part",
            "gpt2-tied",
            "gpt2",
            "gpt2-in-part",
            "bert",
            "bert-in-part",
        ],
    )
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_logits(self, kind: str, config: dict[str, Any], wanted: str, tmp_path: Path):
        model = checkpoints.language_model(kind, **config)
        before = checkpoints.logits(model)
        model.save_pretrained(tmp_path / "base")
        checkpoints.change(model, lambda name: wanted in name)
        model.save_pretrained(tmp_path / "tuned")
        after = checkpoints.logits(model)
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
        assert report.error < 1e-6 and not report.warnings
        got = checkpoints.logits(self.reloaded(kind, tmp_path / "out", **config))
        assert np.abs(after - before).max() > 1e-3
        assert np.abs(got - after).max() < 2e-5 * max(1.0, np.abs(after).max())

    def test_a_tied_head_is_adapted_beside_its_embedding(self, tmp_path: Path):
        model = checkpoints.language_model("llama", tie_word_embeddings=True)
        model.save_pretrained(tmp_path / "base")
        checkpoints.change(model, lambda name: "embed" in name).save_pretrained(tmp_path / "tuned")
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
        sizes = {stem: module.shape for stem, module in report.modules.items()}
        assert sizes == {"lm_head": (32, 24), "model.embed_tokens": (24, 32)}

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_a_head_that_training_untied(self, tmp_path: Path):
        model = checkpoints.language_model("llama", tie_word_embeddings=True)
        model.save_pretrained(tmp_path / "base")
        tensors = values(tmp_path / "base")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][3] += 0.5
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["tie_word_embeddings"] = False
        checkpoints.write(tmp_path / "tuned", tensors, config=config)
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
        assert set(report.modules) == {"lm_head"} and report.error < 1e-6
        got = self.reloaded("llama", tmp_path / "out", tie_word_embeddings=True)
        apart = checkpoints.logits(got) - checkpoints.logits(model)
        assert (np.abs(apart).max(axis=(0, 1)) > 1e-4).nonzero()[0].tolist() == [3]

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    @pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
    def test_new_tokens(self, tied: bool, tmp_path: Path):
        from peft import PeftModel

        model = checkpoints.language_model("llama", tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(37, mean_resizing=False)
        checkpoints.change(model, lambda name: True).save_pretrained(tmp_path / "tuned")
        paths = tmp_path / "base", tmp_path / "tuned"
        with pytest.raises(UnsupportedError, match=r"grew by 5 tokens.*--embeddings save"):
            made(*paths, tmp_path / "no")
        report = made(*paths, tmp_path / "out", embeddings="save")
        assert any("resize_token_embeddings(37)" in warning for warning in report.warnings)
        host = checkpoints.language_model("llama", tie_word_embeddings=tied)
        host.resize_token_embeddings(37, mean_resizing=False)
        with quiet():
            got = checkpoints.logits(PeftModel.from_pretrained(host, str(tmp_path / "out")).eval())
        np.testing.assert_allclose(got, checkpoints.logits(model), atol=1e-4)

    def test_policies_of_embeddings_and_vectors(self, tmp_path: Path):
        model = checkpoints.language_model("llama")
        model.save_pretrained(tmp_path / "base")
        checkpoints.change(model, lambda name: True).save_pretrained(tmp_path / "tuned")
        paths = tmp_path / "base", tmp_path / "tuned"
        dropped = made(*paths, tmp_path / "d", embeddings="drop", vectors="drop")
        gone = {name for name, how in dropped.extras.items() if how == "dropped"}
        assert len(gone) == 7 and {"lm_head.weight", "model.norm.weight"} <= gone
        assert len(dropped.modules) == 14 and any("7 tensors" in note for note in dropped.notes)
        saved = made(*paths, tmp_path / "s", embeddings="save")
        assert len(saved.modules) == 14 and len(saved.extras) == 7
        got = checkpoints.logits(self.reloaded("llama", tmp_path / "s"))
        np.testing.assert_allclose(got, checkpoints.logits(model), atol=1e-4)
        with pytest.raises(IncompatibleError, match=r"and 4 more differ.*--vectors drop"):
            made(*paths, tmp_path / "no", vectors="error")
        for options in ({"vectors": "keep"}, {"embeddings": "none"}):
            with pytest.raises(UsageError, match="expected one of"):
                made(*paths, tmp_path / "no", **options)

    def test_names_that_are_the_end_of_others(self, tmp_path: Path):
        """PEFT compares modules_to_save with ends of paths: `norm` would save every layer's."""
        model = checkpoints.language_model("llama")
        model.save_pretrained(tmp_path / "base")
        wanted = ("model.norm", "layers.1.input_layernorm", "layers.0.mlp")
        checkpoints.change(model, lambda name: any(w in name for w in wanted))
        model.save_pretrained(tmp_path / "tuned")
        made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["model.layers.1.input_layernorm", "model.norm"]
        got = checkpoints.logits(self.reloaded("llama", tmp_path / "out"))
        np.testing.assert_allclose(got, checkpoints.logits(model), atol=1e-5)

    @pytest.mark.parametrize("side", ["base", "tuned", "both"])
    def test_a_checkpoint_of_the_body_alone_lacks_a_word(self, side: str, tmp_path: Path):
        """Hub checkpoints of GPT-2 have no `transformer.`; the class in the config has."""
        model = checkpoints.language_model("gpt2")
        model.save_pretrained(tmp_path / "base")
        wanted = "transformer.h."
        checkpoints.change(model, lambda name: wanted in name).save_pretrained(tmp_path / "tuned")
        for name in ("base", "tuned"):
            if side in (name, "both"):
                tensors = values(tmp_path / name)
                short = {k.removeprefix("transformer."): v for k, v in tensors.items()}
                checkpoints.write(tmp_path / name, short)
        made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
        got = checkpoints.logits(self.reloaded("gpt2", tmp_path / "out"))
        np.testing.assert_allclose(got, checkpoints.logits(model), atol=1e-4)


class TestArchitectures:
    """What PEFT 0.21 and transformers 5 make of models that are no plain causal ones."""

    def reloaded(self, kind: str, folder: Path) -> Any:
        from peft import PeftModel

        with quiet():
            return PeftModel.from_pretrained(architectures.model(kind), str(folder)).eval()

    def changed(self, kind: str, tmp_path: Path, wanted: Callable[[str], bool]) -> tuple[Any, Any]:
        """What the model computes before and after a change, both saved."""
        model = architectures.model(kind)
        before = architectures.output(kind, model)
        model.save_pretrained(tmp_path / "base")
        checkpoints.change(model, wanted).save_pretrained(tmp_path / "tuned")
        return before, architectures.output(kind, model)

    def same(self, kind: str, tmp_path: Path, before: Any, after: Any) -> None:
        got = architectures.output(kind, self.reloaded(kind, tmp_path / "out"))
        assert np.abs(after - before).max() > 1e-3
        assert np.abs(got - after).max() < 2e-5 * max(1.0, np.abs(after).max())

    @pytest.mark.parametrize(
        ("kind", "word", "policy"),
        [
            ("opt", "", "lora"),
            ("opt", "", "save"),
            ("bart", "embed_positions|fc1", "lora"),
            ("t5", "relative_attention_bias|SelfAttention", "lora"),
            ("t5", "relative_attention_bias|SelfAttention", "save"),
            ("deberta", "rel_embeddings|dense", "lora"),
            ("gpt_neox", "", "lora"),
            ("gpt_neox", "", "save"),
            ("gpt_neox_tied", "", "lora"),
            ("whisper", "layers", "lora"),
        ],
        ids=lambda value: str(value).replace("|", "+") or "all",
    )
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_outputs(self, kind: str, word: str, policy: str, tmp_path: Path):
        before, after = self.changed(kind, tmp_path, lambda n: re.search(word, n) is not None)
        paths = tmp_path / "base", tmp_path / "tuned"
        report = made(*paths, tmp_path / "out", rank=2, embeddings=policy, strict=True)
        assert report.error < 1e-6
        self.same(kind, tmp_path, before, after)

    @pytest.mark.parametrize("policy", ["lora", "save"])
    @pytest.mark.parametrize(
        ("kind", "match"),
        [
            ("t5", "module shared: .*encoder.embed_tokens, decoder.embed_tokens"),
            ("bart", "module model.shared: .*encoder, decoder and head share it"),
            ("whisper", "module model.decoder.embed_tokens: .*share it"),
            ("bert_mlm", "word_embeddings: .*BertForMaskedLM may use it as its head too"),
            ("roberta_causal", "word_embeddings: .*RobertaForCausalLM may use it"),
            ("biogpt", "embed_tokens: .*BioGptForCausalLM may use it"),
            ("ctrl", "module transformer.w: .*CTRLLMHeadModel may use it"),
        ],
    )
    def test_a_shared_embedding_is_refused(
        self, kind: str, match: str, policy: str, tmp_path: Path
    ):
        names = "shared|embed_tokens|word_embeddings|transformer.w.weight|dense|fc1|DenseReluDense"
        self.changed(kind, tmp_path, lambda name: re.search(names, name) is not None)
        paths = tmp_path / "base", tmp_path / "tuned"
        with pytest.raises(UnsupportedError, match=rf"{match}.*; .*--embeddings drop$"):
            made(*paths, tmp_path / "out", embeddings=policy, vectors="drop")
        report = made(*paths, tmp_path / "out", embeddings="drop", vectors="drop")
        assert report.error < 1e-6 and not any("embed" in stem for stem in report.modules)

    def test_without_a_config_nothing_says_what_reads_an_embedding(self, tmp_path: Path):
        plain = {"model.embed_tokens.weight": np.eye(6), "model.q_proj.weight": np.eye(6)}
        base = checkpoints.write(tmp_path / "base", plain)
        tuned = checkpoints.write(tmp_path / "tuned", checkpoints.plus(plain, 1))
        with pytest.raises(UnsupportedError, match=r"no config\.json says whether"):
            made(base, tuned, tmp_path / "out", rank=1)

    def test_renamed_architectures_are_warned_of(self, tmp_path: Path):
        self.changed("vit", tmp_path, lambda name: "fc1.weight" in name)
        paths = tmp_path / "base", tmp_path / "tuned"
        report = made(*paths, tmp_path / "out", rank=2)
        [warning] = report.warnings
        assert "other names for modules of a vit" in warning and "keys are missing" in warning
        with pytest.raises(IncompatibleError, match=r"--strict: transformers 5 has other names"):
            made(*paths, tmp_path / "no", rank=2, strict=True)

    @pytest.mark.parametrize("prefix", ["", "text_model."])
    def test_a_leading_word_that_loaders_dropped(self, prefix: str, tmp_path: Path):
        plain = {f"{prefix}encoder.q_proj.weight": np.eye(6)}
        config = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
        base = checkpoints.write(tmp_path / "base", plain, config=config)
        tuned = checkpoints.write(tmp_path / "tuned", checkpoints.plus(plain, 1), config=config)
        report = made(base, tuned, tmp_path / "out", rank=1)
        assert bool(report.warnings) is bool(prefix)

    def test_the_head_of_gpt_neox_has_the_loaders_name(self, tmp_path: Path):
        self.changed("gpt_neox", tmp_path, lambda name: "lm_head" in name)
        assert "embed_out.weight" in values(tmp_path / "base")
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
        assert set(report.modules) == {"lm_head"}

    def test_a_parameter_beside_modules_cannot_be_saved(self, tmp_path: Path):
        self.changed("bert_mlm", tmp_path, lambda name: "predictions" in name or "query" in name)
        paths = tmp_path / "base", tmp_path / "tuned"
        with pytest.raises(UnsupportedError, match=r"'cls.predictions.bias'.*--vectors drop"):
            made(*paths, tmp_path / "out", embeddings="drop")
        report = made(*paths, tmp_path / "out", embeddings="drop", vectors="drop")
        assert report.extras["cls.predictions.bias"] == "dropped"

    @pytest.mark.parametrize(
        ("kind", "task"),
        [("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"), ("whisper", None), ("opt", "CAUSAL_LM")],
    )
    def test_the_class_of_peft(self, kind: str, task: str | None, tmp_path: Path):
        self.changed(kind, tmp_path, lambda name: "fc1" in name or "SelfAttention.q" in name)
        made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["task_type"] == task

    def test_convolutions_of_whisper_are_warned_of(self, tmp_path: Path):
        self.changed("whisper", tmp_path, lambda name: "conv1.weight" in name)
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
        assert any("stride" in warning for warning in report.warnings)

    def test_an_embedding_alone_has_a_way_out(self, tmp_path: Path):
        self.changed("opt", tmp_path, lambda name: "embed_tokens" in name)
        paths = tmp_path / "base", tmp_path / "tuned"
        for policy in ("save", "drop"):
            with pytest.raises(UnsupportedError, match=r"no matrix is left.*--embeddings lora"):
                made(*paths, tmp_path / "out", embeddings=policy)


class TestImageModels:
    @pytest.mark.parametrize("place", ["component", "pipeline"])
    def test_a_unet(self, place: str, tmp_path: Path):
        model = image_models.model("unet")
        inner = "unet" if place == "pipeline" else "."
        model.save_pretrained(tmp_path / "base" / inner)
        checkpoints.change(model, lambda name: True)
        model.save_pretrained(tmp_path / "tuned" / inner)
        paths = tmp_path / "base", tmp_path / "tuned"
        with pytest.raises(UnsupportedError, match=r"no place for them; .*--vectors drop"):
            made(*paths, tmp_path / "no")
        report = made(*paths, tmp_path / "out", vectors="drop", rank=2)
        assert report.dialect == "diffusers" and report.error < 1e-5
        got = image_models.deltas(tmp_path / "out.safetensors", "unet")
        one, other = values(paths[0] / inner), values(paths[1] / inner)
        exact = {
            name.removesuffix(".weight"): (other[name] - one[name]).reshape(len(one[name]), -1)
            for name in one
            if one[name].ndim > 1
        }
        assert got.keys() == exact.keys() and {"conv_in", "time_embedding.linear_1"} <= got.keys()
        assert any(module.layer == "conv" for module in report.modules.values())
        for stem, change in exact.items():
            np.testing.assert_allclose(got[stem], change, atol=2e-6)

    def test_to_peft(self, tmp_path: Path):
        """A component by itself is a model of PEFT's, norms and biases with it."""
        from peft import PeftModel

        model = image_models.model("unet")
        model.save_pretrained(tmp_path / "base")
        checkpoints.change(model, lambda name: True).save_pretrained(tmp_path / "tuned")
        paths = tmp_path / "base", tmp_path / "tuned"
        report = made(*paths, tmp_path / "out", to="peft", rank=2)
        assert report.dialect == "peft" and "conv_in" in report.modules and report.error < 1e-5
        with quiet():
            host = PeftModel.from_pretrained(image_models.model("unet"), str(tmp_path / "out"))
        merged = host.merge_and_unload().state_dict()
        for name, wanted in model.state_dict().items():
            np.testing.assert_allclose(merged[name].numpy(), wanted.numpy(), atol=2e-6)

    def test_to_kohya(self, tmp_path: Path):
        model = image_models.model("unet")
        model.save_pretrained(tmp_path / "base" / "unet")
        checkpoints.change(model, lambda name: "attn" in name and "bias" not in name)
        model.save_pretrained(tmp_path / "tuned" / "unet")
        report = made(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", to="kohya")
        assert report.dialect == "kohya" and all(s.startswith("lora_unet_") for s in report.modules)

    def test_a_model_of_the_pipeline_that_adapters_do_not_reach(self, tmp_path: Path):
        plain = {"encoder.conv_in.weight": np.ones((4, 3, 3, 3)), "x.weight": np.ones((8, 8))}
        for side, size in (("base", 0.0), ("tuned", 1.0)):
            moved = {name: value + size for name, value in plain.items()}
            checkpoints.write(tmp_path / side / "vae", moved)
            checkpoints.write(tmp_path / side / "unet", {"mid_block.x.weight": moved["x.weight"]})
        paths = tmp_path / "base", tmp_path / "tuned"
        with pytest.raises(UnsupportedError, match=r"vae.encoder.conv_in.*--modules"):
            made(*paths, tmp_path / "no")
        report = made(*paths, tmp_path / "out", modules=r"unet\..*")
        assert set(report.modules) == {"unet.mid_block.x"}

    def test_a_changed_token_embedding_has_no_place(self, tmp_path: Path):
        name = "text_model.embeddings.token_embedding.weight"
        for side in ("base", "tuned"):
            tensors = {name: np.full((9, 4), float(len(side))), "text_model.q.weight": np.eye(4)}
            checkpoints.write(tmp_path / side / "text_encoder", tensors)
        with pytest.raises(UnsupportedError, match="textual inversion"):
            made(tmp_path / "base", tmp_path / "tuned", tmp_path / "no")


class TestBadInput:
    def refused(self, tmp_path: Path, plain: Any, changed: Any, kind: Any, match: str, **o: Any):
        base = checkpoints.write(tmp_path / "base", plain)
        tuned = checkpoints.write(tmp_path / "tuned", changed)
        with pytest.raises(kind, match=match):
            made(base, tuned, tmp_path / "out", **o)
        assert not (tmp_path / "out").exists()

    def test_nothing_differs(self, tmp_path: Path):
        plain = checkpoints.weights()
        self.refused(tmp_path, plain, plain, IncompatibleError, "nothing differs: 9 tensors")

    def test_unchanged_modules_are_left_out(self, tmp_path: Path):
        base, tuned = two(tmp_path, part="layers.1")
        report = made(base, tuned, tmp_path / "out")
        assert set(report.modules) == {"model.layers.1.q_proj", "model.layers.1.o_proj"}
        assert any("7 modules are the same" in note or "4 modules" in note for note in report.notes)

    def test_other_keys(self, tmp_path: Path):
        plain, deeper = checkpoints.weights(), checkpoints.weights(layers=5)
        match = "tuned has 'model.layers.3.norm.weight', .* and 3 more, .*base lacks them"
        self.refused(tmp_path, plain, deeper, IncompatibleError, match)
        alien = checkpoints.write(tmp_path / "alien", {"y.z.weight": np.ones((3, 3))})
        with pytest.raises(IncompatibleError, match=r"no tensor of .*alien is in .*base"):
            made(tmp_path / "base", alien, tmp_path / "out")

    def test_other_shapes(self, tmp_path: Path):
        plain, wider = checkpoints.weights(), checkpoints.weights(columns=44)
        self.refused(
            tmp_path, plain, wider, IncompatibleError, "base has 48 x 40, .*tuned has 48 x 44"
        )

    def test_a_vocabulary_that_shrank(self, tmp_path: Path):
        name = "model.embed_tokens.weight"
        plain, less = {name: np.ones((9, 4))}, {name: np.ones((8, 4))}
        self.refused(tmp_path, plain, less, IncompatibleError, "the vocabulary shrank")

    def test_more_positions_are_no_larger_vocabulary(self, tmp_path: Path):
        name = "transformer.wpe.weight"
        plain, more = {name: np.ones((8, 4))}, {name: np.ones((9, 4))}
        match = r"base has 8 x 4, .*tuned has 9 x 4; are they"
        self.refused(tmp_path, plain, more, IncompatibleError, match, embeddings="save")

    @pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    def test_nan_names_its_tensor(self, bad: float, dtype: str, tmp_path: Path):
        plain = checkpoints.weights(rows=64, columns=1024)
        changed = checkpoints.plus(plain, 2)
        changed["model.layers.1.o_proj.weight"][3, 5] = bad
        base = checkpoints.write(tmp_path / "base", plain, dtype)
        tuned = checkpoints.write(tmp_path / "tuned", changed, dtype)
        with pytest.raises(NumericsError, match=r"1 of 65536 values of model.layers.1.o_proj.w"):
            made(base, tuned, tmp_path / "out")
        with pytest.raises(NumericsError, match="o_proj"):
            made(tuned, base, tmp_path / "out", rank=None, energy=0.9)
        assert not (tmp_path / "out").exists()

    def test_fused_experts(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        plain = {
            "model.layers.0.mlp.experts.gate_up_proj": rng.standard_normal((4, 8, 6)),
            "model.layers.0.q_proj.weight": rng.standard_normal((8, 8)),
        }
        changed = {name: value + 1 for name, value in plain.items()}
        self.refused(
            tmp_path,
            plain,
            changed,
            UnsupportedError,
            "gate_up_proj' of shape 4 x 8 x 6.*--modules",
        )
        report = made(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", modules=r".*q_proj", rank=1
        )
        assert set(report.modules) == {"model.layers.0.q_proj"}
        assert any("--modules leaves out 1 modules" in note for note in report.notes)

    @pytest.mark.parametrize(
        ("name", "config", "match"),
        [
            ("x.weight.absmax", None, "bitsandbytes"),
            ("x.qweight", None, "GPTQ or AWQ"),
            ("x.weight_packed", None, "compressed-tensors"),
            ("x.weight_scale_inv", None, "scaled fp8"),
            ("x.weight", None, "a packed format"),
            ("y.bias", {"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ],
        ids=["bnb", "gptq", "packed", "fp8", "int8", "config"],
    )
    def test_quantised(self, name: str, config: Any, match: str, tmp_path: Path):
        plain = {"z.weight": np.ones((4, 4)), name: np.ones((4, 4), np.uint8)}
        base = checkpoints.write(tmp_path / "base", plain, config=config)
        tuned = checkpoints.write(tmp_path / "tuned", {"z.weight": np.zeros((4, 4))})
        with pytest.raises(UnsupportedError, match=rf"base: is quantised by {match}"):
            made(base, tuned, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "who"),
        [
            ("model.diffusion_model.input_blocks.0.0.weight", "SGM"),
            ("double_blocks.0.img_attn.qkv.weight", "Black Forest Labs"),
        ],
    )
    def test_single_files_of_image_models(self, name: str, who: str, tmp_path: Path):
        plain = {name: np.ones((4, 4))}
        changed = {name: np.zeros((4, 4))}
        self.refused(tmp_path, plain, changed, UnsupportedError, f"{who}.*save_pretrained")

    def test_a_result_of_full_rank_is_refused(self, tmp_path: Path):
        base, tuned = two(tmp_path)
        with pytest.raises(UsageError, match="--rank N"):
            made(base, tuned, tmp_path / "out", rank=None)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": "same"}, "has no rank of its own"),
            ({"to": "lycoris"}, "expected peft"),
            ({"modules": "("}, "no regular expression"),
            ({"rank": 2, "energy": 0.9}, "both choose the rank"),
        ],
        ids=["same", "to", "modules", "two"],
    )
    def test_options(self, options: dict[str, Any], match: str, tmp_path: Path):
        base, tuned = two(tmp_path)
        with pytest.raises(UsageError, match=match):
            made(base, tuned, tmp_path / "out", **options)

    def test_a_pattern_that_matches_nothing(self, tmp_path: Path):
        base, tuned = two(tmp_path)
        with pytest.raises(UsageError, match="--modules 'k_proj' matches none"):
            made(base, tuned, tmp_path / "out", modules="k_proj")

    def test_the_output_is_no_input(self, tmp_path: Path):
        base, tuned = two(tmp_path)
        with pytest.raises(OutputExistsError):
            made(base, tuned, base)
        with pytest.raises(OutputExistsError):
            made(base, tuned, tuned / "model.safetensors", overwrite=True)
        for folder in (base, tuned):
            with pytest.raises(OutputExistsError, match=r"inside the input .*never changed"):
                made(base, tuned, folder / "out")
            assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        assert (base / "model.safetensors").is_file()

    def test_missing_files(self, tmp_path: Path):
        base, _ = two(tmp_path)
        with pytest.raises(FileError, match="no such file"):
            made(base, tmp_path / "nowhere", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FormatError, match="holds no weights"):
            made(base, tmp_path / "empty", tmp_path / "out")

    def test_only_norms_differ(self, tmp_path: Path):
        plain = checkpoints.weights()
        changed = {k: v + 1 if "norm" in k else v for k, v in plain.items()}
        for options in ({}, {"vectors": "drop"}):
            match = "no matrix is left.*norm.weight' differs"
            self.refused(tmp_path, plain, changed, UnsupportedError, match, **options)

    def test_nan_in_what_is_saved_whole(self, tmp_path: Path):
        plain = checkpoints.weights()
        changed = checkpoints.plus(plain, 2)
        changed["model.layers.2.norm.weight"] = np.full(40, np.nan)
        self.refused(tmp_path, plain, changed, NumericsError, "40 of 40 values of model.layers.2.n")


def test_a_dry_run_writes_nothing(tmp_path: Path):
    base, tuned = two(tmp_path)
    plan = extract(base, tuned, out=tmp_path / "out", rank=4, dry_run=True)
    assert isinstance(plan, PlanReport) and plan.rank == 4 and not (tmp_path / "out").exists()
    report = made(base, tuned, tmp_path / "out")
    assert plan.size == report.size and plan.extras == report.extras


def test_provenance_names_both_models_and_no_path(tmp_path: Path):
    base, tuned = two(tmp_path)
    made(base, tuned, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "adapterops.json").read_text())
    assert document["schema"] == "adapterops.extract/1"
    options = document["provenance"]["options"]
    assert (options["base"]["name"], options["tuned"]["name"]) == ("base", "tuned")
    assert options["base"]["sampled_sha256"] != ""
    assert str(tmp_path) not in json.dumps(document)
