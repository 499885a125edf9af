"""How a merge may have been computed: a ladder of models, from exact rounding to the loosest.

T = W + D is the exact sum, E = W' − T the error, h(x) = ½ulp(x) of the grid that W' lies on, the
spacing being that of the smallest normal number below it; M = max(|T|, |W'|). A rung explains an
element if |E| is within its bound; each bound holds those below it.

    0  exact       W' = RN(T), decided with certainty (`rounding.exact`)
    1  float32     h(M) + b: T in float32, b = 2uv + 2⁻²⁴k(|W| + |T|), rounded once
    2  delta       + ½ulp(D): D rounded to the base's type before it was added
    3  16-bit      + Σ ½ulp(cBA) + ½c·ulp(BA): each D computed in 16 bits
    4  factors     + 2·2⁻ᵖ⁻¹·c|B||A|: factors rounded to 16 bits, or TF32's 10 bits of mantissa
    5  sequence    h(M) becomes k·h(|W| + Σ|D|): k adapters, or a cast of W, rounded in turn;
                   of one in bfloat16, + ½ulp in float16 each time, by way of which it may have
                   come, and + 2·2⁻²⁵ for its subnormal W and D
    6  faithful    2h(M) + b: a neighbour of T; only where provenance names such a rounding,
                   k·2h(|W| + Σ|D|) where it names k

u·v bounds what float32 makes of D (`Delta.bounds`), twice: here and in the tool. Of a dense change
(DoRA) rung 3 allows four roundings of W + D. |E| ≤ |D|, which correct rounding of a W on the grid
implies, needs no test of its own: rung 0 is equality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapterops.baking.delta import Delta
from adapterops.casts import FORMATS
from adapterops.rounding.grid import TORCH, ulp

Array = np.ndarray[Any, Any]

RUNGS = (
    "rounded once, exactly",
    "rounded once, computed in float32",
    "the change was rounded before it was added: two roundings",
    "the change was computed in 16 bits",
    "the factors were rounded first (to 16 bits or TF32)",
    "rounded after each of several steps",
    "rounded to a neighbour, at random or with feedback",
)
FAITHFUL = len(RUNGS) - 1
TOLERATED = 1e-6  # share of a tensor's elements that a rung need not explain

_SINGLE, _DOUBLE, _TF32 = 2.0**-24, 2.0**-50, 2.0**-11
_SUBNORMAL = 2.0**-25  # half of float16's spacing below 2⁻¹⁴, where bfloat16's is finer
_WIDER = 1 + 2.0**-6  # what was rounded before may lie across a power of two
_TRIED = 1 << 13  # elements that are tried on the wide rungs before all are
_HOPELESS = 0.01  # share of these that no rung explains, above which counts are extrapolated
_PLAIN_KINDS = ("lora", "dora", "adalora")


@dataclass(frozen=True, slots=True)
class Formats:
    """The types a merge may have gone through, as safetensors names them.

    `grid` is that of W', `stored` that and the base's, `narrow` the 16-bit types among these and
    the adapters': what a change or its factors may have been rounded to. `steps` is how many
    roundings a sequence has.
    """

    grid: str
    stored: tuple[str, ...]
    narrow: tuple[str, ...]
    steps: int


def formats(grid: str, base: str, delta: Delta) -> Formats:
    """The types for one band of a tensor, and a sequence of its adapters.

    One of float32 throughout may still have been computed in bfloat16 (autocast).
    """
    terms = delta.band.terms
    held = {term.site.dtype for term in terms}
    stored = tuple(sorted({name for name in (grid, base) if name in FORMATS}))
    narrow = sorted(n for n in {*held, *stored} if n in FORMATS and FORMATS[n].bits == 16)
    inputs = {term.input for term in terms} | {term.input for term in delta.band.dense}
    steps = max(1, len(inputs)) + (0 if holds(grid, base) else 1)
    return Formats(grid, stored, tuple(narrow) or ("BF16",), steps)


def coarseness(rung: int | None, how: tuple[str, ...]) -> float:
    """Standard error that 16-bit arithmetic adds to a slope, relative: rungs 3 to 5.

    A number of p bits of mantissa times a constant, rounded, has an error that depends on its 2ᵖ
    mantissas alone, so that the mean of any number of them does not vanish: the root mean square of
    the relative error, 2⁻ᵖ/(1.5√12), over √2ᵖ.
    """
    if rung is None or rung < 3:
        return 0.0
    bits = min(FORMATS[name].mantissa for name in how)
    return float(2.0 ** (-1.5 * bits)) / (1.5 * math.sqrt(12.0))


def holds(wide: str, narrow: str) -> bool:
    """Whether every finite value of `narrow` is one of `wide`."""
    return wide in (narrow, "F64") or (wide == "F32" and narrow in ("F16", "BF16"))


def half_ulp(x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """½ulp of the coarsest of some types at x ≥ 0, float64."""
    found = ulp(x, TORCH[names[0]])
    for name in names[1:]:
        found = torch.maximum(found, ulp(x, TORCH[name]))
    return found / 2


def unexplained(
    W: torch.Tensor,
    after: torch.Tensor,
    wrong: torch.Tensor,
    D: torch.Tensor,
    delta: Delta,
    start: int,
    how: Formats,
) -> list[int]:
    """How many elements rungs 0 to 5 leave unexplained, of those that are not RN(T).

    Where no rung explains a hundredth of a sample, the counts from rung 3 on are extrapolated.

    Args:
        W, after: rows from `start` on of the base and of W' (rows, n), in their types.
        wrong: flat indices of elements of W' that differ from RN(T), all finite.
        D: the same rows of the change, float32 (within `delta.bounds`) or float64.
    """
    rows, columns = wrong // W.shape[1], wrong % W.shape[1]
    u, v = delta.bounds(start, start + W.shape[0])
    w, mine, d = (x.reshape(-1)[wrong].double() for x in (W, after, D))
    reach = u[rows].double() * v[columns].double()
    T = w + d
    largest = torch.maximum(T.abs(), mine.abs())
    error = (mine - T).abs_()
    near = half_ulp(largest, (how.grid,))
    counts = [len(wrong)]
    if not delta.is_exact:  # RN(T) of a dense change is RN of a float64, itself in doubt
        counts = [int((error > near * (1 + 2.0**-30) + _DOUBLE * (w.abs() + d.abs())).sum())]
    bound = near + 2 * reach + _SINGLE * max(1, how.steps) * (w.abs() + T.abs())
    left = error > bound
    counts.append(int(left.sum()))
    bound += half_ulp(d.abs() * _WIDER + reach, how.stored)
    left &= error > bound
    counts.append(int(left.sum()))
    at = left.nonzero().view(-1)
    if len(at):
        some = at[:: max(1, len(at) // _TRIED)]
        kept = torch.stack([error, bound, near, w, d])
        wide = _wide(kept[:, some], rows[some] + start, columns[some], delta, how)
        if len(some) == len(at) or wide[-1] > _HOPELESS * len(some):
            counts += [count * len(at) // len(some) for count in wide]
        else:
            counts += _wide(kept[:, at], rows[at] + start, columns[at], delta, how)
    return counts + [0] * (FAITHFUL - len(counts))


def _wide(
    kept: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, delta: Delta, how: Formats
) -> list[int]:
    """Rungs 3 to 5 for the elements that need them: |E|, rung 2's bound, h(M), W, D in `kept`."""
    counts = [0, 0, 0]
    for chunk, left, c, right in delta.at(rows.numpy(), columns.numpy()):
        computed, rounded, sizes = _sizes(left, c, right, delta, how)
        error, limit, near, w, d = kept[:, chunk]
        limit = limit + torch.from_numpy(computed)
        if delta.band.dense:
            limit += 4 * half_ulp((w.abs() + d.abs()) * _WIDER, how.narrow)
            sizes = sizes + d.abs().numpy()
        wrong = error > limit
        counts[0] += int(wrong.sum())
        limit += torch.from_numpy(rounded)
        wrong &= error > limit
        counts[1] += int(wrong.sum())
        reach = (w.abs() + torch.from_numpy(sizes)) * _WIDER
        if how.steps > 1:
            limit += how.steps * half_ulp(reach, (how.grid,)) - near
        if how.grid == "BF16":
            limit += how.steps * half_ulp(reach, ("F16",)) + 2 * _SUBNORMAL
        wrong &= error > limit
        counts[2] += int(wrong.sum())
    return counts


def _sizes(
    left: Array, c: Array, right: Array, delta: Delta, how: Formats
) -> tuple[Array, Array, Array]:
    """For single elements: what rungs 3 and 4 add, and Σ|D| over terms.

    left, right (elements, R), c (R,).
    """

    def half(x: Array, names: tuple[str, ...]) -> Array:
        found: Array = half_ulp(torch.from_numpy(np.ascontiguousarray(x)), names).numpy()
        return found

    def coarse(x: Array) -> Array:
        return np.maximum(half(x, how.narrow), _TF32 * x)

    computed, sizes = np.zeros(len(left)), np.zeros(len(left))
    b, a = np.abs(left), np.abs(right)
    rounded = (coarse(b) * a + b * coarse(a) + coarse(b) * coarse(a)) @ np.abs(c)
    at = 0
    for term in delta.band.terms:
        here, factor = slice(at, at + term.site.rank), abs(term.coefficient)
        at += term.site.rank
        D = np.abs((left[:, here] * c[here] * right[:, here]).sum(1))
        times = 1 if term.site.kind in _PLAIN_KINDS else 4  # products of products
        error = times * factor * half(D / factor * _WIDER, how.narrow) if factor else 0.0
        computed += error + half(D * _WIDER + error, how.narrow)
        sizes += D
    if how.steps > 1:
        computed += (how.steps - 1) * half(sizes * _WIDER, how.narrow)
    return computed, rounded, sizes


def unfaithful(
    W: torch.Tensor,
    after: torch.Tensor,
    D: torch.Tensor,
    sizes: torch.Tensor,
    delta: Delta,
    start: int,
    grid: str,
    times: int = 1,
) -> int:
    """How many elements are no neighbour of T: what rung 6 leaves unexplained; D in float64.

    After several roundings in turn, how many are farther away than those can lead; `sizes` are
    then Σ|D| of the adapters.
    """
    u, v = delta.bounds(start, start + W.shape[0])
    T = W.double() + D
    mine = after.double()
    most = torch.maximum(T.abs(), mine.abs())
    if times > 1:
        most = torch.maximum(most, _WIDER * (W.double().abs() + sizes))
    limit = 2 * times * half_ulp(most, (grid,))
    limit += 2 * torch.outer(u.double(), v.double()) + _SINGLE * (W.double().abs() + T.abs())
    return int(((mine - T).abs() > limit).sum())
