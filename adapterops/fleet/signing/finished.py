"""Modules' figures as a signature takes them, and how Gram matrices and products become them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapterops.fleet.signing import sketch
from adapterops.fleet.signing.fingerprint import start_numbers
from adapterops.fleet.signing.measured import Measured
from adapterops.fleet.signing.spectra import squares_of

Array = np.ndarray[Any, Any]


class Finished(NamedTuple):
    """L modules: `norms` (L,) of ΔW, all else of ΔW over its scale.

    `sketches` (L, p, p) are PᵀBAQ/p, `outputs` (L, k) numbers of PᵀΔWΔWᵀP, `starts` (L, k') of A,
    `squares` (L, r) σ² of BA in descending order.
    """

    stems: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    scales: Array
    norms: Array
    sketches: Array
    outputs: Array
    starts: Array
    squares: Array


def finished(parts: Iterable[Measured], side: int) -> Iterator[Finished]:
    """The figures of all modules whose ΔW is not zero, those of one rank together."""
    groups: defaultdict[tuple[Any, ...], list[Measured]] = defaultdict(list)
    for part in parts:
        groups[part.PB.shape[2], part.squares is None, part.embedding].append(part)
    for group in groups.values():
        yield from _finished(group, side)


def _finished(parts: Sequence[Measured], side: int) -> Iterator[Finished]:
    norms = np.concatenate([part.norms for part in parts])
    keep = norms > 0
    if not keep.any():
        return
    gram_b, gram_a, PB, AQ, scales = (
        np.concatenate([part[i] for part in parts])[keep] for i in _ARRAYS
    )
    known = [part.squares for part in parts if part.squares is not None]
    starts = start_numbers(AQ, gram_a)
    if parts[0].embedding:  # PEFT starts its A from zero, which tells nothing
        starts[...] = 0.0
    yield Finished(
        _kept((stem for part in parts for stem in part.stems), keep),
        _kept((shape for part in parts for shape in part.shapes), keep),
        scales,
        norms[keep],
        (PB[:, :side] @ AQ[:, :, :side]) / side,
        sketch.output_numbers(PB[:, : sketch.COLUMNS], gram_a),
        starts,
        np.concatenate(known)[keep] if known else squares_of(gram_b, gram_a),
    )


_ARRAYS = [Measured._fields.index(name) for name in ("gram_b", "gram_a", "PB", "AQ", "scales")]


def _kept(items: Iterable[Any], keep: Array) -> tuple[Any, ...]:
    return tuple(item for item, kept in zip(items, keep, strict=True) if kept)


def joined(parts: Sequence[Finished]) -> Finished:
    """All modules in one, sorted by stem; `squares` are left with the parts, for ranks differ."""
    stems = [stem for part in parts for stem in part.stems]
    shapes = [shape for part in parts for shape in part.shapes]
    order = sorted(range(len(stems)), key=stems.__getitem__)
    arrays = [
        np.concatenate([part[i] for part in parts])[order] for i in range(2, len(parts[0]) - 1)
    ]
    names, sizes = tuple(stems[i] for i in order), tuple(shapes[i] for i in order)
    return Finished._make([names, sizes, *arrays, np.zeros((len(order), 0))])
