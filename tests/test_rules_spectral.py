"""Spectral methods on cores against dense ones; gauges, twins, repeated values, absent adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.factors import Factors
from adapterops.rules import modify, project, spectral, tucker
from adapterops.rules.registry import METHODS, Cored, find
from tests import rules_dense_spectral as dense

M, N = 30, 24
MODULES = {module.__name__ for module in (project, spectral, tucker)}
NAMES = sorted(name for name, one in METHODS.items() if one.function.__module__ in MODULES)
SPECTRA = {
    "distinct": [5.0, 3.0, 2.0, 1.0],
    "close": [3.0, 3.0 * (1 - 1e-3), 1.0, 1.0 - 1e-3],
    "repeated": [3.0, 3.0, 1.0, 1.0],
    "equal": [2.0, 2.0, 2.0, 2.0],
}


def trio(spectrum: str = "distinct", seed: int = 0) -> list[Factors]:
    """Three adapters of different ranks and sizes."""
    values = SPECTRA[spectrum]
    sizes = [values, values[:3], [0.5 * x for x in values]]
    return [dense.adapter(10 * seed + i, M, N, x) for i, x in enumerate(sizes)]


def run(
    name: str, members: list[Factors], w: list[float], noise: Any = None, **given: Any
) -> tuple[np.ndarray, Cored]:
    left, right, cores = dense.frame(members)
    one = find(name)
    noise = np.zeros(len(w)) if noise is None else np.asarray(noise, dtype=float)
    found = one.function(cores, np.array(w, dtype=float), noise, **one.values(given))
    assert found.core.shape == cores.shape[1:] and np.isfinite(found.core).all()
    return left @ found.core @ right.T, found


def rank_of(delta: np.ndarray) -> int:
    values = np.linalg.svd(delta, compute_uv=False)
    return int((values > 1e-9 * max(values[0], 1e-300)).sum())


W = [1.0, 0.7, -1.3]


def test_these_are_registered():
    assert NAMES == ["ctm", "iso_c", "iso_cts", "project", "subtract", "tsv"]


@pytest.mark.parametrize("scale", ["norm", "mean"])
def test_iso_c_is_the_dense_one(scale: str):
    members = trio()
    expected = dense.iso_c([one.dense() for one in members], np.array(W), 11, scale)
    result, found = run("iso_c", members, W, alpha=1.5, scale=scale)
    np.testing.assert_allclose(result, 1.5 * expected, atol=1e-11)
    assert found.rank == 11 and found.notes == ()
    assert found.gap < 1e-12


@pytest.mark.parametrize("scale", ["norm", "mean"])
@pytest.mark.parametrize(("common", "shared", "each"), [(0.8, 8, 1), (0.5, 5, 2), (1, 11, 0)])
def test_iso_cts_is_the_dense_one(scale: str, common: float, shared: int, each: int):
    members = trio()
    deltas = [one.dense() for one in members]
    expected = dense.iso_cts(deltas, np.array(W), shared, each, scale)
    result, found = run("iso_cts", members, W, common=common, scale=scale)
    np.testing.assert_allclose(result, expected, atol=1e-10)
    assert found.rank == 11


@pytest.mark.parametrize(("rank", "ranks"), [(0, (4, 3, 4)), (2, (2, 2, 2)), (9, (4, 3, 4))])
def test_tsv_is_the_dense_one(rank: int, ranks: tuple[int, ...]):
    members = trio()
    expected = dense.tsv([one.dense() for one in members], np.array(W), ranks)
    result, found = run("tsv", members, W, rank=rank, alpha=0.5)
    np.testing.assert_allclose(result, 0.5 * expected, atol=1e-11)
    assert found.rank == sum(ranks) == rank_of(result)


def test_tsv_keeps_what_the_adapter_has_and_nothing_arbitrary():
    """min(m, n)/T directions, as in the authors' program, would take in null vectors."""
    members = trio()
    deltas = [one.dense() for one in members]
    result, _ = run("tsv", members, W)
    arbitrary = dense.tsv(deltas, np.array(W), [N // 3] * 3)
    assert np.linalg.norm(result - arbitrary) > 0.01 * np.linalg.norm(result)
    whole = np.linalg.matrix_rank(np.concatenate(deltas, axis=1), tol=1e-9)
    both = np.linalg.matrix_rank(np.concatenate([*deltas, result], axis=1), tol=1e-9)
    assert both == whole


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_ctm_is_the_dense_one(beta: float):
    members = trio()
    deltas = [one.dense() for one in members]
    U, V = dense.hooi(deltas, 3, beta)
    expected = U @ U.T @ sum(c * D for c, D in zip(W, deltas, strict=True)) @ V @ V.T
    result, found = run("ctm", members, W, rank=3, beta=beta)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert found.rank == 3 == rank_of(result)


def test_ctm_certifies_its_fit():
    members = trio(seed=3)
    _, _, cores = dense.frame(members)
    found = tucker.shared(cores, np.ones(3), np.zeros(3), rank=3, beta=0.25, cut=1e-3)
    assert np.linalg.norm(found.U.T @ found.U - np.eye(3)) < 1e-13
    assert 0 < found.fit < found.bound < 1
    norms = np.linalg.norm(cores, axis=(1, 2))
    X = cores * (0.25 + 0.75 * norms.mean() / norms)[:, None, None]
    rng = np.random.default_rng(0)
    for _ in range(200):  # no other subspaces, near or far, pass the bound
        near = [
            np.linalg.qr(side + rng.choice([1e-2, 10]) * rng.standard_normal(side.shape))[0]
            for side in (found.U, found.V)
        ]
        fit = float(((near[0].T @ X @ near[1]) ** 2).sum() / (X**2).sum())
        assert fit <= found.bound
    rows = [Factors(one.B[:, :3], members[0].A[:3]) for one in members]  # one row space
    _, _, cores = dense.frame(rows)
    alike = tucker.shared(cores, np.ones(3), np.zeros(3), rank=3, beta=1.0, cut=1e-3)
    side = np.linalg.svd(np.concatenate(list(cores), axis=1), compute_uv=False) ** 2
    assert alike.fit == pytest.approx(alike.bound) == pytest.approx(side[:3].sum() / side.sum())
    assert alike.bound < 0.999
    whole = run("ctm", members, W, rank=11)
    np.testing.assert_allclose(
        whole[0], sum(c * x.dense() for c, x in zip(W, members, strict=True)), atol=1e-12
    )
    assert whole[1].fit == pytest.approx((1.0, 1.0))
    assert run("ctm", members, W)[1].rank == 4  # the largest of the adapters' ranks


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("k", [2, 3])
def test_project_and_subtract_are_the_dense_ones(side: str, share: float, k: int):
    shapes = [[5, 3, 2, 1], [4, 2, 1], [3, 2.5, 0.5]]
    members = [dense.adapter(i, M, 12, x) for i, x in enumerate(shapes)]
    deltas = [one.dense() for one in members]
    expected = dense.project(deltas, k, side, share)
    taken, found = run("project", members, [2, 1, -1], side=side, share=share, rank=k)
    np.testing.assert_allclose(taken, 2 * expected, atol=1e-12)
    assert found.rank == 2 * k and np.linalg.norm(taken) > 0.1
    left, _ = run("subtract", members, [2, 1, -1], side=side, share=share, rank=k)
    np.testing.assert_allclose(left, 2 * (deltas[0] - expected), atol=1e-12)


def test_subtracting_an_adapter_from_itself_leaves_nothing():
    one, other = dense.adapter(1, M, N, [3, 2, 1]), dense.adapter(2, M, N, [3, 2])
    for side in ("left", "right", "both"):
        assert np.linalg.norm(run("subtract", [one, one], [1, 1], side=side)[0]) < 1e-13
        gone, _ = run("subtract", [one, other], [1, 0], side=side)  # weight 0: not looked at
        np.testing.assert_allclose(gone, one.dense(), atol=1e-13)
        assert not run("project", [one, 0 * other], [1, 1], side=side)[0].any()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", NAMES)
def test_the_gauge_and_the_order_do_not_matter(name: str, spectrum: str):
    members = trio(spectrum)
    options = {"rank": 3} if name == "ctm" else {}
    result, found = run(name, members, W, **options)
    other = [dense.regauged(one, 7 + i) for i, one in enumerate(members)]
    again, same = run(name, other, W, **options)
    size = np.linalg.norm(result)
    limit = 1e-7 if name == "ctm" else 1e-10
    assert np.linalg.norm(result - again) <= limit * size
    assert found.rank == same.rank and found.cut == pytest.approx(same.cut)
    order = [0, 2, 1] if name in ("project", "subtract") else [2, 0, 1]
    moved, _ = run(name, [members[i] for i in order], [W[i] for i in order], **options)
    assert np.linalg.norm(result - moved) <= limit * size


@pytest.mark.parametrize("name", ["tsv", "project", "subtract"])
def test_a_number_of_directions_never_parts_equal_ones(name: str):
    """One direction of [2, 2, 2, 2] is asked for: which would depend on rounding, so all come."""
    members = [dense.adapter(1, M, N, [3, 2, 1]), dense.adapter(2, M, N, SPECTRA["equal"])]
    result, _ = run(name, members, [1, 1], rank=1)
    again, _ = run(name, [dense.regauged(one, 3) for one in members], [1, 1], rank=1)
    assert np.linalg.norm(result - again) < 1e-10
    if name != "tsv":
        np.testing.assert_allclose(result, run(name, members, [1, 1], rank=4)[0], atol=1e-12)


def test_ctm_says_when_its_rank_parts_equal_directions():
    one = dense.adapter(2, M, N, SPECTRA["equal"])
    _, found = run("ctm", [one], [1], rank=2)
    assert found.rank == 2 and found.gap > 0.999 and "left out" in found.notes[0]
    assert not run("ctm", trio(), W, rank=3)[1].notes


@pytest.mark.parametrize("values", [[9, 8, 6, 5, 4, 3, 2, 1], [4, 4, 4, 4, 1, 1, 1, 1]])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "iso_cts"])
def test_twins_do_not_change_the_rank(name: str, values: list[float]):
    """An adapter and its fp16 re-save at 0.5/0.5: the noise is no direction."""
    one = dense.adapter(4, M, N, values)
    again, noise = dense.saved(one)
    result, found = run(name, [one, again], [0.5, 0.5], [0, noise])
    exact, _ = run(name, [one, one], [0.5, 0.5])
    assert found.rank == 8 and noise > 0
    assert np.linalg.norm(result - exact) < 30 * noise
    if name != "subtract":
        assert rank_of(result) == 8


def test_twins_and_iso_cts():
    """Two copies have one direction of their own, 6 + 1 of 8; among equal ones a warning says so"""
    one = dense.adapter(4, M, N, [9, 8, 6, 5, 4, 3, 2, 1])
    again, noise = dense.saved(one)
    result, found = run("iso_cts", [one, again], [0.5, 0.5], [0, noise])
    exact, same = run("iso_cts", [one, one], [0.5, 0.5])
    assert found.rank == same.rank == rank_of(result) == 7 and not found.notes
    assert np.linalg.norm(result - exact) < 30 * noise
    one = dense.adapter(4, M, N, [4, 4, 4, 4, 1, 1, 1, 1])
    again, noise = dense.saved(one)
    assert "left out" in run("iso_cts", [one, again], [0.5, 0.5], [0, noise])[1].notes[0]


@pytest.mark.parametrize("name", ["iso_c", "tsv"])
def test_without_a_cut_the_noise_of_twins_would_be_half_the_result(name: str):
    """What the cut is for: with none, fp16 rounding counts as eight more directions."""
    one = dense.adapter(4, M, N, SPECTRA["distinct"])
    again, noise = dense.saved(one)
    exact, _ = run(name, [one, one], [0.5, 0.5])
    wrong, found = run(name, [one, again], [0.5, 0.5], [0, 0], cut=0.0)
    assert found.rank > 4 and np.linalg.norm(wrong - exact) > 0.2 * np.linalg.norm(exact)
    right, found = run(name, [one, again], [0.5, 0.5], [0, noise], cut=0.0)
    assert found.rank == 4 and np.linalg.norm(right - exact) < 10 * noise


@pytest.mark.parametrize("name", ["tsv", "project"])
def test_twins_with_weak_directions(name: str):
    """Noise turns a weak direction far more than a strong one: it is judged at its strength."""
    one = dense.adapter(4, M, N, [9e-3, 5e-3, 3e-3, 3e-4])
    again, noise = dense.saved(one)
    turned = noise / 3e-4
    assert turned > 10 * 1e-3  # as a unit vector it is far from its twin
    first = [dense.adapter(5, M, N, [1, 1])] if name == "project" else []
    result, found = run(
        name, [*first, one, again], [1] * (2 + len(first)), [0] * len(first) + [0, noise]
    )
    assert found.rank == 4
    exact, _ = run(name, [*first, one, one], [1] * (2 + len(first)))
    assert np.linalg.norm(result - exact) < 10 * turned * np.linalg.norm(exact)


def test_tsv_of_copies_at_different_weights():
    """What two copies differ by is taken out whatever they weigh: polar([U, U]) = [U, U]/√2."""
    one = dense.adapter(1, M, N, [3, 2, 1])
    deltas, w = [one.dense(), one.dense()], np.array([0.9, 0.1])
    np.testing.assert_allclose(run("tsv", [one, one], [0.9, 0.1])[0], deltas[0] / 2, atol=1e-12)
    np.testing.assert_allclose(dense.tsv(deltas, w, [3, 3]), deltas[0] / 2, atol=1e-12)


@pytest.mark.parametrize("name", ["ctm", "project"])
def test_noise_alone_makes_the_cut(name: str):
    one, other = dense.adapter(4, M, N, SPECTRA["distinct"]), dense.adapter(5, M, N, [1, 1])
    again, noise = dense.saved(one)
    members = [other, one, again] if name == "project" else [one, again]
    noises = [0, 0, noise][-len(members) :]
    options = {"rank": 8} if name == "ctm" else {}
    assert run(name, members, [1] * len(members), noises, cut=0.0, **options)[1].rank == 4
    assert run(name, members, [1] * len(members), cut=0.0, **options)[1].rank > 4


def test_weights_of_the_others_only_say_who_counts():
    members = trio()
    result, _ = run("project", members, [1, 1, 1])
    np.testing.assert_allclose(run("project", members, [1, 1e-6, -5])[0], result, atol=1e-12)
    noise = [0, 1e-3, 2e-3]
    assert run("project", members, [1, 1e-6, -5], noise)[1].cut == pytest.approx(4 * 5**0.5 * 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_iso_c_output_can_be_fed_back(name: str):
    members = trio()
    flat, _ = run("iso_c", members, W)
    U, values, Vh = np.linalg.svd(flat)
    back = Factors(U[:, :11] * values[:11], Vh[:11])
    assert values[11] < 1e-12
    assert values[0] - values[10] < 1e-12 * values[0]
    fed = [back, dense.adapter(9, M, N, [1.0, 0.5])]
    result, found = run(name, fed, [1, 1])
    again, _ = run(name, [dense.regauged(one, 5) for one in fed], [1, 1])
    assert np.linalg.norm(result - again) < 1e-7 * np.linalg.norm(result)
    if name == "iso_c":
        alone, found = run("iso_c", [back], [1])
        np.testing.assert_allclose(alone, flat, atol=1e-12)
        assert found.rank == 11


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_as_if_absent(name: str):
    members = trio()
    zero = Factors(np.zeros((M, 2)), np.zeros((2, N)))
    result, found = run(name, members, W)
    more, same = run(name, [*members, zero, members[1]], [*W, 5.0, 0.0])
    np.testing.assert_allclose(more, result, atol=1e-7 if name == "ctm" else 1e-11)
    assert found.rank == same.rank
    nothing, found = run(name, [zero, zero], [1, 1])
    assert not nothing.any() and found.rank == 0 and found.gap == 0 and found.notes == ()
    assert not run(name, members, [0, 0, 0])[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_homogeneous(name: str):
    members = trio()
    scaled, found = run(name, [1e-4 * one for one in members], W, [1e-7] * 3)
    result, same = run(name, members, W, [1e-3] * 3)
    np.testing.assert_allclose(scaled, 1e-4 * result, atol=1e-12)
    assert found.rank == same.rank and found.cut == pytest.approx(1e-4 * same.cut)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_a_sum_that_cancels_is_zero_and_says_so(name: str):
    one = dense.adapter(1, M, N, [3, 2, 1])
    result, found = run(name, [one, dense.regauged(one, 2)], [1, -1], cut=0.0)
    assert not result.any() and found.rank == 0 and "the result is zero" in found.notes[0]


def test_an_adapter_below_the_cut_is_named():
    members = [dense.adapter(1, M, N, [3, 2, 1]), dense.adapter(2, M, N, [1e-4])]
    result, found = run("tsv", members, [1, 1])
    np.testing.assert_allclose(result, members[0].dense(), atol=1e-12)
    assert "adapter 2 is below the cut" in found.notes[0]


def test_an_unclear_cut_is_noted():
    """At 1e-3 of σ₁ the direction of 1.2e-3 stays, that of 0.9e-3 goes: 0.75 of the other."""
    one = dense.adapter(1, M, N, [1.0, 0.5, 1.2e-3, 0.9e-3])
    for name in ("iso_c", "tsv", "iso_cts"):
        _, found = run(name, [one], [1])
        assert found.rank == 3 and found.gap == pytest.approx(0.75) and "0.75" in found.notes[0]
        clear = run(name, [dense.adapter(1, M, N, [1.0, 0.5, 3e-3, 9e-4])], [1])[1]
        assert clear.gap == pytest.approx(0.3) and clear.notes == ()


def test_copies_of_one_adapter_give_a_fraction_by_tsv():
    one = dense.adapter(1, M, N, [3, 2, 1])
    result, found = run("tsv", [one, one], [1, 1])
    np.testing.assert_allclose(result, one.dense(), atol=1e-12)  # half of the sum
    assert found.rank == 3
    np.testing.assert_allclose(run("tsv", [one], [1])[0], one.dense(), atol=1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
)
def test_any_sizes(seed: int, sizes: tuple[int, int], ranks: list[int]):
    """More directions than rows or columns, one row, one direction: a result and no NaN."""
    rng = np.random.default_rng(seed)
    m, n = sizes
    members = [Factors(rng.standard_normal((m, r)), rng.standard_normal((r, n))) for r in ranks]
    w = rng.uniform(-1, 1, len(ranks)).tolist()
    for name in NAMES:
        result, found = run(name, members, w)
        assert np.isfinite(result).all() and found.rank <= max(m, n) and 0 <= found.gap <= 1
        other = [dense.regauged(one, seed + 1) for one in members]
        if found.gap < 0.5 and name != "ctm":
            again, _ = run(name, other, w)
            assert np.linalg.norm(result - again) < 1e-6 * (1 + np.linalg.norm(result))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_without_any_rank(name: str):
    one = find(name)
    for shape in ((2, 0, 0), (2, 0, 3), (2, 3, 0)):
        found = one.function(np.zeros(shape), np.ones(2), np.zeros(2), **one.values({}))
        assert found.core.shape == shape[1:] and found.rank == 0
        assert modify.pico(np.zeros(shape), np.ones(2)).shape == shape
        core = modify.svc(np.zeros(shape[1:]), np.zeros(shape), np.ones(2), np.zeros(2))
        assert core.shape == shape[1:]
