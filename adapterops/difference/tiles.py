"""What one job of `diff` computes of many adapters: a module's inner products and distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapterops import geometry, linalg
from adapterops.difference.stacks import not_finite, stacked
from adapterops.difference.task import Parts
from adapterops.formats.model import Read, Ref
from adapterops.geometry import Matrix, Stack
from adapterops.kernels import once

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """Members against members: ⟨i, j⟩, ‖i − j‖ and its floor (N, N′); norms of the first (N,)."""

    inner: Matrix
    distance: Matrix
    floor: Matrix
    norms: Matrix


def peak(shape: Shape, columns: int) -> int:
    """Bytes that one of `tiles` needs at most for this many columns of all its members."""
    return 8 * (2 * columns * sum(shape) + 6 * columns * columns)


def tiles(
    shapes: Sequence[Shape], pairs: Sequence[tuple[tuple[Parts, ...], tuple[Parts, ...]]]
) -> list[Tile]:
    """Modules of several adapters against those of several others, each the sum of its parts."""
    read = once(Ref.raw)
    return [_tile(shape, *pair, read) for shape, pair in zip(shapes, pairs, strict=True)]


def _tile(shape: Shape, first: tuple[Parts, ...], second: tuple[Parts, ...], read: Read) -> Tile:
    rows = _stack(shape, first, read)
    columns = rows if second is first else _stack(shape, second, read)
    inner, distance = geometry.gram(rows, columns)
    bounds = rows.betas[:, None] + columns.betas
    return Tile(inner, distance, linalg.rank_floor(*shape, 1.0) * bounds, rows.norms)


def _stack(shape: Shape, members: tuple[Parts, ...], read: Read) -> Stack:
    parts = [part for member in members for part in member]
    columns, rows = stacked(shape, parts, read)
    start = 0
    for part in parts:
        rows[start : start + part.site.rank] *= part.coefficient
        start += part.site.rank
    widths = tuple(sum(part.site.rank for part in member) for member in members)
    stack = Stack(columns.T, rows, widths)
    if not np.isfinite(stack.betas).all():
        raise not_finite(parts)
    return stack
