"""Elementwise merge methods: dense references, what PEFT and mergekit compute, and known traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adapterops.errors import UsageError
from adapterops.rules import streamed
from adapterops.rules.draws import stacked
from adapterops.rules.registry import Limits, find
from tests import rules_dense_elements as dense

NAMES = [
    "magnitude_prune",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "sce",
]
RANDOM = [name for name in NAMES if find(name).needs]
CASES = [
    ("magnitude_prune", {}),
    ("magnitude_prune", {"density": 0.03}),
    ("ties", {}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.5, "normalize": False}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.2, "normalize": True}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.4}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"normalize": True}),
    ("dare", {}),
    ("dare", {"density": 0.1, "normalize": True}),
    ("dare", {"density": 0.7, "rescale": False}),
    ("dare_ties", {}),
    ("dare_ties", {"density": 0.3, "normalize": True, "majority_sign_method": "frequency"}),
    ("della", {}),
    ("della", {"density": 0.3, "epsilon": 0.2, "normalize": False}),
    ("della", {"density": 1.0}),
    ("della_linear", {}),
    ("della_linear", {"density": 0.8, "epsilon": 0.1, "normalize": True, "rescale": False}),
    ("sce", {}),
    ("sce", {"select_topk": 0.2}),
]
LABELS = ["a", "b", "c", "d"]


def case_id(value):
    return (
        ",".join(f"{k}={v}" for k, v in value.items()) or "-" if isinstance(value, dict) else None
    )


def run(name, D, w, *, rows=5, kind="numpy", labels=None, seed=0, **given):
    """The method on blocks of rows, as float64 numpy."""
    method = find(name)
    values = method.values(given)
    w = np.asarray(w, float)
    T, m, n = D.shape
    labels = labels or LABELS[:T]
    X = torch.from_numpy(D) if kind == "torch" else D

    def blocks():
        return iter([X[:, at : at + rows] for at in range(0, m, rows)])

    def bits(start, stop):
        return stacked(seed, labels, "m", start, stop, n)

    draws = bits if "seed" in method.needs else None
    limits = streamed.find_limits(method, blocks, m * n, w, values, draws)
    parts = list(streamed.merged(method, blocks, limits, w, values, draws))
    assert all(type(part) is type(X) and part.dtype == X.dtype for part in parts)
    return np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)


def bits_of(D, labels=None, seed=0):
    T, m, n = D.shape
    return stacked(seed, labels or LABELS[:T], "m", 0, m, n)


def adapters(T=3, m=13, n=17, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((T, m, 4)), rng.standard_normal((T, 4, n))
    return (B @ A).astype(dtype)


def close(one, other, tolerance):
    scale = np.abs(other).max() or 1.0
    assert np.isfinite(one).all()
    assert np.abs(one - other).max() <= tolerance * scale


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "given"), CASES, ids=case_id)
def test_dense_reference(name, given, dtype, kind):
    D, w = adapters(dtype=dtype), np.array([0.7, -0.4, 0.5])
    reference = getattr(dense, name)
    expected = reference(D.astype(float), w, bits_of(D), **given)
    assert np.abs(expected).max() > 0
    close(run(name, D, w, kind=kind, **given), expected, 2e-6 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize(("name", "given"), CASES, ids=case_id)
def test_blocks_do_not_matter(name, given):
    """To the last bit, whatever the height of the blocks and the number of threads."""
    D, w = adapters(dtype=np.float32, m=24, n=40), [0.7, 0.4, 0.5]
    whole = run(name, D, w, rows=24, **given)
    for rows in (1, 7, 16):
        assert np.array_equal(run(name, D, w, rows=rows, **given), whole)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            threaded = run(name, D, w, rows=12, kind="torch", **given)
            assert np.array_equal(threaded == 0, whole == 0)  # the same mask in torch and numpy
            close(threaded, whole, 1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "given"), CASES, ids=case_id)
def test_order_of_adapters_does_not_matter(name, given):
    D, w = adapters(), np.array([0.7, -0.4, 0.5])
    one = run(name, D, w, **given)
    for order in ([2, 0, 1], [1, 0, 2]):
        labels = [LABELS[t] for t in order]
        close(run(name, D[order], w[order], labels=labels, **given), one, 1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_zero_weights_and_zero_adapters_are_as_if_absent(name):
    D = adapters(4, seed=2)
    D[1] = 0
    alone = run(name, D[[0, 3]], [0.6, 0.4], labels=["a", "d"])
    close(run(name, D, [0.6, 0.5, 0, 0.4]), alone, 1e-14)
    D[1] = adapters(1, seed=3)[0]
    close(run(name, D, [0.6, 0, 0, 0.4]), alone, 1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_zeros(name, dtype):
    for shape in ((3, 4, 5), (1, 1, 1), (2, 6, 1)):
        assert not run(name, np.zeros(shape, dtype), np.ones(shape[0])).any()
    assert not run(name, adapters(dtype=dtype), [0, 0, 0]).any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    D=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, -1.0, 2.0**-149, 2.0**-126]),
            st.floats(-(2.0**60), 2.0**60, width=32),
        ),
    ),
    data=st.data(),
)
@pytest.mark.parametrize("name", NAMES)
def test_never_nan(name, D, data):
    weight = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1e-6])
    w = [data.draw(weight) for _ in D]
    for convention in conventions(name):
        given = {"convention": convention} if convention else {}
        assert np.isfinite(run(name, D, w, rows=data.draw(st.integers(1, 5)), **given)).all()


def conventions(name):
    for parameter in find(name).parameters:
        if parameter.name == "convention":
            return parameter.choices
    return ("",)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_as_they_are(name):
    """Core Space's DARE-TIES drops again from what an earlier call dropped from."""
    D = adapters()
    before = D.copy()
    once = run(name, D, [0.5, -0.2, 1])
    assert np.array_equal(D, before)
    assert np.array_equal(run(name, D, [0.5, -0.2, 1]), once)


@pytest.mark.parametrize("name", NAMES)
def test_declared_laws(name):
    laws, D, w = find(name).laws, adapters(), np.array([0.7, -0.4, 0.5])
    result = run(name, D, w)
    assert "homogeneous" in laws
    close(run(name, 4 * D, w), 4 * result, 0)  # a power of two is exact
    if "linear" in laws:
        close(run(name, D, w + np.array([1, 2, -1])), result + run(name, D, [1, 2, -1]), 1e-14)
    same = np.repeat(D[:1], 3, axis=0)
    is_identity = np.allclose(run(name, D, [1, 0, 0]), D[0])
    is_copies = np.allclose(run(name, same, np.full(3, 1 / 3)), D[0])
    assert ("identity" in laws, "copies" in laws) == (is_identity, is_copies)


@pytest.mark.parametrize("name", NAMES)
def test_turned_adapters_give_the_turned_result(name):
    """So that the signs of a core's basis do not matter; PEFT and mergekit elect plus on a tie."""
    D = np.concatenate([adapters(2), -adapters(1)])  # the third undoes the first
    w = [0.5, 0.25, 0.5]
    close(run(name, -D, w), -run(name, D, w), 0)
    close(run(name, D, [0.5, 0.25, -0.5]), run(name, np.stack([D[0], D[1], -D[2]]), w), 1e-14)


# The traps


def test_ties_of_equal_adapters_is_one_of_them():
    """PEFT divides by their number: two at 0.5 give half."""
    D = np.repeat(adapters(1), 2, axis=0)
    trimmed = D[0] * dense.largest(D, round(0.2 * D[0].size))[0]
    close(run("ties", D, [0.5, 0.5]), trimmed, 1e-15)
    close(run("ties", D, [0.5, 0.5], convention="peft"), trimmed / 2, 1e-15)


def test_ties_keeps_k_and_all_that_tie():
    """The paper's notebook keeps k + 1 (kthvalue and >=)."""
    D = adapters(1)
    assert (run("ties", D, [1], density=0.5) != 0).sum() == round(0.5 * D.size)
    flat = np.array([[[4.0, -2, 2, 2, 1, 0, 0, 0]]])
    assert run("ties", flat, [1], density=0.25).tolist() == [[4, -2, 2, 2, 0, 0, 0, 0]]
    assert (run("ties", flat, [1], density=0.25) != 0).sum() == 4


def test_density_is_what_is_kept_and_one_is_everything():
    D = adapters(1)
    close(run("ties", D, [1], density=1), D[0], 0)
    close(run("ties", D, [1], density="1.0"), D[0], 0)
    assert (run("ties", D, [1], density=0.1) != 0).mean() == pytest.approx(0.1, abs=0.01)
    kept = (run("dare", adapters(1, 200, 200), [1], density=0.1) != 0).mean()
    assert kept == pytest.approx(0.1, abs=0.01)


def test_a_small_density_keeps_one_entry_at_least():
    D = adapters(1, 3, 3)
    for name in ("ties", "magnitude_prune", "breadcrumbs"):
        assert (run(name, D, [1], density=0.01) != 0).sum() == 1
    assert np.isfinite(run("dare", D, [1], density=1e-9)).all()
    for convention, kept in (("mergekit", 1), ("peft", 0)):
        assert (run("ties", D, [1], density=0.01, convention=convention) != 0).sum() == kept


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, float("nan"), "half"])
def test_density_out_of_range(bad):
    with pytest.raises(UsageError, match=r"density is .*; expected a number above 0 to 1"):
        find("ties").values({"density": bad})


def test_trim_is_per_matrix():
    """The paper trims over all layers together; here each matrix, as PEFT and mergekit do."""
    D = np.array([[[8.0, 7, 6, 5]], [[4.0, 3, 2, 1]]])
    assert (run("ties", D[:1], [1], density=0.5) != 0).sum() == 2
    assert (run("ties", D[1:], [1], density=0.5) != 0).sum() == 2


def test_weights_elect_and_zero_weights_do_not():
    """PEFT elects without weights: an adapter of weight 0 can turn a sign."""
    D = np.array([[[1.0]], [[-3.0]]])
    assert run("ties", D, [1, 0.1], density=1) == 1
    assert run("ties", D, [1, 0], density=1) == 1
    assert run("ties", D, [1, 0], density=1, convention="peft") == 0


def test_a_tied_vote_elects_nothing():
    """Also where rounding would find a majority: 0.1 + 0.2 against 0.3."""
    D = np.array([[[1.0]], [[1.0]], [[-1.0]]])
    for dtype in (np.float32, np.float64):
        assert run("ties", D.astype(dtype), [0.1, 0.2, 0.3], density=1) == 0
        assert run("sce", D.astype(dtype), [0.1, 0.2, 0.3]) == 0
        assert run("sce", D.astype(dtype), [0.1, 0.2, -0.3]) == 1
    assert run("ties", D, [0.1, 0.2, 0.31], density=1) == -1
    for convention in ("peft", "mergekit"):
        assert run("ties", D[1:], [0.5, 0.5], density=1, convention=convention) > 0


def test_negative_weights_do_not_blow_up():
    """mergekit's divisor is the signed sum, which cancels: a mean of 1 and 1 becomes 2000."""
    D = np.array([[[1.0]], [[-1.0]]])
    w = [1, -0.999]
    assert run("ties", D, w, density=1) == pytest.approx(1)
    assert run("ties", D, w, density=1, convention="mergekit") == pytest.approx(1999)


def test_dare_divides_by_the_exact_probability():
    D = np.ones((1, 50, 60))
    for density in (0.5, 0.1, 1 / 3):
        level = round(density * 65536)
        expected = (bits_of(D)[0] < level) * (65536 / level)
        assert np.array_equal(run("dare", D, [1], density=density), expected)


@pytest.mark.parametrize("name", ["dare", "della_linear"])
def test_entries_are_kept_below_the_level_not_at_it(name):
    """So that a level t keeps t of the 2¹⁶ numbers, and 2¹⁶ keeps them all."""
    method, X = find(name), np.ones((1, 1, 2))
    values = method.values({"epsilon": 0.0} if name == "della_linear" else {})
    nothing = Limits(np.zeros((1, 0)), np.zeros((1, 0)))
    draws = np.array([[[32767, 32768]]], np.uint16)
    assert method.function(X, np.ones(1), nothing, draws, **values).tolist() == [[2, 0]]


def test_dare_ties_does_not_trim_again():
    D = adapters(1)
    close(run("dare_ties", D, [1]), run("dare", D, [1]), 1e-15)


def test_della_divides_each_entry_by_its_own_probability():
    D = np.array([[[0.1, 0.4, 0.2, 0.3]]])
    probabilities = np.array([0.2, 0.8, 0.4, 0.6])
    seen = [run("della_linear", D, [1], epsilon=0.3, seed=seed)[0] for seed in range(40)]
    largest = np.max(seen, axis=0)
    assert np.allclose(largest, D[0, 0] / probabilities, rtol=1e-4)
    assert all(np.isin(row, [*largest, 0]).all() for row in seen)


def test_della_ranks_rows_not_the_matrix():
    """A row of small entries is kept as much as a row of large ones."""
    D = np.ones((1, 2, 20000))
    D[0, 1] = 1000
    D *= np.random.default_rng(0).uniform(1, 2, D.shape)
    kept = (run("della_linear", D, [1]) != 0).mean(axis=1)
    assert kept == pytest.approx([0.5, 0.5], abs=0.02)


def test_della_of_one_column():
    """Ranks from 0 to 0: mergekit divides 0 by 0."""
    D = adapters(1, 300, 1)
    kept = run("della_linear", D, [1]) != 0
    assert kept.mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_probabilities_have_to_be_probabilities(name):
    with pytest.raises(UsageError, match=r"density 0\.9 ± epsilon 0\.15") as error:
        find(name).values({"density": 0.9})
    assert error.value.hint == "epsilon below 0.1, or density 1"
    assert find(name).values({"density": 1})["density"] == 1
    for density in (0.1, 0.15):
        with pytest.raises(UsageError, match="has to lie between 0 and 1"):
            find(name).values({"density": density})


def test_breadcrumbs_drops_the_largest_first():
    D = np.arange(1.0, 11).reshape(1, 2, 5)
    result = run("breadcrumbs", D, [1], density=0.5, gamma=0.2)
    assert result.ravel().tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]
    result = run("breadcrumbs", D, [1], density=0.9, gamma=0.5)  # the density is kept
    assert result.ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    close(run("breadcrumbs", D, [1], density=1, gamma=0.5), D[0], 0)


def test_sce_energies_count_at_any_scale():
    """mergekit takes equal weights below a mean square of 1e-6, where most adapters are."""
    D = adapters()
    D[0] *= 5
    result = run("sce", D, [1, 1, 1], select_topk=0.5)
    close(run("sce", D * 2.0**-20, [1, 1, 1], select_topk=0.5), result * 2.0**-20, 1e-14)


def test_sce_of_one_adapter_is_that_one():
    close(run("sce", adapters(1), [0.3], select_topk=0.5), adapters(1)[0], 1e-15)


# Unbiasedness


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dare", {}),
        ("dare", {"density": 0.1}),
        ("dare", {"density": 0.3333}),
        ("della_linear", {}),
        ("della_linear", {"density": 0.3, "epsilon": 0.25}),
    ],
    ids=case_id,
)
def test_unbiased(name, given):
    """The mean over seeds is the weighted sum, to five of its standard deviations everywhere."""
    assert "unbiased" in find(name).laws
    D, w, count = adapters(2, 6, 8), np.array([0.7, -0.4]), 1500
    runs = np.stack([run(name, D, w, rows=6, seed=seed, **given) for seed in range(count)])
    deviation = runs.std(axis=0) / np.sqrt(count)
    off = np.abs(runs.mean(axis=0) - np.einsum("t,tmn->mn", w, D))
    assert (off <= 5 * deviation).all()
    assert (deviation > 0).all()


def test_mergekits_rescaling_of_della_is_biased():
    """Small entries come out too small, large ones too large: 0.52 and 1.17 at these values."""
    given = {"density": 0.3, "epsilon": 0.15}
    D = np.sort(np.random.default_rng(0).uniform(0.01, 1, (1, 1, 400)))
    ratios = {}
    for convention in ("adapterops", "mergekit"):
        runs = [
            run("della_linear", D, [1], seed=seed, convention=convention, **given)[0] / D[0, 0]
            for seed in range(400)
        ]
        mean = np.mean(runs, axis=0)
        ratios[convention] = mean[:100].mean(), mean[-100:].mean()
    assert ratios["adapterops"] == pytest.approx((1, 1), abs=0.05)
    assert ratios["mergekit"][0] < 0.7 and ratios["mergekit"][1] > 1.1


def test_float32_differs_from_float64_only_where_it_is_counted():
    """Rounding of float32 products moves entries across a limit only within 2⁻²⁰ of it."""
    rng = np.random.default_rng(5)
    B, A = rng.standard_normal((4, 512, 16)), rng.standard_normal((4, 16, 640))
    B, A, w = B.astype(np.float32), A.astype(np.float32), np.full(4, 0.25)
    exact = B.astype(float) @ A.astype(float)
    method, found = find("ties"), []
    for D in (exact, np.concatenate([B[:, at : at + 32] @ A for at in range(0, 512, 32)], axis=1)):

        def blocks(D=D):
            return iter([torch.from_numpy(D[:, at : at + 32]) for at in range(0, 512, 32)])

        values = method.values({})
        limits = streamed.find_limits(method, blocks, 512 * 640, w, values)
        parts = streamed.merged(method, blocks, limits, w, values)
        found.append((np.concatenate([part.numpy() for part in parts]), limits))
    (expected, _), (single, limits) = found
    assert limits.near.shape == (4, 1) and limits.near.min() >= 1
    moved = np.abs(single - expected) > 1e-6 * np.abs(expected).max()
    assert moved.sum() <= limits.near.sum() <= 1e-4 * moved.size
