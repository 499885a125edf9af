"""PEFT's files as files: configs that other loaders parse, copies, single files, extras."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.errors import FormatError, IncompatibleError
from adapterops.formats import open_adapter_file
from tests.dialects import EXTRAS
from tests.support import dense, distance, pairs, weighted, write_kohya, write_peft

SHAPES = {"layers.0.q_proj": (12, 10), "layers.1.q_proj": (12, 10)}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="session")
def peft() -> Any:
    """Helpers around PEFT, imported once."""
    return pytest.importorskip("tests.peft_models")


@pytest.fixture
def two(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Two PEFT directories written by hand and 0.7·a + 0.3·b."""
    a, b = pairs(1, SHAPES, 2), pairs(2, SHAPES, 3)
    folders = [write_peft(tmp_path / "a", a, alpha=5), write_peft(tmp_path / "b", b)]
    return folders, weighted((0.7, dense(a, 2.5)), (0.3, dense(b)))


def read(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """ΔW of each module as adapterops reads it."""
    return {name: factors.dense() for name, factors in ao.open_adapter(path, **options).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


class TestConfig:
    def test_holds_only_what_old_loaders_know(self, two: Any, tmp_path: Path) -> None:
        folders, _ = two
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m")
        assert config_of(tmp_path / "m") == {
            "alpha_pattern": {},
            "base_model_name_or_path": "tiny/base",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": 5,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 5,
            "rank_pattern": {},
            "target_modules": ["q_proj"],
            "task_type": None,
            "use_rslora": False,
        }

    @pytest.mark.parametrize(
        ("config", "targets"),
        [
            ({}, ["q_proj"]),
            ({"target_modules": ["layers.0.q_proj", "1.q_proj"]}, ["1.q_proj", "layers.0.q_proj"]),
            ({"target_modules": ["q_proj", "k_proj"]}, ["q_proj"]),
            ({"target_modules": ["k_proj"]}, sorted(SHAPES)),
            ({"target_modules": r".*\.q_proj"}, sorted(SHAPES)),
            ({"target_modules": "all-linear"}, sorted(SHAPES)),
            ({"target_modules": None}, sorted(SHAPES)),
            ({"layers_to_transform": [0, 1]}, sorted(SHAPES)),
            ({"exclude_modules": ["layers.2"]}, sorted(SHAPES)),
            ({"modules_to_save": ["score"]}, sorted(SHAPES)),
        ],
        ids=str,
    )
    def test_targets_are_these_modules_and_no_others(
        self, config: dict[str, Any], targets: list[str], tmp_path: Path
    ) -> None:
        source = write_peft(tmp_path / "a", pairs(1, SHAPES, 2), **config)
        ao.merge([source], [0.5], out=tmp_path / "m")
        assert config_of(tmp_path / "m")["target_modules"] == targets

    def test_a_selection_of_modules_gets_full_paths(self, two: Any, tmp_path: Path) -> None:
        ao.merge(two[0], [0.7, 0.3], out=tmp_path / "m", modules=r"layers\.1\..*")
        assert config_of(tmp_path / "m")["target_modules"] == ["layers.1.q_proj"]

    @pytest.mark.parametrize(
        "broken", ["[]", "{", '{"r": 2, "r": 4}', '{"r": "two"}', '{"r": true}']
    )
    def test_a_broken_config_is_named(self, broken: str, tmp_path: Path) -> None:
        source = write_peft(tmp_path / "a", pairs(1, SHAPES, 2))
        (source / CONFIG).write_text(broken)
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            ao.open_adapter(source)


class TestScale:
    @pytest.mark.parametrize(
        ("config", "scale"),
        [
            ({"use_rslora": True}, 6 / math.sqrt(4)),
            ({"peft_type": "ADALORA", "init_r": 8, "target_r": 4}, 6 / (8 + 1e-5)),
        ],
        ids=["rsLoRA", "AdaLoRA"],
    )
    @pytest.mark.parametrize("said", [3, None], ids=["against the config", "instead of it"])
    def test_an_alpha_that_is_given_means_what_the_config_s_would(
        self, config: dict[str, Any], scale: float, said: int | None, tmp_path: Path
    ) -> None:
        factors = pairs(1, SHAPES, 4)
        core = {f"base_model.model.{name}.lora_E": np.ones((4, 1), np.float32) for name in SHAPES}
        extras = core if "init_r" in config else {}
        source = write_peft(tmp_path / "a", factors, extras=extras, **config, lora_alpha=said)
        alpha: Any = {source: 6.0} if said else 6.0
        for weight in (1.0, 0.5):
            out = tmp_path / f"m{weight}"
            ao.merge([source], [weight], out=out, alpha=alpha)
            assert distance(read(out), dense(factors, weight * scale)) < 1e-6

    def test_thousands_of_patterns(self, tmp_path: Path) -> None:
        """Exact ones, as we write them, before an expression; PEFT takes the first that matches."""
        other = pytest.importorskip("peft.utils.other")
        names = [f"layers.{i // 4}.{'qkvo'[i % 4]}_proj" for i in range(2000)]
        late = [f"layers.{i}.q_proj" for i in range(500, 510)]  # the expression alone matches them
        ranks = {name: 1 + i % 3 for i, name in enumerate(names)} | dict.fromkeys(late, 5)
        alphas = {name: i + 2 for i, name in enumerate(names)} | dict.fromkeys(late, 7)
        expression = r"layers\.\d*0\d\.q_proj"
        patterns = {
            field: {**{"^" + re.escape(name): values[name] for name in names}, expression: last}
            for field, values, last in (("rank_pattern", ranks, 5), ("alpha_pattern", alphas, 7))
        }
        factors = {name: (np.ones((1, r)), np.ones((r, 1))) for name, r in ranks.items()}
        source = write_peft(tmp_path / "a", factors, alpha=9, **{**patterns, "r": 4})
        sites = open_adapter_file(source).sites
        found = {name: (site.dim, site.alpha, site.scale) for name, site in sites.items()}
        assert found == {name: (r, alphas[name], alphas[name] / r) for name, r in ranks.items()}
        for name in (*names[::700], names[400], late[0]):  # 400: layers.100.q_proj, matched twice
            for field, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
                theirs = patterns[field][other.get_pattern_key(patterns[field], name)]
                assert theirs == values[name]


class TestCopy:
    """One adapter with weight 1 and nothing to cut: the same tensors, the same effect."""

    @pytest.mark.parametrize(
        "config",
        [
            {"r": 2, "lora_alpha": 7},
            {"r": 4, "lora_alpha": 7, "use_rslora": True},
            {
                "r": 4,
                "use_rslora": True,
                "rank_pattern": {"q_proj": 1, "layers.1.self_attn.v_proj": 6},
            },
            {"r": 2, "alpha_pattern": {"v_proj": 3.5}, "rank_pattern": {"down_proj": 5}},
            {"r": 2, "layers_to_transform": [1]},
            {"r": 2, "target_modules": r".*layers\.0\..*_proj"},
        ],
        ids=str,
    )
    def test_of_what_peft_saved(self, peft: Any, config: dict[str, Any], tmp_path: Path) -> None:
        targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], **config}
        source = peft.trained(tmp_path / "a", 1, "llama", **targets)
        report = ao.merge([source], out=tmp_path / "m")
        assert {module.route for module in report.modules.values()} == {"copy"}
        assert report.error == 0.0
        before, after = load_file(source / WEIGHTS), load_file(tmp_path / "m" / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
        then, now = (peft.layers(peft.reloaded(x, "llama")) for x in (source, tmp_path / "m"))
        assert {n: x.scaling for n, x in now.items()} == {n: x.scaling for n, x in then.items()}
        assert bool(config.get("use_rslora")) == config_of(tmp_path / "m")["use_rslora"]

    def test_of_a_multihead_attention_with_patterns(self, peft: Any, tmp_path: Path) -> None:
        config = {"rank_pattern": {"mha": 4}, "alpha_pattern": {"mha": 3}}
        source = peft.trained(tmp_path / "a", 1, r=2, target_modules=["mha", "linear"], **config)
        ao.merge([source], out=tmp_path / "m")
        found, wanted = (peft.deltas(peft.reloaded(x)) for x in (tmp_path / "m", source))
        assert distance(found, wanted) == 0.0

    def test_half_an_adapter_is_no_copy(self, peft: Any, tmp_path: Path) -> None:
        source = peft.trained(tmp_path / "a", 1, r=2, lora_alpha=7, target_modules=["linear"])
        ao.merge([source], [0.5], out=tmp_path / "m")
        found, wanted = (peft.deltas(peft.reloaded(x)) for x in (tmp_path / "m", source))
        assert distance(found, weighted((0.5, wanted))) < 1e-6

    def test_of_an_adapter_whose_alpha_was_given(self, tmp_path: Path) -> None:
        factors = pairs(1, SHAPES, 2)
        source = write_peft(tmp_path / "a", factors)
        (source / CONFIG).unlink()
        ao.merge([source], out=tmp_path / "m", alpha=8)
        assert distance(read(tmp_path / "m"), dense(factors, 4.0)) < 1e-15


class TestSingleFile:
    def test_is_read_back(self, two: Any, tmp_path: Path) -> None:
        folders, wanted = two
        report = ao.merge(folders, [0.7, 0.3], out=tmp_path / "m.safetensors")
        assert any("PEFT, vLLM and SGLang need a directory" in note for note in report.notes)
        assert distance(read(tmp_path / "m.safetensors"), wanted) < 1e-6

    def test_the_header_wins_over_another_files_config(self, two: Any, tmp_path: Path) -> None:
        folders, wanted = two
        other = write_peft(tmp_path / "other", pairs(3, SHAPES, 5), alpha=50)
        ao.merge(folders, [0.7, 0.3], out=other / "m.safetensors")
        assert distance(read(other / "m.safetensors"), wanted) < 1e-6

    def test_a_header_and_a_config_of_its_own_must_agree(self, two: Any, tmp_path: Path) -> None:
        ao.merge(two[0], [0.7, 0.3], out=tmp_path / "m.safetensors")
        config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10}
        (tmp_path / "m.json").write_text(json.dumps(config))
        with pytest.raises(IncompatibleError, match="two scales disagree"):
            ao.open_adapter(tmp_path / "m.safetensors")
        (tmp_path / "m.json").write_text(json.dumps({**config, "lora_alpha": 5}))
        assert ao.open_adapter(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("place", ["x.json", "x/adapter_config.json", "adapter_config.json"])
    def test_config_lies_beside(self, place: str, tmp_path: Path) -> None:
        factors = pairs(1, SHAPES, 2)
        source = write_peft(tmp_path / "a", factors, alpha=6)
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(source / WEIGHTS, tmp_path / "x.safetensors")
        shutil.copy(source / CONFIG, tmp_path / place)
        adapter = ao.open_adapter(tmp_path / "x.safetensors")
        assert distance({k: v.dense() for k, v in adapter.items()}, dense(factors, 3.0)) < 1e-15
        notes = adapter.terms[0][1].notes
        assert any("its config is taken to be" in note for note in notes) == (place == CONFIG)

    def test_a_config_of_other_ranks_is_not_its(self, tmp_path: Path) -> None:
        source = write_peft(tmp_path, pairs(1, SHAPES, 2), r=8)
        (source / WEIGHTS).rename(source / "x.safetensors")
        with pytest.raises(IncompatibleError, match="no scale"):
            ao.open_adapter(source / "x.safetensors")

    def test_its_own_config_of_other_ranks_is_an_error(self, tmp_path: Path) -> None:
        source = write_peft(tmp_path, pairs(1, SHAPES, 2), r=8)
        with pytest.raises(IncompatibleError, match="r=8, its tensors have rank 2"):
            ao.open_adapter(source / WEIGHTS)

    def test_a_kohya_file_is_not_read_by_the_peft_config_beside_it(self, tmp_path: Path) -> None:
        factors = pairs(1, {"lora_unet_x": (12, 10)}, 2)
        write_peft(tmp_path, pairs(1, SHAPES, 2), alpha=99, use_dora=True)
        write_kohya(tmp_path / "k.safetensors", factors)
        assert distance(read(tmp_path / "k.safetensors"), dense(factors)) < 1e-15


class TestSpellings:
    def test_of_a_raw_state_dict(self, tmp_path: Path) -> None:
        """`lora_A.default.weight`, `lora_embedding_A.default` and a bare `lora_A`."""
        rng = np.random.default_rng(0)
        A, B = rng.standard_normal((2, 10)), rng.standard_normal((12, 2))
        tensors = {}
        for stem, (down, up) in {
            "q": ("lora_A.default.weight", "lora_B.default.weight"),
            "embed": ("lora_embedding_A.default", "lora_embedding_B.default"),
            "bare": ("lora_A", "lora_B"),
        }.items():
            tensors[f"base_model.model.{stem}.{down}"] = A
            tensors[f"base_model.model.{stem}.{up}"] = B
        save_file(tensors, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text('{"r": 2, "lora_alpha": 2, "target_modules": ["q"]}')
        found = read(tmp_path)
        assert distance(found, dict.fromkeys(("q", "embed", "bare"), B @ A)) == 0.0

    def test_two_adapters_in_one_file(self, tmp_path: Path) -> None:
        tensors = {
            f"base_model.model.q.lora_{side}.{name}.weight": np.ones((2, 2), np.float32)
            for side in "AB"
            for name in ("one", "two")
        }
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(FormatError, match="are both the A of one module"):
            ao.open_adapter(tmp_path)

    def test_a_head_may_have_a_parameter_called_alpha(self, tmp_path: Path) -> None:
        extras = {"base_model.model.head.alpha": np.ones(3, np.float32)}
        source = write_peft(tmp_path / "a", pairs(1, SHAPES, 2), extras=extras)
        ao.merge([source], [0.5], out=tmp_path / "m")
        assert (load_file(tmp_path / "m" / WEIGHTS)[next(iter(extras))] == 1).all()

    def test_pickles_are_read_on_request(self, tmp_path: Path) -> None:
        import torch

        factors = pairs(1, SHAPES, 2)
        source = write_peft(tmp_path / "a", factors, alpha=6)
        tensors = {k: torch.from_numpy(v) for k, v in load_file(source / WEIGHTS).items()}
        torch.save(tensors, source / "adapter_model.bin")
        (source / WEIGHTS).unlink()
        with pytest.raises(FormatError, match="--allow-pickle"):
            ao.open_adapter(source)
        assert distance(read(source, allow_pickle=True), dense(factors, 3.0)) < 1e-15
        ao.merge([source], [2.0], out=tmp_path / "m", allow_pickle=True)
        assert distance(read(tmp_path / "m"), dense(factors, 6.0)) < 1e-6


class TestExtras:
    """Heads, biases and token rows as PEFT trained them, seen again by PEFT."""

    def merged(self, peft: Any, tmp_path: Path, *configs: dict[str, Any], **options: Any) -> Any:
        folders = [
            peft.trained(tmp_path / str(i), i, **{"r": 2, "target_modules": ["linear"], **config})
            for i, config in enumerate(configs, 1)
        ]
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m", **options)
        return [peft.reloaded(folder) for folder in (*folders, tmp_path / "m")]

    @staticmethod
    def head(model: Any) -> np.ndarray:
        return model.base_model.model.head.modules_to_save["default"].weight.detach().numpy()

    @pytest.mark.parametrize("policy", ["first", "average", "drop", "error"])
    def test_heads_that_disagree(self, peft: Any, policy: str, tmp_path: Path) -> None:
        config = {"modules_to_save": ["head"]}
        if policy == "error":
            with pytest.raises(IncompatibleError, match=r"head.*differs"):
                self.merged(peft, tmp_path, config, config)
            return
        a, b, m = self.merged(peft, tmp_path, config, config, extras=policy, dtype="float32")
        if policy == "drop":
            assert "modules_to_save" not in dir(m.base_model.model.head)
        else:
            wanted = self.head(a) if policy == "first" else 0.7 * self.head(a) + 0.3 * self.head(b)
            np.testing.assert_allclose(self.head(m), wanted, rtol=1e-6)

    def test_each_input_has_its_own_head(self, peft: Any, tmp_path: Path) -> None:
        a, b, m = self.merged(
            peft, tmp_path, {"modules_to_save": ["head"]}, {"modules_to_save": ["wide", "point"]}
        )
        assert (self.head(m) == self.head(a)).all()
        for name in ("wide", "point"):
            found, wanted = (
                getattr(x.base_model.model, name).modules_to_save["default"].weight for x in (m, b)
            )
            assert found.equal(wanted)

    @pytest.mark.parametrize("kind", EXTRAS)
    def test_of_one_input_are_kept(self, peft: Any, kind: str, tmp_path: Path) -> None:
        a, b, m = self.merged(peft, tmp_path, EXTRAS[kind], {})
        trained, plain, found = (
            {name: x for name, x in model.named_parameters() if "lora_" not in name}
            for model in (a, b, m)
        )
        assert found.keys() == trained.keys()
        assert all(found[name].equal(value) for name, value in trained.items())
        changed = [n for n, x in trained.items() if n not in plain or not x.equal(plain[n])]
        assert changed  # the adapter did train something beside its factors

    def test_a_module_saved_by_one_and_adapted_by_the_other(
        self, peft: Any, tmp_path: Path
    ) -> None:
        configs = {"modules_to_save": ["head"]}, {"target_modules": ["linear", "head"]}
        with pytest.raises(IncompatibleError, match=r"head: .*1/adapter_model.*carries it whole"):
            self.merged(peft, tmp_path, *configs)
        ao.merge([tmp_path / "1", tmp_path / "2"], [0.7, 0.3], out=tmp_path / "m", modules="linear")
        assert self.head(peft.reloaded(tmp_path / "m")).any()

    def test_a_classifier_reloads_without_its_head(self, peft: Any, tmp_path: Path) -> None:
        """PEFT adds heads to `modules_to_save` of its own accord for this task type."""
        config = {"task_type": "SEQ_CLS", "target_modules": ["query"], "r": 2}
        source = peft.trained(tmp_path / "a", 1, "classifier", **config)
        for policy in ("first", "drop"):
            ao.merge([source], [0.5], out=tmp_path / policy, extras=policy)
            found = peft.deltas(peft.reloaded(tmp_path / policy, "classifier"))
            wanted = peft.deltas(peft.reloaded(source, "classifier"))
            assert distance(found, weighted((0.5, wanted))) < 1e-6

    def test_the_wider_choice_of_biases_is_recorded(self, peft: Any, tmp_path: Path) -> None:
        configs = {"bias": "lora_only"}, {"bias": "all"}
        *_, m = self.merged(peft, tmp_path, *configs, extras="first")
        assert m.peft_config["default"].bias == "all"

    def test_token_rows_stand_for_their_tokens(self, peft: Any, tmp_path: Path) -> None:
        config = EXTRAS["token rows (trainable_token_indices)"]
        a, _, m = self.merged(peft, tmp_path, config, {})
        found, wanted = (x.base_model.model.embed.token_adapter for x in (m, a))
        assert found.token_indices == wanted.token_indices == {"default": [5, 2]}
        table = found.get_merged_weights(["default"])
        assert table[[5, 2]].equal(wanted.trainable_tokens_delta["default"])

    def test_a_dropped_head_leaves_its_layers_unadapted(self, tmp_path: Path) -> None:
        """`dense` in the head was no target while the head was saved; it must not become one."""
        shapes = {"layers.0.dense": (12, 10)}
        head = {"base_model.model.classifier.dense.weight": np.ones((3, 3), np.float32)}
        source = write_peft(
            tmp_path / "a", pairs(1, shapes, 2), extras=head, modules_to_save=["classifier"]
        )
        for policy, targets in (("first", ["dense"]), ("drop", ["layers.0.dense"])):
            ao.merge([source], [0.5], out=tmp_path / policy, extras=policy)
            assert config_of(tmp_path / policy)["target_modules"] == targets


def test_a_folder_of_named_adapters_says_which(tmp_path: Path) -> None:
    """PEFT saves an adapter that is not called "default" into a folder of that name."""
    for name in ("one", "two"):
        write_peft(tmp_path / "all" / name, pairs(1, {"x.q": (16, 24)}, 2))
    with pytest.raises(FormatError, match="one, two"):
        ao.merge([tmp_path / "all"], out=tmp_path / "m")


def test_an_expression_survives_where_transformers_renamed_the_modules(tmp_path: Path) -> None:
    """PEFT renames old keys of vision-language models on load; full paths would find nothing."""
    shapes = {f"language_model.model.layers.0.self_attn.{n}_proj": (16, 24) for n in "qv"}
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    for name, targets in (("a", pattern), ("b", ["q_proj", "v_proj"])):
        write_peft(tmp_path / name, pairs(1, shapes, 2), target_modules=targets)
    ao.merge([tmp_path / "a"], [0.5], out=tmp_path / "m")
    assert config_of(tmp_path / "m")["target_modules"] == pattern
    ao.merge([tmp_path / "a", tmp_path / "b"], [1, 1], out=tmp_path / "n")
    joined = config_of(tmp_path / "n")["target_modules"]
    assert isinstance(joined, str) and all(re.fullmatch(joined, name) for name in shapes)


def test_a_path_without_a_dot_is_not_taken_for_the_end_of_another(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", pairs(1, {"q": (16, 24), "block.k": (16, 24)}, 2))
    ao.merge([tmp_path / "a"], [0.5], out=tmp_path / "m", modules="q")
    target = config_of(tmp_path / "m")["target_modules"]
    assert isinstance(target, str) and re.fullmatch(target, "q")
    assert not re.fullmatch(target, "block.q")


@pytest.mark.parametrize("first", ["the expression", "the path"])
def test_the_first_pattern_that_matches_is_taken(first: str, tmp_path: Path) -> None:
    """PEFT's own configs are sorted: `.*` comes before `^`."""
    other = pytest.importorskip("peft.utils.other")
    items = [(r".*\.q_proj", 9), (r"^layers\.0\.q_proj", 5)]
    patterns = dict(items if first == "the expression" else items[::-1])
    source = write_peft(
        tmp_path / "a", pairs(1, {"layers.0.q_proj": (12, 10)}, 2), alpha_pattern=patterns
    )
    theirs = patterns[other.get_pattern_key(patterns, "layers.0.q_proj")]
    assert open_adapter_file(source).sites["layers.0.q_proj"].alpha == theirs


def test_where_the_scale_comes_from_is_the_rule_that_made_it(tmp_path: Path) -> None:
    """6 / sqrt(4) = 3 is shown as "--alpha 6 / rank 4"."""
    source = write_peft(tmp_path / "a", pairs(1, {"x.q": (12, 10)}, 4), use_rslora=True, alpha=3)
    site = open_adapter_file(source, alpha=6.0, alpha_wins=True).sites["x.q"]
    assert site.scale == 3.0 and site.scale_from != "--alpha 6 / rank 4"
