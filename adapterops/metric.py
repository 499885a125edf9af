"""Truncation and norms measured by what a module's inputs make of ΔW: ‖ΔW·C^{1/2}‖_F, C = E[xxᵀ].

Its square is E‖ΔW·x‖², the mean squared change of the module's output. No inverse of C is taken and
no root of it, so it may be singular: with M = ΔW·C^{1/2} = UΣVᵀ the best ΔW′ of rank r is
U_r·U_rᵀ·ΔW, and U comes from the factors alone (Eckart & Young 1936 for M; U_rᵀ·M is what is left).

ΔW = B·A is first written as left·Q with orthonormal rows Q, by QR of Aᵀ: a bad gauge and columns
that cancel do their harm here, linearly in u, before anything is squared. Then

    samples X (k, n):  C = XᵀX/k, and M has the singular values of left·(QXᵀ)/√k: no squaring.
    gram C (n, n):     G = QCQᵀ, and of left·G^{1/2}: G is known to ε·tr C, its root to √ε.

Both are streamed by blocks of rows, so C is never held whole. Arrays are float64, numpy or torch;
B is (m, R), A is (R, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from adapterops.arrays import Array, host, like, namespace
from adapterops.errors import FormatError, NumericsError
from adapterops.formats.model import Ref
from adapterops.linalg import EPSILON, Matrix, Spectrum, rank_floor, svd

Kind = Literal["gram", "samples"]

_BLOCK_NUMBERS = 1 << 20
# A matrix of second moments rounded to float32 is off by at most √n·2⁻²⁴·tr C as a quadratic form.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of one module's inputs x: `ref` holds E[xxᵀ], (n, n), or k of them, (k, n)."""

    kind: Kind
    ref: Ref

    @property
    def width(self) -> int:
        """n: how many numbers one input has."""
        return self.ref.shape[1]


@dataclass(frozen=True, slots=True)
class _Root:
    """S (p, q) with S·Sᵀ = Q·C·Qᵀ; `trace` is E‖x‖² = tr C, `blur` what S·Sᵀ may be off by."""

    S: Matrix
    trace: float
    blur: float


@dataclass(frozen=True, slots=True)
class _Reduced:
    """ΔW = basis·core·rows with orthonormal `basis` (m, p) and `rows` (q, n).

    `image` has the singular values of ΔW·C^{1/2} and, in that basis, its left singular vectors.
    They are noise at or below `floor`, the singular values of ΔW at or below `plain_floor`.
    """

    basis: Array
    core: Matrix
    rows: Array
    image: Matrix
    floor: float
    plain_floor: float


def spectrum(B: Array, A: Array, inputs: Inputs, known: Spectrum) -> Spectrum:
    """The singular values of ΔW·C^{1/2}, descending, as many as ΔW has.

    `known` is the spectrum of ΔW itself: its rank stays, for a module is stored without loss only
    at that rank, whatever the inputs see of it. Raises FormatError where the second moments are
    none (not symmetric, negative), NumericsError where they are not finite.
    """
    values = np.zeros(len(known.values))
    norm = floor = 0.0
    if len(values):
        found = _reduced(B, A, inputs)
        seen = svd(found.image)[1][: len(values)]
        values[: len(seen)] = seen
        norm, floor = float(np.linalg.norm(found.image)), found.floor
    return replace(known, values=values, norm=norm, floor=floor, route="activation")


def truncate(B: Array, A: Array, rank: int, inputs: Inputs) -> tuple[Array, Array]:
    """B′ (m, rank) and A′ (rank, n) that are closest to B·A as the inputs see it.

    Directions that the inputs do not see (more of them than samples, say) are filled by size. The
    result is U√Σ and √ΣVᵀ of its own singular value decomposition, columns beyond its rank zero.
    Raises as `spectrum` does.
    """
    m, n = B.shape[0], A.shape[1]
    if 0 in (*B.shape, *A.shape):
        return like(np.zeros((m, rank)), B), like(np.zeros((rank, n)), A)
    found = _reduced(B, A, inputs)
    U, values, _ = svd(found.image)
    kept = U[:, : min(rank, int((values > found.floor).sum()))]
    if kept.shape[1] < rank:
        kept = _filled(kept, rank, found)
    P, values, Vh = svd(kept.T @ found.core)
    width = len(values)
    root = np.sqrt(values)
    left, right = np.zeros((len(kept), rank)), np.zeros((rank, Vh.shape[1]))
    left[:, :width], right[:width] = kept @ (P * root), root[:, None] * Vh
    return found.basis @ like(left, B), like(right, A) @ found.rows


def norm(B: Array, A: Array, inputs: Inputs) -> tuple[float, float]:
    """‖B·A·C^{1/2}‖_F and the floor below which it is rounding noise.

    Of a difference [B̃, −B][Ã; A] the factors cancel in float64 before the inputs come in: with
    β = Σ‖b_j‖‖a_j‖ the floor is max(m, n)·ε·β·√tr C, and where C is squared, a gram, √(ε·tr C)
    times the size of the difference, not of what it is a difference of. Raises as `spectrum` does.
    """
    if 0 in (*B.shape, *A.shape):
        return 0.0, 0.0
    found = _reduced(B, A, inputs)
    return float(np.linalg.norm(found.image)), found.floor


def _reduced(B: Array, A: Array, inputs: Inputs) -> _Reduced:
    xp = namespace(B)
    (m, _), n = B.shape, A.shape[1]
    beta = float((B * B).sum(0) ** 0.5 @ (A * A).sum(1) ** 0.5)
    columns, triangle = xp.linalg.qr(A.mT)
    basis, core = xp.linalg.qr(B @ triangle.mT)
    rows, core = columns.mT, host(core)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found, and named
        root = _of_samples(rows, inputs) if inputs.kind == "samples" else _of_gram(rows, inputs)
    lost = rank_floor(m, max(n, inputs.ref.shape[0]), beta)
    size = float(np.linalg.norm(core))
    floor = math.sqrt(root.trace * lost**2 + root.blur * size**2)
    return _Reduced(basis, core, rows, core @ root.S, floor, lost)


def _filled(kept: Matrix, rank: int, found: _Reduced) -> Matrix:
    """`kept` and, up to `rank`, the largest directions of what it leaves of ΔW; orthonormal."""
    U, values, _ = svd(found.core - kept @ (kept.T @ found.core))
    more = U[:, : rank - kept.shape[1]][:, values[: rank - kept.shape[1]] > found.plain_floor]
    basis: Matrix = np.linalg.qr(np.concatenate([kept, more], axis=1))[0]
    return basis


def _of_gram(rows: Array, inputs: Inputs) -> _Root:
    """The root of Q·C·Qᵀ by eigenvalues, those that rounding made negative taken as 0."""
    gram, trace = np.zeros((rows.shape[0], rows.shape[0])), 0.0
    for start, block in _blocks(inputs.ref, rows):
        product = rows @ block.mT
        gram += host(product @ rows[:, start : start + len(block)].mT)
        diagonal = host(block.diagonal(start))
        _check_finite(product, inputs.ref)
        trace += float(diagonal.sum())
        if diagonal.min() < 0:
            raise _no_moments(inputs.ref, "has a negative number on its diagonal")
    allowed = _TOLERANCE * trace
    if float(np.abs(gram - gram.T).max()) > allowed:
        raise _no_moments(inputs.ref, "is not symmetric")
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    if values[0] < -allowed:
        raise _no_moments(inputs.ref, "is not positive semidefinite")
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return _Root(root, trace, EPSILON * trace + max(-float(values[0]), 0.0))


def _of_samples(rows: Array, inputs: Inputs) -> _Root:
    """Q·Xᵀ/√k, or where there are more samples than rows its triangle by QR, block by block."""
    xp = namespace(rows)
    width = rows.shape[0]
    pieces: list[Array] = []
    squares, waiting = 0.0, 0
    for _, block in _blocks(inputs.ref, rows):
        pieces.append(block @ rows.mT)
        _check_finite(pieces[-1], inputs.ref)
        squares += float((block * block).sum())
        waiting += len(block)
        if waiting > 4 * width:
            pieces = [xp.linalg.qr(xp.concat(pieces, 0))[1]]
            waiting = width
    count = inputs.ref.shape[0]
    return _Root(host(xp.concat(pieces, 0)).T / math.sqrt(count), squares / count, 0.0)


def _blocks(ref: Ref, beside: Array) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of a plain matrix, about a million numbers at a time, where `beside` is."""
    device = "cpu"
    if not isinstance(beside, np.ndarray):
        device = "torch" if beside.device.type == "cpu" else str(beside.device)
    total, n = ref.shape
    step = max(1, _BLOCK_NUMBERS // n)
    stride = ref.nbytes // total
    for start in range(0, total, step):
        count = min(step, total - start)
        part = replace(
            ref, shape=(count, n), offset=ref.offset + start * stride, nbytes=count * stride
        )
        yield start, part.read(device)


def _check_finite(seen: Array, ref: Ref) -> None:
    """NaN and infinities survive every product."""
    if not bool(namespace(seen).isfinite(seen).all()):
        raise NumericsError(
            f"{ref.name} holds NaN or infinities",
            path=ref.source.path,
            hint="collect the activations again, in float32",
        )


def _no_moments(ref: Ref, what: str) -> FormatError:
    return FormatError(
        f"{ref.name} {what}: it is no second moment E[xxᵀ]",
        path=ref.source.path,
        hint="collect the activations again",
    )


def outer(inputs: Inputs, probe: Matrix) -> tuple[Matrix, Matrix]:
    """F (n, q) and spread (n,) such that F·Fᵀ + diag(spread²) is about C, with its diagonal.

    Of samples F is all of them, Xᵀ/√k. A gram is approximated from `probe` (n, w) by Nyström's
    method (Tropp, Yurtsever, Udell & Cevher 2017, alg. 3), exactly where its rank is at most w;
    the diagonal of what that leaves is the spread. Raises NumericsError for what is not finite.
    """
    n = inputs.width
    if inputs.kind == "samples":
        pieces = [block for _, block in _blocks(inputs.ref, probe)]
        for block in pieces:
            _check_finite(block, inputs.ref)
        return np.concatenate(pieces).T / math.sqrt(inputs.ref.shape[0]), np.zeros(n)
    seen, diagonal = np.empty_like(probe, np.float64), np.empty(n)
    for start, block in _blocks(inputs.ref, probe):
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are found, and named
            seen[start : start + len(block)] = block @ probe
        diagonal[start : start + len(block)] = block.diagonal(start)
        _check_finite(seen[start : start + len(block)], inputs.ref)
    core = probe.T @ seen
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > n * EPSILON * max(float(values[-1]), 0.0)
    F: Matrix = seen @ (vectors[:, kept] / np.sqrt(values[kept]))
    return F, np.sqrt(np.maximum(diagonal - np.einsum("nq,nq->n", F, F), 0.0))
