"""Squared singular values of many small cores at once, and the ranks that an error allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ERRORS = (0.01, 0.05)


def squares_of(gram_b: Array, gram_a: Array) -> Array:
    """σ² of BA (L, r), descending, from BᵀB and AAᵀ (L, r, r).

    They are the eigenvalues of LᵀAAᵀL with LLᵀ = BᵀB, wrong by rounding of the largest: enough
    for errors from 10⁻⁴ of the norm on. Columns are scaled to equal norms by powers of two first.
    """
    norm_b = np.sqrt(np.diagonal(gram_b, axis1=1, axis2=2))
    norm_a = np.sqrt(np.diagonal(gram_a, axis1=1, axis2=2))
    live = (norm_b > 0) & (norm_a > 0)
    apart = np.log2(np.where(live, norm_a, 1.0)) - np.log2(np.where(live, norm_b, 1.0))
    scale = np.ldexp(1.0, np.rint(apart / 2).astype(int))
    gram_b = gram_b * scale[:, :, None] * scale[:, None, :]
    gram_a = gram_a / scale[:, :, None] / scale[:, None, :]
    try:
        root = np.linalg.cholesky(gram_b)
    except np.linalg.LinAlgError:  # of a lower rank
        values, vectors = np.linalg.eigh(gram_b)
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    squares: Array = np.linalg.eigvalsh(root.mT @ gram_a @ root)[:, ::-1]
    return np.maximum(squares, 0.0)


def needed_ranks(squares: Sequence[Array]) -> tuple[int, int]:
    """The smallest uniform ranks that keep the error of the whole adapter within 1 % and 5 %.

    `squares` are σ² of the modules with their scale, (L, r) for each rank r.
    """
    energy = np.zeros(max(array.shape[1] for array in squares) + 1)
    for array in squares:
        energy[: array.shape[1]] += array.sum(0)
    tail = np.cumsum(energy[::-1])[::-1]  # tail[k]: what is lost at rank k
    one, five = (max(1, int(np.argmax(tail <= error * error * tail[0]))) for error in ERRORS)
    return one, five
