"""RegMean: the ΔW whose outputs are, on every adapter's own inputs, closest to that adapter's.

It minimises Σ|wᵢ|·E‖ΔW·x − sign(wᵢ)Dᵢx‖² over inputs x of adapter i, module by module:

    ΔW = (Σ wᵢDᵢHᵢ)(Σ|wᵢ|Hᵢ)⁻¹,   Hᵢ = αGᵢ + (1 − α)·diag Gᵢ + λI,   Gᵢ = E[xxᵀ].

The column space stays that of the B's, so the result is exact in factors: Bᵢ with wᵢAᵢHᵢ(Σ|w|H)⁻¹.
The base's weights drop out of the formula, for they are the same in every model.

Samples keep it thin. With Z (K, n) all samples, each times √(|wᵢ|α/kᵢ), and d the diagonal of the
rest, S = Σ|w|H = diag d + ZᵀZ, and with H̄ = diag(1/d)

    S⁻¹ = H̄ − H̄Zᵀ(I + ZH̄Zᵀ)⁻¹ZH̄,   ZS⁻¹ = (I + ZH̄Zᵀ)⁻¹ZH̄   (Woodbury 1950),

so that a K x K matrix is solved with, of eigenvalues ≥ 1, and no difference of large numbers is
taken. From K ≥ n, or with second moments, S itself is factored by Cholesky. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops import linalg
from adapterops.errors import FormatError, IncompatibleError, NumericsError
from adapterops.rules.registry import Array, Moments, Pair, Parameter, method

_ROWS = 1 << 20  # numbers of a matrix that are looked at in one go
_SYMMETRIC = 1e-4  # of the trace, as in `metric`


@method(
    "regmean",
    "factors",
    summary="Closest to each adapter's own outputs on its own inputs, by least squares.",
    reference="Jin et al. 2023, Dataless knowledge fusion by merging weights, arXiv 2212.09849",
    parameters=[
        Parameter("reduce", "number", 0.9, "factor of the moments beside the diagonal", 0.0, 1.0),
        Parameter(
            "ridge",
            "number",
            1e-6,
            "added to the diagonal, as a share of its mean",
            0.0,
            1.0,
            open_low=True,
        ),
    ],
    laws=["identity", "copies", "homogeneous"],
    needs=["activations"],
)
def regmean(
    pairs: Sequence[Pair],
    w: Array,
    inputs: Sequence[Moments],
    *,
    reduce: float,
    ridge: float,
) -> tuple[Array, Array]:
    """B (m, R) and A (R, n): the Bᵢ side by side, and wᵢ·scaleᵢ·AᵢHᵢ(Σ|w|H)⁻¹.

    A mean: only ratios of weights matter. Second moments are means over inputs, so adapters count
    alike however many inputs they have (the paper's are sums). α is `reduce`, the paper's usual
    0.9; λ is `ridge` times the mean of the diagonals: directions that no input takes get the
    weighted mean of the adapters, for there H is λI. Adapters of zeros or weight 0 are as if
    absent. Every matrix of `inputs` is read twice, and none is kept.

    Raises IncompatibleError for inputs of different sizes, NumericsError for ones that are not
    finite and where Σ|w|H is not positive definite, FormatError for moments that are none.
    """
    own = [
        i
        for i, pair in enumerate(pairs)
        if w[i] != 0 and pair.scale != 0 and linalg.norm(pair.B, pair.A) > 0
    ]
    rows, columns = pairs[0].B.shape[0], pairs[0].A.shape[1]
    if not own:
        return np.zeros((rows, 0)), np.zeros((0, columns))
    pairs, inputs = [pairs[i] for i in own], [inputs[i] for i in own]
    signs, sizes = np.sign(w[own]), np.abs(w[own])
    sizes = sizes / sizes.sum()
    diagonals = [_diagonal(each, columns, i) for i, each in zip(own, inputs, strict=True)]
    mean = float(np.mean(sizes @ np.stack(diagonals)))
    if mean == 0.0:  # inputs of zeros: nothing is known of any direction
        diagonals, mean = [np.ones(columns) for _ in diagonals], 1.0
    # What lies on the diagonal of each H whatever its samples, (n,).
    plain = [(1 - reduce) * each + ridge * mean for each in diagonals]
    samples = sum(each.count for each in inputs if each.kind == "samples")
    if all(each.kind == "samples" for each in inputs) and samples < columns:
        parts = _thin(pairs, inputs, sizes, plain, reduce)
    else:
        parts = _dense(pairs, inputs, sizes, plain, reduce)
    factors = [sign * pair.scale for sign, pair in zip(signs, pairs, strict=True)]
    B = np.concatenate([pair.B for pair in pairs], axis=1)
    A = np.concatenate([factor * part for factor, part in zip(factors, parts, strict=True)])
    return B, A


def _thin(
    pairs: Sequence[Pair],
    inputs: Sequence[Moments],
    sizes: Array,
    plain: Sequence[Array],
    reduce: float,
) -> list[Array]:
    """sizesᵢ·AᵢHᵢS⁻¹ of each adapter (rᵢ, n), by the samples' K x K matrix."""
    from scipy.linalg import cho_factor, cho_solve

    total = np.einsum("t,tn->n", sizes, np.stack(plain))
    roots = [np.sqrt(size * reduce / each.count) for size, each in zip(sizes, inputs, strict=True)]
    Z = np.concatenate([root * each.matrix for root, each in zip(roots, inputs, strict=True)])
    scaled = Z / total
    inner = scaled @ Z.T
    inner[np.diag_indices_from(inner)] += 1.0
    factor = cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
    ends = np.cumsum([each.count for each in inputs])
    parts = []
    for pair, size, diagonal, end, each in zip(
        pairs, sizes, plain, ends.tolist(), inputs, strict=True
    ):
        # Hᵢ is the diagonal, at most S's own, and the adapter's own rows of Z.
        straight = pair.A * (size * diagonal / total)
        left = -straight @ Z.T
        own = slice(end - each.count, end)
        left[:, own] += pair.A @ Z[own].T
        solved = cho_solve(factor, left.T, check_finite=False)
        parts.append(straight + solved.T @ scaled)
    return parts


def _dense(
    pairs: Sequence[Pair],
    inputs: Sequence[Moments],
    sizes: Array,
    plain: Sequence[Array],
    reduce: float,
) -> list[Array]:
    """The same by S (n, n), of which one is held beside one adapter's moments."""
    from scipy.linalg import cho_factor, cho_solve

    columns = pairs[0].A.shape[1]
    S = np.zeros((columns, columns))
    sides = []
    for pair, each, size, diagonal in zip(pairs, inputs, sizes, plain, strict=True):
        X, share = each.matrix, size * reduce
        if each.kind == "samples":
            share /= len(X)
            S += share * (X.T @ X)
            side = (pair.A @ X.T) @ X
        else:
            _add(S, X, share)
            side = pair.A @ X
        S[np.diag_indices(columns)] += size * diagonal
        sides.append(share * side + pair.A * (size * diagonal))
    try:
        factor = cho_factor(S, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise NumericsError(
            "regmean: the moments do not add up to a positive definite matrix, rounded as they are",
            hint="raise ridge, or lower reduce",
        ) from error
    return [cho_solve(factor, side.T, check_finite=False).T for side in sides]


def _add(S: Array, gram: Array, share: float) -> None:
    """S += share·gram, in stripes."""
    step = max(1, _ROWS // len(S))
    for start in range(0, len(S), step):
        S[start : start + step] += share * gram[start : start + step]


def _diagonal(each: Moments, columns: int, at: int) -> Array:
    """The diagonal of E[xxᵀ], (n,), of adapter number `at`, whose inputs are checked."""
    X = each.matrix
    who = f"the inputs of adapter {at + 1}"
    if X.shape[1] != columns or (each.kind == "gram" and X.shape[0] != columns) or not len(X):
        raise IncompatibleError(
            f"{who} are {X.shape[0]} x {X.shape[1]}, the module takes {columns} numbers",
            hint="collect activations from the adapters' base model",
        )
    step = max(1, _ROWS // columns)
    squares, apart = np.zeros(columns), 0.0
    for start in range(0, len(X), step):
        block = X[start : start + step]
        if not np.isfinite(block).all():
            raise NumericsError(f"{who} hold NaN or infinities")
        if each.kind == "samples":
            squares += np.einsum("kn,kn->n", block, block)
        else:
            apart = max(apart, float(np.abs(block - X[:, start : start + step].T).max()))
    if each.kind == "samples":
        return squares / len(X)
    diagonal = np.diagonal(X)
    if diagonal.min() < 0 or apart > _SYMMETRIC * float(diagonal.sum()):
        raise FormatError(f"{who} are no second moments E[xxᵀ]: not symmetric, or negative")
    return diagonal.copy()
