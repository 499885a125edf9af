"""What one job of `analyze` computes: all figures of a module, from one factorisation.

The adapters' factors, read once, are brought into common coordinates by a QR of either side
(`geometry.in_common_bases`): B = Q_B·X, A = Y·Q_Aᵀ with a few rows and columns. Norms, inner
products, angles, singular values of the weighted sum and what merge methods make of the adapters
are computed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from adapterops import geometry, linalg
from adapterops.analysis import candidates
from adapterops.analysis.candidates import Merged, Method
from adapterops.analysis.signs import Signs, entries, signs
from adapterops.derived.rule import storage_noise
from adapterops.difference.stacks import not_finite, stacked
from adapterops.difference.task import Parts
from adapterops.factors import Factors
from adapterops.formats.model import Read, Ref
from adapterops.geometry import Matrix
from adapterops.kernels import once
from adapterops.linalg import Spectrum
from adapterops.plan import Module


@dataclass(frozen=True, slots=True)
class Settings:
    """What every job is given: weights (T,), candidates, seed and entries drawn of a module."""

    weights: Matrix
    methods: tuple[Method, ...]
    seed: int
    samples: int


@dataclass(frozen=True, slots=True)
class Angles:
    """Of two spaces in d dimensions: Σcos², Σcos and the largest cos; ranks (r₁, r₂) and d."""

    squares: float
    cosines: float
    largest: float
    ranks: tuple[int, int]
    dimension: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One module of T adapters, P pairs of them.

    `norms`, `floors` and numerical `ranks` (T,), `inner` and `distance` (T, T) are of the adapters
    as they are; `spectrum` is of the weighted sum. `columns` and `rows` (P,) are None where one of
    two is zero, `starts` (P,) are cosines of the A factors as stored, None where there are none.
    """

    stem: str
    shape: tuple[int, int]
    norms: Matrix
    floors: Matrix
    ranks: tuple[int, ...]
    inner: Matrix
    distance: Matrix
    spectrum: Spectrum
    columns: tuple[Angles | None, ...]
    rows: tuple[Angles | None, ...]
    starts: tuple[float | None, ...]
    signs: Signs
    merged: tuple[Merged, ...]


def peak(modules: Sequence[Module], adapters: int, settings: Settings) -> int:
    """Bytes that `figures` needs at most."""
    columns, (m, n) = max(module.columns for module in modules), modules[0].shape
    shared = sum(
        ref.nbytes
        for part in modules[0].parts
        for ref in part.site.parts.values()
        if not ref.is_plain
    )
    core = min(columns, max(m, n))
    blocks = 6 * adapters * min(columns, m) * n  # of KnOTS
    sampled = 3 * columns * min(settings.samples, m * n)
    return shared + 8 * (4 * columns * (m + n) + (12 + 4 * adapters) * core**2 + blocks + sampled)


def figures(
    modules: Sequence[Module], sides: Sequence[tuple[Parts, ...]], settings: Settings
) -> list[Figures]:
    """Each module; `sides` are what makes it up in each adapter, perhaps nothing."""
    read = once(Ref.raw)
    return [
        _figures(module, parts, settings, read)
        for module, parts in zip(modules, sides, strict=True)
    ]


def _figures(module: Module, sides: tuple[Parts, ...], settings: Settings, read: Read) -> Figures:
    parts = [part for own in sides for part in own]
    columns, rows = stacked(module.shape, parts, read)
    starts = _starts(sides, rows)
    start = 0
    for part in parts:
        rows[start : start + part.site.rank] *= part.coefficient
        start += part.site.rank
    widths = tuple(sum(part.site.rank for part in own) for own in sides)
    near = geometry.in_common_bases(columns.T, rows, widths)
    stack = geometry.Stack(
        np.concatenate([one.B for one in near], 1), np.concatenate([one.A for one in near]), widths
    )
    if not np.isfinite(stack.betas).all():
        raise not_finite(parts)
    inner, distance = geometry.gram(stack, stack)
    floors = linalg.rank_floor(*module.shape, 1.0) * stack.betas
    spaces = [geometry.spaces(one, float(floor)) for one, floor in zip(near, floors, strict=True)]
    ends = list(pairwise(np.cumsum([0, *widths]).tolist()))
    half = [Factors(one.B, rows[i:j]) for one, (i, j) in zip(near, ends, strict=True)]
    noise = np.array(
        [
            storage_noise({part.site.dtype for part in own}, one, module.shape)
            for own, one in zip(sides, near, strict=True)
        ]
    )
    pairs = list(combinations(range(len(sides)), 2))
    return Figures(
        stem=module.stem,
        shape=module.shape,
        norms=stack.norms,
        floors=floors,
        ranks=tuple(len(one.values) for one in spaces),
        inner=inner,
        distance=distance,
        spectrum=_spectrum(stack, settings.weights, module.shape),
        columns=tuple(
            _angles(spaces[i].columns, spaces[j].columns, module.shape[0]) for i, j in pairs
        ),
        rows=tuple(_angles(spaces[i].rows, spaces[j].rows, module.shape[1]) for i, j in pairs),
        starts=starts,
        signs=_signs(module, stack, columns, rows, settings),
        merged=tuple(
            candidates.merge(method, near, half, settings.weights, noise, module.stem, module.shape)
            if stack.norms.any()
            else Merged(np.zeros(len(sides)), 0.0)
            for method in settings.methods
        ),
    )


def _starts(sides: tuple[Parts, ...], rows: Matrix) -> tuple[float | None, ...]:
    """Cosines of the stored A factors: of plain LoRAs alone, of the rows that both have."""
    ends = np.cumsum([0, *(sum(part.site.rank for part in own) for own in sides)]).tolist()
    known = []
    for own, start, stop in zip(sides, ends, ends[1:], strict=False):
        plain = len(own) == 1 and own[0].site.kind == "lora"
        known.append(rows[start:stop] if plain else None)
    found: list[float | None] = []
    for one, other in combinations(known, 2):
        if one is None or other is None:
            found.append(None)
            continue
        count = min(len(one), len(other))
        x, y = one[:count], other[:count]
        sizes = float(np.linalg.norm(x)), float(np.linalg.norm(y))
        dead = not (sizes[0] > 0 and sizes[1] > 0)
        found.append(None if dead else geometry.cosine_of(float(np.sum(x * y)), *sizes))
    return tuple(found)


def _spectrum(stack: geometry.Stack, weights: Matrix, shape: tuple[int, int]) -> Spectrum:
    """Singular values of the weighted sum, from its core in common coordinates."""
    shares = stack.owners @ weights
    core = (stack.B * shares) @ stack.A
    values = linalg.svd(core)[1] if core.size else np.zeros(0)
    beta = float(np.abs(weights) @ stack.betas)
    floor = linalg.rank_floor(*shape, beta)
    rank = int((values > floor).sum())
    size = float(np.sqrt(values @ values))
    return Spectrum(values, size, beta, floor, rank, sum(stack.widths), "qr" if beta else "zero")


def _angles(first: Matrix, second: Matrix, dimension: int) -> Angles | None:
    """The cosines of the principal angles of two orthonormal bases; None where one is empty."""
    ranks = first.shape[1], second.shape[1]
    if 0 in ranks:
        return None
    cosines = np.minimum(linalg.svd(first.T @ second)[1], 1.0)
    return Angles(
        float(cosines @ cosines), float(cosines.sum()), float(cosines[0]), ranks, dimension
    )


def _signs(
    module: Module, stack: geometry.Stack, columns: Matrix, rows: Matrix, settings: Settings
) -> Signs:
    i, j = entries(settings.seed, module.stem, module.shape, settings.samples)
    values = stack.owners.T @ (columns[:, i] * rows[:, j])
    return signs(values, settings.weights, module.shape[0] * module.shape[1])
