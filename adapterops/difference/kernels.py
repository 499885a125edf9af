"""What one job of `diff` computes of two adapters: a module's figures, from their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapterops import geometry, linalg
from adapterops.certificate import ratio
from adapterops.difference.report import Angles, ModuleDifference, Relation
from adapterops.difference.rounding import close, delta_noise, relation
from adapterops.difference.stacks import not_finite, stacked
from adapterops.difference.task import Parts
from adapterops.factors import Factors
from adapterops.formats.model import Read, Ref
from adapterops.geometry import Matrix
from adapterops.kernels import once
from adapterops.plan import Module

Shape = tuple[int, int]


def peak(modules: Sequence[Module]) -> int:
    """Bytes that `module_differences` needs at most."""
    columns, shape = max(module.columns for module in modules), modules[0].shape
    shared = sum(
        ref.nbytes
        for part in modules[0].parts
        for ref in part.site.parts.values()
        if not ref.is_plain
    )
    return shared + 8 * (3 * columns * sum(shape) + 12 * min(columns, max(shape)) ** 2)


def module_differences(
    modules: Sequence[Module], sides: Sequence[tuple[Parts, ...]]
) -> list[ModuleDifference]:
    """Each module of two adapters; `sides` are what makes it up in either, perhaps nothing."""
    read = once(Ref.raw)
    return [
        _difference(module.shape, first, second, read)
        for module, (first, second) in zip(modules, sides, strict=True)
    ]


def _difference(shape: Shape, first: Parts, second: Parts, read: Read) -> ModuleDifference:
    parts = (*first, *second)
    columns, rows = stacked(shape, parts, read)
    found = relation(first, second, columns, rows)
    if found == "equal":  # the same numbers: only one of them is left to measure
        parts = first
        columns, rows = columns[: parts[0].site.rank], rows[: parts[0].site.rank]
    raw = geometry.in_common_bases(columns.T, rows, [part.site.rank for part in parts])
    if not all(np.isfinite(one.B).all() and np.isfinite(one.A).all() for one in raw):
        raise not_finite(parts)
    noise = [delta_noise(part, one) for part, one in zip(parts, raw, strict=True)]
    scaled = [one * part.coefficient for part, one in zip(parts, raw, strict=True)]
    nothing = Factors(scaled[0].B[:, :0], scaled[0].A[:0])
    a = sum(scaled[: len(first)], nothing)
    if found == "equal":
        return _equal(shape, a, noise[0])
    b = sum(scaled[len(first) :], nothing)
    if found == "differ" and close(parts, raw):
        found = "close"
    noises = math.hypot(*noise[: len(first)]), math.hypot(*noise[len(first) :])
    return _compare(shape, a, b, noises, found)


def _compare(
    shape: Shape, a: Factors, b: Factors, noise: tuple[float, float], factors: Relation
) -> ModuleDifference:
    """All figures of two deltas in common coordinates."""
    dense_a, dense_b = a.dense(), b.dense()
    norm_a, norm_b = float(np.linalg.norm(dense_a)), float(np.linalg.norm(dense_b))
    product = float(np.sum(dense_a * dense_b))
    apart = float(np.linalg.norm(dense_a - dense_b))
    floor_a, floor_b = (linalg.rank_floor(*shape, geometry.beta(side)) for side in (a, b))
    factor = product / norm_a / norm_a if norm_a > floor_a else None
    found = ModuleDifference(
        shape=shape,
        ranks=(a.rank, b.rank),
        norms=(norm_a, norm_b),
        distance=apart,
        relative=ratio(apart, norm_a),
        cosine=geometry.cosine_of(product, norm_a, norm_b),
        ratio=factor,
        residual=float(np.linalg.norm(dense_b - (factor or 0.0) * dense_a)),
        floor=floor_a + floor_b,
        zero=(norm_a <= floor_a, norm_b <= floor_b),
        noise=noise,
        factors=factors,
    )
    if any(found.zero):
        return replace(found, cosine=0.0)
    one, other = geometry.spaces(a, floor_a), geometry.spaces(b, floor_b)
    doubt = math.degrees(one.uncertainty + other.uncertainty + linalg.EPSILON)
    return replace(
        found,
        columns=_angles(one.columns, other.columns, doubt),
        rows=_angles(one.rows, other.rows, doubt),
        shared=(
            _shared(one.columns, other.columns, shape[0]),
            _shared(one.rows, other.rows, shape[1]),
        ),
    )


def _equal(shape: Shape, a: Factors, noise: float) -> ModuleDifference:
    """A module whose numbers are the same in both adapters: what differs is exactly nothing."""
    norm, floor = float(np.linalg.norm(a.dense())), linalg.rank_floor(*shape, geometry.beta(a))
    zero = norm <= floor
    angles = Angles((0.0,) * len(geometry.spaces(a, floor).values))
    return ModuleDifference(
        shape=shape,
        ranks=(a.rank, a.rank),
        norms=(norm, norm),
        distance=0.0,
        relative=ratio(0.0, norm),
        cosine=0.0 if zero else 1.0,
        ratio=None if zero else 1.0,
        residual=0.0,
        floor=2 * floor,
        zero=(zero, zero),
        noise=(noise, noise),
        factors="equal",
        columns=angles,
        rows=angles,
        shared=None if zero else (1.0, 1.0),
    )


def _angles(first: Matrix, second: Matrix, doubt: float) -> Angles:
    found = np.degrees(geometry.principal_angles(first, second))
    return Angles(tuple(map(float, found)), doubt)


def _shared(one: Matrix, other: Matrix, dimension: int) -> float:
    """The smaller share of one space inside the other, chance deducted."""
    return min(
        geometry.share_inside(one, other, dimension), geometry.share_inside(other, one, dimension)
    )
