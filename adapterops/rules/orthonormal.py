"""Orthonormal bases of long thin stacks, in matrix products alone where that is accurate.

Householder QR of a few thousand rows runs at a fraction of the speed of products, and numpy holds
its lock meanwhile, so that threads wait for each other. Cholesky QR in two rounds is as orthonormal
while the columns, at like sizes, are independent enough (Yamamoto et al. 2015, Roundoff error
analysis of the CholeskyQR2 algorithm, theorem 3.3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Matrix = np.ndarray[Any, Any]
_LONG = 4
_INDEPENDENT = 1e4  # ‖R‖‖R⁻¹‖ up to which Q·R is wrong by no more than this many roundings


def orthonormal(columns: Matrix) -> tuple[Matrix, Matrix]:
    """Q (m, k) with QᵀQ = I and upper triangular R (k, c), Q·R = `columns` (m, c), k = min(m, c).

    By Householder QR where columns depend on each other, or nearly. All float64 on the host.
    """
    m, c = columns.shape
    found = _by_products(columns) if c and m >= _LONG * c else None
    if found is None:
        basis, upper = np.linalg.qr(columns)
        return basis, upper
    return found


def _by_products(columns: Matrix) -> tuple[Matrix, Matrix] | None:
    """Cholesky QR, twice, of columns scaled by powers of two; None where it is not accurate."""
    sizes = np.linalg.norm(columns, axis=0)
    if not (np.isfinite(sizes).all() and sizes.all()):
        return None
    scale = np.ldexp(1.0, np.rint(np.log2(sizes)).astype(int))
    basis, upper = columns / scale, np.diag(scale)
    for _ in range(2):
        try:
            root = np.linalg.cholesky(basis.T @ basis).T
        except np.linalg.LinAlgError:
            return None
        inverse = np.linalg.inv(root)
        if np.linalg.norm(root) * np.linalg.norm(inverse) > _INDEPENDENT:
            return None
        basis, upper = basis @ inverse, root @ upper
    return basis, upper
