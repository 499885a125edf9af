"""What storage does to factors: the noise it makes, and whether two pairs are one but for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adapterops import casts
from adapterops.difference.report import Relation
from adapterops.factors import Factors
from adapterops.formats.model import Site
from adapterops.geometry import Matrix
from adapterops.plan import Part

# Rounding errors are spread evenly over one unit in the last place, stored numbers evenly over the
# logarithm of a binade: √(1/3 · E[1/x²]) of the unit roundoff, x in [1, 2) with density 1/(x·ln 2).
_RMS = math.sqrt((1 - 1 / 4) / (6 * math.log(2)))
_ARITHMETIC = 2.0**-21  # a few roundings of float32, in which tools make the factors they store
_FLOAT8 = {"F8_E4M3": (3, 2.0**-9), "F8_E5M2": (2, 2.0**-16)}  # mantissa bits, smallest step
_NO_FACTORS = ("alpha", "bias", "magnitude")
CERTAIN = 3.0  # differences up to so many times their root mean square may be nothing but rounding


def tensor_noise(norm: float, count: int, dtype: str) -> float:
    """Root mean square error of rounding `count` numbers of this norm to a storage type."""
    roundoff, step = _grid(dtype)
    return math.hypot(_RMS * roundoff * norm, step * math.sqrt(count / 12) if norm > 0 else 0.0)


def _grid(dtype: str) -> tuple[float, float]:
    """Unit roundoff of a storage type, and the distance of its smallest numbers."""
    if dtype in casts.FORMATS:
        form = casts.FORMATS[dtype]
        mantissa, step = form.mantissa, form.smallest_normal * 2.0**-form.mantissa
    else:
        mantissa, step = _FLOAT8[dtype]
    return 2.0 ** -(mantissa + 1), step


def arithmetic_noise(norm: float, dtype: str) -> float:
    """Error of a delta of this norm from arithmetic in float32; none where float64 is stored."""
    return 0.0 if dtype == "F64" else _ARITHMETIC * norm


def delta_noise(part: Part, factors: Factors) -> float:
    """Root mean square error in c·B·A of rounding B and A once to the type they are stored in.

    `factors` are B and A in any orthonormal coordinates, the coefficient c not folded in. Errors of
    single numbers are independent, so those of the column pairs add in squares.
    """
    site = part.site
    stored = [ref.dtype for role, ref in site.parts.items() if role not in _NO_FACTORS]
    if site.made:
        stored = [site.made.dtype] * 2
    roundoff, step = max(map(_grid, stored))
    b, a = np.sum(factors.B**2, axis=0), np.sum(factors.A**2, axis=1)
    below = step**2 / 12 * (a * site.shape[0] * (b > 0) + b * site.shape[1] * (a > 0))
    squared = float(np.sum(2 * (_RMS * roundoff) ** 2 * a * b + below))
    product = float(np.linalg.norm(factors.dense()))
    arithmetic = max(arithmetic_noise(product, dtype) for dtype in stored)
    return abs(part.coefficient) * math.hypot(math.sqrt(squared * len(stored) / 2), arithmetic)


def close(parts: Sequence[Part], factors: Sequence[Factors]) -> bool:
    """Whether two factor pairs are equal, each factor to within the rounding of its storage."""
    if len(parts) != 2 or parts[0].coefficient != parts[1].coefficient:
        return False
    one, other = factors
    if one.rank != other.rank:
        return False
    sizes = parts[0].site.shape
    for x, y, size in ((one.B, other.B, sizes[0]), (one.A, other.A, sizes[1])):
        noise = [
            tensor_noise(float(np.linalg.norm(z)), size * one.rank, part.site.dtype)
            for z, part in zip((x, y), parts, strict=True)
        ]
        if np.linalg.norm(x - y) > CERTAIN * math.hypot(*noise):
            return False
    return True


def relation(
    first: Sequence[Part], second: Sequence[Part], columns: Matrix, rows: Matrix
) -> Relation:
    """How the factors of two adapters compare, number by number.

    `columns` (R, m) and `rows` (R, n) hold those of `first`, then of `second`. A sum of several
    files has no factors of its own: it differs.
    """
    if not first or not second:
        return "alone"
    one, other = first[0], second[0]
    rank = one.site.rank
    if len(first) > 1 or len(second) > 1 or other.site.rank != rank:
        return "differ"
    pairs = [(columns[:rank], columns[rank:]), (rows[:rank], rows[rank:])]
    if one.coefficient == other.coefficient:
        if all(_match(x, y) for x, y in pairs):
            return "equal"
        to_b, to_a = _narrower(one.site, other.site), _narrower(other.site, one.site)
        if to_b and all(_match(x, y, to_b) for x, y in pairs):
            return "rounded-b"
        if to_a and all(_match(y, x, to_a) for x, y in pairs):
            return "rounded-a"
    powers = [_power_of_two(x, y) for x, y in pairs]
    if one.coefficient == other.coefficient * powers[0] * powers[1] and all(
        _match(power * x, y) for (x, y), power in zip(pairs, powers, strict=True)
    ):
        return "split"
    return "differ"


def _match(x: Matrix, y: Matrix, dtype: str | None = None) -> bool:
    """Whether y is x, rounded to `dtype` if one is given; the first row alone tells most apart."""
    for rows in (slice(0, 1), slice(1, None)):
        values = x[rows]
        if dtype:
            with np.errstate(over="ignore", invalid="ignore"):  # infinities are named later
                values = casts.round_to(values, dtype)
        if not np.array_equal(values, y[rows]):
            return False
    return True


def _narrower(wide: Site, narrow: Site) -> str | None:
    """The type of `narrow` if its numbers may be those of `wide`, rounded."""
    types = {site.dtype for site in (wide, narrow)}
    if len(types) < 2 or not types.issubset(casts.FORMATS):
        return None
    if casts.FORMATS[wide.dtype].mantissa <= casts.FORMATS[narrow.dtype].mantissa:
        return None
    return narrow.dtype


def _power_of_two(x: Matrix, y: Matrix) -> float:
    """The power of two nearest to ‖y‖/‖x‖, 1 where there is none."""
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if not (0 < norms[0] < math.inf and 0 < norms[1] < math.inf):
        return 1.0
    return float(math.ldexp(1.0, round(math.log2(norms[1] / norms[0]))))
