"""Where ΔW of a module lies in stored tensors, seen as matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterops.basemodel.parts import Part
from adapterops.changes.targets import as_matrix
from adapterops.formats.model import Ref, Site


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one stored tensor, and the part of a module's ΔW that it changes by.

    `name` is the tensor's in the result, `ref` what it starts as, `matrix` its shape as a matrix.
    The others are as in `Term`. `experts` is how many share the tensor or its name, None where
    experts have nothing to do with it. A `misfit` has the right name, and a shape that no count of
    rows and columns tells from the right one: another kernel, an embedding the other way round.
    """

    name: str
    ref: Ref
    matrix: tuple[int, int]
    rows: slice
    columns: slice
    turned: bool = False
    outputs: slice | None = None
    inputs: slice | None = None
    experts: int | None = None
    misfit: bool = False

    def fits(self, site: Site) -> bool:
        """Whether the parts of both have one shape."""
        out, columns = site.shape
        own = (
            _count(self.outputs or slice(0, out), out),
            _count(self.inputs or slice(0, columns), columns),
        )
        there = _count(self.rows, self.matrix[0]), _count(self.columns, self.matrix[1])
        count = site.expert[1] if site.expert else 1
        counted = self.experts in (None, count) or not (site.expert or site.owned)
        return not self.misfit and counted and own == (there[::-1] if self.turned else there)


Reading = tuple[Piece, ...]  # all of one module's ΔW


def fit(reading: Reading, site: Site) -> bool:
    """Whether the pieces hold all of ΔW, and each its part."""
    covered = sum(_area(piece, site) for piece in reading)
    return covered == math.prod(site.shape) and all(piece.fits(site) for piece in reading)


def piece(part: Part, ref: Ref, name: str = "") -> Piece:
    """The piece that a part of a checkpoint's tensor is; `name` if it has another in the result."""
    rows, columns = as_matrix(ref.shape)
    outputs = part.rows or slice(0, columns if part.turned else rows)
    return Piece(
        name or part.tensor,
        ref,
        (rows, columns),
        slice(0, rows, 1) if part.turned else _stepped(outputs),
        _stepped(outputs) if part.turned else slice(0, columns, 1),
        part.turned,
        part.of,
    )


def region(
    name: str,
    ref: Ref,
    index: int,
    turned: bool,
    stored: slice | None = None,
    part: slice | None = None,
    *,
    in_out: bool = False,
    experts: int,
) -> Piece:
    """One expert's part of a stack (E, rows, columns), or of a matrix of its own.

    `stored` are those of the expert's outputs that the piece is, which are columns if `in_out`.
    `part` are the outputs of the module's weight that it is; of ΔWᵀ if `turned`, then, they are
    inputs, unless the stack is the one that is turned.
    """
    rows, columns = ref.shape[-2:]
    first = index * rows if len(ref.shape) == 3 else 0
    chosen = stored or slice(0, columns if in_out else rows, 1)
    down = slice(0, rows, 1) if in_out else chosen
    by_input = turned and not in_out
    return Piece(
        name,
        ref,
        (math.prod(ref.shape[:-1]), columns),
        slice(first + down.start, first + down.stop, down.step or 1),
        _stepped(chosen) if in_out else slice(0, columns, 1),
        turned,
        None if by_input else part,
        part if by_input else None,
        experts,
    )


def _stepped(index: slice) -> slice:
    return slice(index.start, index.stop, index.step or 1)


def _count(index: slice, size: int) -> int:
    """How many indices a slice has; more than there are do not count as there."""
    return len(range(size)[index]) if index.stop <= size else -1


def _area(part: Piece, site: Site) -> int:
    return _count(part.rows, part.matrix[0]) * _count(part.columns, part.matrix[1])
