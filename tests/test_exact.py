"""Correct rounding of W + ΣcBA, against exact rational arithmetic."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.changes.targets import Target, Term
from adapterops.rounding.exact import Counts, codes, round_exactly, sum_to_odd
from adapterops.rounding.precision import exact_arithmetic
from tests.changes import TORCH, exact_sums, rounded, target

HALVES = ("F16", "BF16")
ALL = (*HALVES, "F32")


def outcome(W, pairs, dtype=None, step=None, turned=False):
    """(W + D rounded exactly, counts), by blocks of `step` rows."""
    (band,) = bands(target(W, pairs, turned=turned))
    delta = Delta(target(W, pairs, turned=turned), band)
    parts, counts = [], Counts()
    for start in range(0, len(W), step or len(W)):
        stop = min(start + (step or len(W)), len(W))
        part, more = round_exactly(W[start:stop], delta, start, stop, dtype=dtype)
        parts.append(part)
        counts += more
    return torch.cat(parts), counts


def check(W, pairs, dtype):
    """Every element is what rational arithmetic gives; returns the counts."""
    result, counts = outcome(W, pairs)
    whole, unit = exact_sums(W, pairs)
    expected = rounded(whole, unit, dtype)
    np.testing.assert_array_equal(result.double().numpy(), expected)
    return counts


def some(shape, dtype, seed, size=0.02):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * size).to(TORCH[dtype])


def factors(m, n, r, seed, size, kind=np.float32):
    g = np.random.default_rng(seed)
    return (g.standard_normal((m, r)) * size).astype(kind), g.standard_normal((r, n)).astype(kind)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("scales", [(1.0,), (1.4, -0.7)])
def test_random_values(dtype, size, scales):
    W = some((96, 128), dtype, 1)
    pairs = [(c, *factors(96, 128, 8, k, size)) for k, c in enumerate(scales)]
    counts = check(W, pairs, dtype)
    assert counts.single + counts.double + counts.exact == W.numel()
    assert not counts.single or dtype != "F32"
    assert counts.single or dtype == "F32" or size == 1e-2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ties_of_small_integers(dtype, scale):
    """Half of the sums lie exactly between two codes, and none needs Python's exact sum."""
    g = np.random.default_rng(3)
    W = torch.from_numpy(g.integers(1 << 11, 1 << 12, (256, 256)).astype("f4")).to(TORCH[dtype])
    B = g.integers(-3, 4, (256, 4)).astype("f4")
    A = g.integers(-3, 4, (4, 256)).astype("f4")
    counts = check(W, [(scale, B, A)], dtype)
    assert counts.exact > (1000 if scale == 1.0 else 50)


@pytest.mark.parametrize("dtype", HALVES)
def test_next_to_a_tie_by_two_to_the_minus_eighty(dtype):
    half = 2.0**-11 if dtype == "F16" else 2.0**-8
    tiny = 2.0**-40
    A = np.array([[half, half, half, -half / 2, -half / 2], [tiny, -tiny, 0, tiny, -tiny]], "f4")
    B = np.array([[1.0, tiny]], "f4")
    W = torch.ones((1, 5), dtype=TORCH[dtype])
    counts = check(W, [(1.0, B, A)], dtype)
    assert counts.exact == 5
    result, _ = outcome(W, [(1.0, B, A)])
    assert result[0, 0] > 1 and result[0, 1] == 1 and result[0, 2] == 1


def test_a_coefficient_that_is_no_short_number():
    """0.7 is a fraction of 2^−53: products with it do not fit into float64."""
    g = np.random.default_rng(5)
    W = torch.from_numpy(g.integers(1 << 8, 1 << 9, (64, 64)).astype("f4")).bfloat16()
    B = g.integers(-9, 10, (64, 3)).astype("f4")
    A = g.integers(-9, 10, (3, 64)).astype("f4")
    other = [(-0.7, B, A), (0.7, B, A)]  # cancels exactly: every sum is on the grid
    check(W, other, "BF16")
    check(W, [(0.7, B, A), (0.1 + 0.2, A.T[:, :3].copy(), B.T.copy())], "BF16")


@pytest.mark.parametrize(
    ("W", "D", "expected"),
    [
        (65504.0, 15.9921875, 65504.0),
        (65504.0, 16.0, np.inf),
        (65504.0, -65504.0, 0.0),
        (2.0**-24, 2.0**-25, 2.0**-23),
        (2.0**-24, -(2.0**-25), 0.0),
        (0.0, 2.0**-25, 0.0),
        (0.0, 2.0**-25 + 2.0**-45, 2.0**-24),
        (2.0**-14, -(2.0**-25), 2.0**-14),
        (2.0**-14, -(2.0**-25) - 2.0**-40, 2.0**-14 - 2.0**-24),
    ],
)
def test_the_ends_of_float16(W, D, expected):
    A = np.array([[D]], "f8")
    result, _ = outcome(torch.tensor([[W]], dtype=torch.float16), [(1.0, np.ones((1, 1)), A)])
    assert float(result[0, 0]) == expected


def test_an_exact_zero_has_the_sign_of_the_weight():
    W = torch.tensor([[0.0, -0.0, 1.0, -1.0]], dtype=torch.bfloat16)
    D = np.array([[0.0, 0.0, -1.0, 1.0]], "f4")
    for dtype in (torch.bfloat16, torch.float32):
        result, _ = outcome(W.to(dtype), [(1.0, np.ones((1, 1), "f4"), D)])
        assert torch.signbit(result).tolist() == [[False, True, False, True]]
        assert not result.any()


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("dtype", ALL)
def test_unchanged_zeros_keep_their_signs_in_any_block(dtype, rank):
    """Float32 settles the block of 64 rows but for two zeros, and leaves all of the single ones."""
    W = some((64, 64), dtype, 2)
    W[3], W[9, 5] = -0.0, -0.0
    B, A = factors(64, 64, rank, 3, 1e-3)
    B[3] = B[9] = 0
    for step in (1, 64):
        result, _ = outcome(W, [(1.0, B, A)], step=step)
        assert torch.equal(codes(result[[3, 9]]), codes(W[[3, 9]]))


@pytest.mark.parametrize("dtype", ALL)
def test_bytes_do_not_depend_on_blocks_or_gauge(dtype):
    W = some((130, 65), dtype, 2)
    B, A = factors(130, 65, 6, 7, 1e-3)
    scales = 2.0 ** np.arange(-9.0, 9.0, 3.0)
    other = ((B * scales).astype("f4"), (A / scales[:, None]).astype("f4"))
    whole, _ = outcome(W, [(1.4, B, A)])
    for step in (1, 7, 64):
        part, _ = outcome(W, [(1.4, *other)], step=step)
        assert torch.equal(codes(part), codes(whole))


@pytest.mark.parametrize("order", ["cancelling", "huge", "subnormal", "empty"])
@pytest.mark.parametrize("dtype", ALL)
def test_factors_of_every_kind(order, dtype):
    W = some((33, 40), dtype, 4)
    B, A = factors(33, 40, 5, 8, 1e-3)
    if order == "cancelling":
        pairs = [(1.0, B * 1000, A), (-1.0, B * 1000, A), (0.3, B, A)]
    elif order == "huge":
        pairs = [(1.0, (B * 1e20).astype("f4"), (A * np.float32(1e-20)).astype("f4"))]
    elif order == "subnormal":
        pairs = [(1.0, (B * 1e-20).astype("f4"), (A * 1e-20).astype("f4"))]
    else:
        pairs = [(1.0, B[:, :0], A[:0])]
    check(W, pairs, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_many_columns_begin_in_double(dtype):
    """Where float32 leaves more than 5 % in doubt it is not asked."""
    W = some((8, 64), dtype, 5)
    B, A = factors(8, 64, 4096, 9, 1e-2)
    counts = check(W, [(1.0, B, A)], dtype)
    assert counts.single == 0


def test_float64_factors():
    """Those of LoHa or LoKr, expanded: their products take four parts each."""
    W = some((40, 40), "BF16", 6)
    check(W, [(0.3, *factors(40, 40, 4, 10, 1e-3, np.float64))], "BF16")


def test_another_type_than_the_weight_has():
    W = some((40, 40), "BF16", 6)
    B, A = factors(40, 40, 4, 10, 1e-3)
    whole, unit = exact_sums(W, [(1.0, B, A)])
    for dtype in ALL:
        result, _ = outcome(W, [(1.0, B, A)], dtype=TORCH[dtype])
        assert result.dtype == TORCH[dtype]
        np.testing.assert_array_equal(result.double().numpy(), rounded(whole, unit, dtype))


def test_a_hundred_thousand_elements_with_ties():
    """The target of the issue, in both 16-bit types."""
    for dtype in HALVES:
        W = some((320, 320), dtype, 11, 1.0)
        B, A = factors(320, 320, 2, 12, 1.0)
        B, A = np.rint(B * 4) / np.float32(256), np.rint(A * 4) / np.float32(16)
        counts = check(W, [(1.0, B.astype("f4"), A.astype("f4"))], dtype)
        assert counts.exact > 100


def test_sums_to_odd_decide_every_rounding():
    g = np.random.default_rng(13)
    base = g.standard_normal(500)
    left, right, c = g.standard_normal((500, 3)), g.standard_normal((500, 3)), np.array([0.7, 1, 3])
    left[::2, 1], right[::2, 1] = -base[::2], 1.0  # cancels, and leaves what was small
    from fractions import Fraction as F

    for i, odd in enumerate(sum_to_odd(base, left, c, right)):
        exact = F(base[i]) + sum(F(left[i, k]) * F(c[k]) * F(right[i, k]) for k in range(3))
        assert abs(F(odd) - exact) < F(np.spacing(abs(odd)))
        assert F(odd) == exact or np.float64(odd).view(np.int64) & 1


def test_precision_switches_are_set_and_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    try:
        with exact_arithmetic(), exact_arithmetic():
            assert torch.get_num_threads() == 1
            x = torch.full((64, 64), 1 + 2.0**-20)
            assert torch.equal(x @ torch.eye(64), x)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(before)


def test_denormals_are_kept_inside_and_flushed_again_outside():
    def halved() -> float:
        return float(torch.tensor([2.0**-126]) / 2)

    torch.set_flush_denormal(True)
    try:
        with exact_arithmetic():
            inside = halved()
        outside = halved()
    finally:
        torch.set_flush_denormal(False)
    assert (inside, outside) == (2.0**-127, 0.0)
    with exact_arithmetic():
        pass
    assert halved() == 2.0**-127


@pytest.mark.parametrize("mode", ["threads", "here"])
def test_a_default_device_is_not_used(mode):
    """A worker thread has none of the caller's, but may have one of its own."""
    W, pair = some((8, 16), "BF16", 1), (1.0, *factors(8, 16, 3, 2, 0.02))

    def under() -> bytes:
        with torch.device("meta"), exact_arithmetic():
            return outcome(W, [pair])[0].view(torch.int16).numpy().tobytes()

    expected = outcome(W, [pair])[0].view(torch.int16).numpy().tobytes()
    if mode == "here":
        assert under() == expected
    else:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(under).result() == expected


@pytest.mark.parametrize("inputs", ["columns", "rows"])
def test_large_factors_are_held_once_and_let_go(inputs):
    m, n, rank = 1800, 1400, 256
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    own = (B.copy, A.copy)
    site = SimpleNamespace(
        rank=rank, shape=(m, n), made=None, factors=lambda: tuple(copy() for copy in own)
    )
    term = Term(0, 0.5, site, slice(0, m), slice(0, n))
    target = Target("x", None, (m, n), (term,), (), inputs)
    delta = Delta(target, bands(target)[0])
    tracemalloc.start()
    try:
        both = B.nbytes + A.nbytes
        assert delta.factors.fits
        held, peak = tracemalloc.get_traced_memory()
        assert held < 1.55 * both and peak < 2.2 * both
        basis = delta.basis()
        assert tracemalloc.get_traced_memory()[1] <= delta.peak + (4 << 20)
        noise = delta.noise
        delta.done(m - 1)
        assert tracemalloc.get_traced_memory()[0] > 1.5 * both
        delta.done(1)
        assert tracemalloc.get_traced_memory()[0] < basis.nbytes + (1 << 20)
    finally:
        tracemalloc.stop()
    assert delta.noise == noise and torch.equal(delta.basis(), basis)
