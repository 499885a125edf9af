"""Full deltas of several adapters, compared element by element, a stretch of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from adapterops import casts, geometry, linalg
from adapterops.certificate import ratio
from adapterops.difference.report import DeltaDifference
from adapterops.difference.rounding import arithmetic_noise, tensor_noise
from adapterops.difference.task import Dense, FullDelta
from adapterops.difference.tiles import Tile
from adapterops.errors import NumericsError
from adapterops.geometry import Matrix

_BLOCK = 1 << 20


def peak(delta: FullDelta) -> int:
    """Bytes that comparing it needs at most: the tensors as stored, and a few stretches of each."""
    stored = sum(ref.nbytes for member in delta.members for _, ref in member.tensors)
    factors = sum(
        8 * part.site.rank * sum(part.site.shape)
        for member in delta.members
        for part in member.factors
    )
    return stored + factors + 8 * 4 * min(_BLOCK, math.prod(delta.shape)) * len(delta.members)


def dense_tile(delta: FullDelta) -> Tile:
    """Every adapter against every other; one that leaves the parameter alone is zero there.

    Raises NumericsError, naming the tensor, for NaN or infinities.
    """
    inner, squares = np.zeros((2, len(delta.members), len(delta.members)))
    for values in _stretches(delta):
        inner += values @ values.T
        for row, one in zip(squares, values, strict=True):
            row += np.sum((one - values) ** 2, axis=1)
    norms = np.sqrt(np.diagonal(inner))
    floor = linalg.EPSILON * (norms[:, None] + norms)
    return Tile(inner, np.sqrt(squares), floor, norms)


def dense_difference(delta: FullDelta) -> DeltaDifference:
    """All figures of one full delta of two adapters."""
    found = dense_tile(delta)
    norm_a, norm_b = map(float, found.norms)
    product = float(found.inner[0, 1])
    factor = product / norm_a / norm_a if norm_a else None
    left = math.fsum(float(np.sum((b - (factor or 0.0) * a) ** 2)) for a, b in _stretches(delta))
    return DeltaDifference(
        shape=delta.shape,
        norms=(norm_a, norm_b),
        distance=float(found.distance[0, 1]),
        relative=ratio(float(found.distance[0, 1]), norm_a),
        cosine=geometry.cosine_of(product, norm_a, norm_b),
        ratio=factor,
        residual=math.sqrt(left),
        floor=float(found.floor[0, 1]),
        zero=(norm_a == 0.0, norm_b == 0.0),
        noise=(_noise(delta.members[0], norm_a), _noise(delta.members[1], norm_b)),
    )


def _stretches(delta: FullDelta) -> Iterator[Matrix]:
    """(N, numbers) of each adapter's share, some rows of the tensor at a time."""
    rows, width = (*delta.shape, 1)[0], math.prod(delta.shape[1:])
    stored = [[(c, ref, ref.raw()) for c, ref in member.tensors] for member in delta.members]
    low = [
        [(part.coefficient, *part.site.factors()) for part in member.factors]
        for member in delta.members
    ]
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = np.zeros((len(delta.members), (stop - start) * width))
        for total, tensors, factors in zip(values, stored, low, strict=True):
            for coefficient, ref, raw in tensors:
                row = len(raw) // rows
                numbers = casts.decode(raw[start * row : stop * row], ref.dtype, total.shape)
                if casts.count_nonfinite(numbers):
                    raise NumericsError(f"{ref.name} holds NaN or infinities", path=ref.source.path)
                total += coefficient * numbers
            for coefficient, B, A in factors:
                total += coefficient * (B[start:stop] @ A).reshape(-1)
        yield values


def _noise(member: Dense, norm: float) -> float:
    """What rounding to storage makes of a share, the coarsest of its tensors deciding."""
    dtypes = [ref.dtype for _, ref in member.tensors]
    dtypes += [part.site.dtype for part in member.factors]
    count = max((math.prod(ref.shape) for _, ref in member.tensors), default=0)
    return max(
        (
            math.hypot(tensor_noise(norm, count, dtype), arithmetic_noise(norm, dtype))
            for dtype in dtypes
        ),
        default=0.0,
    )
