"""One stored tensor before and after a merge, read once, tile by tile: all sums that judge it.

Rows that no adapter changes must be W to the last bit, or W rounded where W' has another type. A
W' whose values all lie on a coarser type's grid was merged there: it is judged on that grid.
Arithmetic must be exact here (`rounding.precision.exact_arithmetic`, entered by the caller).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from adapterops.baking.bands import Band, bands
from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.kernel import read_rows
from adapterops.baking.measuring import measured, tiles
from adapterops.changes.targets import Target
from adapterops.formats.model import Ref
from adapterops.judging.ladder import FAITHFUL, formats, unexplained, unfaithful
from adapterops.judging.route import SUM, Route, restate
from adapterops.judging.trend import BINS, SAMPLED, Trend, margins, regress
from adapterops.rounding.exact import codes, different, narrowed
from adapterops.rounding.grid import NAMES, TORCH, ulp

Array = np.ndarray[Any, Any]
Alter = Callable[[Band, Array, Array, Array], tuple[Array, Array, Array]]
_COARSER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float16: (torch.bfloat16,),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that the adapters change, and where its merged values are, of the same shape."""

    target: Target
    after: Ref


@dataclass(frozen=True, slots=True)
class Sums:
    """What a pass found, of rows that something changes unless said otherwise; it adds up.

    `unexplained` counts elements by rung. `outside` counts elements in other rows that differ.
    `nonfinite` are values of W' that are NaN or infinite, `overflow` those where W + D is beyond
    the type. `expected` is how many codes a correct merge changes. `astray` is how many elements of
    a faithful merge are not RN(T), on average: Σ |RN(T) − T|/ulp. `narrow` are the 16-bit types
    that it may have been computed in. `coarse` are elements of tiles that lie on a narrower grid,
    `grid` its name. `margins` counts, in `sampled` elements, what a
    scale error would change (`trend.margins`).
    """

    elements: int = 0
    unexplained: tuple[int, ...] = (0,) * (FAITHFUL + 1)
    outside: int = 0
    nonfinite: int = 0
    overflow: int = 0
    expected: int = 0
    astray: float = 0.0
    narrow: frozenset[str] = frozenset()
    coarse: int = 0
    grid: str = ""
    sampled: int = 0
    margins: Array | float = 0.0
    drift: Drift = field(default_factory=Drift)
    trend: Trend = field(default_factory=Trend)

    def __add__(self, other: Sums) -> Sums:
        apart = ("unexplained", "narrow", "grid")
        names = (f.name for f in fields(self) if f.name not in apart)
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        both = zip(self.unexplained, other.unexplained, strict=True)
        return Sums(
            **sums,
            unexplained=tuple(x + y for x, y in both),
            narrow=self.narrow | other.narrow,
            grid=self.grid or other.grid,
        )

    @property
    def changes(self) -> Array:
        """How many codes of the tensor a scale error changes, by its size."""
        counts = self.margins if isinstance(self.margins, np.ndarray) else np.zeros(BINS)
        return counts * (self.elements / self.sampled if self.sampled else 0.0)


class Altered(Delta):
    """A change with its stacked factors (left, c, right) altered: what a tool may have added."""

    def __init__(self, target: Target, band: Band, alter: Alter) -> None:
        super().__init__(target, band)
        self._alter = alter

    def _stacked(self) -> tuple[Array, Array, Array]:
        return self._alter(self.band, *super()._stacked())


def change_of(target: Target, band: Band, alter: Alter | None = None) -> Delta:
    """The change of a band, altered if asked for."""
    return Delta(target, band) if alter is None else Altered(target, band, alter)


def measure(pair: Pair, route: Route = SUM, alter: Alter | None = None) -> Sums:
    """All sums of one tensor.

    Raises FileError and ChangedError as reading does, NumericsError for factors that are not
    finite.
    """
    total = Sums()
    for band in bands(pair.target):
        if band.is_changed:
            total += _changed(pair, band, route, alter)
        else:
            total += _copied(pair, band)
    return total


def energies(pair: Pair, alter: Alter | None = None) -> tuple[Array, Array]:
    """ΣD² of each row and of each column of the matrix; no weights are read."""
    m, n = pair.target.matrix
    rows, columns = np.zeros(m), np.zeros(n)
    for band in bands(pair.target):
        delta = change_of(pair.target, band, alter)
        here = tiles(band.start, band.stop, pair.target.matrix[1])
        for first, last in here if band.is_changed else ():
            squares = delta.single(first, last).square_()
            rows[first:last] = squares.sum(1, dtype=torch.float64).numpy()
            columns += squares.sum(0, dtype=torch.float64).numpy()
    return rows, columns


def _copied(pair: Pair, band: Band) -> Sums:
    """Rows that no adapter changes."""
    target, wrong = pair.target, 0
    for first, last in tiles(band.start, band.stop, pair.target.matrix[1]):
        W = read_rows(target.ref, target.matrix, first, last)
        after, _ = on_grid(read_rows(pair.after, target.matrix, first, last))
        kept = narrowed(W.double(), after.dtype) if W.dtype != after.dtype else W
        if not torch.equal(codes(kept), codes(after)):
            same = (kept == after) | (kept.isnan() & after.isnan())
            wrong += int((~same).sum())
    return Sums(outside=wrong)


def _changed(pair: Pair, band: Band, route: Route, alter: Alter | None) -> Sums:
    """Rows that adapters change."""
    target = pair.target
    delta = change_of(target, band, alter)
    steps = [by_input(target, band, index) for index in inputs_of(band)] if route.each else [delta]
    if route.times > 1:
        delta = Altered(target, band, lambda _, b, c, a: (b, route.times * c, a))
    total, along = Sums(), None
    for first, last in tiles(band.start, band.stop, pair.target.matrix[1]):
        W = read_rows(target.ref, target.matrix, first, last)
        after, coarse = on_grid(read_rows(pair.after, target.matrix, first, last))
        found, part = _tile(W, after, delta, first, route, steps)
        if coarse:
            found = replace(found, coarse=after.numel(), grid=NAMES[after.dtype])
        total += found
        if part is not None:
            along = part if along is None else along + part
    if along is not None:
        inside = float((along * along).sum())
        total = replace(total, drift=replace(total.drift, inside=inside))
    return total


def inputs_of(part: Target | Band) -> list[int]:
    """Which adapters change a target, or a band of one, in their order."""
    return sorted({term.input for term in part.terms} | {term.input for term in part.dense})


def by_input(target: Target, band: Band, index: int) -> Delta:
    """One adapter's share of a band's change."""
    terms = tuple(term for term in band.terms if term.input == index)
    dense = tuple(term for term in band.dense if term.input == index)
    return Delta(target, replace(band, terms=terms, dense=dense))


def _tile(
    W: torch.Tensor, after: torch.Tensor, delta: Delta, first: int, route: Route, steps: list[Delta]
) -> tuple[Sums, torch.Tensor | None]:
    """The sums of some rows, from `first` on, and Q'E where inputs run along them."""
    last = first + len(W)
    single = delta.single(first, last)
    drift, along = measured(W, after, delta, first, last)
    broken = 0
    if not np.isfinite(drift.error):
        W, after, broken = _mended(W, after, single)
        drift, along = measured(W, after, delta, first, last)
    grid = after.dtype
    how = formats(NAMES[grid], NAMES[W.dtype], delta)
    how = replace(how, steps=how.steps * route.times)
    start = W if W.dtype == grid else narrowed(W.double(), grid)
    W = start if route.cast else W
    rounded = restate(W, delta, steps, first, single, route, grid)
    wrong = torch.from_numpy(_differing(rounded, after))
    same = not len(wrong) and W.dtype == grid
    sums = Sums(
        elements=W.numel(),
        unexplained=(0,) * FAITHFUL + (W.numel(),),
        nonfinite=broken,
        overflow=int(rounded.view(-1)[wrong].isinf().sum()),
        expected=drift.changed if same else _count_different(rounded, start),
        narrow=frozenset(how.narrow),
        drift=drift,
        trend=Trend(delta=drift.delta),
    )
    in_single = grid != torch.float32 and delta.is_exact and not route.faithful
    D = single if in_single else delta.double(first, last)
    if route.faithful:
        sizes = torch.zeros_like(D)
        if route.faithful > 1:
            parts = [by_input(delta.target, delta.band, index) for index in inputs_of(delta.band)]
            sizes = sum((part.double(first, last).abs() for part in parts), sizes)
        count = unfaithful(W, after, D, sizes, delta, first, how.grid, route.faithful)
        T = W.double() + D
        x = (after.double() - T).view(-1)
        off = float(((narrowed(T, grid).double() - T).abs() / ulp(T, grid)).sum())
        trend = regress(x, D, torch.arange(len(x)), first, drift.delta)
        sums = replace(
            sums, unexplained=(W.numel(),) * FAITHFUL + (count,), trend=trend, astray=off
        )
    elif len(wrong):
        found = unexplained(W, after, wrong, D, delta, first, how)
        x = after.view(-1)[wrong].double() - rounded.view(-1)[wrong].double()
        finite = x.isfinite()
        trend = regress(x[finite], D, wrong[finite], first, drift.delta)
        sums = replace(sums, unexplained=(*found, W.numel()), trend=trend)
    sample = slice(-first % SAMPLED, None, SAMPLED)
    D = D[sample].double()
    T = W[sample].double() + D
    room = margins(T, D, ulp(T, grid))
    return replace(sums, sampled=T.numel(), margins=room), along


def on_grid(after: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Values in a type of fewer bits of mantissa that holds all of them, if there is one."""
    for dtype in _COARSER.get(after.dtype, ()) if after.numel() else ():
        if torch.equal(after[0].to(dtype).to(after.dtype), after[0]):
            narrow = after.to(dtype)
            if torch.equal(narrow.to(after.dtype), after):
                return narrow, True
    return after, False


def _differing(one: torch.Tensor, other: torch.Tensor) -> Array:
    """Flat indices where two tensors of one type hold other values; zeros have no sign."""
    found = different(one, other)
    if not len(found):
        return found
    index = torch.from_numpy(found)
    differs: Array = (one.reshape(-1)[index] != other.reshape(-1)[index]).numpy()
    kept: Array = found[differs]
    return kept


def _count_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many codes of two tensors of one type differ."""
    return int(np.count_nonzero(codes(one).numpy() != codes(other).numpy()))


def _mended(
    W: torch.Tensor, after: torch.Tensor, D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both with harmless values where either is not finite, and how many of W' are wrong there.

    Where W itself is NaN or infinite, so must W' be.
    """
    bad = ~(W.isfinite() & after.isfinite())
    kept = ~W.isfinite() & ((W.double() == after.double()) | (W.isnan() & after.isnan()))
    count = int((bad & ~kept).sum())
    return (
        W.masked_fill(bad, 0.0),
        torch.where(bad, narrowed(D.double(), after.dtype), after),
        count,
    )


def as_outputs(target: Target, ref: Ref) -> Array:
    """A whole stored matrix of a target's shape as (out, in), in float64."""
    W: Array = read_rows(ref, target.matrix, 0, target.matrix[0]).double().numpy()
    return W.T if target.inputs == "rows" else W


def is_judged(ref: Ref) -> bool:
    """Whether a tensor is of a type that merges are judged in: 16- or 32-bit floating point."""
    return ref.dtype in TORCH and ref.dtype != "F64"
