"""Rounding at random and with feedback: by their definitions, and by what they promise."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.changes.targets import DenseTerm, Target
from adapterops.errors import NumericsError
from adapterops.rounding import compensated
from adapterops.rounding.compensated import round_compensated
from adapterops.rounding.exact import Counts, codes
from adapterops.rounding.grid import from_ordinal, neighbours, ordinal, ulp
from adapterops.rounding.stochastic import round_stochastically, thresholds
from tests.changes import FORMS, TORCH, exact_sums, ref, target

ALL = ["F16", "BF16", "F32"]
HALVES = ["F16", "BF16"]


def weights(shape, dtype, size=0.02, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * size).to(TORCH[dtype])


def factors(m, n, r, size, seed=1):
    g = np.random.default_rng(seed)
    return (g.standard_normal((m, r)) * size).astype("f4"), g.standard_normal((r, n)).astype("f4")


# -- at random


def at_random(W, pairs, *, seed=0, name="layer.weight", step=None, dtype=None):
    """(W + D rounded at random, counts), by blocks of `step` rows."""
    whole = target(W, pairs)
    (band,) = bands(whole)
    delta = Delta(whole, band)
    parts, counts = [], Counts()
    for start in range(0, len(W), step or len(W)):
        stop = min(start + (step or len(W)), len(W))
        part, more = round_stochastically(
            W[start:stop], delta, start, stop, seed=seed, name=name, dtype=dtype
        )
        parts.append(part)
        counts += more
    return torch.cat(parts), counts


def by_fractions(W, pairs, x, dtype):
    """The rule in rational arithmetic: the upper neighbour where T > lower + x·gap."""
    whole, unit = exact_sums(W, pairs)
    mantissa, least, _ = FORMS[dtype]
    result = []
    for value, share in zip(whole.ravel(), x.tolist(), strict=True):
        T = Fraction(int(value), 1 << unit)
        exponent = least
        while Fraction(2) ** (exponent + 1) <= abs(T):
            exponent += 1
        gap = Fraction(2) ** (exponent - mantissa)
        lower = (T / gap).__floor__() * gap
        result.append(float(lower + gap if lower + Fraction(share) * gap < T else lower))
    return np.array(result).reshape(W.shape)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2])
def test_random_rounding_is_that_of_the_exact_sum(dtype, size):
    W = weights((32, 50), dtype)
    pairs = [(1.4, *factors(32, 50, 4, size)), (-0.7, *factors(32, 50, 4, size, seed=2))]
    result, counts = at_random(W, pairs, seed=3)
    expected = by_fractions(W, pairs, thresholds(3, "layer.weight", 0, W.numel()), dtype)
    np.testing.assert_array_equal(result.double().numpy(), expected)
    assert counts.single + counts.double + counts.exact == W.numel()
    assert bool(counts.single) == (dtype != "F32")


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_on_and_beside_the_threshold(dtype):
    """T = lower + x·gap stays, 2⁻⁸⁰ more goes up: neither float32 nor float64 can tell."""
    n, form = 24, TORCH[dtype]
    x = thresholds(5, "layer.weight", 0, 3 * n).view(3, n).numpy()
    gap = 2.0 ** -FORMS[dtype][0]
    tiny = np.array([[0.0], [2.0**-40], [-(2.0**-40)]])
    B = np.concatenate([np.eye(3), tiny], axis=1)
    A = np.concatenate([x * gap, np.full((1, n), 2.0**-40)])
    result, counts = at_random(torch.ones((3, n), dtype=form), [(1.0, B, A)], seed=5)
    assert (result[1] == 1 + gap).all()
    assert (result[[0, 2]] == 1).all()
    assert counts.exact == 3 * n


def philox(counter, key):
    """Philox4x64-10 (Salmon et al. 2011, §3.3) of one counter, four words."""
    word = (1 << 64) - 1
    c = [(counter >> shift) & word for shift in (0, 64, 128, 192)]
    k = [key & word, key >> 64]
    for _ in range(10):
        one, other = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(other >> 64) ^ c[1] ^ k[0], other & word, (one >> 64) ^ c[3] ^ k[1], one & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def test_random_bits_are_those_of_philox():
    key = int.from_bytes(hashlib.sha256(b"7\0a.weight").digest()[:16], "little")
    for first, count in ((0, 16), (5, 3), (16 * 1000 + 15, 34)):
        expected = []
        for index in range(first, first + count):
            block = philox(index // 16, key)
            bits = block[index % 16 // 4] >> (16 * (index % 4)) & 0xFFFF
            expected.append((bits + 0.5) / 65536)
        assert thresholds(7, "a.weight", first, count).tolist() == expected


@pytest.mark.parametrize("dtype", ALL)
def test_random_rounding_does_not_depend_on_blocks(dtype):
    W = weights((67, 33), dtype)
    pairs = [(1.0, *factors(67, 33, 3, 1e-4))]
    whole, _ = at_random(W, pairs, seed=1)
    for step in (1, 10, 64):
        assert torch.equal(codes(at_random(W, pairs, seed=1, step=step)[0]), codes(whole))
    for other in (at_random(W, pairs, seed=2), at_random(W, pairs, seed=1, name="other")):
        assert not torch.equal(other[0], whole)


@pytest.mark.parametrize("share", [2.0**-12, 0.3, 0.5, 0.97])
def test_random_rounding_is_unbiased(share):
    W = torch.ones((200, 500), dtype=torch.bfloat16)
    D = (np.ones((200, 1)), np.full((1, 500), share / 128))
    up = int((at_random(W, [(1.0, *D)])[0] > 1).sum())
    sigma = np.sqrt(W.numel() * share * (1 - share))
    assert abs(up - W.numel() * share) < 5 * sigma


def test_all_of_a_swallowed_change_arrives_on_average():
    W = weights((512, 512), "BF16")
    B, A = factors(512, 512, 8, 1e-5 / np.sqrt(8))
    D = torch.from_numpy(B.astype("f8") @ A.astype("f8"))
    W64 = W.double()
    moved = at_random(W, [(1.0, B, A)])[0].double() - W64
    nearest = (W64 + D).bfloat16().double() - W64
    noise = float((moved - D).norm() / D.norm())
    assert 2 < noise < 20
    assert float((nearest * D).sum() / D.square().sum()) < 0.4
    # E is independent of D's direction: the error of the gain is noise / √elements.
    assert abs(float((moved * D).sum() / D.square().sum()) - 1) < 5 * noise / 512


@pytest.mark.parametrize("dtype", ALL)
def test_no_change_leaves_every_code(dtype):
    W = weights((40, 40), dtype)
    form = torch.finfo(W.dtype)
    W[0, :4] = torch.tensor([0.0, -0.0, form.max, -form.tiny / 2])
    for pairs in ([(1.0, np.zeros((40, 2)), np.zeros((2, 40)))], [(0.0, *factors(40, 40, 2, 1.0))]):
        assert torch.equal(codes(at_random(W, pairs)[0]), codes(W))


def test_random_rounding_at_the_ends_of_float16():
    W = torch.full((4, 64), 65504.0, dtype=torch.float16)
    D = np.array([[15.9921875], [16.0], [-16.0], [-65504.0]])
    result, _ = at_random(W, [(1.0, D, np.ones((1, 64)))])
    assert (result[0] == 65504).all()
    assert (result[1] == float("inf")).all()
    assert set(result[2].tolist()) == {65472.0, 65504.0}
    assert not result[3].any()
    small, _ = at_random(W * 0, [(1.0, np.full((4, 1), -(2.0**-26)), np.ones((1, 64)))])
    assert set(small.view(-1).tolist()) == {0.0, -(2.0**-24)}
    assert small.signbit().all()  # a zero that was rounded to has the sum's sign


def test_random_rounding_to_another_type():
    W = weights((30, 40), "F32")
    before = W.clone()
    pairs = [(1.0, *factors(30, 40, 3, 1e-3))]
    x = thresholds(0, "layer.weight", 0, W.numel())
    for dtype in HALVES:
        result, _ = at_random(W, pairs, dtype=TORCH[dtype])
        assert result.dtype == TORCH[dtype]
        np.testing.assert_array_equal(result.double().numpy(), by_fractions(W, pairs, x, dtype))
        assert torch.equal(W, before)
    wide, counts = at_random(W, pairs, dtype=torch.float64)  # to nearest
    whole, unit = exact_sums(W, pairs)
    nearest = np.array([int(v) / (1 << unit) for v in whole.ravel()]).reshape(W.shape)
    assert wide.dtype == torch.float64 and counts == Counts(plain=W.numel())
    np.testing.assert_allclose(wide.numpy(), nearest, rtol=1e-12)


def test_a_dense_change_is_added_in_float64():
    class Change:
        def rows(self, start, stop):
            return np.full((stop - start, 8), 2.0**-9)

    W = torch.ones((64, 8), dtype=torch.bfloat16)
    whole = Target("w", ref("w", W), (64, 8), dense=(DenseTerm(0, 1.0, "w", Change),))
    (band,) = bands(whole)
    result, counts = round_stochastically(W, Delta(whole, band), 0, 64, seed=0, name="w")
    x = thresholds(0, "w", 0, 512).view(64, 8)
    assert torch.equal(result == 1, x >= 0.25)
    assert counts == Counts(plain=512)


# -- with feedback


def problem(ratio, dtype, m=96, n=1024, r=16, seed=0):
    """float64 T = W + D, W, and an orthonormal basis of what D reads; ‖D‖ = ratio·‖W‖."""
    W = weights((m, n), dtype, seed=seed).double()
    B, A = factors(m, n, r, 1.0, seed + 1)
    D = torch.from_numpy(B.astype("f8") @ A.astype("f8"))
    D *= ratio * W.norm() / D.norm()
    return W + D, W, torch.linalg.qr(torch.from_numpy(A.T.astype("f8")))[0]


def assert_greedy(T, P, result, ridge):
    """Each error is the one nearer to e*, as the definition has it, by another order of sums."""
    dtype = result.dtype
    E = result.double() - T
    lower, upper = (found.double() for found in neighbours(T, dtype))
    assert ((lower - T == E) | (upper - T == E)).all()
    other = lower + upper - result.double() - T
    steps = E[:, :, None] * P[None]
    S = steps.cumsum(1) - steps
    wanted = -(S * P).sum(2) / (P.square().sum(1) + ridge * P.shape[1] / P.shape[0])
    room = 1e-4 * ulp(T.abs().amax(1, keepdim=True), dtype)
    assert ((E - wanted).abs() <= (other - wanted).abs() + room).all()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(5, 100, 1), (40, 333, 7), (3, 20, 20)], ids=str)
@pytest.mark.parametrize("ridge", [1.0, 10.0])
def test_every_choice_is_the_greedy_one(dtype, shape, ridge):
    m, n, r = shape
    for ratio in (5e-4, 0.3):
        T, _, P = problem(ratio, dtype, m, n, r)
        result, clipped = round_compensated(T, P, TORCH[dtype], module="m", ridge=ridge)
        assert result.dtype == TORCH[dtype] and not clipped
        assert_greedy(T, P, result, ridge)
        spacing = ulp(torch.maximum(T.abs(), result.double().abs()), TORCH[dtype])
        assert ((result.double() - T).abs() < spacing).all()


def test_rows_of_every_size():
    """Outliers, subnormals, zeros: what is fed back is cut off at 2⁻²² of the row's spacing."""
    T, _, P = problem(5e-3, "F16", m=6, n=200, r=4)
    T[0] *= 1e-4
    T[1, 50] = 3e4
    T[2] = 0.0
    T[3, ::2] *= 1e-3
    T[4, :199] = 0.0
    result, _ = round_compensated(T, P, torch.float16, module="m")
    assert_greedy(T, P, result, 1.0)
    assert not result[2].any() and not result[4, :199].any()


@pytest.mark.parametrize("dtype", ALL)
def test_codes_do_not_depend_on_blocks_or_on_the_order_of_sums(dtype, monkeypatch):
    T, _, P = problem(5e-3, dtype, m=53, n=300, r=24)
    whole, _ = round_compensated(T, P, TORCH[dtype], module="m")
    turned, _ = round_compensated(T.T.contiguous().T, P, TORCH[dtype], module="m")
    assert torch.equal(turned, whole)
    for seed in range(3):  # another order of P's columns is another order of all sums
        order = torch.from_numpy(np.random.default_rng(seed).permutation(24))
        assert torch.equal(round_compensated(T, P[:, order], TORCH[dtype], module="m")[0], whole)
    for size in (1, 7, 52):
        parts = [round_compensated(t, P, TORCH[dtype], module="m")[0] for t in T.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(compensated, "_ROWS", 10)
    assert torch.equal(round_compensated(T, P, TORCH[dtype], module="m")[0], whole)


def test_no_sum_of_the_feedback_is_rounded(monkeypatch):
    """Each product that is added comes out as in rational arithmetic, so order cannot matter."""
    seen = []

    def exact(name):
        add = getattr(torch.Tensor, name)

        def checked(self, left, right, *, alpha=1):
            after, other = ((x[:, None] if x.ndim == 1 else x) for x in (self, right))
            before = after.clone()
            add(self, left, right, alpha=alpha)
            for i, j in ((0, 0), (len(before) - 1, before.shape[1] - 1)):
                terms = zip(left[i].tolist(), other[:, j].tolist(), strict=True)
                total = sum((Fraction(x) * Fraction(y) for x, y in terms), Fraction(0))
                expected = Fraction(float(before[i, j])) + alpha * total
                assert Fraction(float(after[i, j])) == expected
                seen.append(total)
            return self

        return checked

    for name in ("addmm_", "addmv_"):
        monkeypatch.setattr(torch.Tensor, name, exact(name))
    T, _, P = problem(0.3, "BF16", m=2, n=100, r=5)
    T[1, 3] = 3e7
    round_compensated(T, P, torch.bfloat16, module="m")
    assert sum(total != 0 for total in seen) > 100


@pytest.mark.parametrize("dtype", HALVES)
def test_columns_that_nothing_reads_are_rounded_to_nearest(dtype):
    form = TORCH[dtype]
    values = from_ordinal(torch.arange(1, 4001, dtype=torch.int32), form).view(40, 100)
    upper = from_ordinal(ordinal(values) + 1, form)
    P = torch.zeros((100, 2), dtype=torch.float64)
    P[7, 0] = P[90, 1] = 1.0
    read = P.any(1)
    shares = [0.5, 0.5 - 2.0**-40, 0.5 + 2.0**-40, 0.1]
    share = torch.tensor(shares, dtype=torch.float64).repeat(25)
    T = values.double() + share * (upper.double() - values.double())
    expected = torch.where(
        (share > 0.5) | ((share == 0.5) & (ordinal(upper) & 1 == 0)), upper, values
    )
    for sign in (1, -1):
        result, _ = round_compensated(sign * T, P, form, module="m", ridge=1e-3)
        assert torch.equal(result[:, ~read], sign * expected[:, ~read])
    none = torch.zeros((100, 0), dtype=torch.float64)
    assert torch.equal(round_compensated(T, none, form, module="m")[0], expected)


@pytest.mark.parametrize("dtype", ALL)
def test_what_is_on_the_grid_stays(dtype):
    T, W, P = problem(0.05, dtype)
    T[:, 100:300] = W[:, 100:300]
    T[0, 100], T[0, 101] = 0.0, -0.0
    result, _ = round_compensated(T, P, TORCH[dtype], module="m")
    assert torch.equal(result[:, 100:300].double(), T[:, 100:300])
    assert result[0, 100:102].signbit().tolist() == [False, True]


def test_feedback_at_the_end_of_float16():
    T, _, P = problem(5e-3, "F16", m=4, n=64, r=2)
    T[1, 3], T[2, 5], T[2, 6] = 65519.99, -65504.0, 65504.5
    result, clipped = round_compensated(T, P, torch.float16, module="m")
    assert clipped == 2
    assert result[1, 3] == 65504 and result[2, 5] == -65504 and result[2, 6] == 65504
    for value in (65520.0, -65520.0, float("inf"), float("nan")):
        T[3, 9] = value
        with pytest.raises(NumericsError, match=r"module layer.*float16"):
            round_compensated(T, P, torch.float16, module="layer")


def figures(T, W, P, result):
    """Gain, error inside P's span, error over all; the last two relative to ‖D‖."""
    D, E = T - W, result.double() - T
    gain = ((result.double() - W) * D).sum() / D.square().sum()
    return float(gain), float((E @ P).norm() / D.norm()), float(E.norm() / D.norm())


@pytest.mark.parametrize("ratio", [5e-4, 5e-3, 5e-2])
@pytest.mark.parametrize("dtype", HALVES)
def test_feedback_keeps_what_nearest_loses(ratio, dtype):
    T, W, P = problem(ratio, dtype, m=128, n=2048)
    gain, inside, noise = figures(T, W, P, round_compensated(T, P, TORCH[dtype], module="m")[0])
    _, plain_inside, plain_noise = figures(T, W, P, T.to(TORCH[dtype]))
    assert inside < plain_inside / 5
    assert noise < 2 * plain_noise
    assert abs(gain - 1) < 0.03


def test_nothing_to_round():
    P = torch.zeros((8, 0), dtype=torch.float64)
    for shape in ((0, 8), (3, 0)):
        result, clipped = round_compensated(
            torch.zeros(shape, dtype=torch.float64), P[: shape[1]], torch.bfloat16
        )
        assert result.shape == shape and not clipped
