"""What a wrong merge added, R = W' − W, held against the change D that it should have added.

One pass over both, row block by row block: which rows and columns moved, how much of R lies along
each adapter, along each direction of the factors and along Dᵀ, and a random sketch of R that shows
its rank (Halko, Martinsson & Tropp 2011, §4). Beside each figure stands that of a right merge,
R₀ = RN(W + D) − W: a format that swallows much of a change makes both small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import read_rows
from adapterops.baking.measuring import tiles
from adapterops.judging.measure import Pair, by_input, inputs_of
from adapterops.rounding.exact import narrowed, round_exactly

Array = np.ndarray[Any, Any]

_SKETCH = 48  # columns of the sketch, 16 more than the largest rank that is told apart
MOST_RANK = 32
_SAMPLE = 1 << 19  # elements kept to try scales on


@dataclass(frozen=True, slots=True)
class Evidence:
    """The sums of one tensor.

    `moved` and `expected` count elements with R ≠ 0 and R₀ ≠ 0, by row and by column of the matrix.
    `norm`, `change` and `base` are ‖R‖, ‖D‖ and ‖W‖. `inputs` and `directions` are R's coefficients
    over R₀'s along each adapter's D and, of a tensor in one piece, along each column of the stacked
    factors; NaN where R₀ has none. `turned` is ⟨R, Dᵀ⟩ / ⟨R₀, D⟩ of a square matrix, 0 of others.
    `rank` is R's numerical rank above its noise, None if it has no low one. `saturated` are
    elements at the type's largest value where W + D is larger. `sample` holds W, R and D of rows
    spread over the tensor, and the type of W'.
    """

    moved: tuple[Array, Array]
    expected: tuple[Array, Array]
    norm: float
    change: float
    base: float
    inputs: Array
    directions: Array
    turned: float
    rank: int | None
    saturated: int
    sample: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]


@dataclass
class _Sums:
    """Running sums, and pieces of the sample."""

    moved: tuple[Array, Array]
    expected: tuple[Array, Array]
    squares: Array  # ΣR², ΣD², ΣW², ⟨R, Dᵀ⟩, ⟨R₀, D⟩, saturated
    gram: Array
    along: Array  # (inputs, 2): ⟨R, Dᵢ⟩ and ⟨R₀, Dᵢ⟩
    ranks: list[tuple[Array, Array]]
    sketch: Array
    sample: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def gather(pair: Pair) -> Evidence:
    """Everything, in one pass. W and W' are finite where the figures are to mean anything."""
    target = pair.target
    m, n = target.matrix
    count = 1 + max(inputs_of(target), default=0)
    omega = np.random.default_rng(0).standard_normal((n, min(_SKETCH, n)))
    sums = _Sums(
        moved=(np.zeros(m, np.int64), np.zeros(n, np.int64)),
        expected=(np.zeros(m, np.int64), np.zeros(n, np.int64)),
        squares=np.zeros(6),
        gram=np.zeros((count, count)),
        along=np.zeros((count, 2)),
        ranks=[],
        sketch=np.zeros((m, omega.shape[1])),
        sample=[],
    )
    pieces = [band for band in bands(target) if band.is_changed]
    dtype = torch.float32
    for band in pieces:
        delta = Delta(target, band)
        one = len(pieces) == 1 and delta.is_exact and delta.rank > 0
        for first, last in tiles(band.start, band.stop, pair.target.matrix[1]):
            dtype = _block(pair, delta, first, last, sums, omega, one)
    by_direction = np.full(0, np.nan)
    if sums.ranks:
        by_direction = _directions(Delta(target, pieces[0]), sums.ranks)
    r2, d2, w2, turned, right, saturated = sums.squares
    along = np.linalg.lstsq(sums.gram, sums.along, rcond=1e-12)[0]
    return Evidence(
        moved=sums.moved,
        expected=sums.expected,
        norm=float(np.sqrt(r2)),
        change=float(np.sqrt(d2)),
        base=float(np.sqrt(w2)),
        inputs=_ratios(along),
        directions=by_direction,
        turned=float(turned / right) if right else 0.0,
        rank=_rank(sums.sketch),
        saturated=int(saturated),
        sample=(*_joined(sums.sample, n), dtype),
    )


def _block(
    pair: Pair, delta: Delta, first: int, last: int, sums: _Sums, omega: Array, one: bool
) -> torch.dtype:
    target = pair.target
    W = read_rows(target.ref, target.matrix, first, last)
    after = read_rows(pair.after, target.matrix, first, last)
    exact = round_exactly(W, delta, first, last, after.dtype)[0].double()
    w, D = W.double(), delta.double(first, last)
    start = w if W.dtype == after.dtype else narrowed(w, after.dtype).double()
    largest = torch.finfo(after.dtype).max
    saturated = (after.double().abs() == largest) & (exact.abs() > largest)
    mine = after.double().nan_to_num_(0.0, 0.0, 0.0)
    R, R0 = mine - start, exact.nan_to_num_(0.0, largest, -largest) - start
    here = slice(first, last)
    for moved, x in ((sums.moved, R), (sums.expected, R0)):
        moved[0][here] += torch.count_nonzero(x, dim=1).numpy()
        moved[1][:] += torch.count_nonzero(x, dim=0).numpy()
    turned = 0.0
    if one and target.matrix[0] == target.matrix[1]:
        parts = delta.factors
        turned = float((R.numpy() * ((parts.right.T[here] * parts.c) @ parts.left.T)).sum())
    right = float((R0 * D).sum())
    sums.squares += [_square(R), _square(D), _square(w), turned, right, int(saturated.sum())]
    band = delta.band
    alone = [(k, by_input(target, band, k).double(first, last)) for k in inputs_of(band)]
    for k, mine_k in alone:
        sums.along[k] += [float((R * mine_k).sum()), float((R0 * mine_k).sum())]
        for other, theirs in alone:
            sums.gram[k, other] += float((mine_k * theirs).sum())
    if one:
        parts = delta.factors
        left = parts.left[first - band.start : last - band.start]
        both = [(left * (x.numpy() @ parts.right.T)).sum(0) for x in (R, R0)]
        sums.ranks.append((both[0], both[1]))
    sums.sketch[here] = R.numpy() @ omega
    step = max(1, target.matrix[0] * target.matrix[1] // _SAMPLE)
    rows = slice(-first % step, None, step)
    sums.sample.append((start[rows], R[rows], D[rows]))
    return after.dtype


def _directions(delta: Delta, sums: list[tuple[Array, Array]]) -> Array:
    """R's coefficients over R₀'s along the rank-one parts of the stacked factors."""
    parts = delta.factors
    gram = (parts.left.T @ parts.left) * (parts.right @ parts.right.T)
    gram = gram * np.multiply.outer(parts.c, parts.c)
    sides = parts.c[:, None] * np.stack([sum(s[k] for s in sums) for k in (0, 1)], axis=1)
    return _ratios(np.linalg.lstsq(gram, sides, rcond=1e-12)[0])


def _ratios(pairs: Array) -> Array:
    """First column over second, NaN where the second says nothing."""
    ratios = np.full(len(pairs), np.nan)
    np.divide(pairs[:, 0], pairs[:, 1], out=ratios, where=np.abs(pairs[:, 1]) > 1e-3)
    return ratios


def _rank(sketch: Array) -> int | None:
    """How many singular values of a sketch stand out of its noise, None if none or too many.

    Those of s random columns of length m lie between √m − √s and √m + √s times their size.
    """
    m, s = sketch.shape
    values = np.linalg.svd(sketch, compute_uv=False)
    if m <= s or not values[0]:
        return None
    noise = float(np.median(values[len(values) * 3 // 4 :]))
    spread = (np.sqrt(m) + np.sqrt(s)) / (np.sqrt(m) - np.sqrt(s))
    found = int((values > max(1.2 * spread * noise, 1e-10 * values[0])).sum())
    return found if 0 < found <= MOST_RANK else None


def _joined(
    pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    empty = torch.empty(0, columns, dtype=torch.float64)
    joined = [torch.cat([piece[k] for piece in pieces] or [empty]) for k in range(3)]
    return joined[0], joined[1], joined[2]


def _square(x: torch.Tensor) -> float:
    return float((x * x).sum())
