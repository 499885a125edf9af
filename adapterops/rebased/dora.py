"""ΔW of an adapter that is relative to its base, as rows: DoRA, and any changed base that was kept.

The factors of a module make D (their scale folded in), W is the base's weight, R the weight that
training started from: W itself, unless an initialisation changed it.

- residual: W′ = R + D.
- dora: W′ = m ⊙ (R + D) / ‖R + D‖, a magnitude m and a norm for each unit (Liu et al. 2024, arXiv
  2402.09353, eq. 5). Units are outputs: rows of W (out, in), over channels and kernel of a
  convolution. LyCORIS before 3.2 (later on request) and MLX's embeddings take columns: input
  channels, tokens.

ΔW = W′ − W is computed as (g − 1)·W + g·(R − W + D) with g = m / ‖R + D‖: nothing cancels but what
the adapter itself makes cancel. Trainers compute it in the type of their model, and PEFT's norms of
a bfloat16 model are right to 2⁻⁹ only. LyCORIS adds that type's epsilon to each norm, which float32
does not show; it is left out.

Rows are those of the weight as it is stored: of Wᵀ where the base keeps it as (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref, Site
from adapterops.rebased.magnitude import axis_of

Block = np.ndarray[Any, Any]

_BLOCK = 1 << 20  # numbers of a block in passes over a whole weight


class Residual:
    """R − W + D of one site, whose parts `residual` and `base` are R and W."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.base = site.parts["base"]
        self.start = site.parts.get("residual")
        self.transposed = self.base.transposed
        self.shape = site.shape[::-1] if self.transposed else site.shape

    def rows(self, start: int, stop: int) -> Block:
        """Rows of R − W + D in float64."""
        left, right = self.factors
        change: Block = left[start:stop] @ right
        if self.start is not None:
            with np.errstate(invalid="ignore"):  # infinities are found, and named, later
                change += stored(self.start, start, stop) - stored(self.base, start, stop)
        return change

    def single(self, start: int, stop: int) -> Block:
        """The same rows rounded to float32."""
        return self.rows(start, stop).astype(np.float32)

    def noise(self, start: int, stop: int) -> float:
        """0: what training started from is taken as it is."""
        return 0.0

    def beta(self, norm: float) -> float:
        """‖R‖ + ‖W‖ and the norms of D's single terms."""
        refs = [ref for ref in (self.start, self.base) if ref is not None]
        squares = (np.sum(stored(ref, *b) ** 2) for ref in refs for b in self.blocks())
        return self.terms + math.sqrt(len(refs) * math.fsum(squares))

    def check(self) -> None:
        """Raise NumericsError, naming the tensor, where one holds NaN or infinities."""
        refs = [ref for ref in (self.start, self.base) if ref is not None]
        for ref in refs:
            wrong = (casts.count_nonfinite(stored(ref, *block)) for block in self.blocks())
            self.refuse(ref, sum(wrong))
        assert self.factors  # looked at as they are read

    @property
    def terms(self) -> float:
        """Σ ‖b‖‖a‖ over the columns of D."""
        left, right = self.factors
        norms = np.sqrt((left * left).sum(axis=0)), np.sqrt((right * right).sum(axis=1))
        return float(norms[0] @ norms[1])

    @cached_property
    def factors(self) -> tuple[Block, Block]:
        """D as a product of two, its rows in the order of the stored weight."""
        assert self.site.inner is not None
        B, A = self.site.inner.factors()
        scaled = self.site.inner.scale * A
        return (scaled.T, B.T) if self.transposed else (B, scaled)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most a million numbers."""
        rows, columns = self.shape
        step = max(1, _BLOCK // max(1, columns))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def refuse(self, ref: Ref, wrong: int) -> None:
        """Raise NumericsError if a tensor holds wrong values."""
        if wrong:
            raise NumericsError(
                f"{wrong} of {math.prod(ref.shape)} values of {ref.name} are NaN or infinite",
                path=ref.source.path,
                module=self.site.stem,
                hint="the file is damaged or the training diverged; --modules leaves it out",
            )


class Dora:
    """W′ − W of one DoRA site: its parts `magnitude` and `base`, and `residual` if R is not W."""

    def __init__(self, site: Site) -> None:
        self._moved = Residual(site)
        self._site = site
        self._magnitude = site.parts["magnitude"]
        self.transposed = self._moved.transposed
        self.shape = self._moved.shape
        self._by_row = (axis_of(site) == 0) != self.transposed

    def rows(self, start: int, stop: int) -> Block:
        """Rows of W′ − W in float64."""
        change = self._moved.rows(start, stop)
        change *= self._along(self._gain, start, stop)
        change += self._along(self._less, start, stop) * stored(self._moved.base, start, stop)
        return change

    def single(self, start: int, stop: int) -> Block:
        """The same rows rounded to float32."""
        return self.rows(start, stop).astype(np.float32)

    def noise(self, start: int, stop: int) -> float:
        """0: W′ is the result of a formula, rounded to nothing."""
        return 0.0

    def beta(self, norm: float) -> float:
        """‖W‖ and, with the largest gain, ‖W‖, ‖R + D‖ and the norms of D's single terms."""
        whole, base = (math.sqrt(float(np.sum(part))) for part in self._squares)
        return base + float(self._gain.max(initial=0.0)) * (base + whole + self._moved.terms)

    def check(self) -> None:
        """Raise NumericsError for NaN or infinities in a tensor, and for units of no direction."""
        self._moved.check()
        assert self._gain is not None  # looked at as they are computed

    def _along(self, units: Block, start: int, stop: int) -> Block:
        """A number for each unit, to multiply rows [start, stop) with."""
        if self._by_row:
            return units[start:stop, None]
        return np.repeat(units, self.shape[1] // len(units))  # a channel's columns: its kernel

    @cached_property
    def _values(self) -> Block:
        """m of every unit."""
        values: Block = self._magnitude.read().ravel()
        self._moved.refuse(self._magnitude, casts.count_nonfinite(values))
        return values

    @cached_property
    def _squares(self) -> tuple[Block, Block]:
        """‖R + D‖² and ‖W‖² of every unit."""
        sums: list[tuple[Block, Block]] = []
        for start, stop in self._moved.blocks():
            W = stored(self._moved.base, start, stop)
            whole = W + self._moved.rows(start, stop)
            pair = [(part * part).sum(axis=1 if self._by_row else 0) for part in (whole, W)]
            sums.append((pair[0], pair[1]))
        join = np.concatenate if self._by_row else sum
        units = math.prod(self._magnitude.shape)
        each = [join(part).reshape(units, -1).sum(axis=1) for part in zip(*sums, strict=True)]
        if not np.isfinite(each).all():
            self._moved.check()
        return each[0], each[1]

    @cached_property
    def _gain(self) -> Block:
        """g = m / ‖R + D‖ of every unit; 0 where there is nothing and should be nothing."""
        norms, magnitude = np.sqrt(self._squares[0]), self._values
        lost = (norms == 0) & (magnitude != 0)
        if lost.any():
            unit = int(np.argmax(lost))
            raise NumericsError(
                f"unit {unit} of the weight is zero: it has no direction that its magnitude "
                f"{magnitude[unit]:g} could apply to",
                path=self._moved.base.source.path,
                module=self._site.stem,
                hint="is it the base that the adapter was trained on? --modules leaves it out",
            )
        gain: Block = np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms != 0)
        return gain

    @cached_property
    def _less(self) -> Block:
        """g − 1, from the difference of two close numbers."""
        norms = np.sqrt(self._squares[0])
        none = np.full_like(norms, -1.0)
        less: Block = np.divide(self._values - norms, norms, out=none, where=norms != 0)
        return less


def stored(ref: Ref, start: int, stop: int) -> Block:
    """Rows [start, stop) of a matrix as the file has it, in float64, exactly."""
    rows, columns = ref.stored_shape
    each = ref.nbytes // rows
    part = replace(
        ref,
        shape=(stop - start, columns),
        offset=ref.offset + start * each,
        nbytes=(stop - start) * each,
        transposed=False,
    )
    values: Block = part.read()
    return values
