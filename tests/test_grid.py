"""The grids of the storage types, against all their codes and rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from adapterops.rounding.grid import (
    from_ordinal,
    multiples,
    neighbours,
    ordinal,
    rounding_limit,
    ulp,
)

HALVES = [torch.float16, torch.bfloat16]
ALL = [*HALVES, torch.float32]
FORMS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}
INFINITY = float("inf")


def every_code(dtype):
    """All codes of a 16-bit type that are no NaN, in the order of their values, one zero."""
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    codes = codes[~codes.isnan()]
    negative, positive = codes[codes.signbit()], codes[~codes.signbit()]
    return torch.cat([negative.flip(0)[:-1], positive])


def spacing(x, dtype):
    """2^(max(⌊log₂|x|⌋, e) − p), as a fraction."""
    mantissa, least = FORMS[dtype]
    value, exponent = abs(Fraction(x)), least
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    return Fraction(2) ** (exponent - mantissa)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ordinals_count_all_codes(dtype):
    values = every_code(dtype)
    places = ordinal(values)
    assert places.diff().eq(1).all()
    assert places[values == 0].tolist() == [0]
    assert torch.equal(from_ordinal(places, dtype).view(torch.int16), values.view(torch.int16))
    assert ordinal(torch.tensor([-0.0], dtype=dtype)).tolist() == [0]


def test_ordinals_of_float32():
    values = torch.tensor([-INFINITY, -1.0, -(2.0**-149), -0.0, 0.0, 2.0**-149, 1.0, INFINITY])
    places = ordinal(values)
    assert places.tolist() == [-0x7F800000, -0x3F800000, -1, 0, 0, 1, 0x3F800000, 0x7F800000]
    assert torch.equal(from_ordinal(places, torch.float32), values)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_are_their_own_neighbours(dtype, wide):
    values = torch.cat([every_code(dtype), torch.tensor([-0.0], dtype=dtype)])
    for found in neighbours(values.to(wide), dtype):
        assert torch.equal(found.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_neighbours_of_what_lies_between_all_codes(dtype):
    finite = every_code(dtype)[1:-1]
    lower, upper = finite[:-1], finite[1:]
    for share in (0.5, 2.0**-40, 1 - 2.0**-40):  # a cast through float32 would lose the last two
        between = lower.double() + share * (upper.double() - lower.double())
        found = neighbours(between, dtype)
        assert torch.equal(found[0], lower) and torch.equal(found[1], upper)
    up, down = (finite.double() * factor for factor in (1 + 2.0**-52, 1 - 2.0**-52))
    away, towards = torch.maximum(up, down), torch.minimum(up, down)
    places = ordinal(finite)
    some = finite != 0
    assert torch.equal(neighbours(away, dtype)[0][some], finite[some])
    assert torch.equal(neighbours(towards, dtype)[1][some], finite[some])
    assert torch.equal(ordinal(neighbours(away, dtype)[1])[some], places[some] + 1)
    assert torch.equal(ordinal(neighbours(towards, dtype)[0])[some], places[some] - 1)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_the_ends_of_the_grid(dtype):
    largest = torch.finfo(dtype).max
    limit = rounding_limit(dtype)
    assert limit == {torch.float16: 65520.0}.get(dtype, limit)
    T = torch.tensor(
        [largest * (1 + 2.0**-50), limit, 2 * limit, 1e300, INFINITY], dtype=torch.float64
    )
    lower, upper = neighbours(T, dtype)
    assert lower.tolist() == [largest] * 4 + [INFINITY]
    assert upper.tolist() == [INFINITY] * 5
    lower, upper = neighbours(-T, dtype)
    assert lower.tolist() == [-INFINITY] * 5
    assert upper.tolist() == [-largest] * 4 + [-INFINITY]
    inside = torch.nextafter(torch.tensor(limit, dtype=torch.float64), torch.tensor(0.0).double())
    if dtype != torch.float32:  # torch rounds twice: inside becomes the limit in float32
        assert inside.to(dtype) == INFINITY
    assert neighbours(inside, dtype)[0] == largest
    assert neighbours(torch.tensor([float("nan"), 1.0]).double(), dtype)[0].isnan().tolist() == [
        1,
        0,
    ]
    assert neighbours(T[:0], dtype)[0].shape == (0,)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_below_the_smallest_number(dtype):
    least = float(ulp(torch.zeros(1, dtype=torch.float64), dtype))
    T = torch.tensor([least / 2, 5e-324, 0.0, -0.0, -5e-324, -least / 3], dtype=torch.float64)
    lower, upper = neighbours(T, dtype)
    assert lower.tolist() == [0, 0, 0, 0, -least, -least]
    assert upper.tolist() == [least, least, 0, 0, 0, 0]
    signs = [False, False, False, True, True, True]
    assert torch.copysign(torch.ones(6), lower).signbit().tolist() == signs
    assert torch.copysign(torch.ones(6), upper).signbit().tolist() == signs


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_spacings_of_all_codes(dtype, wide):
    finite = every_code(dtype)[1:-1]
    gaps = finite.double().diff()
    outer = torch.where(finite[:-1] < 0, finite[1:], finite[:-1])  # the one nearer to zero
    assert torch.equal(ulp(outer.to(wide), dtype).double(), gaps)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@given(x=st.floats(-65000, 65000, allow_subnormal=True))
@example(x=2.0**-14 - 2.0**-60)
@example(x=-(2.0**-126))
@example(x=2.0**-149)
@example(x=1.0 + 2.0**-52)
def test_any_number_against_fractions(dtype, x):
    T = torch.tensor([x], dtype=torch.float64)
    step = spacing(x, dtype)
    count = Fraction(x) / step
    below, above = count.__floor__() * step, count.__ceil__() * step
    assert Fraction(float(ulp(T, dtype))) == step
    assert [Fraction(float(v)) for v in neighbours(T, dtype)] == [below, above]
    room = tuple(torch.empty_like(T) for _ in range(3))
    assert [Fraction(float(v)) for v in multiples(T, dtype, room)] == [below, above]


def test_neighbours_bracket_the_nearest_code():
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(100_000) * 1e-3)
    for dtype in HALVES:
        lower, upper = neighbours(values, dtype)
        assert (lower.double() <= values).all() and (values <= upper.double()).all()
        assert set((ordinal(upper) - ordinal(lower)).tolist()) <= {0, 1}
