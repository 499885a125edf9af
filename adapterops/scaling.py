"""Where the scale of an output stands: folded into the factors, or beside them as the input had it.

A loader multiplies B·A by alpha / r, or by alpha / √r where rsLoRA is on (Kalajdzievski 2023, arXiv
2312.03732, eq. 4). Folded means alpha = r: any loader gets that right, whatever it reads.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from adapterops.errors import UsageError

Scaling = Literal["folded", "keep", "rslora"]

# Dialects with a place for a scale; the others are read with scale 1.
_PLACES = ("peft", "kohya", "mlx")


def check_scaling(scaling: str, dialect: str) -> None:
    """Raise UsageError for a scaling that is unknown or that the dialect cannot say."""
    if scaling not in get_args(Scaling):
        raise UsageError(f"--scaling {scaling!r}: expected one of {', '.join(get_args(Scaling))}")
    if scaling == "rslora" and dialect != "peft":
        raise UsageError(
            f"--scaling rslora: only PEFT's config says that alpha is divided by √r; {dialect} "
            "does not",
            hint="--scaling folded or keep",
        )


def stored(scaling: Scaling, dialect: str, scale: float, rank: int) -> tuple[float, float]:
    """(alpha as it is stored, what a loader makes of it) for a module of this scale and rank.

    `scale` is the input's. kohya keeps alpha as a float32; MLX the scale itself, returned as alpha.
    """
    if scaling == "rslora":
        root = math.sqrt(max(rank, 1))
        alpha = scale * root
        return alpha, alpha / root
    if scaling == "folded" or dialect not in _PLACES or rank == 0:
        return float(rank), 1.0
    if dialect == "mlx":
        return scale, scale
    alpha = scale * rank
    if dialect == "kohya":
        alpha = float(np.float32(alpha))
    return alpha, alpha / rank
