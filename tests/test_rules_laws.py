"""One suite over all merge methods: what holds for every method, and what each declares.

Methods run as adapters do: through `combined`, through blocks of dense rows where they compare the
entries of ΔW, or on factor pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adapterops.derived.grid import voting
from adapterops.derived.rule import Combined, Rule, combined
from adapterops.factors import Factors
from adapterops.geometry import beta
from adapterops.rules import streamed
from adapterops.rules.draws import stacked
from adapterops.rules.registry import METHODS, Moments, Pair, find
from tests import rules_dense_spectral as dense

M, N = 26, 21
Array = np.ndarray
Case = tuple[str, str]  # method and, of elementwise ones, space

# Parameters that must be given, and those whose default leaves a method with nothing to do.
GIVEN = {"svd": {"rank": 3}, "ctm": {"rank": 3}, "sce": {"select_topk": 0.4}}
FIRST = ("project", "subtract")  # made of the first adapter: the order of the others is free
CASES = [(name, space) for name in sorted(METHODS) for space in find(name).spaces or ("",)]
SPECTRA = {
    "distinct": [5.0, 3.0, 2.0, 1.0],
    "close": [3.0, 3.0 * (1 - 1e-3), 1.0, 1.0 - 1e-3],
    "repeated": [3.0, 3.0, 1.0, 1.0],
}
W = [1.0, 0.7, -1.3]


def case_id(case: Any) -> str | None:
    return "-".join(filter(None, case)) if isinstance(case, tuple) else None


def of(cases: Sequence[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=case_id)


def declaring(law: str) -> list[Case]:
    return [case for case in CASES if law in find(case[0]).laws]


every = of(CASES)
CORE = [case for case in CASES if find(case[0]).signature == "core"]


def trio(spectrum: str = "distinct", seed: int = 0) -> list[Factors]:
    """Three adapters of different ranks and sizes."""
    values = SPECTRA[spectrum]
    sizes = [values, values[:3], [0.5 * x for x in values]]
    return [dense.adapter(10 * seed + i, M, N, x) for i, x in enumerate(sizes)]


def enough(case: Case, members: list[Factors]) -> list[Factors]:
    """As many of them as the method takes, of one rank where it asks for that."""
    if case[0] == "peft_linear":
        sizes = [5.0, 3.0, 2.0, 1.0]
        members = [dense.adapter(i, M, N, [x * (i + 1) for x in sizes]) for i in range(3)]
    return members[: find(case[0]).most or len(members)]


def inputs_of(labels: Sequence[str]) -> list[Moments]:
    """Inputs of each adapter's module, by its label: moments, few samples, many."""
    found = []
    for label in labels:
        rng = np.random.default_rng(ord(label))
        count = (40, 4, 30)[ord(label) % 3]
        X = rng.standard_normal((count, N)) @ rng.standard_normal((N, N))
        samples = ord(label) % 3
        found.append(Moments("samples", X) if samples else Moments("gram", X.T @ X / count))
    return found


def run(
    case: Case,
    members: Sequence[Factors],
    w: Sequence[float],
    *,
    labels: Sequence[str] = "abcdefgh",
    noise: Any = None,
    seed: int = 0,
    scales: Sequence[float] | None = None,
    **given: Any,
) -> Array:
    """ΔW, (M, N) float64."""
    return whole(case, members, w, labels, noise, seed, scales, given)[0]


def whole(
    case: Case,
    members: Sequence[Factors],
    w: Sequence[float],
    labels: Sequence[str] = "abcdefgh",
    noise: Any = None,
    seed: int = 0,
    scales: Sequence[float] | None = None,
    given: dict[str, Any] | None = None,
) -> tuple[Array, Combined | None]:
    method = find(case[0])
    values = method.values({**GIVEN.get(case[0], {}), **(given or {})})
    weights, labels = np.array(w, float), labels[: len(members)]
    noises = np.zeros(len(members)) if noise is None else np.array(noise, float)
    method.check_count(len(members))
    if method.signature == "factors":
        scales = scales or [1.0] * len(members)
        pairs = [Pair(x.B / s, x.A, s) for x, s in zip(members, scales, strict=True)]
        B, A = method.function(pairs, weights, inputs_of(labels), **values)
        result, found = B @ A, None
    elif case[1] == "dense":
        result, found = entries(case, members, weights, labels, seed, values), None
    else:
        width = min(method.columns([x.rank for x in members], values), M, N)
        if method.signature == "gram":
            width = method.columns([x.rank for x in members], values)
        rule = Rule(method, values, space=case[1] or "dense", seed=seed)  # type: ignore[arg-type]
        found = combined(rule, list(members), weights, noises, labels, "m", width)
        result = found.B @ found.A
    assert result.shape == (M, N) and np.isfinite(result).all()
    return result, found


def entries(
    case: Case,
    members: Sequence[Factors],
    w: Array,
    labels: Sequence[str],
    seed: int,
    values: dict[str, Any],
) -> Array:
    """An elementwise method on blocks of rows of the deltas."""
    own = voting(members, w)
    if not own:
        return np.zeros((M, N))
    D, w, labels = np.stack([members[i].dense() for i in own]), w[own], [labels[i] for i in own]

    def blocks() -> Any:
        return iter([D[:, at : at + 7] for at in range(0, M, 7)])

    def bits(start: int, stop: int) -> Array:
        return stacked(seed, labels, "m", start, stop, N)

    draws = bits if "seed" in find(case[0]).needs else None
    limits = streamed.find_limits(find(case[0]), blocks, M * N, w, values, draws)
    parts = streamed.merged(find(case[0]), blocks, limits, w, values, draws)
    return np.concatenate(list(parts))


def total(members: Sequence[Factors], w: Sequence[float]) -> Array:
    return np.asarray(sum(c * one.dense() for c, one in zip(w, members, strict=True)))


def regauged(factors: Factors, seed: int, decades: float) -> Factors:
    """The same adapter as (BG, G⁻¹A), G of condition 10^decades."""
    rng = np.random.default_rng(seed)
    left, right = (dense.orthonormal(rng, factors.rank, factors.rank) for _ in range(2))
    G = (left * np.logspace(0, decades, factors.rank)) @ right.T
    return Factors(factors.B @ G, np.linalg.solve(G, factors.A))


def apart(one: Array, other: Array) -> float:
    """‖one − other‖/‖one‖."""
    size = float(np.linalg.norm(one))
    assert size > 1e-3
    return float(np.linalg.norm(one - other)) / size


def close(case: Case) -> float:
    """ctm iterates, until its subspaces move by 10⁻⁹."""
    return 1e-7 if case[0] == "ctm" else 1e-9


# Laws that hold for every method


@pytest.mark.parametrize("decades", [1.5, 6.0], ids=["mild", "harsh"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@every
def test_gauge(case: Case, spectrum: str, decades: float):
    """(BG, G⁻¹A) is the same adapter; products of it are known to 10⁻¹⁶ times the condition."""
    members = enough(case, trio(spectrum))
    other = [regauged(one, 7 + i, decades) for i, one in enumerate(members)]
    w = W[: len(members)]
    difference = apart(run(case, members, w), run(case, other, w))
    if "gauge" in find(case[0]).breaks:
        assert difference > 1e-2
    else:
        assert difference <= (close(case) if decades < 2 else 1e-5)


@of([case for case in CASES if find(case[0]).signature == "factors"])
def test_where_the_scale_stands(case: Case):
    members = enough(case, trio())
    again = run(case, members, W, scales=[2.0, 0.25, 1.0])
    if "gauge" in find(case[0]).breaks:
        assert apart(run(case, members, W), again) > 1e-2
    else:
        assert apart(run(case, members, W), again) <= 1e-9


@every
def test_order(case: Case):
    """Adapters in another order, with their weights, labels and inputs."""
    members = enough(case, trio())
    places = {2: [1, 0], 3: [2, 0, 1]}[len(members)]
    if case[0] in FIRST:
        places = [0, 2, 1]
    moved = run(
        case,
        [members[i] for i in places],
        [W[i] for i in places],
        labels=["abc"[i] for i in places],
    )
    assert apart(run(case, members, W[: len(members)]), moved) <= close(case)


@every
def test_adapters_of_zeros_do_not_matter(case: Case):
    """Zeros, B = 0 as before training, a module that is not there, and a weight of 0."""
    rng = np.random.default_rng(5)
    members = trio() if find(case[0]).most else enough(case, trio())
    nothing = [
        Factors(np.zeros((M, 2)), np.zeros((2, N))),
        Factors(np.zeros((M, 4)), rng.standard_normal((4, N))),
        Factors(np.zeros((M, 0)), np.zeros((0, N))),
    ]
    if case[0] == "peft_linear":  # it adds up factors of one rank
        nothing[0] = Factors(np.zeros((M, 4)), np.zeros((4, N)))
    most = find(case[0]).most
    if most:
        [first] = members[:1]
        results = [run(case, [first, none], [0.8, 1.0]) for none in nothing]
        assert all(apart(results[0], other) <= 1e-12 for other in results)
        direction = first.dense() / first.norm()
        assert apart(results[0], float((results[0] * direction).sum()) * direction) <= 1e-12
        return
    alone = run(case, members, W)
    for i, none in enumerate(nothing):
        more = run(case, [*members, none, members[0]], [*W, 5.0, 0.0])
        if i == 1 and "zeros" in find(case[0]).breaks:
            assert apart(alone, more) > 1e-2
        else:
            assert apart(alone, more) <= close(case)


@every
def test_adapters_of_zeros_alone_give_zero(case: Case):
    zero = Factors(np.zeros((M, 2)), np.zeros((2, N)))
    assert not run(case, [zero, zero], [1.0, -1.0]).any()
    members = enough(case, trio())
    if case[0] != "peft_linear":
        assert not run(case, members, [0.0] * len(members)).any()


@every
def test_the_same_again(case: Case):
    members = enough(case, trio())
    w = W[: len(members)]
    np.testing.assert_array_equal(run(case, members, w), run(case, members, w))


@of([case for case in CASES if case[1] != "dense"])
def test_the_rank_is_no_more_than_the_method_says(case: Case):
    members = enough(case, trio())
    result = run(case, members, W[: len(members)])
    values = find(case[0]).values(GIVEN.get(case[0], {}))
    bound = find(case[0]).columns([one.rank for one in members], values)
    assert np.linalg.matrix_rank(result, 1e-9 * np.linalg.norm(result)) <= bound
    exact, found = whole(case, members, W[: len(members)])
    assert found is None or found.B.shape[1] <= min(bound, M, N)
    if find(case[0]).width and found:
        wide = combined_at_full_width(case, members, values)
        assert apart(wide, exact) <= 1e-12  # nothing was cut off to get there


def combined_at_full_width(case: Case, members: list[Factors], values: dict[str, Any]) -> Array:
    rule = Rule(find(case[0]), values)
    w = np.array(W[: len(members)])
    found = combined(rule, members, w, np.zeros(len(w)), "abc", "m", min(M, N))
    return found.B @ found.A


# Laws that methods declare


def identity(case: Case, members: list[Factors]) -> float:
    w = [1.0, *[0.0] * (len(members) - 1)]
    return apart(members[0].dense(), run(case, members, w))


def copies(case: Case, one: Factors, count: int) -> float:
    again = [regauged(one, 3 + i, 1.0) for i in range(count)]
    if "gauge" in find(case[0]).breaks:
        again = [one] * count
    given = {"select_topk": 1.0} if case[0] == "sce" else {}  # copies vary by rounding alone
    return apart(one.dense(), run(case, again, [1 / count] * count, **given))


def linearity(case: Case, members: list[Factors]) -> float:
    """With weights of either sign, none of them 0."""
    pairs = [([0.5, 0.7, -0.4], [0.6, -0.3, 0.9]), ([1.0, 1.0, 1.0], [2.0, 1.0, 1.0])]
    worst = 0.0
    for one, other in pairs:
        first, second = np.array(one)[: len(members)], np.array(other)[: len(members)]
        parts = [run(case, members, w.tolist()) for w in (first, second)]
        whole_sum = run(case, members, (first + second).tolist())
        size = np.linalg.norm(whole_sum) + np.linalg.norm(parts[0]) + np.linalg.norm(parts[1])
        if size:
            worst = max(worst, float(np.linalg.norm(whole_sum - parts[0] - parts[1]) / size))
    return worst


@of(declaring("identity"))
def test_identity(case: Case):
    for spectrum in SPECTRA:
        assert identity(case, enough(case, trio(spectrum))) <= 1e-9


@of(declaring("copies"))
def test_copies(case: Case):
    for spectrum in SPECTRA:
        for count in (2, 3, 5):
            if count <= (find(case[0]).most or count):
                assert copies(case, trio(spectrum)[0], count) <= 1e-9


@of(declaring("linear"))
def test_linear_in_the_weights(case: Case):
    assert linearity(case, enough(case, trio())) <= close(case)


@of(declaring("homogeneous"))
@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_homogeneous(case: Case, factor: float):
    members = enough(case, trio())
    w = W[: len(members)]
    scaled = [Factors(one.B * factor**0.5, one.A * factor**0.5) for one in members]
    assert apart(run(case, members, w), run(case, scaled, w) / factor) <= close(case)


@of(declaring("low-rank"))
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_low_rank(case: Case, spectrum: str, rank: int):
    result = run(case, trio(spectrum), W, rank=rank)
    assert np.linalg.matrix_rank(result, 1e-9 * np.linalg.norm(result)) == rank


def mean_of_seeds(case: Case, members: list[Factors], seeds: int) -> Array:
    return np.mean([run(case, members, W, seed=seed) for seed in range(seeds)], axis=0)


@of([case for case in CASES if "seed" in find(case[0]).needs])
def test_unbiased_where_it_says_so(case: Case):
    """One seed is far from the sum; the mean of 256 is 16 times nearer, or there is a bias."""
    members, seeds = trio(), 256
    expected = total(members, W)
    single = np.mean([apart(expected, run(case, members, W, seed=seed)) for seed in range(8)])
    distance = apart(expected, mean_of_seeds(case, members, seeds))
    assert single > 0.2
    if "unbiased" in find(case[0]).laws:
        assert 0.7 * single <= distance * seeds**0.5 <= 1.3 * single
    else:
        assert distance * seeds**0.5 > 1.8 * single


# Declarations are honest: what is not declared does not hold, in one space at least (one adapter's
# core is diagonal, and a few entries of it are all there are)


def lacking(law: str) -> Any:
    names = sorted(name for name in METHODS if law not in find(name).laws)
    return pytest.mark.parametrize("name", names)


def spaces(name: str) -> list[Case]:
    return [case for case in CASES if case[0] == name]


@lacking("identity")
def test_who_does_not_declare_identity_breaks_it(name: str):
    weak = [dense.adapter(1, M, N, [5.0, 3.0, 2.0, 1e-3]), *trio()[1:]]
    assert max(identity(case, x) for case in spaces(name) for x in (trio(), weak)) > 1e-5


@lacking("copies")
def test_who_does_not_declare_copies_breaks_it(name: str):
    assert max(copies(case, trio()[0], 2) for case in spaces(name)) > 1e-3


@lacking("linear")
def test_who_does_not_declare_linearity_breaks_it(name: str):
    near_the_cut = [trio()[0], dense.adapter(4, M, N, [6e-3]), trio()[2]]
    alike = [trio()[0] + 0.3 * one for one in trio()]
    worst = max(
        linearity(case, enough(case, members))
        for case in spaces(name)
        for members in (trio(), near_the_cut, alike)
    )
    assert worst > 1e-5


def test_only_methods_with_a_rank_promise_one():
    assert {name for name, _ in declaring("low-rank")} == {"svd", "ctm"}
    assert {name for name, _ in declaring("unbiased")} == {"dare", "dare_linear", "della_linear"}
    assert {name for name in METHODS if find(name).breaks} == {"peft_linear"}


# Spectral methods on inputs that are hard for them


def storage_noise(one: Factors) -> float:
    """What rounding to fp16 did to the delta at most."""
    u = 2.0**-11
    return (2 * u + u * u) * beta(one)


def balanced(one: Factors) -> Factors:
    U, values, V = dense.leading(one.dense(), one.rank)
    return Factors(U * np.sqrt(values), np.sqrt(values)[:, None] * V.T)


@of([case for case in CASES if find(case[0]).signature in ("core", "gram")])
@pytest.mark.parametrize("values", [[9, 8, 6, 5, 4, 3, 2, 1], [4, 4, 4, 4, 1, 1, 1, 1]])
def test_fp16_twins(case: Case, values: list[float]):
    """An adapter and its fp16 re-save at 0.5/0.5 are two copies of it, not 16 directions."""
    one = balanced(dense.adapter(4, M, N, values))
    twin, error = dense.saved(one)
    noise = [0.0, storage_noise(twin)]
    assert 0 < error <= noise[1]
    given = {"rank": 8} if case[0] in ("svd", "ctm") else {}
    result, found = whole(case, [one, twin], [0.5, 0.5], noise=noise, given=given)
    exact, same = whole(case, [one, one], [0.5, 0.5], given=given)
    if case[0] == "iso_cts" and values[0] == values[1]:
        # One of two copies' own directions: which of the equal ones is a matter of rounding.
        assert found and found.cored and "left out" in found.cored.notes[0]
        return
    assert found and same
    if found.cored and same.cored and case[0] != "svd":  # svd keeps what is asked for
        assert found.cored.rank == same.cored.rank
    assert np.linalg.norm(result - exact) <= 30 * error


def flat() -> Factors:
    """What iso_c gives: eleven equal singular values, in any basis of their spaces."""
    result = combined_at_full_width(("iso_c", ""), trio(), find("iso_c").values({}))
    U, values, V = dense.leading(result, 11)
    assert values[0] - values[10] < 1e-12 * values[0]
    return Factors(U * values, V.T)


@of(CORE)
def test_iso_c_output_can_be_fed_back(case: Case):
    """Vectors of equal σ are free, and no result may depend on which ones came out."""
    fed = [flat(), dense.adapter(9, M, N, [1.0, 0.5])]
    given = {"rank": 13} if case[0] in ("svd", "ctm") else {}
    result = run(case, fed, [1, 1], **given)
    again = run(case, [regauged(one, 5, 1.5) for one in fed], [1, 1], **given)
    assert apart(result, again) <= 1e-7


@of([("svd", ""), ("ctm", "")])
def test_a_rank_that_parts_equal_directions_is_kept_and_noted(case: Case):
    """Any of them is as good, and which ones come is rounding: the certificate says so."""
    for one in (flat(), regauged(flat(), 5, 1.5)):
        result, found = whole(case, [one], [1], given={"rank": 3})
        assert np.linalg.matrix_rank(result, 1e-9) == 3
        assert np.linalg.norm(one.dense() - result) == pytest.approx(one.norm() * (8 / 11) ** 0.5)
        assert found and found.cored
        assert found.cored.gap > 0.999 and "left out" in found.cored.notes[0]
