"""Factors of several adapters side by side, as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops.errors import NumericsError
from adapterops.formats.model import Read
from adapterops.geometry import Matrix
from adapterops.plan import Part


def stacked(shape: tuple[int, int], parts: Sequence[Part], read: Read) -> tuple[Matrix, Matrix]:
    """Bᵀ (R, m) and A (R, n) of all parts; LAPACK wants the transposes of both as they lie here."""
    total = sum(part.site.rank for part in parts)
    columns, rows = np.empty((total, shape[0])), np.empty((total, shape[1]))
    start = 0
    for part in parts:
        own = slice(start, start + part.site.rank)
        part.site.factors_into(columns[own].T, rows[own], read)
        start = own.stop
    return columns, rows


def not_finite(parts: Sequence[Part]) -> NumericsError:
    """The error that names the tensor that holds NaN or infinities, if one does."""
    try:
        for part in parts:
            part.site.factors()
    except NumericsError as error:
        return error
    return NumericsError(
        "its factors are too large for float64 products", module=parts[0].site.stem
    )
