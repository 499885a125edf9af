"""Every quirk that shared/corpus/README.md lists, as a small fixture with the reading it must get.

Real files carry all of these. Each was met at least once where another tool read something else
without a word.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError, UnsupportedError
from adapterops.formats import open_adapter_file
from tests.kinds import KINDS, Kind, gap, read, write
from tests.kinds import dense as lycoris_dense
from tests.support import (
    Pairs,
    dense,
    distance,
    load_file,
    pairs,
    read_kohya,
    read_peft,
    weighted,
    write_kohya,
    write_peft,
)

EXACT = 1e-14
SHAPES = {"layers.0.q_proj": (24, 20), "layers.0.v_proj": (12, 20), "layers.1.q_proj": (24, 20)}


def peft(folder: Path, seed: int = 1, rank: int = 2, **options: Any) -> dict[str, np.ndarray]:
    """A PEFT directory over SHAPES at scale 1.5; its ΔW."""
    factors = pairs(seed, SHAPES, rank)
    write_peft(folder, factors, alpha=1.5 * rank, **options)
    return dense(factors, 1.5)


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of a directory's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestNumbers:
    """All-zero, diverged, subnormal and half-empty adapters are published as results."""

    @pytest.mark.parametrize("side", ["B", "A", "both"])
    def test_an_adapter_of_zeros_adds_nothing(self, side: str, tmp_path: Path) -> None:
        factors = {
            name: (B * (side == "A"), A * (side == "B"))
            for name, (B, A) in pairs(1, SHAPES, 2).items()
        }
        write_peft(tmp_path / "zero", factors)
        other = peft(tmp_path / "b")
        assert all(not value.any() for value in read(tmp_path / "zero").values())
        report = ao.merge(
            [tmp_path / "zero", tmp_path / "b"], [0.7, 0.3], out=tmp_path / "m", dtype="float32"
        )
        assert math.isfinite(report.error)
        wanted = {name: 0.3 * value for name, value in other.items()}
        assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6

    @pytest.mark.parametrize("options", [{}, {"rank": 1}, {"energy": 0.9}], ids=str)
    def test_zeros_alone_stay_zeros(self, options: dict[str, Any], tmp_path: Path) -> None:
        """Retention of nothing is undefined: no NaN anywhere, or a refusal that says why."""
        factors = {name: (B * 0, A) for name, (B, A) in pairs(1, SHAPES, 2).items()}
        write_peft(tmp_path / "zero", factors)
        try:
            report = ao.merge([tmp_path / "zero"], [2.0], out=tmp_path / "m", **options)
        except ao.AdapterOpsError as error:
            assert options and "zero" in str(error)
        else:
            assert "NaN" not in json.dumps(report.to_dict())
            assert all(not value.any() for value in read(tmp_path / "m").values())

    @pytest.mark.parametrize("title", ["LoHa, linear", "LoKr, w2 factored"])
    def test_untrained_lycoris_is_zero(self, title: str, tmp_path: Path) -> None:
        """Their initialisation: one factor of several is zero."""
        kind: Kind = next(kind for kind in KINDS if kind.title == title)
        arrays = kind.draw(1, 2)
        arrays[next(name for name in ("hada_w2_a", "lokr_w2_b") if name in arrays)][:] = 0
        trained = kind.draw(2, 2)
        files = [
            write(tmp_path / f"{n}.safetensors", {"lora_unet_x": tensors})
            for n, tensors in enumerate((arrays, trained))
        ]
        assert not read(files[0])["lora_unet_x"].any()
        ao.merge(files, [1.0, 0.5], out=tmp_path / "m.safetensors", rank=20, dtype="float32")
        found = read_kohya(tmp_path / "m.safetensors")["lora_unet_x"]
        assert gap(found, 0.5 * lycoris_dense(trained)) < 1e-6

    def test_a_diverged_adapter_is_read_as_it_is(self, tmp_path: Path) -> None:
        """‖ΔW‖ = 2597 was published; finite is finite."""
        factors = {name: (700 * B, A) for name, (B, A) in pairs(1, SHAPES, 2).items()}
        write_peft(tmp_path / "a", factors)
        wanted = dense(factors)
        assert math.hypot(*map(np.linalg.norm, wanted.values())) > 2000
        assert distance(read(tmp_path / "a"), wanted) < EXACT
        other = peft(tmp_path / "b")
        ao.merge([tmp_path / "a", tmp_path / "b"], [1e-3, 1.0], out=tmp_path / "m", dtype="float32")
        assert distance(read_peft(tmp_path / "m"), weighted((1e-3, wanted), (1.0, other))) < 1e-6

    def test_subnormals_are_numbers(self, tmp_path: Path) -> None:
        """Every element of B is an fp16 subnormal: a loader that flushes them reads zeros."""
        rng = np.random.default_rng(1)
        factors: Pairs = {
            name: (
                (2.0**-24 * rng.integers(1, 1000, (m, 2))).astype(np.float16),
                rng.standard_normal((2, n)).astype(np.float16),
            )
            for name, (m, n) in SHAPES.items()
        }
        assert all(B.min() > 0 and B.max() < 2.0**-14 for B, _ in factors.values())
        write_peft(tmp_path / "a", factors)
        wanted = dense(factors)
        assert distance(read(tmp_path / "a"), wanted) < EXACT
        ao.merge([tmp_path / "a"], [-2.0], out=tmp_path / "m", dtype="float32")
        doubled = {name: -2 * value for name, value in wanted.items()}
        assert distance(read_peft(tmp_path / "m"), doubled) < 1e-6
        report = ao.merge([tmp_path / "a"], [-2.0], out=tmp_path / "half")
        found = distance(read_peft(tmp_path / "half"), doubled)
        assert report.dtype == "float16"
        assert found == pytest.approx(report.error, rel=1e-4) and found < 1e-3

    def test_an_encoder_s_half_may_be_zero(self, tmp_path: Path) -> None:
        """Trained on the U-Net only, saved with both: the text encoder is there, and zero."""
        shapes = {"lora_unet_a": (24, 20), "lora_te_b": (20, 16), "lora_te_c": (16, 16)}
        factors = {
            name: (B * name.startswith("lora_unet"), A)
            for name, (B, A) in pairs(1, shapes, 2).items()
        }
        full = pairs(2, shapes, 2)
        write_kohya(tmp_path / "a.safetensors", factors, alpha=1)
        write_kohya(tmp_path / "b.safetensors", full, alpha=2)
        out = tmp_path / "m.safetensors"
        for rank in (None, 2):
            files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
            ao.merge(files, [0.7, 0.3], out=out, rank=rank, dtype="float32", overwrite=True)
            found = read_kohya(out)
            for name in ("lora_te_b", "lora_te_c"):
                assert gap(found[name], 0.3 * dense(full)[name]) < 1e-6


class TestConfigs:
    """What real configs hold beside, or instead of, what they should."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"fancy_new_option": {"deep": [1, 2]}, "megatron_core": "megatron.core", "_x": None},
            {"runtime_config": {"ephemeral_gpu_offload": False}, "eva_config": None},
            {"modules_to_save": []},
            {"layers_to_transform": [], "layers_pattern": [], "exclude_modules": []},
            {"rank_pattern": [], "alpha_pattern": []},
            {"rank_pattern": None, "alpha_pattern": None},
            {"target_parameters": [], "alora_invocation_tokens": [], "layer_replication": []},
            {"loftq_config": {}, "trainable_token_indices": [], "use_bdlora": None},
            {"enable_lora": None, "merge_weights": False},
            {"peft_type": "lora"},
            {"lora_alpha": 3.0, "r": 2.0},
            {"target_modules": None},
            {"target_modules": ".*_proj"},
        ],
        ids=lambda changes: ",".join(changes),
    )
    def test_fields_that_change_nothing(self, changes: dict[str, Any], tmp_path: Path) -> None:
        wanted = peft(tmp_path / "a")
        edit(tmp_path / "a", **changes)
        assert distance(read(tmp_path / "a"), wanted) < EXACT
        ao.merge([tmp_path / "a"], [0.5], out=tmp_path / "m", dtype="float32")
        half = {name: value / 2 for name, value in wanted.items()}
        assert distance(read_peft(tmp_path / "m"), half) < 1e-6

    def test_fields_that_are_missing(self, tmp_path: Path) -> None:
        """Old configs say no more than r and alpha."""
        wanted = peft(tmp_path / "a")
        (tmp_path / "a" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3}')
        assert distance(read(tmp_path / "a"), wanted) < EXACT

    def test_duplicates_in_modules_to_save(self, tmp_path: Path) -> None:
        heads = ["classifier", "score", "classifier", "score"]
        extras = {"base_model.model.classifier.weight": np.ones((2, 24), np.float32)}
        wanted = peft(tmp_path / "a", extras=extras, modules_to_save=heads)
        other = peft(tmp_path / "b", 2, 3, extras=extras, modules_to_save=heads[:2])
        folders = [tmp_path / "a", tmp_path / "b"]
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", dtype="float32")
        assert distance(read_peft(tmp_path / "m"), weighted((0.7, wanted), (0.3, other))) < 1e-6
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert sorted(config["modules_to_save"]) == ["classifier", "score"]
        assert "base_model.model.classifier.weight" in load_file(
            tmp_path / "m" / "adapter_model.safetensors"
        )

    def test_the_order_of_targets_is_random(self, tmp_path: Path) -> None:
        """PEFT saves a set: the same training writes another list each time."""
        names = [f"p{i}_proj" for i in range(8)]
        outputs = []
        for seed in (1, 2):
            targets = random.Random(seed).sample(names, len(names))
            factors = pairs(1, {f"layers.0.{name}": (12, 10) for name in names}, 2)
            write_peft(tmp_path / f"a{seed}", factors, target_modules=targets)
            ao.merge([tmp_path / f"a{seed}"], [0.5], out=tmp_path / f"m{seed}")
            config = json.loads((tmp_path / f"m{seed}" / "adapter_config.json").read_text())
            outputs.append(config["target_modules"])
        assert outputs[0] == outputs[1] == sorted(names)

    @pytest.mark.parametrize("flag", [True, False])
    def test_fan_in_fan_out_does_not_turn_anything(self, flag: bool, tmp_path: Path) -> None:
        """The flag is often wrong. B·A as stored is (out, in) of the layer whatever it says."""
        square = {"h.0.c_proj": (16, 16)}
        factors = pairs(1, square, 2)
        write_peft(tmp_path / "a", factors, fan_in_fan_out=flag)
        write_peft(tmp_path / "b", pairs(2, square, 2), fan_in_fan_out=not flag)
        assert distance(read(tmp_path / "a"), dense(factors)) < EXACT
        report = ao.merge(
            [tmp_path / "a", tmp_path / "b"], [0.7, 0.3], out=tmp_path / "m", dtype="float32"
        )
        assert any("fan_in_fan_out" in warning for warning in report.warnings)
        config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] is flag
        with pytest.raises(IncompatibleError, match="fan_in_fan_out"):
            folders = [tmp_path / "a", tmp_path / "b"]
            ao.merge(folders, [0.7, 0.3], out=tmp_path / "s", strict=True)

    def test_one_base_goes_under_four_names(self, tmp_path: Path) -> None:
        """A hub id, a short id, a local path, a Windows path: warned about, not refused."""
        bases = [
            "meta-llama/Llama-3.1-8B",
            "Llama-3.1-8B",
            "/home/user/models/Llama-3.1-8B",
            "C:\\models\\Llama-3.1-8B",
        ]
        folders, deltas = [], []
        for index, name in enumerate(bases):
            folders.append(tmp_path / str(index))
            deltas.append(peft(folders[-1], index, base_model_name_or_path=name))
        report = ao.merge(folders, [0.25] * 4, out=tmp_path / "m", dtype="float32")
        [warning] = report.warnings
        assert "base" in warning and "meta-llama/Llama-3.1-8B" in warning
        wanted = weighted(*((0.25, delta) for delta in deltas))
        assert distance(read_peft(tmp_path / "m"), wanted) < 1e-6
        with pytest.raises(IncompatibleError, match="base"):
            ao.merge(folders, [0.25] * 4, out=tmp_path / "s", strict=True)

    def test_two_bases_may_share_every_shape(self, tmp_path: Path) -> None:
        """Then only the names differ, and a warning is all there is."""
        peft(tmp_path / "a", base_model_name_or_path="org/base")
        peft(tmp_path / "b", 2, base_model_name_or_path="org/base-instruct")
        report = ao.merge([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], out=tmp_path / "m")
        [warning] = report.warnings
        assert "org/base-instruct" in warning

    def test_heads_are_part_of_an_adapter_s_identity(self, tmp_path: Path) -> None:
        """Identical factors, different classifiers: not the same adapter."""
        name = "base_model.model.classifier.weight"
        for seed, folder in enumerate("ab"):
            head = np.full((2, 24), seed, np.float32)
            peft(tmp_path / folder, extras={name: head}, modules_to_save=["classifier"])
        with pytest.raises(IncompatibleError, match=r"classifier.*--extras"):
            ao.merge([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], out=tmp_path / "m")


class TestFiles:
    """Names of files and of tensors."""

    def test_a_download_s_number_in_the_name(self, tmp_path: Path) -> None:
        """`adapter_model (1).safetensors` beside its config, as a directory and as a file."""
        wanted = peft(tmp_path / "a")
        file = tmp_path / "a" / "adapter_model (1).safetensors"
        (tmp_path / "a" / "adapter_model.safetensors").rename(file)
        assert distance(read(tmp_path / "a"), wanted) < EXACT
        assert distance(read(file), wanted) < EXACT
        ao.merge([file], [0.5], out=tmp_path / "m", dtype="float32")
        half = {name: value / 2 for name, value in wanted.items()}
        assert distance(read_peft(tmp_path / "m"), half) < 1e-6

    def test_two_downloads_are_ambiguous(self, tmp_path: Path) -> None:
        peft(tmp_path / "a")
        folder = tmp_path / "a"
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").unlink()
        for number in (1, 2):
            (folder / f"adapter_model ({number}).safetensors").write_bytes(data)
        with pytest.raises(FormatError, match="name one of the files"):
            ao.open_adapter(folder)

    def test_a_missing_config(self, tmp_path: Path) -> None:
        """No scale anywhere: refused, and read once the user says it."""
        wanted = peft(tmp_path / "a")
        (tmp_path / "a" / "adapter_config.json").unlink()
        with pytest.raises(IncompatibleError, match="--alpha") as caught:
            ao.open_adapter(tmp_path / "a")
        assert caught.value.exit_code == 4
        assert distance(read(tmp_path / "a", alpha=3.0), wanted) < EXACT

    def test_a_doubled_prefix(self, tmp_path: Path) -> None:
        """Hand-made kohya names: `lora_unet_unet_…`, no alpha, scale 1 (and said to be assumed)."""
        shapes = {
            f"lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{n}_to_q": (24, 20)
            for n in (1, 2)
        }
        factors = [pairs(seed, shapes, 2) for seed in (1, 2)]
        files = [write_kohya(tmp_path / f"{n}.safetensors", item) for n, item in enumerate(factors)]
        assert distance(read(files[0]), dense(factors[0])) < EXACT
        opened = open_adapter_file(files[0])
        assert opened.dialect == "kohya" and sorted(opened.sites) == sorted(shapes)
        assert all("assumed" in site.scale_from for site in opened.sites.values())
        ao.merge(files, [0.7, 0.3], out=tmp_path / "m.safetensors", dtype="float32")
        wanted = weighted(*zip((0.7, 0.3), map(dense, factors), strict=True))
        assert distance(read_kohya(tmp_path / "m.safetensors"), wanted) < 1e-6

    @pytest.mark.parametrize(
        "tensors",
        [
            {f"w_{side}_{n:03}": (4, 4) for side in "ab" for n in range(2)},
            {f"layer{n}.w_{side}": (4, 4) for side in "ab" for n in range(2)},
            {"A": (2, 8), "B": (8, 2)},
            {"model.layers.0.q_proj.weight": (8, 8)},
        ],
        ids=lambda tensors: next(iter(tensors)),
    )
    def test_hand_made_names_are_refused(
        self, tensors: Mapping[str, tuple[int, ...]], tmp_path: Path
    ) -> None:
        """Nothing says which of them belong together, or to what."""
        file = tmp_path / "a.safetensors"
        save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, file)
        with pytest.raises((FormatError, UnsupportedError)) as caught:
            ao.open_adapter(file)
        assert any(name in str(caught.value) for name in tensors)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize("prefix", ["", "transformer."])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_alpha_in_the_header_of_bare_names(
        self, prefix: str, rslora: bool, tmp_path: Path
    ) -> None:
        """`lora_adapter_metadata` of a model's own save names no component, nor do its keys."""
        factors = pairs(1, {"transformer_blocks.0.attn.to_q": (24, 20)}, 4)
        tensors = {}
        for name, (B, A) in factors.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = A
            tensors[f"{prefix}{name}.lora_B.weight"] = B
        config = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["to_q"]}
        named = {f"{prefix}{key}": value for key, value in config.items()}
        file = tmp_path / "a.safetensors"
        save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(named)})
        [found] = read(file).values()
        [wanted] = dense(factors, 3.0 if rslora else 1.5).values()
        assert gap(found, wanted) < EXACT

    def test_mlx_says_alpha_and_scale(self, tmp_path: Path) -> None:
        """Scale is what mlx-lm multiplies with; alpha / rank would be five times too weak."""
        a, b = np.ones((16, 8), np.float32), np.ones((8, 12), np.float32)
        stem = "model.layers.0.self_attn.q_proj"
        save_file({f"{stem}.lora_a": a, f"{stem}.lora_b": b}, tmp_path / "adapters.safetensors")
        parameters = {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0}
        config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert gap(read(tmp_path)[stem], np.full((12, 16), 80.0)) < EXACT

    def test_a_dump_of_a_live_model(self, tmp_path: Path) -> None:
        """state_dict keys keep the adapter's name: `.lora_A.default.weight`."""
        wanted = peft(tmp_path / "a")
        file = tmp_path / "a" / "adapter_model.safetensors"
        tensors = {
            name.replace(".weight", ".default.weight"): value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file)
        assert distance(read(tmp_path / "a"), wanted) < EXACT

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda folder: edit(folder, rank_pattern=[1]),
            lambda folder: edit(folder, lora_alpha="16"),
            lambda folder: edit(folder, r=[2]),
            lambda folder: edit(folder, lora_alpha=float("nan")),
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            lambda folder: (folder / "adapter_config.json").write_text("{"),
        ],
        ids=["pattern list", "alpha text", "r list", "alpha NaN", "a list", "torn"],
    )
    def test_configs_that_are_none(self, spoil: Callable[[Path], Any], tmp_path: Path) -> None:
        peft(tmp_path / "a")
        spoil(tmp_path / "a")
        with pytest.raises(FormatError, match="config"):
            ao.open_adapter(tmp_path / "a")
