"""The change D = Σ cᵢBᵢAᵢ of a stored tensor, block by block, with bounds on what arithmetic loses.

An inner product of R terms, added in any order, is off by at most R·u·Σ|l||r|, u the unit roundoff,
with nothing of second order (Jeannerod & Rump 2013, "Improved error bounds for inner products in
floating-point arithmetic", SIAM J. Matrix Anal. Appl. 34(2); Higham's γ_R exceeds (R + 4)·u beyond
R = 5,800 in float32). Two more are for factors rounded before, two to spare; Σ|l||r| ≤ ‖l‖‖r‖ by
Cauchy-Schwarz. Columns of the left factor and rows of the right one are first scaled by powers of
two so that their largest elements agree, which changes nothing, makes the bound tight in any gauge
and squares finite.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from adapterops.baking.bands import Band, meeting
from adapterops.changes.targets import Rows, Target

Array = np.ndarray[Any, Any]

_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53  # unit roundoffs
_UP = 1 + 2.0**-20  # what is rounded to float32 afterwards stays an upper bound
_LEAST = 2.0**-149
_GATHERED = 1 << 18  # numbers gathered at once for single elements


@dataclass(frozen=True, slots=True)
class _Factors:
    """D = left · diag(c) · right of a band in float64, and what float32 arithmetic needs.

    left (rows, R), right (R, n); `single` are both as torch float32, balanced, c folded into the
    right one; `u` (rows,) and `v` (n,) bound the error of their product. `norms` are those of
    single rows and columns, `used` where they are not zero; `fits`, if float32 holds them.
    """

    left: Array
    c: Array
    right: Array
    single: tuple[torch.Tensor, torch.Tensor]
    u: torch.Tensor
    v: torch.Tensor
    norms: tuple[Array, Array]
    used: tuple[Array, Array]
    fits: bool


class Delta:
    """The change of one band of a target; its factors are read once, by whichever thread is first.

    `sign` −1 makes it −D, what unbaking adds. Rows are counted from the start of the matrix.
    """

    def __init__(self, target: Target, band: Band, sign: float = 1.0, device: str = "cpu") -> None:
        self.target = target
        self.band = band
        self.sign = sign
        self.device = device
        self._lock = threading.RLock()
        self._left = band.stop - band.start

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the band, columns of the matrix."""
        return self.band.stop - self.band.start, self.target.matrix[1]

    @property
    def rank(self) -> int:
        """R, the number of columns of all low-rank terms."""
        return sum(term.site.rank for term in self.band.terms)

    @property
    def is_exact(self) -> bool:
        """Whether D is a product of factors, whose value is defined to the last bit."""
        return not self.band.dense

    @property
    def factors(self) -> _Factors:
        """The band's factors."""
        with self._lock:
            return self._factors

    @cached_property
    def _factors(self) -> _Factors:
        return _prepared(*self._stacked(), self.device)

    @cached_property
    def _opened(self) -> list[tuple[float, Rows]]:
        return [(self.sign * term.coefficient, term.change()) for term in self.band.dense]

    def _stacked(self) -> tuple[Array, Array, Array]:
        """left, coefficients and right of all terms side by side, zero where one does not reach."""
        rows, columns = self.shape
        total, at = self.rank, 0
        left, right = np.zeros((rows, total)), np.zeros((total, columns))
        c = np.empty(total)
        for term in self.band.terms:
            B, A = term.factors()
            one, other = (A.T, B.T) if term.turned else (B, A)
            del A, B  # each is let go of as soon as it is copied
            rank = one.shape[1]
            taken, placed = meeting(term.rows, self.target.matrix[0], self.band)
            left[placed, at : at + rank] = one[taken]
            del one
            right[at : at + rank, term.columns] = other
            del other
            c[at : at + rank] = term.coefficient
            at += rank
        return left, c * self.sign, right

    def single(self, start: int, stop: int, step: int = 1) -> torch.Tensor:
        """Every `step`th row of D in float32, off by at most u·v of `bounds`.

        Dense changes are rounded once.
        """
        if self.band.dense or not self.factors.fits:
            return self.double(start, stop)[::step].float()
        left, right = self.factors.single
        return torch.mm(left[self._local(start, stop)][::step], right)

    def onto(self, W: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """W + `single` of some rows in float32, W (rows, n) in its own type."""
        total = W.to(torch.float32, copy=True)
        if self.band.dense or not self.factors.fits:
            return total.add_(self.single(start, stop).to(W.device))
        left, right = self.factors.single
        return total.addmm_(left[self._local(start, stop)], right)

    def bounds(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(u, v) with |single − D| ≤ u_a·v_b for row a and column b; float32."""
        return self.factors.u[self._local(start, stop)], self.factors.v

    def double(self, start: int, stop: int) -> torch.Tensor:
        """Rows of D in float64, off by at most R + 4 units roundoff of Σ|l||c·r|; on the host."""
        here = self._local(start, stop)
        change = np.zeros((stop - start, self.shape[1]))
        if self.band.terms:
            parts = self.factors
            change += (parts.left[here] * parts.c) @ parts.right
        with self._lock:
            opened = self._opened
        for coefficient, rows in opened:
            change += coefficient * rows.rows(start, stop)
        return torch.from_numpy(change)

    def double_bounds(self, start: int, stop: int) -> tuple[Array, Array]:
        """(u, v) as of `bounds` for `double`, where no change is dense; float64."""
        parts = self.factors
        unit = (parts.left.shape[1] + 4) * _DOUBLE * _UP
        return unit * parts.norms[0][self._local(start, stop)], parts.norms[1]

    @cached_property
    def noise(self) -> float:
        """The square of what float32 may get wrong of D: one that is no larger counts as none."""
        if self.band.dense or not self.factors.fits:
            return 0.0
        squares = (float((bound.double() ** 2).sum()) for bound in (self.factors.u, self.factors.v))
        return math.prod(squares)

    def elements(self, start: int, stop: int) -> int:
        """How many elements of the rows have factors that are not zero, all if some are dense."""
        rows, columns = stop - start, self.shape[1]
        if self.band.terms and not self.band.dense:
            used = self.factors.used
            rows, columns = int(used[0][self._local(start, stop)].sum()), int(used[1].sum())
        return rows * columns

    def at(self, rows: Array, columns: Array) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Single elements by their indices, a chunk at a time: (chunk, left, c, right).

        left and right are (elements, R) in float64: D there is Σₖ leftₖ·cₖ·rightₖ.
        """
        parts = self.factors
        size = max(1, _GATHERED // max(1, parts.left.shape[1]))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            left = parts.left[rows[chunk] - self.band.start]
            yield chunk, left, parts.c, parts.right.T[columns[chunk]]

    def basis(self) -> torch.Tensor | None:
        """Orthonormal columns spanning what the adapters read, float32: their A's.

        (n, k), or (rows of the band, k) if the target's inputs run along rows. None where they span
        all of it, or a change is dense.
        """
        with self._lock:
            return self._basis

    @cached_property
    def _basis(self) -> torch.Tensor | None:
        if self.band.dense:
            return None
        parts = self.factors
        by_columns = self.target.inputs == "columns"
        mine, others = (parts.right.T, parts.left) if by_columns else (parts.left, parts.right.T)
        scale = np.empty(len(parts.c))
        for here in _parts(len(scale), len(mine)):
            scale[here] = np.linalg.norm(mine[:, here], axis=0)
        used = (scale > 0) & others.any(axis=0) & (parts.c != 0)
        length, count = len(mine), int(used.sum())
        if count >= length:
            return None
        vectors = mine[:, used]
        vectors /= scale[used]
        Q, R = np.linalg.qr(vectors)
        del vectors
        turned, sizes, _ = np.linalg.svd(R)
        kept = sizes > length * _DOUBLE * sizes.max(initial=0.0)
        basis = (Q @ turned[:, kept]).astype(np.float32)
        return torch.from_numpy(basis).to(self.device)

    def projected(self, start: int, stop: int) -> tuple[torch.Tensor, float] | None:
        """D·Q of some rows, Q the `basis`, (rows, k) in float32, and the sum of D's elements there.

        None without a basis, where inputs run along rows, or where float32 does not hold factors.
        """
        with self._lock:
            right = self._right
        if right is None:
            return None
        product = self.factors.single[0][self._local(start, stop)] @ right
        return product[:, :-1], float(product[:, -1].double().sum())

    @cached_property
    def _right(self) -> torch.Tensor | None:
        """What takes the float32 left factor to D·Q and, in its last column, to D's row sums."""
        basis = self.basis()
        if basis is None or self.target.inputs != "columns" or not self.factors.fits:
            return None
        right = self.factors.single[1].double()
        narrow = torch.cat([right @ basis.double(), right.sum(1, keepdim=True)], dim=1)
        return narrow.float()

    @property
    def peak(self) -> int:
        """Bytes that the factors take at most: float64 and float32 pairs, and making the basis."""
        rows, columns = self.shape
        length = columns if self.target.inputs == "columns" else rows
        span = 0 if self.band.dense else min(self.rank, length)
        reading = 32 * self.rank * (rows + columns)  # as they come, and side by side
        basis = 8 * self.rank * (3 * length + 4 * span) if self.rank < length else 0
        made = max((t.site.made.peak for t in self.band.terms if t.site.made), default=0)
        made += sum(term.held for term in self.band.dense)
        return made + max(reading, 12 * self.rank * (rows + columns) + basis)

    def done(self, rows: int) -> None:
        """So many rows are not asked for again; with the last of the band its factors are let go.

        `noise` is kept. What asks for rows nevertheless reads them again.
        """
        with self._lock:
            self._left -= rows
            if self._left <= 0 and self.band.is_changed and self.noise >= 0:
                for name in ("_factors", "_opened", "_basis", "_right"):
                    self.__dict__.pop(name, None)

    def _local(self, start: int, stop: int) -> slice:
        return slice(start - self.band.start, stop - self.band.start)


def _parts(count: int, length: int) -> Iterator[slice]:
    """Slices of `count` vectors of `length` numbers, few enough for temporaries of any kind."""
    step = max(1, _GATHERED // max(1, length))
    return (slice(at, at + step) for at in range(0, count, step))


def _prepared(left: Array, c: Array, right: Array, device: str) -> _Factors:
    """The factors in float64, which it scales in place, and what is made of them in float32."""
    largest_l = np.maximum(left.max(axis=0, initial=0.0), -left.min(axis=0, initial=0.0))
    largest_r = np.maximum(right.max(axis=1, initial=0.0), -right.min(axis=1, initial=0.0))
    shift = np.zeros(len(c), np.int64)
    both = (largest_l > 0) & (largest_r > 0) & (c != 0)
    of_c, of_l, of_r = np.log2([np.abs(c)[both], largest_l[both], largest_r[both]])
    shift[both] = np.rint((of_c + of_r - of_l) / 2)
    np.ldexp(left, shift, out=left)
    np.ldexp(right, -shift[:, None], out=right)
    narrow = np.empty(left.shape, np.float32), np.empty(right.shape, np.float32)
    u, v = np.empty(len(left)), np.empty(right.shape[1])
    with np.errstate(over="ignore", under="ignore"):
        for here in _parts(len(left), len(c)):
            narrow[0][here], u[here] = left[here], np.linalg.norm(left[here], axis=1)
        for here in _parts(right.shape[1], len(c)):
            other = c[:, None] * right[:, here]
            narrow[1][:, here], v[here] = other, np.linalg.norm(other, axis=0)
    terms = left.shape[1]
    # What underflows in factors or products adds at most half of this, spread over u·v below. It is
    # never 0: no float32 sum settles the sign of a zero.
    least = _LEAST * (max(1, terms) + np.sqrt(terms) * (u.max(initial=0.0) + v.max(initial=0.0)))
    root = np.sqrt(least)
    unit = (terms + 4) * _SINGLE
    bound_u, bound_v = unit * u * _UP + root, v * _UP + root
    fits = all(np.isfinite(part).all() for part in narrow)
    if not fits:  # then nothing is certain in float32
        bound_u = np.full_like(bound_u, np.inf)
    return _Factors(
        left=left,
        c=c,
        right=right,
        single=(torch.from_numpy(narrow[0]).to(device), torch.from_numpy(narrow[1]).to(device)),
        u=torch.from_numpy(bound_u.astype(np.float32)).to(device),
        v=torch.from_numpy(bound_v.astype(np.float32)).to(device),
        norms=(u, v),
        used=(u > 0, v > 0),
        fits=fits,
    )
