"""How much a finished module holds of the adapters that merge methods made it from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adapterops import casts, linalg
from adapterops.plan import Module
from adapterops.storing import Piece


def with_origins(module: Module, piece: Piece, rank: int, dtype: str) -> Piece:
    """With ‖D‖ and ⟨written, D⟩ of the adapters that methods made the module from.

    `rank` and `dtype` are those of its factors; what the methods say of themselves comes along.
    """
    if not module.leaves:
        return piece
    m, n = module.shape
    B = casts.decode(np.frombuffer(piece.B, np.uint8), dtype, (m, rank))
    A = casts.decode(np.frombuffer(piece.A, np.uint8), dtype, (rank, n)) * module.scale
    sizes, products = [], []
    said = tuple(part.site.made.said for part in module.parts if part.site.made)
    for _, site in module.leaves:
        left, right = site.factors()
        right = right * site.scale
        sizes.append(linalg.norm(left, right))
        products.append(float(((B.T @ left) * (A @ right.T)).sum()))
    return replace(
        piece,
        figures=replace(
            piece.figures, input_norms=tuple(sizes), inner=tuple(products), methods=said
        ),
    )
