"""What an initialisation of PEFT took out of the base: the factors that training started from.

PEFT stores W − s·B₀A₀ as the base and trains from (B₀, A₀); the adapter saved is relative to that
base, and changes the original W by s·(BA − B₀A₀). Only the product B₀A₀ counts, so signs and the
split of singular values between the two are free. (peft 0.21.2, `tuners/lora/layer.py`.)

- pissa: the r largest singular triplets of W, divided by s (Meng et al. 2024, arXiv 2404.02948).
- olora: the first r columns of Q and rows of R of W = QR (Büyükakyüz 2024, arXiv 2406.01775). Q_r
  follows from the first r columns of W alone, and R_r = Q_rᵀW.

PEFT computes them anew in float32 whenever such an adapter is loaded. Here it is float64, and
where float32 cannot tell which subspace is meant, NumericsError says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterops import linalg
from adapterops.errors import NumericsError

Matrix = np.ndarray[Any, Any]

_SMALL = 512  # the full decomposition of a matrix with so short a side takes less than a second
_FEW = 8  # Lanczos pays up to this share of the singular triplets
_SINGLE = 2.0**-22  # error of a float32 decomposition, relative to the largest singular value
_ACCEPTED = 2.0**-8  # what that error may make of the part taken out, relative to the same


def pissa(W: Matrix, rank: int, scale: float) -> tuple[Matrix, Matrix]:
    """B₀ (m, rank) and A₀ (rank, n) of W (m, n), float64: the best approximation of W, over s."""
    right = _leading(W, rank)
    return (W @ right.T) / scale, right


def olora(W: Matrix, rank: int, scale: float) -> tuple[Matrix, Matrix]:
    """B₀ (m, rank) and A₀ (rank, n) of W (m, n), float64; they do not depend on the scale."""
    Q, R = np.linalg.qr(W[:, :rank])
    if rank and np.abs(np.diagonal(R)).min() < _SINGLE / _ACCEPTED * np.linalg.norm(R, 2):
        raise _undetermined("OLoRA", f"its first {rank} columns depend on each other")
    return Q, Q.T @ W


def _leading(W: Matrix, rank: int) -> Matrix:
    """The right singular vectors (rank, n) of the largest singular values."""
    side = min(W.shape)
    if side <= _SMALL or _FEW * (rank + 1) > side:
        _, values, Vh = linalg.svd(W)
    else:
        values, Vh = _lanczos(W, rank + 1)
    if 0 < rank < side and values[0] > 0:
        last, gap = values[rank - 1], values[rank - 1] - values[rank]
        angle = _SINGLE * values[0] / max(gap, _SINGLE * values[0])  # Davis & Kahan 1970
        if last * angle > _ACCEPTED * values[0]:
            text = f"singular values {rank} and {rank + 1} are too close for single precision"
            raise _undetermined("PiSSA", text)
    leading: Matrix = Vh[:rank]
    return leading


def _lanczos(W: Matrix, count: int) -> tuple[Matrix, Matrix]:
    """The `count` largest singular values, descending, and their right vectors, by ARPACK."""
    from scipy.sparse.linalg import ArpackError, svds  # rarely needed, slow to import

    words = np.random.Philox(key=0).random_raw((min(W.shape) + 63) // 64)
    start = 2.0 * np.unpackbits(words.view(np.uint8), count=min(W.shape)) - 1.0
    try:
        _, values, Vh = svds(W, k=count, v0=start)
    except ArpackError:
        _, values, Vh = linalg.svd(W)
        return values[:count], Vh[:count]
    order = np.argsort(values)[::-1]
    return values[order], Vh[order]


def _undetermined(name: str, why: str) -> NumericsError:
    return NumericsError(
        f"what {name} took out of this weight depends on the machine: {why}",
        hint="give the base as the initialisation left it (--residual), or leave the module out "
        "with --modules",
    )
