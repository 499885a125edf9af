"""Which rows of a stored tensor the same terms change."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from adapterops.changes.targets import DenseTerm, Target, Term


@dataclass(frozen=True, slots=True)
class Band:
    """Rows [start, stop) of a target's matrix that the same terms change."""

    start: int
    stop: int
    terms: tuple[Term, ...]
    dense: tuple[DenseTerm, ...]

    @property
    def is_changed(self) -> bool:
        """Whether anything changes it."""
        return bool(self.terms or self.dense)


def bands(target: Target) -> list[Band]:
    """The rows of a target, cut wherever a term begins or ends; bands without terms are copied."""
    rows = target.matrix[0]
    reached = [(range(rows)[term.rows], term) for term in target.terms]
    spans = [(found[0], found[-1] + 1, term) for found, term in reached if len(found)]
    edges = sorted({0, rows}.union(*((first, last) for first, last, _ in spans)))
    at = {edge: index for index, edge in enumerate(edges)}
    over: list[list[Term]] = [[] for _ in edges[1:]]
    for first, last, term in spans:
        for terms in over[at[first] : at[last]]:
            terms.append(term)
    return [
        Band(start, stop, tuple(terms), target.dense)
        for (start, stop), terms in zip(itertools.pairwise(edges), over, strict=True)
    ]


def meeting(rows: slice, count: int, band: Band) -> tuple[slice, slice]:
    """Of a term's rows those within a band: which of its own, and where they lie in the band."""
    indices = range(count)[rows]
    step = indices.step
    first = max(0, -(-(band.start - indices.start) // step))
    last = min(len(indices), -(-(band.stop - indices.start) // step))
    at = indices.start + first * step - band.start
    return slice(first, last), slice(at, at + (last - first - 1) * step + 1, step)
