"""N adapters against each other: inner products and distances, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from adapterops.difference import dense, tiles
from adapterops.difference.task import Parts, Task
from adapterops.difference.tiles import Tile
from adapterops.geometry import Matrix, cosine_of
from adapterops.stream import Job

_COLUMNS = 512  # of one side of a tile: more would hold more at once, fewer read more often


@dataclass(frozen=True, slots=True)
class Matrices:
    """Whole adapters: norms (N,), distances, their floors and cosines (N, N), which are zero."""

    norms: Matrix
    distance: Matrix
    floor: Matrix
    cosine: Matrix
    zero: tuple[bool, ...]


def compare_all(task: Task) -> Matrices:
    """Distances and cosines of all pairs; a module that one lacks counts as zero for it."""
    count = len(task.adapters)
    inner, squares, floors = np.zeros((3, count, count))

    def add(first: Sequence[int], second: Sequence[int], tile: Tile) -> None:
        figures = ((inner, tile.inner), (squares, tile.distance**2), (floors, tile.floor**2))
        for whole, part in figures:
            whole[np.ix_(first, second)] += part
            if first is not second:
                whole[np.ix_(second, first)] += part.T

    jobs, places = _jobs(task)
    for (first, second), found in zip(places, task.run(jobs), strict=True):
        for tile in found:
            add(first, second, tile)
    everyone = range(count)
    full = [Job(one.name, dense.dense_tile, (one,), dense.peak(one)) for one in task.deltas()]
    for tile in task.run(full):
        add(everyone, everyone, tile)

    norms = np.sqrt(np.diagonal(inner))
    zero = tuple(map(bool, norms <= np.sqrt(np.diagonal(floors)) / 2))
    cosine = np.zeros((count, count))
    for i, j in np.argwhere(~np.logical_or.outer(zero, zero)):
        cosine[i, j] = 1.0 if i == j else cosine_of(inner[i, j], norms[i], norms[j])
    np.fill_diagonal(floors, 0.0)
    return Matrices(norms, np.sqrt(squares), np.sqrt(floors), cosine, zero)


def _jobs(task: Task) -> tuple[list[Job[list[Tile]]], list[tuple[list[int], list[int]]]]:
    """A job for each module and pair of groups of adapters, and which adapters these are."""
    jobs, places = [], []
    for batch in task.batches():
        parts = [task.parts(module) for module in batch]
        shapes = [module.shape for module in batch]
        for first, second in combinations_with_replacement(_groups(parts[0]), 2):
            pairs = []
            for own in parts:
                rows = tuple(own[index] for index in first)
                same = second is first
                pairs.append((rows, rows if same else tuple(own[index] for index in second)))
            columns = sum(_columns(parts[0][index]) for index in {*first, *second})
            peak = tiles.peak(batch[0].shape, columns)
            jobs.append(Job(batch[0].stem, tiles.tiles, (shapes, pairs), peak))
            places.append((first, second))
    return jobs, places


def _groups(parts: Sequence[Parts]) -> list[list[int]]:
    """The adapters in groups of a bounded number of columns; those that lack the module too."""
    groups: list[list[int]] = [[]]
    filled = 0
    for index, part in enumerate(parts):
        filled += _columns(part)
        if filled > _COLUMNS and groups[-1]:
            groups.append([])
            filled = _columns(part)
        groups[-1].append(index)
    return groups


def _columns(parts: Parts) -> int:
    return sum(part.site.rank for part in parts)
