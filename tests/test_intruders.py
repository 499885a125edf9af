"""Intruder dimensions against full singular value decompositions and PEFT's own function."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
from scipy.sparse.linalg import ArpackNoConvergence

from adapterops.errors import NumericsError, UsageError
from adapterops.judging import intruders as judged
from adapterops.judging.intruders import Intruders, intruders, intruders_in, mitigated
from tests import peft_models

SHAPES = {
    "square": (320, 320),
    "wide": (250, 500),
    "tall": (500, 250),
    "small": (40, 64),
    "row": (1, 30),
    "column": (30, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape) / math.sqrt(shape[0])


def planted(kind: str, m: int, n: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """W, B and A with intruders that are known, or none."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((m, n)) / math.sqrt(n)
    U, _, Vh = np.linalg.svd(W, full_matrices=False)
    inner = min(m, n) // 2  # a direction of W that is none of its first
    if kind == "strange":
        B, A = 6 * unit(rng, m, 3), unit(rng, n, 3).T
    elif kind == "leading":
        B, A = 6 * U[:, :2], Vh[:2]
    elif kind == "inner":
        B, A = 6 * U[:, inner : inner + 1], Vh[inner : inner + 1]
    elif kind == "both":
        B = np.concatenate([9 * U[:, inner : inner + 1], 6 * unit(rng, m, 1)], 1)
        A = np.concatenate([Vh[inner : inner + 1], unit(rng, n, 1).T])
    elif kind == "spread":  # over some of the first, most in none
        B, A = 2 * U[:, :9].sum(axis=1, keepdims=True), unit(rng, n, 1).T
    elif kind == "weak":
        B, A = 1e-3 * unit(rng, m, 3), unit(rng, n, 3).T
    else:
        B, A = np.zeros((m, 2)), np.zeros((2, n))
    return W, B, A


def oracle(W: np.ndarray, merged: np.ndarray, top: int = 10, epsilon: float = 0.5):
    """(index, σ, similarity) of the intruders, from all singular vectors."""
    X, values, _ = np.linalg.svd(W, full_matrices=False)
    X = X[:, values > 1e-13 * max(values, default=0.0)]
    Y, sigma, _ = np.linalg.svd(merged, full_matrices=False)
    similar = np.abs(X.T @ Y[:, :top]).max(axis=0, initial=0.0)
    known = sigma[:top] > 1e-13 * sigma[0]
    return [
        (j, sigma[j], similar[j])
        for j in np.flatnonzero((similar < epsilon) & known[: len(similar)])
    ]


def agree(found: Intruders, expected) -> None:
    assert [each.index for each in found.dims] == [j for j, _, _ in expected]
    for each, (_, sigma, similarity) in zip(found.dims, expected, strict=True):
        assert each.sigma == pytest.approx(sigma, rel=1e-9)
        assert each.similarity <= similarity + 1e-6
        assert similarity - 1e-6 <= each.at_most < found.epsilon
        if found.cost != "lanczos":
            assert each.similarity == pytest.approx(similarity, abs=1e-6)


@shapes
@pytest.mark.parametrize("kind", ["strange", "leading", "inner", "both", "spread", "weak", "none"])
def test_the_same_as_all_singular_vectors(kind, shape):
    W, B, A = planted(kind, *shape)
    found = intruders(W, B, A)
    agree(found, oracle(W, W + B @ A))
    assert (found.cost == "svd") == (min(shape) <= 192)
    merged = intruders_in(W, W + B @ A)
    assert [each.index for each in merged.dims] == [each.index for each in found.dims]


@pytest.mark.parametrize(
    ("kind", "cost", "count"),
    [
        ("strange", "lanczos", 3),
        ("leading", "lanczos", 0),
        ("inner", "eigh", 0),
        ("both", "eigh", 1),
    ],
    ids=["strange", "leading", "inner", "both"],
)
def test_all_singular_vectors_are_computed_only_where_the_first_do_not_decide(kind, cost, count):
    found = intruders(*planted(kind, 320, 320))
    assert (found.cost, len(found.dims)) == (cost, count)


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top", [1, 3, 20])
def test_options(top, epsilon):
    W, B, A = planted("strange", 300, 260, seed=4)
    agree(intruders(W, B, A, top=top, epsilon=epsilon), oracle(W, W + B @ A, top, epsilon))


@pytest.mark.parametrize("shape", [(220, 220), (220, 260), (260, 220)], ids=str)
@pytest.mark.parametrize("index", [0, 100, 215])
def test_graded_weights(index, shape):
    """Singular values over twelve decades: directions whose squares are lost are still known."""
    rng = np.random.default_rng(index)
    m, n = shape
    U, V = np.linalg.qr(unit(rng, m, 220))[0], np.linalg.qr(unit(rng, n, 220))[0].T
    W = (U * np.logspace(0, -12, 220)) @ V
    assert intruders(W, 3 * U[:, [index]], V[[index]], top=1).dims == ()
    y = U[:, [index]] + 2 * U[:, [3]] + 2 * U[:, [60]] + 2 * U[:, [150]] + 2 * U[:, [200]]
    found = intruders(W, 3 * y, V[[index]], top=1, epsilon=0.49)  # 2/√17 is 0.485
    agree(found, oracle(W, W + 3 * y @ V[[index]], 1, 0.49))


@pytest.mark.parametrize("shape", [(220, 300), (300, 220), (30, 20)], ids=str)
def test_a_direction_that_a_weight_lacks_is_strange_to_it(shape):
    rng = np.random.default_rng(1)
    m, n = shape
    W = unit(rng, m, 10) @ rng.standard_normal((10, n))
    y = unit(rng, m)
    y -= W @ np.linalg.lstsq(W, y, rcond=None)[0]
    found = intruders(W, 50 * y[:, None], unit(rng, n)[None], top=1)
    assert [each.index for each in found.dims] == [0]
    assert found.dims[0].similarity < 0.5
    nothing = intruders(0 * W, unit(rng, m, 2), unit(rng, n, 2).T)
    assert [each.similarity for each in nothing.dims] == [0.0, 0.0]
    assert nothing.looked_at == 2  # beyond its rank there is nothing


def test_no_convergence_takes_all_singular_vectors(monkeypatch):
    def fails(*_, **__):
        raise ArpackNoConvergence("no convergence", np.empty(0), np.empty((0, 0)))

    W, B, A = planted("strange", 250, 260)
    expected = intruders(W, B, A)
    monkeypatch.setattr(judged, "svds", fails)
    found = intruders(W, B, A)
    assert [each.index for each in found.dims] == [each.index for each in expected.dims]
    assert [each.sigma for each in found.dims] == pytest.approx(
        [each.sigma for each in expected.dims]
    )


def test_repeated_runs_and_a_transposed_view_agree():
    W, B, A = planted("strange", 260, 300)
    one, two = intruders(W, B, A), intruders(W, B, A)
    assert one.to_dict() == two.to_dict()
    assert np.array_equal(one.left, two.left)
    stored = np.ascontiguousarray(W.T)  # (in, out), as a Conv1D is
    assert [each.index for each in intruders(stored.T, B, A).dims] == [0, 1, 2]
    assert json.loads(json.dumps(one.to_dict()))["cost"] == "lanczos"


@shapes
@pytest.mark.parametrize("strength", [0.0, 0.75, 1.0, 1.5])
def test_mitigation_scales_the_intruders_and_nothing_else(shape, strength):
    W, B, A = planted("strange", *shape)
    found = intruders(W, B, A)
    B2, A2 = mitigated(B, A, found, strength)
    assert B2.shape[1] == A2.shape[0] == B.shape[1] + len(found.dims)
    U, sigma, Vh = np.linalg.svd(W + B @ A, full_matrices=False)
    mine = [each.index for each in found.dims]
    sigma[mine] *= strength
    expected = (U * sigma) @ Vh - W
    assert np.abs(B2 @ A2 - expected).max() < 1e-7 * max(1.0, sigma.max(initial=0.0))


def test_mitigation_agrees_with_peft():
    """In float32 PEFT adds nothing away; what it then cuts to the old rank is cut here too."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    names = ("strange", "both", "leading")
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(60, 48, bias=False) for name in names})
    with peft_models.quiet():
        model = get_peft_model(layers, LoraConfig(r=3, lora_alpha=3, target_modules=list(names)))
    mine = {}
    for name in names:
        W, B, A = planted(name, 48, 60, seed=2)
        B, A = (np.concatenate([B, 0 * B, 0 * B], 1)[:, :3], np.concatenate([A, 0 * A, 0 * A])[:3])
        layer = peft_models.layers(model)[name]
        with torch.no_grad():
            layer.get_base_layer().weight.copy_(torch.from_numpy(W))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(B))
            layer.lora_A["default"].weight.copy_(torch.from_numpy(A))
        found = intruders(W, B, A)
        mine[name] = (found, *mitigated(B, A, found))
    said: list[str] = []
    reduce_intruder_dimension(model, logging_sink=said.append)
    for name, (found, B, A) in mine.items():
        count = f"Intruders: {len(found.dims)}" if found.dims else "No intruders"
        assert any(line.endswith(f"{name}: {count}") for line in said), said
        layer = peft_models.layers(model, "intruder_reduced")[name]
        theirs = layer.get_delta_weight("intruder_reduced").detach().double().numpy()
        U, sigma, Vh = np.linalg.svd(B @ A)
        best = (U[:, :3] * sigma[:3]) @ Vh[:3]
        assert np.abs(theirs - best).max() < 2e-5
    assert len(mine["strange"][0].dims) == 3


def test_a_change_that_sixteen_bits_swallow_counts():
    """PEFT adds the change in the stored type; nothing is left of it there to be an intruder."""
    rng = np.random.default_rng(3)
    W = np.ones((200, 210))  # the next bfloat16 below 1 is 2⁻⁸ away
    B, A = unit(rng, 200, 1), 0.03 * unit(rng, 210, 1).T
    assert np.abs(B @ A).max() < 2.0**-9
    found = intruders(W, B, A, top=2)
    assert [each.index for each in found.dims] == [1]
    assert intruders_in(W, W, top=2).dims == ()


@pytest.mark.parametrize("where", ["W", "B", "A"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_what_is_not_finite(where, value):
    parts = dict(zip("WBA", planted("strange", 20, 30), strict=True))
    parts[where][0, 0] = value
    with pytest.raises(NumericsError, match=r"1 of .* values are NaN or infinite"):
        intruders(*parts.values())


@pytest.mark.parametrize("options", [{"top": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}], ids=str)
def test_options_out_of_range(options):
    with pytest.raises(UsageError, match="expected at least 1"):
        intruders(*planted("strange", 20, 30), **options)


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_strength_out_of_range(strength):
    W, B, A = planted("strange", 20, 30)
    with pytest.raises(UsageError, match="strength"):
        mitigated(B, A, intruders(W, B, A), strength)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_has_no_intruders(shape):
    m, n = shape
    found = intruders(np.zeros(shape), np.zeros((m, 1)), np.zeros((1, n)))
    assert found.dims == () and found.looked_at == 0
    B, A = mitigated(np.zeros((m, 1)), np.zeros((1, n)), found)
    assert (B.shape, A.shape) == ((m, 1), (1, n))


def test_the_bound_holds_for_measures_with_atoms():
    """Of vectors with a known share in one eigenvector none is bounded by less than that share."""
    rng = np.random.default_rng(7)
    U = scipy.linalg.qr(rng.standard_normal((260, 260)))[0]
    W = U * np.sort(rng.uniform(0.1, 1.0, 260))
    for index in range(0, 260, 20):
        for share in (0.05, 0.2, 0.3, 0.6, 0.95):
            z = unit(rng, 260)
            z -= U[:, index] * (U[:, index] @ z)
            z *= math.sqrt(1 - share) / np.linalg.norm(z)
            z += math.sqrt(share) * U[:, index]
            largest = float(np.max((U.T @ z) ** 2))
            assert judged._largest_share(W, z, 0.25) >= largest - 1e-9
