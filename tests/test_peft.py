"""PEFT writes two adapters, adapterops merges them, PEFT reads the result: ΔW = Σ wᵢΔWᵢ.

The oracle is PEFT's own `get_delta_weight` in float64. Where PEFT's merge is wrong, a named test
shows that ours differs, and by how much PEFT is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterops as ao
from tests.dialects import PEFT, Peft
from tests.support import distance, weighted

WEIGHTS = ([0.7, 0.3], [-1.5, 0.4], [1.0, 0.0])
by_case = pytest.mark.parametrize("case", PEFT, ids=lambda case: case.kind)


@pytest.fixture(scope="session")
def peft() -> Any:
    """Helpers around PEFT, imported once."""
    return pytest.importorskip("tests.peft_models")


@pytest.fixture(scope="session")
def pair(peft: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """case -> the folders of its two adapters."""
    made: dict[str, list[Path]] = {}

    def make(case: Peft) -> list[Path]:
        if case.kind not in made:
            folder = tmp_path_factory.mktemp("pair")
            made[case.kind] = [
                peft.trained(
                    folder / name, seed, case.model, **{"r": r, "lora_alpha": alpha, **config}
                )
                for name, seed, r, alpha, config in (
                    ("a", 1, 2, 5, case.a),
                    ("b", 2, 3, 3, case.b),
                )
            ]
        return made[case.kind]

    return make


def expected(peft: Any, folders: list[Path], weights: list[float], model: str) -> Any:
    """Σ wᵢΔWᵢ of the modules that have a factor in an input of non-zero weight."""
    terms = [
        (weight, peft.deltas(peft.reloaded(folder, model)))
        for weight, folder in zip(weights, folders, strict=True)
        if weight
    ]
    return weighted(*terms)


@by_case
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_peft_reads_back_the_exact_sum(
    peft: Any, pair: Any, case: Peft, weights: list[float], tmp_path: Path
) -> None:
    folders = pair(case)
    wanted = expected(peft, folders, weights, case.model)
    ao.merge(folders, weights, out=tmp_path / "m", dtype="float32")
    model = peft.reloaded(tmp_path / "m", case.model)
    found = peft.deltas(model)
    for name in found.keys() - wanted.keys():  # an input without lora_bias shifts it by zero
        assert name.endswith(".bias") and not found.pop(name).any()
    assert distance(found, wanted) < 1e-6
    assert {layer.scaling["default"] for layer in peft.layers(model).values()} == {
        1.0
    } or 0.0 in weights
    if case.forward:
        result = peft.outputs(model, case.model)
        plain = peft.outputs(peft.shifted(case.model, wanted), case.model)
        np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_error_is_what_the_certificate_says(
    peft: Any, pair: Any, dtype: str, tmp_path: Path
) -> None:
    case = next(case for case in PEFT if case.kind == "all of these")
    folders, weights = pair(case), [0.7, 0.3]
    wanted = expected(peft, folders, weights, case.model)
    report = ao.merge(folders, weights, out=tmp_path / "m", dtype=dtype)
    found = peft.deltas(peft.reloaded(tmp_path / "m"))
    assert distance(found, wanted) == pytest.approx(report.error, rel=1e-6)
    for name, module in report.modules.items():
        assert distance({0: found[name]}, {0: wanted[name]}) == pytest.approx(
            module.error, rel=1e-6
        )


def test_half_precision_inputs_keep_their_type(peft: Any, tmp_path: Path) -> None:
    config = {"target_modules": ["linear", "conv2"], "r": 2, "lora_alpha": 3}
    folders = [
        peft.trained(tmp_path / n, i, dtype="bfloat16", **config) for i, n in enumerate("ab")
    ]
    report = ao.merge(folders, [0.7, 0.3], out=tmp_path / "m")
    assert report.dtype == "bfloat16"
    found = peft.deltas(peft.reloaded(tmp_path / "m"))
    wanted = expected(peft, folders, [0.7, 0.3], "tiny")
    assert distance(found, wanted) == pytest.approx(report.error, rel=1e-6)


def test_agrees_with_cat_on_plain_lora(peft: Any, pair: Any, tmp_path: Path) -> None:
    """PEFT's exact method: same rank for all, no rsLoRA, no lora_bias."""
    case = next(case for case in PEFT if case.kind == "all of these")
    both = together(peft, pair(case), case.model)
    both.add_weighted_adapter(["default", "b"], [0.7, 0.3], "sum", combination_type="cat")
    ao.merge(pair(case), [0.7, 0.3], out=tmp_path / "m")
    assert distance(peft.deltas(peft.reloaded(tmp_path / "m")), peft.deltas(both, "sum")) < 1e-6


def together(peft: Any, folders: list[Path], model: str) -> Any:
    """Both adapters on one base, "default" and "b"."""
    both = peft.reloaded(folders[0], model)
    with peft.quiet():
        both.load_adapter(str(folders[1]), "b")
    return both.double()


class TestWhereWeDifferFromPeft:
    """Each case first shows PEFT's result to be wrong, then that ours is not."""

    @staticmethod
    def compare(
        peft: Any, folders: list[Path], weights: list[float], out: Path, **options: Any
    ) -> tuple[float, float]:
        """Relative distance of PEFT's merge and of ours from Σ wᵢΔWᵢ."""
        wanted = expected(peft, folders, weights, "tiny")
        both = together(peft, folders, "tiny")
        both.add_weighted_adapter(["default", "b"], weights, "sum", **options)
        ao.merge(folders, weights, out=out)
        theirs = distance(peft.deltas(both, "sum"), wanted)
        return theirs, distance(peft.deltas(peft.reloaded(out)), wanted)

    @staticmethod
    def trained(peft: Any, folder: Path, *configs: dict[str, Any]) -> list[Path]:
        targets = {"target_modules": ["linear", "square"]}
        return [
            peft.trained(folder / str(seed), seed, **{**targets, **config})
            for seed, config in enumerate(configs)
        ]

    def test_linear_has_no_cross_terms(self, peft: Any, tmp_path: Path) -> None:
        folders = self.trained(peft, tmp_path, {"r": 2}, {"r": 2})
        theirs, ours = self.compare(
            peft, folders, [0.7, 0.3], tmp_path / "m", combination_type="linear"
        )
        assert theirs > 0.3 and ours < 1e-6

    def test_rslora_does_not_inflate_the_result(self, peft: Any, tmp_path: Path) -> None:
        config = {"r": 2, "use_rslora": True}
        folders = self.trained(peft, tmp_path, config, config)
        theirs, ours = self.compare(
            peft, folders, [0.7, 0.3], tmp_path / "m", combination_type="cat"
        )
        assert theirs == pytest.approx(1.0, rel=1e-3)  # √R = 2 times too large
        assert ours < 1e-6

    def test_rank_of_a_single_adapter_can_be_reduced(self, peft: Any, tmp_path: Path) -> None:
        [folder] = self.trained(peft, tmp_path, {"r": 4})
        alone = peft.reloaded(folder)
        alone.add_weighted_adapter(["default"], [1.0], "less", combination_type="svd", svd_rank=2)
        assert alone.peft_config["less"].r == 4
        ao.merge([folder], out=tmp_path / "m", rank=2)
        found = peft.deltas(peft.reloaded(tmp_path / "m"))
        for name, whole in peft.deltas(alone).items():
            u, s, v = np.linalg.svd(whole)
            best = (u[:, :2] * s[:2]) @ v[:2]
            assert distance({name: found[name]}, {name: best}) < 1e-6

    def test_a_trained_head_survives(self, peft: Any, tmp_path: Path) -> None:
        config = {"r": 2, "modules_to_save": ["head"]}
        folders = self.trained(peft, tmp_path, config, {"r": 2})
        both = together(peft, folders, "tiny")
        both.add_weighted_adapter(["default", "b"], [0.7, 0.3], "sum", combination_type="cat")
        trained, untrained = (
            peft.reloaded(folders[0]).base_model.model.head.modules_to_save["default"].weight,
            peft.base().double().head.weight,
        )
        theirs = both.base_model.model.head.modules_to_save["sum"].weight
        assert theirs.equal(untrained)
        ao.merge(folders, [0.7, 0.3], out=tmp_path / "m")
        ours = peft.reloaded(tmp_path / "m").base_model.model.head.modules_to_save["default"]
        assert ours.weight.equal(trained)

    def test_lora_bias_is_merged(self, peft: Any, tmp_path: Path) -> None:
        config = {"r": 2, "lora_bias": True}
        folders = [
            peft.trained(tmp_path / str(seed), seed, target_modules=["linear"], **config)
            for seed in (1, 2)
        ]
        theirs, ours = self.compare(
            peft, folders, [0.7, 0.3], tmp_path / "m", combination_type="cat"
        )
        assert theirs > 1e-2 and ours < 1e-6

    def test_patterns_whose_order_matters_are_reported(self, peft: Any, tmp_path: Path) -> None:
        """JSON sorts the keys, so PEFT reloads another scale than it trained with."""
        pattern = {"linear": 2, ".*e.*": 40}  # in training `linear` came first
        folders = self.trained(peft, tmp_path, {"r": 2, "alpha_pattern": pattern}, {"r": 2})
        layer = peft.layers(peft.reloaded(folders[0]))["linear"]
        assert layer.scaling["default"] == 20.0  # trained at 2 / 2
        report = ao.merge(folders, [0.7, 0.3], out=tmp_path / "m")
        [warning] = report.warnings
        assert "alpha_pattern gives module linear the values [40.0, 2.0]" in warning
        wanted = expected(peft, folders, [0.7, 0.3], "tiny")
        assert distance(peft.deltas(peft.reloaded(tmp_path / "m")), wanted) < 1e-6

    def test_negative_weights_at_full_rank(self, peft: Any, tmp_path: Path) -> None:
        folders = self.trained(peft, tmp_path, {"r": 2}, {"r": 3})
        theirs, ours = self.compare(
            peft, folders, [1.0, -0.6], tmp_path / "m", combination_type="cat"
        )
        assert theirs < 1e-6 and ours < 1e-6
