"""`inspect`: what headers say, and spectra against dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops
from adapterops import inspect
from adapterops.errors import FileError, FormatError, IncompatibleError, UsageError
from adapterops.inspection.base import base_parameters
from adapterops.inspection.stems import families, natural, ranges
from tests.inspecting import SHAPES, call, peft
from tests.kinds import KINDS, Kind
from tests.kinds import write as write_kind
from tests.support import dense, pairs, write_kohya, write_peft


class TestDescription:
    def test_a_peft_directory(self, tmp_path):
        head = {"base_model.model.score.weight": np.ones((2, 10), np.float16)}
        peft(tmp_path / "a", 4, alpha=16, extras=head, modules_to_save=["score"])
        (tmp_path / "a" / "tokenizer.json").write_text("{}")
        found = inspect(tmp_path / "a")
        assert (found.dialect, found.base, found.module_count) == ("peft", "tiny/base", 8)
        assert found.dialects == {"peft": 8} and found.kinds == {"lora": 8}
        assert found.layer_types == {"linear": 8}
        assert found.ranks == found.dims == {4: 8}
        assert [(s.scale, s.alpha, s.modules) for s in found.scales] == [(4.0, 16.0, 8)]
        assert found.scales[0].origin == "lora_alpha in adapter_config.json"
        assert found.dtypes == {"float32": 16, "float16": 1}
        assert found.parameters == found.kind_parameters["lora"] == 8 * 4 * 22
        assert found.adapted == 8 * 120 and found.base_parameters is None
        assert found.size == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        assert [(e.name, e.tensors, e.bytes) for e in found.extras] == [(*head, 1, 40)]
        assert found.side_files == ("tokenizer.json",)
        assert found.config_file == "adapter_config.json"
        assert (found.notes, found.problems, found.spectrum) == ((), (), None)
        module = found.modules["model.layers.3.self_attn.v_proj"]
        assert (module.shape, module.rank, module.dim, module.scale) == ((12, 10), 4, 4, 4.0)
        assert (module.dtype, module.parameters, module.kernel) == ("float32", 88, ())

    def test_modules_by_type_and_the_layers_that_are_missing(self, tmp_path):
        shapes = dict(SHAPES)
        del shapes["model.layers.2.self_attn.v_proj"]
        write_peft(tmp_path / "a", pairs(1, shapes, 2))
        q, v = inspect(tmp_path / "a").families
        assert (q.name, q.modules, q.where, q.missing) == (
            "model.layers.*.self_attn.q_proj",
            4,
            "0–3",
            "",
        )
        assert (v.modules, v.where, v.missing) == (3, "0–1, 3", "2")
        assert (v.shapes, v.ranks, v.scales, v.parameters) == (((12, 10),), (2,), (1.0,), 3 * 44)

    def test_patterns_and_stabilised_scales(self, tmp_path):
        factors = {**pairs(1, SHAPES, 2), **pairs(2, {"model.lm_head": (20, 10)}, 9)}
        config = {"rank_pattern": {"lm_head": 9}, "alpha_pattern": {"lm_head": 6}}
        write_peft(tmp_path / "a", factors, alpha=3, use_rslora=True, **config)
        found = inspect(tmp_path / "a")
        assert found.ranks == {2: 8, 9: 1}
        assert [(s.scale, s.alpha) for s in found.scales] == [(3 / math.sqrt(2), 3.0), (2.0, 6.0)]

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
    def test_every_kind(self, kind: Kind, tmp_path):
        file = write_kind(
            tmp_path / "x.safetensors", {"lora_unet_x": kind.draw(1, 3)}, {"lora_unet_x": 6.0}
        )
        found = inspect(file)
        assert found.kinds == {kind.name: 1} and found.dialect == "kohya"
        [module] = found.modules.values()
        assert module.rank >= kind.rank(3) and module.layer == kind.layer
        numbers = sum(value.size for value in kind.draw(1, 3).values())
        assert found.parameters == module.parameters == numbers
        assert found.unread == () and found.problems == ()
        spectrum = inspect(file, spectrum=True).spectrum
        assert spectrum.rank <= kind.rank(3) and spectrum.columns == module.rank

    def test_trained_rank_and_columns_of_a_loha(self, tmp_path):
        kind = next(kind for kind in KINDS if kind.name == "loha")
        file = write_kind(tmp_path / "x.safetensors", {"lora_unet_x": kind.draw(1, 3)})
        found = inspect(file)
        assert (found.ranks, found.dims) == ({9: 1}, {3: 1})
        assert "rank 9 (trained rank 3)" in call("inspect", file, cwd=tmp_path).stdout

    def test_full_deltas(self, tmp_path):
        factors = pairs(1, {"lora_unet_x": (8, 6)}, 2)
        tensors = {
            f"lora_unet_x.lora_{n}.weight": v
            for n, v in zip(("up", "down"), factors["lora_unet_x"], strict=True)
        }
        tensors["lora_unet_norm.diff"] = np.ones(5, np.float32)
        save_file(tensors, tmp_path / "x.safetensors")
        found = inspect(tmp_path / "x.safetensors", spectrum=True)
        assert [(d.name, d.parameters) for d in found.deltas] == [("lora_unet_norm.diff", 5)]
        assert found.parameters == 28 and list(found.spectrum.modules) == ["lora_unet_x"]
        save_file({"lora_unet_norm.diff": np.ones(5, np.float32)}, tmp_path / "y.safetensors")
        alone = inspect(tmp_path / "y.safetensors", spectrum=True)
        assert alone.module_count == 0 and alone.spectrum is None and alone.deltas

    def test_provenance_of_our_own(self, tmp_path):
        peft(tmp_path / "a")
        adapterops.merge([tmp_path / "a", tmp_path / "a"], [0.5, 0.5], out=tmp_path / "m", rank=2)
        made = inspect(tmp_path / "m").provenance
        assert (made["verb"], made["version"]) == ("merge", adapterops.__version__)
        assert "made by        adapterops" in call("inspect", "m", cwd=tmp_path).stdout

    @pytest.mark.parametrize(
        "text", ["{", "[]", "[" * 100_000, "null", "3", '{"inputs": 3}', '{"inputs": [1]}']
    )
    def test_provenance_of_a_stranger(self, tmp_path, text):
        write_kohya(
            tmp_path / "x.safetensors",
            pairs(1, {"lora_unet_x": (8, 6)}, 2),
            metadata={"adapterops": text},
        )
        call("inspect", "x.safetensors", cwd=tmp_path)
        made = inspect(tmp_path / "x.safetensors").provenance
        assert made is None or isinstance(made, dict)

    def test_only_some_modules(self, tmp_path):
        peft(tmp_path / "a")
        found = inspect(tmp_path / "a", modules=r".*\.1\..*", spectrum=True)
        assert sorted(found.modules) == sorted(name for name in SHAPES if ".1." in name)
        assert sorted(found.spectrum.modules) == sorted(found.modules)
        none = inspect(tmp_path / "a", modules="q_proj", spectrum=True)
        assert not none.modules and none.spectrum is None and "as a whole" in none.notes[0]
        with pytest.raises(UsageError, match="no regular expression"):
            inspect(tmp_path / "a", modules="(")


class TestQuirks:
    def test_a_second_download(self, tmp_path):
        file = peft(tmp_path / "a") / "adapter_model.safetensors"
        file.rename(tmp_path / "a" / "adapter_model (1).safetensors")
        assert any("second download" in note for note in inspect(tmp_path / "a").notes)

    def test_a_missing_config(self, tmp_path):
        (peft(tmp_path / "a") / "adapter_config.json").unlink()
        found = inspect(tmp_path / "a")
        assert "no adapter_config.json" in found.notes[0]
        assert [s.scale for s in found.scales] == [None]
        [problem, *_] = found.problems
        assert "no scale" in problem["message"] and "--alpha" in problem["hint"]
        given = inspect(tmp_path / "a", alpha=6)
        assert given.problems == () and given.scales[0].scale == 3.0
        assert "--alpha" in given.scales[0].origin

    def test_a_stale_twin(self, tmp_path):
        (peft(tmp_path / "a") / "adapter_model.bin").write_bytes(b"")
        assert "may be another adapter" in inspect(tmp_path / "a").notes[0]

    def test_a_doubled_prefix_and_an_assumed_scale(self, tmp_path):
        shapes = {"lora_unet_unet_mid_block_x": (8, 6), "lora_unet_unet_mid_block_y": (8, 6)}
        write_kohya(tmp_path / "x.safetensors", pairs(1, shapes, 2))
        notes = " ".join(inspect(tmp_path / "x.safetensors").notes)
        assert "2 modules have a doubled prefix" in notes and "1 is assumed" in notes

    @pytest.mark.parametrize("name", ["lora_unet_unix_x", "lora_te_text_model_x", "lora_te1_x"])
    def test_no_doubled_prefix(self, tmp_path, name):
        write_kohya(tmp_path / "x.safetensors", pairs(1, {name: (8, 6)}, 2), alpha=2)
        assert inspect(tmp_path / "x.safetensors").notes == ()

    def test_several_number_formats(self, tmp_path):
        factors = {
            **pairs(1, {"lora_unet_x": (8, 6)}, 2),
            **pairs(1, {"lora_unet_y": (8, 6)}, 2, np.float16),
        }
        write_kohya(tmp_path / "x.safetensors", factors, alpha=2)
        assert "several number formats" in inspect(tmp_path / "x.safetensors").notes[0]

    def test_what_merge_would_refuse_is_read_and_said(self, tmp_path):
        magnitude = {
            f"base_model.model.{name}.lora_magnitude_vector": np.ones(12, np.float32)
            for name in SHAPES
        }
        peft(tmp_path / "a", extras=magnitude, use_dora=True)
        found = inspect(tmp_path / "a")
        assert found.kinds == {"dora": 8} and found.module_count == 8
        assert any("DoRA" in problem["message"] for problem in found.problems)
        done = call("inspect", "a", cwd=tmp_path)
        assert "merge would refuse this: " in done.stdout and "DoRA" in done.stdout
        assert "DoRA" in call("inspect", "a", "--spectrum", cwd=tmp_path, code=4).stderr
        assert "DoRA" in call("inspect", "a", "--strict", cwd=tmp_path, code=4).stderr

    def test_tensors_of_modules_with_a_problem_are_named(self, tmp_path):
        tensors = {"lora_unet_x.lora_down.weight": np.ones((2, 6), np.float32)}
        save_file(tensors, tmp_path / "x.safetensors")
        found = inspect(tmp_path / "x.safetensors")
        assert [item.name for item in found.unread] == [*tensors] and found.problems
        assert "not read" in call("inspect", "x.safetensors", cwd=tmp_path).stdout

    def test_strict_makes_notes_errors(self, tmp_path):
        (peft(tmp_path / "a") / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(IncompatibleError, match="--strict"):
            inspect(tmp_path / "a", strict=True)
        peft(tmp_path / "b")
        assert inspect(tmp_path / "b", strict=True).problems == ()


class TestErrors:
    def test_what_cannot_be_read(self, tmp_path):
        with pytest.raises(FileError, match="no such file"):
            inspect(tmp_path / "gone")
        (tmp_path / "x.safetensors").write_bytes(b"nothing")
        with pytest.raises(FormatError, match="too short"):
            inspect(tmp_path / "x.safetensors")
        save_file({"weight": np.ones(3)}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match="not a LoRA"):
            inspect(tmp_path / "model.safetensors")

    def test_alphas_that_are_none(self, tmp_path):
        for value in (0, -1, math.nan, math.inf):
            with pytest.raises(UsageError, match="above 0"):
                inspect(peft(tmp_path / "a"), alpha=value)


class TestSpectrum:
    def test_against_dense_singular_values(self, tmp_path):
        factors = pairs(3, SHAPES, 4)
        write_peft(tmp_path / "a", factors, alpha=8)
        found = inspect(tmp_path / "a", spectrum=True).spectrum
        squares = np.zeros(4)
        for name, matrix in dense(factors, 2.0).items():
            values = np.linalg.svd(matrix, compute_uv=False)[:4]
            module = found.modules[name]
            assert module.values == pytest.approx(values, rel=1e-12)
            assert module.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
            stable = (np.linalg.norm(matrix) / values[0]) ** 2
            assert module.stable_rank == pytest.approx(stable, rel=1e-12)
            assert (module.rank, module.columns) == (4, 4)
            for enough in module.enough:
                kept = np.cumsum(values**2) / np.sum(values**2)
                assert kept[enough.rank - 1] >= enough.energy - 1e-12
                assert enough.rank == 1 or kept[enough.rank - 2] < enough.energy
                assert enough.error == pytest.approx(
                    math.sqrt(max(1 - kept[enough.rank - 1], 0)), abs=1e-7
                )
            squares += values**2
        tail = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum())
        assert found.curve == pytest.approx(tail, abs=1e-12) and found.columns == found.rank == 4
        assert [kept.rank for kept in found.kept] == [1, 2, 4]
        for kept in found.kept:
            assert kept.error == pytest.approx(tail[kept.rank], abs=1e-12)
            assert kept.energy == pytest.approx(1 - tail[kept.rank] ** 2, abs=1e-12)

    def test_the_curve_is_what_merging_at_that_rank_costs(self, tmp_path):
        peft(tmp_path / "a", 4)
        found = inspect(tmp_path / "a", spectrum=True).spectrum
        for rank in (1, 2, 3):
            report = adapterops.merge([tmp_path / "a"], out=tmp_path / str(rank), rank=rank)
            assert report.truncation == pytest.approx(found.curve[rank], rel=1e-9)
        for enough in found.enough:
            report = adapterops.merge(
                [tmp_path / "a"], out=tmp_path / f"e{enough.energy}", energy=enough.energy
            )
            assert report.rank == enough.rank

    def test_a_rank_that_is_not_used(self, tmp_path):
        factors = {}
        for name, (B, A) in pairs(1, SHAPES, 1).items():
            factors[name] = (np.hstack([B, 2 * B, 0 * B]), np.vstack([A, A, A]))
        write_peft(tmp_path / "a", factors)
        found = inspect(tmp_path / "a", spectrum=True).spectrum
        assert (found.rank, found.columns) == (
            1,
            3,
        ) and found.conclusion == "no module has a rank above 1"
        assert all(module.stable_rank == pytest.approx(1) for module in found.modules.values())

    def test_half_of_the_rank(self, tmp_path):
        B, A = np.eye(12, 4, dtype=np.float32), np.eye(4, 10, dtype=np.float32)
        values = np.array([10, 1, 0.5, 0.25], np.float32)
        write_peft(tmp_path / "a", {"m.q_proj": (B * values, A)})
        found = inspect(tmp_path / "a", spectrum=True).spectrum
        lost = math.sqrt((0.25 + 0.0625) / (100 + 1 + 0.25 + 0.0625))
        assert f"rank 2 would lose {100 * lost:.2g} %" in found.conclusion
        assert "holds 99.69 % of the energy" in found.conclusion
        assert [enough.rank for enough in found.enough] == [1, 2, 3]

    def test_zeros(self, tmp_path):
        factors = {name: (0 * B, A) for name, (B, A) in pairs(1, SHAPES, 2).items()}
        one = "model.layers.0.self_attn.q_proj"
        write_peft(tmp_path / "zero", factors)
        found = inspect(tmp_path / "zero", spectrum=True).spectrum
        assert found.norm == 0 and found.enough == () and "changes nothing" in found.conclusion
        assert all(m.stable_rank is None and m.rank == 0 for m in found.modules.values())
        write_peft(tmp_path / "some", factors | {one: pairs(1, SHAPES, 2)[one]})
        found = inspect(tmp_path / "some", spectrum=True).spectrum
        assert [name for name, m in found.modules.items() if m.rank] == [one]
        for name in ("zero", "some"):
            for options in ([], ["-v"], ["--json", "-v"], ["-o", f"{name}.svg"]):
                call("inspect", name, "--spectrum", *options, cwd=tmp_path)

    def test_values_that_are_none(self, tmp_path):
        factors = pairs(1, SHAPES, 2)
        factors["model.layers.1.self_attn.q_proj"][0][0, 0] = np.nan
        write_peft(tmp_path / "a", factors)
        assert inspect(tmp_path / "a").problems == ()
        done = call("inspect", "a", "--spectrum", cwd=tmp_path, code=5)
        assert "model.layers.1.self_attn.q_proj" in done.stderr and "NaN" in done.stderr

    def test_threads_and_memory_change_nothing(self, tmp_path):
        peft(tmp_path / "a", 4)
        one = inspect(tmp_path / "a", spectrum=True, jobs=1)
        assert inspect(tmp_path / "a", spectrum=True, jobs=3, memory="1KB") == one


class TestBase:
    def test_a_checkpoint(self, tmp_path):
        folder = tmp_path / "base"
        folder.mkdir()
        save_file(
            {"a.weight": np.ones((10, 20), np.float16)}, folder / "model-00001-of-00002.safetensors"
        )
        save_file(
            {"b.weight": np.ones(7, np.float32), "position_ids": np.arange(9)},
            folder / "model-00002-of-00002.safetensors",
        )
        assert base_parameters(folder) == 207
        assert base_parameters(folder / "model-00001-of-00002.safetensors") == 200
        found = inspect(peft(tmp_path / "a"), base=folder)
        assert found.base_parameters == 207
        assert (
            "of the 0.000207 million in the base"
            in call("inspect", "a", "--base", "base", cwd=tmp_path).stdout
        )

    def test_a_pipeline(self, tmp_path):
        for name, count in (("unet", 5), ("text_encoder", 3)):
            (tmp_path / name).mkdir()
            for kind in ("", ".fp16"):
                save_file({"w": np.ones(count)}, tmp_path / name / f"x{kind}.safetensors")
        (tmp_path / "scheduler").mkdir()
        assert base_parameters(tmp_path) == 8

    def test_refusals(self, tmp_path):
        for name in ("pruned", "emaonly"):
            save_file({"w": np.ones(3)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(FormatError, match="several models"):
            base_parameters(tmp_path)
        save_file({"q.weight": np.ones(3, np.uint8)}, tmp_path / "quantised.safetensors")
        with pytest.raises(IncompatibleError, match="quantised"):
            base_parameters(tmp_path / "quantised.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "roformer"}')
        with pytest.raises(IncompatibleError, match="'roformer'"):
            base_parameters(tmp_path / "config.json")
        (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "8"}')
        with pytest.raises(FormatError, match="hidden_size"):
            base_parameters(tmp_path / "config.json")
        with pytest.raises(FileError):
            base_parameters(tmp_path / "gone")

    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_config_against_transformers(self, tmp_path, kind, tied):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        extra = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": {"head_dim": 8}}
        config = AutoConfig.for_model(
            kind,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            tie_word_embeddings=tied,
            **extra.get(kind, {}),
        )
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert base_parameters(tmp_path) == model.num_parameters()


class TestFamilies:
    def test_names_that_differ_in_indices(self):
        names = (
            "h.0.attn",
            "h.1.attn",
            "h.1.mlp",
            "h.2.attn",
            "h.2.mlp",
            "head",
            "x_1_y2_0",
            "x_3_y2_0",
        )
        found = {
            family.name: (ranges(family.indices), ranges(family.missing))
            for family in families(names)
        }
        assert found == {
            "h.*.attn": ("0–2", ""),
            "h.*.mlp": ("1–2", "0"),
            "head": ("", ""),
            "x_*_y2_0": ("1, 3", ""),
        }

    def test_every_name_is_in_one_family(self):
        names = (*SHAPES, "a*b", "a*1.b", "a.9999999999.b", "é.3", "e[0]", "e[1]", "")
        found = families(names)
        assert sorted(i for family in found for i in family.members) == list(range(len(names)))
        for family in found:
            for position, indices in zip(family.members, family.indices, strict=True):
                text = family.name
                for index in indices:
                    head, _, rest = text.partition("*")
                    text = f"{head}{index}{rest}"
                assert text == names[position] or "*" in names[position]

    def test_layers_in_the_order_of_their_numbers(self):
        names = ["h.10.a", "h.9.b", "h.9.a", "h", "1", "h.123456789012"]
        assert sorted(names, key=natural) == ["1", "h", "h.9.a", "h.9.b", "h.10.a", names[-1]]

    def test_ranges(self):
        assert ranges([(0,), (1,), (3,)]) == "0–1, 3"
        assert ranges([(i, j) for i in range(3) for j in (0, 2)]) == "0–2 × 0, 2"
        assert ranges([(0, 1), (2, 0)]) == "0.1, 2.0"
        assert ranges([()]) == ranges([]) == ""


class TestCorpus:
    def test_every_file_by_its_manifest(self, corpus: Path) -> None:
        for entry in json.loads((corpus / "manifest.json").read_text()):
            found = inspect(corpus / entry["file"], allow_pickle=True, spectrum=True)
            assert found.problems == ()
            assert {str(k): v for k, v in found.ranks.items()} == entry["ranks"]
            assert {scale.scale for scale in found.scales} == set(entry["scale"])
            assert found.module_count == entry["n_mod"]
            assert sum(item.tensors for item in found.extras) == entry["extra_keys"]
            assert found.size == entry["bytes"]
            assert found.spectrum.norm == pytest.approx(entry["fro"], rel=1e-6)

    def test_the_whole_folder(self, corpus: Path, tmp_path: Path) -> None:
        done = call("inspect", corpus, "--allow-pickle", "--spectrum", "--json", "-v", cwd=tmp_path)
        entries = json.loads(done.stdout)["adapters"]
        assert len(entries) == 15
        text = [e for e in entries if "RoBERTa" in e["path"] and e["dims"].keys() == {"8"}]
        image = [e for e in entries if e["path"].endswith("-lora")]
        assert text and all(e["spectrum"]["curve"][4] < 0.15 for e in text)
        assert image and all(0.3 < e["spectrum"]["curve"][2] < 0.6 for e in image)
        call("inspect", corpus, "--allow-pickle", cwd=tmp_path)
        assert "--allow-pickle" in call("inspect", corpus, cwd=tmp_path, code=3).stderr
