"""The numbers of a tensor that is given values, block by block, before they are rounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.changes.targets import Values, as_matrix
from adapterops.extras import Extra
from adapterops.files.source import read_bytes
from adapterops.formats.model import Ref

Array = np.ndarray[Any, Any]


def given_rows(values: Values, start: int, stop: int) -> Array:
    """Rows [start, stop) of the tensor seen as a matrix (`as_matrix`), in float64.

    Exactly what adapters and base hold; of several adapters the weighted mean, rounded to float64.
    Raises UnsupportedError for what is no float of 8 to 64 bits.
    """
    if values.rows is None:
        return _mean(values.extra, start, stop)
    assert values.ref is not None
    wide = _read(values.ref, start, stop)
    for at, row in enumerate(values.rows):
        if start <= row < stop:
            wide[row - start] = _mean(values.extra, at, at + 1)[0]
    return wide


def _mean(extra: Extra, start: int, stop: int) -> Array:
    """Rows of what adapters hold: Σwx / Σw."""
    total = math.fsum(extra.weights)
    parts = [
        (weight / total) * _read(ref, start, stop)
        for weight, ref in zip(extra.weights, extra.refs, strict=True)
    ]
    return np.asarray(sum(parts[1:], parts[0]))


def _read(ref: Ref, start: int, stop: int) -> Array:
    rows, columns = as_matrix(ref.shape)
    each = ref.nbytes // max(1, rows)
    data = read_bytes(ref.source, ref.offset + start * each, (stop - start) * each)
    raw = np.frombuffer(data, np.uint8)
    return np.asarray(casts.decode(raw, ref.dtype, (stop - start, columns)))
