"""`svd`, and PEFT's linear as PEFT computes it, which is not the weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapterops.errors import IncompatibleError, UsageError
from adapterops.rules.registry import Pair, find
from tests import rules_dense_spectral as dense

M, N = 12, 10
Array = np.ndarray


def cored(members: list[Any], w: list[float], rank: int) -> tuple[Array, Any]:
    left, right, cores = dense.frame(members)
    one = find("svd")
    found = one.function(cores, np.array(w, float), np.zeros(len(w)), **one.values({"rank": rank}))
    return left @ found.core @ right.T, found


MEMBERS = [dense.adapter(i, M, N, x) for i, x in enumerate([[3, 2, 1], [2, 1], [1, 0.5, 0.1]])]
W = [1.0, -0.5, 2.0]


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_closest_of_its_rank(rank: int):
    total = sum(c * x.dense() for c, x in zip(W, MEMBERS, strict=True))
    U, values, V = dense.leading(total, rank)
    result, found = cored(MEMBERS, W, rank)
    np.testing.assert_allclose(result, U * values @ V.T, atol=1e-13)
    assert np.linalg.matrix_rank(result, 1e-9) == rank == found.rank
    whole = np.linalg.svd(total, compute_uv=False)
    assert found.gap == pytest.approx(whole[rank] / whole[rank - 1])
    assert found.cut == pytest.approx(whole[rank]) and not found.notes


def test_svd_of_a_larger_rank_is_the_sum():
    _, _, cores = dense.frame(MEMBERS)
    found = find("svd").function(cores, np.array(W), np.zeros(3), rank=50)
    np.testing.assert_array_equal(found.core, np.tensordot(W, cores, 1))
    assert found.rank == 8 and found.gap == 0.0
    twice = [MEMBERS[0], dense.regauged(MEMBERS[0], 5)]
    assert cored(twice, [1, 1], 50)[1].rank == 3
    assert cored(twice, [1, -1], 50)[1].rank == 0


def test_svd_keeps_its_rank_among_equal_directions_and_says_so():
    one = dense.adapter(3, M, N, [2, 2, 2, 2])
    result, found = cored([one], [1], 2)
    assert np.linalg.matrix_rank(result, 1e-9) == 2 == found.rank
    assert np.linalg.norm(result - one.dense()) == pytest.approx(8**0.5)  # no other is closer
    assert found.gap == pytest.approx(1.0) and "left out" in found.notes[0]


@pytest.mark.parametrize("given", [{}, {"rank": 0}, {"rank": 1.5}])
def test_svd_needs_a_rank(given: dict[str, Any]):
    with pytest.raises(UsageError, match="rank"):
        find("svd").values(given)


def pairs(seed: int, scales: list[float], rank: int = 3) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [
        Pair(rng.standard_normal((M, rank)), rng.standard_normal((rank, N)), scale)
        for scale in scales
    ]


def linear(given: list[Pair], w: list[float]) -> tuple[Array, Array]:
    B, A = find("peft_linear").function(given, np.array(w, float), None)
    return B, A


def test_peft_linear_is_not_the_weighted_sum():
    """Cross terms: two equal adapters at 0.5 give twice that adapter, others 90 % another sum."""
    one = pairs(0, [2.0])[0]
    B, A = linear([one, one], [0.5, 0.5])
    np.testing.assert_allclose(B @ A, 2 * 2.0 * one.B @ one.A, rtol=1e-13)
    given = pairs(1, [1.0, 1.0])
    B, A = linear(given, [0.7, 0.3])
    total = 0.7 * given[0].B @ given[0].A + 0.3 * given[1].B @ given[1].A
    assert np.linalg.norm(B @ A - total) > 0.5 * np.linalg.norm(total)
    cross = 0.21**0.5 * (given[0].B @ given[1].A + given[1].B @ given[0].A)
    np.testing.assert_allclose(B @ A, total + cross, rtol=1e-12)


def test_peft_linear_depends_on_the_form_of_the_factors():
    given = pairs(2, [1.0, 1.0])
    again = [given[0], Pair(given[1].B * 4, given[1].A / 4)]
    results = [np.matmul(*linear(each, [1, 1])) for each in (given, again)]
    assert np.linalg.norm(results[0] - results[1]) > 0.1 * np.linalg.norm(results[0])
    assert find("peft_linear").breaks == ["gauge", "zeros"]


def test_peft_linear_takes_one_rank_and_skips_who_lacks_the_module():
    given = [*pairs(3, [1.0], 3), *pairs(4, [1.0], 2)]
    with pytest.raises(IncompatibleError, match=r"3, 2; use linear"):
        linear(given, [1, 1])
    lacking = Pair(np.zeros((M, 0)), np.zeros((0, N)))
    B, A = linear([lacking, given[0], lacking], [1, 0.5, 1])
    np.testing.assert_allclose(B @ A, 0.5 * given[0].B @ given[0].A, rtol=1e-14)
    assert np.matmul(*linear([lacking], [1])).shape == (M, N)


@pytest.mark.parametrize(
    "w", [[0.7, 0.3, 1.0], [1.0, 0.0, 0.0], [0.5, -1.5, 0.25]], ids=["plus", "one", "minus"]
)
def test_peft_linear_is_what_peft_computes(w: list[float], tmp_path):
    """Linear, Conv1D, convolutions and an embedding of a tiny model, at three scales."""
    pytest.importorskip("peft")
    peft = pytest.importorskip("tests.peft_models")
    targets = ["embed", "linear", "wide", "conv1", "conv2"]
    names = ["default", "b", "c"]
    folders = [
        peft.trained(tmp_path / name, seed, r=4, lora_alpha=alpha, target_modules=targets)
        for seed, (name, alpha) in enumerate(zip(names, [8, 4, 12], strict=True))
    ]
    with peft.quiet():
        model = peft.reloaded(folders[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        model.double()
        model.add_weighted_adapter(names, w, "merged", combination_type="linear")
    layers = peft.layers(model, "merged")
    assert set(layers) == set(targets)
    for module, layer in layers.items():
        given = [Pair(*factors(layer, name), layer.scaling[name]) for name in names]
        B, A = linear(given, w)
        expected = factors(layer, "merged")
        assert layer.scaling["merged"] == 1.0
        for mine, theirs in zip((B, A), expected, strict=True):
            tolerance = 3e-7 * np.abs(theirs).max()  # PEFT's weights are float32
            np.testing.assert_allclose(mine, theirs, atol=tolerance, err_msg=module)


def factors(layer: Any, name: str) -> tuple[Array, Array]:
    """B (m, r) and A (r, n) of an adapter of PEFT's layer."""
    if name in layer.lora_A:
        B, A = layer.lora_B[name].weight, layer.lora_A[name].weight
    else:
        B, A = layer.lora_embedding_B[name], layer.lora_embedding_A[name]
    B, A = B.detach().numpy(), A.detach().numpy()
    return B.reshape(len(B), -1), A.reshape(len(A), -1)
