"""Rounding against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterops import casts
from adapterops.errors import NumericsError, UnsupportedError


def as_numpy(x):
    return x


def as_torch(x):
    import torch

    return torch.from_numpy(x)


both = pytest.mark.parametrize("place", [as_numpy, as_torch], ids=["numpy", "torch"])


def nearest(x: float, dtype: str) -> float:
    """Round to nearest even by Fractions, from the definition of the format."""
    form = casts.FORMATS[dtype]
    if x == 0.0:
        return x
    value = abs(Fraction(x))
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    while Fraction(2) ** exponent > value:
        exponent -= 1
    smallest = np.frexp(form.smallest_normal)[1] - 1
    ulp = Fraction(2) ** (max(exponent, int(smallest)) - form.mantissa)
    result = float(round(value / ulp) * ulp)  # Fraction's round is to even
    return result if x > 0 else -result


def traps(dtype: str) -> list[float]:
    """Ties, near-ties beyond float32, subnormals, the last number before overflow."""
    form = casts.FORMATS[dtype]
    half = 2.0 ** -(form.mantissa + 1)
    ties = [
        1 + half,
        1 + 3 * half,
        1 + half + 2.0**-40,
        1 + half - 2.0**-40,
        1 + 3 * half + 2.0**-52,
    ]
    tiny = form.smallest_normal * 2.0**-form.mantissa
    small = [
        tiny,
        tiny / 2,
        tiny / 2 * (1 + 2.0**-30),
        tiny * 1.5,
        tiny * 2.5,
        tiny * 0.49,
        0.0,
        -0.0,
    ]
    last = float(np.nextafter(form.overflow, 0)) if dtype != "F64" else 1e300
    return [*ties, *(-t for t in ties), *small, *(-t for t in small), last, -last]


@both
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_traps_round_once(dtype, place):
    values = np.array(traps(dtype))
    expected = [nearest(x, dtype) for x in values]
    rounded = np.asarray(casts.round_to(place(values), dtype))
    assert rounded.tolist() == expected
    assert np.signbit(rounded).tolist() == np.signbit(values).tolist()


@both
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_near_ties_where_a_cast_through_float32_fails(dtype, place):
    rng = np.random.default_rng(0)
    step = 2.0 ** -casts.FORMATS[dtype].mantissa
    base = 1 + step * rng.integers(0, 1 << casts.FORMATS[dtype].mantissa, 20_000)
    values = base + step / 2 + rng.choice([-1, 1], 20_000) * 2.0 ** -rng.integers(26, 50, 20_000)
    expected = np.array([nearest(x, dtype) for x in values[:2_000]])
    rounded = np.asarray(casts.round_to(place(values), dtype))
    assert np.array_equal(rounded[:2_000], expected)
    through = casts.round_to(values.astype(np.float32).astype(np.float64), dtype)
    assert np.mean(through != rounded) > 0.2  # the trap is real


@given(st.floats(-60_000, 60_000), st.sampled_from(["F16", "BF16", "F32"]))
@example(65519.99, "F16")
@example(2.0**-25 * (1 + 2.0**-52), "F16")
def test_any_number_rounds_to_nearest(x, dtype):
    assert casts.round_to(np.array([x]), dtype)[0] == nearest(x, dtype)


@both
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_bytes_decode_to_what_was_rounded(dtype, place):
    values = np.random.default_rng(1).standard_normal((5, 7)) * 100
    stored = casts.store(place(values), dtype)
    raw = np.frombuffer(casts.stored_bytes(stored), np.uint8)
    decoded = np.asarray(casts.decode(place(raw.copy()), dtype, (5, 7)))
    assert np.array_equal(decoded, np.asarray(casts.round_to(place(values), dtype)))
    assert np.array_equal(decoded, casts.round_to(values, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_range_is_checked_at_the_rounding_boundary(dtype):
    edge = casts.FORMATS[dtype].overflow
    casts.check_range(np.array([np.nextafter(edge, 0)]), dtype, "m")
    for value in (edge, -edge, np.inf, np.nan):
        with pytest.raises(NumericsError, match=r"module m.*float32") as caught:
            casts.check_range(np.array([1.0, value]), dtype, "m")
        assert caught.value.exit_code == 5


@both
def test_float8_decodes_like_torch(place):
    import torch

    codes = np.arange(256, dtype=np.uint8)
    for dtype, kind in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        expected = torch.from_numpy(codes).view(kind).double().numpy()
        assert np.array_equal(
            np.asarray(casts.decode(place(codes), dtype, (256,))), expected, equal_nan=True
        )


def test_integers_are_no_factors():
    with pytest.raises(UnsupportedError, match="I32"):
        casts.decode(np.zeros(4, np.uint8), "I32", (1,))


@both
def test_subnormals_are_counted_only_where_precision_was_lost(place):
    values = np.array([2.0**-24, 2.0**-24 * 1.3, 2.0**-30, 0.0, 1.0])
    stored = casts.store(place(values), "F16")
    assert casts.count_subnormal(place(values), stored, "F16") == 2
