"""What a signature needs of every module, from one look at its factors.

Modules that are complete at the same time and alike in shape, rank and type are measured together:
Gram matrices in float64 from exactly widened factors, products with random signs in float32, whose
rounding is far below what a sketch estimates. Factors that cancel, and kinds other than a plain
LoRA, take float64 throughout, and QR where the Gram matrices cannot see the result (`linalg`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapterops import linalg
from adapterops.errors import NumericsError
from adapterops.fleet.signing import sketch
from adapterops.fleet.signing.reading import Pass
from adapterops.fleet.signing.widening import FAST, SUSPECT, codes, widened
from adapterops.formats.model import Site

Array = np.ndarray[Any, Any]

ROWS, PROBES = 4, 4  # of A, and of Q: what a fingerprint of A's start is made from
_BATCH = 1 << 18  # numbers of a factor of all modules measured together
_SMALL = 1_000_000  # m·n·k up to which OpenBLAS multiplies without packing


class Measured(NamedTuple):
    """k modules of one rank r, the scale folded into none of the arrays but `norms`.

    `norms` (k,) are ‖ΔW‖_F, 0 where it is zero to rounding. `gram_b`, `gram_a` (k, r, r) are BᵀB
    and AAᵀ, `PB` (k, c, r) and `AQ` (k, r, q) float64. `squares` (k, r) are σ² of BA, descending,
    where they had to be computed with the factors at hand.
    """

    stems: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    scales: Array
    norms: Array
    gram_b: Array
    gram_a: Array
    PB: Array
    AQ: Array
    squares: Array | None = None
    embedding: bool = False


class Factor(NamedTuple):
    """A factor of k modules as it is stored, and its type."""

    codes: Array
    dtype: str


def measure(sites: Sequence[Site], reader: Pass, seed: int, side: int) -> Iterator[Measured]:
    """Measure modules whose tensors `reader` holds. NumericsError for NaN or infinities."""
    groups: defaultdict[tuple[Any, ...] | str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[_alike(site)].append(site)
    for key, alike in groups.items():
        if isinstance(key, str):
            yield _carefully(alike[0], reader, seed, side)
            continue
        count = max(1, _BATCH // max(1, site_size(alike[0])))
        for start in range(0, len(alike), count):
            yield from _together(alike[start : start + count], reader, seed, side)


def site_size(site: Site) -> int:
    """Numbers of the larger factor."""
    return max(site.shape) * site.rank


def _alike(site: Site) -> tuple[Any, ...] | str:
    """What modules measured together agree in; its name for one that is measured alone."""
    if site.kind != "lora" or 0 in (*site.shape, site.rank):
        return site.stem
    A, B = site.parts["A"], site.parts["B"]
    if not (A.is_plain and B.is_plain and A.dtype in FAST and B.dtype in FAST):
        return site.stem
    return site.shape, site.rank, A.dtype, B.dtype, site.layer == "embedding"


def _together(sites: Sequence[Site], reader: Pass, seed: int, side: int) -> Iterator[Measured]:
    (m, n), rank = sites[0].shape, sites[0].rank
    B, A = _codes(sites, "B", (m, rank), reader), _codes(sites, "A", (rank, n), reader)
    with np.errstate(over="ignore", invalid="ignore"):
        found = _products(sites, B, A, seed, side)
        squares_b = np.diagonal(found.gram_b, axis1=1, axis2=2)
        squares_a = np.diagonal(found.gram_a, axis1=1, axis2=2)
        beta = np.sqrt(squares_b * squares_a).sum(1)
        norm = np.sqrt(np.maximum((found.gram_b * found.gram_a).sum((1, 2)), 0.0))
        # Below SUSPECT nothing is infinite, nor are products with signs in float32.
        sure = (norm >= linalg.GRAM_NORM * beta) & (squares_a.max(1) < SUSPECT)
        sure &= squares_b.max(1) < SUSPECT
        norms = np.abs(found.scales) * norm
    if sure.all():
        yield found._replace(norms=norms)
        return
    for index, site in enumerate(sites):
        if sure[index]:
            yield _one(found, index)._replace(norms=norms[index : index + 1])
        else:
            yield _carefully(site, reader, seed, side)


def _codes(sites: Sequence[Site], role: str, shape: tuple[int, int], reader: Pass) -> Factor:
    """One factor of all modules as it is stored, (k, *shape)."""
    refs = [site.parts[role] for site in sites]
    raw = [reader.raw(ref) for ref in refs]
    whole = codes(raw[0] if len(raw) == 1 else np.concatenate(raw), refs[0].dtype)
    return Factor(whole.reshape(len(refs), *shape), refs[0].dtype)


def _carefully(site: Site, reader: Pass, seed: int, side: int) -> Measured:
    """One module of any kind, in float64."""
    B, A = site.factors("cpu", reader.raw)
    if 0 in (*B.shape, *A.shape):
        B, A = np.zeros((B.shape[0], 1)), np.zeros((1, A.shape[1]))
    B, high_b = _to_one(B)
    A, high_a = _to_one(A)
    with np.errstate(over="ignore"):
        scale = float(np.ldexp(site.scale, high_b + high_a))
    found = _products([site], Factor(B[None], "F64"), Factor(A[None], "F64"), seed, side)
    core = linalg.cores(B[None], A[None])[0]
    squares = None
    norm = core.norm
    if core.cancels:
        spectrum = linalg.spectrum(B, A, core)
        norm = spectrum.norm if spectrum.rank else 0.0
        squares = np.zeros((1, B.shape[1]))
        squares[0, : len(spectrum.values)] = spectrum.values**2
    norm *= abs(scale)
    if not math.isfinite(norm):
        raise NumericsError("the norm of its change is beyond float64", module=site.stem)
    return found._replace(scales=np.array([scale]), norms=np.array([norm]), squares=squares)


def _to_one(factor: Array) -> tuple[Array, int]:
    """A factor over a power of two, so that its largest number is about 1, and the exponent."""
    high = int(np.frexp(np.abs(factor).max(initial=0.0))[1])
    return np.ldexp(factor, -high), high


def _products(sites: Sequence[Site], B: Factor, A: Factor, seed: int, side: int) -> Measured:
    """Gram matrices and products with signs of B (k, m, r) and A (k, r, n)."""
    count, m, rank = B.codes.shape
    n = A.codes.shape[2]
    columns = max(side, sketch.COLUMNS), max(side, PROBES)
    P, Q = sketch.stacked(seed, [site.stem for site in sites], (m, n), columns)
    gram_b, gram_a = np.zeros((count, rank, rank)), np.zeros((count, rank, rank))
    PB, AQ = np.zeros((count, columns[0], rank)), np.zeros((count, rank, columns[1]))
    step = _step(rank, columns[0])
    for at in (slice(start, start + step) for start in range(0, m, step)):
        part = widened(B.codes[:, at], B.dtype)
        PB += P[:, :, at].astype(part.dtype) @ part
        wide = part.astype(np.float64, copy=False)
        _add_gram(gram_b, wide.mT, wide)
    for at in (slice(start, start + step) for start in range(0, n, step)):
        part = widened(A.codes[:, :, at], A.dtype)
        AQ += part @ Q[:, :, at].astype(part.dtype).mT
        wide = part.astype(np.float64, copy=False)
        _add_gram(gram_a, wide, wide.mT)
    return Measured(
        tuple(site.stem for site in sites),
        tuple(site.shape for site in sites),
        np.array([site.scale for site in sites]),
        np.zeros(count),
        gram_b,
        gram_a,
        PB,
        AQ,
        embedding=sites[0].layer == "embedding",
    )


def _step(rank: int, columns: int) -> int:
    """Rows or columns of a factor at once: within the cache, and small for the BLAS."""
    most = _SMALL // (rank * max(columns, (rank + 1) // 2))
    return 1 << min(max(most, 256).bit_length() - 1, 14)


def _add_gram(gram: Array, left: Array, right: Array) -> None:
    """gram += left @ right, (k, r, s) by (k, s, r).

    In two halves: BLAS' symmetric product, which numpy would choose, takes twice as long for
    factors as thin as these.
    """
    half = (gram.shape[1] + 1) // 2
    gram[:, :half] += left[:, :half] @ right
    if half < gram.shape[1]:
        gram[:, half:] += left[:, half:] @ right


def _one(found: Measured, index: int) -> Measured:
    """One of modules measured together."""
    at = slice(index, index + 1)
    return found._replace(
        stems=found.stems[at],
        shapes=found.shapes[at],
        scales=found.scales[at],
        gram_b=found.gram_b[at],
        gram_a=found.gram_a[at],
        PB=found.PB[at],
        AQ=found.AQ[at],
    )
