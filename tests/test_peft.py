"""PEFT writes two adapters, adapterops merges them, PEFT reads the result: ΔW = Σ wᵢΔWᵢ.

The oracle is PEFT's own `get_delta_weight` in float64. Where PEFT's merge is wrong, a named test
shows that ours differs, and by how much PEFT is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.dialects import PEFT, Peft
from tests.support import distance, weighted

import adapterops as ao

pytestmark = pytest.mark.xdist_group("peers")

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
                peft.trained(folder / name, seed, case.model, **{"r": r, "lora_alpha": alpha, **config})
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
    assert {layer.scaling["default"] for layer in peft.layers(model).values()} == {1.0} or 0.0 in weights
    if case.forward:
        result = peft.outputs(model, case.model)
        plain = peft.outputs(peft.shifted(case.model, wanted), case.model)
        np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
