"""Candidate edges from sketches: against all pairs in float64, and recall on planted fleets."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from adapterops.errors import MemoryLimitError
from adapterops.fleet.grouping import blocks, candidates
from adapterops.fleet.grouping.candidates import edges
from adapterops.fleet.grouping.cover import greedy_cover
from adapterops.fleet.grouping.graph import Candidates
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.signing.sketch import deviation, sides, sketch
from adapterops.stream import Compute

MODULES, SHAPE, RANK, SIDE = 12, (32, 24), 3, 8


@dataclass(frozen=True)
class Planted:
    """Dense adapters (N, L, m, n), and what the index keeps of them."""

    dense: np.ndarray
    sketches: np.ndarray
    norms: np.ndarray
    energies: np.ndarray

    def edges(self, radius: float | np.ndarray, on: Compute | None = None) -> Candidates:
        return edges(self.vectors, radius, on)

    @property
    def vectors(self) -> Vectors:
        return Vectors(self.sketches, self.norms, self.energies, SIDE)

    @functools.cached_property
    def apart(self) -> np.ndarray:
        """‖D_i − D_j‖/‖D_i‖ (member i, centre j)."""
        flat = self.dense.reshape(len(self.dense), -1)
        squares = self.norms[:, None] ** 2 + self.norms**2 - 2 * flat @ flat.T
        return np.sqrt(np.maximum(squares, 0.0)) / self.norms[:, None]


def low_rank(rng: np.random.Generator, rank: int) -> np.ndarray:
    (m, n), L = SHAPE, MODULES
    return rng.standard_normal((L, m, rank)) @ rng.standard_normal((L, rank, n))


def forks(rng: np.random.Generator, start: np.ndarray, bound: float) -> Iterator[np.ndarray]:
    """Adapters within `bound` of one: everywhere, in one module by rank 1, rescaled, and decoys."""
    norm = np.linalg.norm(start)
    yield start
    for share in (0.3, 0.6, 0.98):
        step = low_rank(rng, RANK)
        yield start + step * (share * bound * norm / np.linalg.norm(step))
    for share in (0.3, 0.6, 0.9):
        step = np.zeros_like(start)
        step[rng.integers(MODULES)] = low_rank(rng, 1)[0]
        yield start + step * (share * bound * norm / np.linalg.norm(step))
    yield start * (1 - 0.9 * bound)
    yield -start
    yield start * 3


@functools.cache
def planted(bound: float, groups: int = 24, half: bool = True) -> Planted:
    rng = np.random.default_rng(7)
    dense = [
        one
        for _ in range(groups)
        for one in forks(rng, low_rank(rng, RANK) * rng.lognormal(), bound)
    ]
    return indexed(np.array([dense[i] for i in rng.permutation(len(dense))]), half)


def indexed(dense: np.ndarray, half: bool = True) -> Planted:
    norms = np.sqrt(np.sum(dense**2, axis=(2, 3)))
    whole = np.sqrt(np.sum(norms**2, axis=1))
    sketches = np.empty((len(dense), MODULES, SIDE, SIDE))
    for place in range(MODULES):
        P, Q = sides(0, f"m{place}", SHAPE, (SIDE, SIDE))
        for row, one in zip(sketches, dense, strict=True):
            row[place] = sketch(one[place], np.eye(SHAPE[1]), P, Q)
    flat = (sketches / whole[:, None, None, None]).reshape(len(dense), -1)
    energies = ((norms / whole[:, None]) ** 2).astype(np.float32)
    return Planted(dense, flat.astype(np.float16 if half else np.float32), whole, energies)


def edge_set(found: Candidates) -> set[tuple[int, int]]:
    pairs = zip(found.centers().tolist(), found.members.tolist(), strict=True)
    return {(j, i) for j, i in pairs if j != i}


def every_pair(fleet: Planted, radius: float, slack: float) -> set[tuple[int, int]]:
    """What the documented test lets through, by itself, in float64."""
    scaled = fleet.sketches.astype(np.float64) * fleet.norms[:, None]
    result = set()
    for j, row in enumerate(scaled):
        parts = (scaled - row).reshape(len(scaled), MODULES, -1)
        energies = np.sum(parts**2, axis=2)
        reach = radius * fleet.norms * np.sqrt(1 + 3 * deviation(energies, SIDE))
        found = np.sqrt(energies.sum(1)) <= reach * (1 + slack)
        modules = np.sqrt(fleet.energies.astype(float)) * fleet.norms[:, None]
        possible = np.linalg.norm(modules - modules[j], axis=1) <= radius * fleet.norms * (
            1 + slack
        )
        result |= {(j, int(i)) for i in np.flatnonzero(found & possible) if i != j}
    return result


@pytest.mark.parametrize("denser", [0.0, 30.0, np.inf], ids=["pairs", "mixed", "blocks"])
@pytest.mark.parametrize("block", [64, 2048], ids=["small-blocks", "one-block"])
@pytest.mark.parametrize("radius", [0.05, 0.2, 0.5])
def test_edges_are_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, radius: float, block: int, denser: float
) -> None:
    fleet = planted(radius)
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(candidates, "_DENSER", denser)
    monkeypatch.setattr(candidates, "_DENSE", 50)
    found = edge_set(fleet.edges(radius))
    few, many = every_pair(fleet, radius, -1e-4), every_pair(fleet, radius, 0.03)
    assert few and few <= found <= many


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.2, 0.5])
def test_none_that_could_share_is_lost(radius: float) -> None:
    fleet = planted(radius)
    found = edge_set(fleet.edges(radius))
    true = {(int(j), int(i)) for i, j in np.argwhere(fleet.apart <= radius) if i != j}
    assert len(true) > 500
    lost = true - found
    assert len(lost) <= 0.01 * len(true), f"recall {1 - len(lost) / len(true):.4f}"
    # At half the bound and below, what a planted group is made of, none is lost.
    assert not {(j, i) for j, i in lost if fleet.apart[i, j] <= 0.7 * radius}
    far = {(j, i) for j, i in found if fleet.apart[i, j] > 2.5 * radius}
    assert not far


def test_differences_in_one_module_of_rank_one_are_found() -> None:
    """Their sketched distances scatter by 75 %, which no cut at a mean deviation allows."""
    rng = np.random.default_rng(3)
    start, bound = low_rank(rng, RANK), 0.2
    members = [start]
    for _ in range(300):
        step = np.zeros_like(start)
        step[rng.integers(MODULES)] = low_rank(rng, 1)[0]
        members.append(start + step * (0.95 * bound * np.linalg.norm(start) / np.linalg.norm(step)))
    fleet = indexed(np.array(members))
    members_found, distances = fleet.edges(bound).row(0)
    assert len(members_found) >= 0.98 * len(members)
    assert np.std((distances[1:] / (0.95 * bound)) ** 2) > 0.5
    assert np.max(distances) > 1.2 * bound  # these, a plain cut at the bound would have lost


@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@pytest.mark.parametrize("radius", [1e-3, 1e-4, 1e-5, 0.0])
def test_duplicates_but_for_rounding(radius: float, half: bool) -> None:
    rng = np.random.default_rng(5)
    starts = [low_rank(rng, RANK) for _ in range(40)]
    steps = [low_rank(rng, RANK) for _ in starts]
    sizes = [
        0.6 * radius * np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(starts, steps, strict=True)
    ]
    dense = np.array(
        [
            one + k * size * step
            for one, step, size in zip(starts, steps, sizes, strict=True)
            for k in (0, 1)
        ]
        + [one + 0.05 * low_rank(rng, 1) for one in starts]
    )
    fleet = indexed(dense, half)
    found = edge_set(fleet.edges(radius))
    twins = {(2 * k, 2 * k + 1) for k in range(40)}
    assert found >= twins | {(i, j) for j, i in twins}
    assert found == twins | {(i, j) for j, i in twins}


def test_distances_estimate_the_true_ones() -> None:
    fleet = planted(0.2)
    found = fleet.edges(0.2)
    centers, members = found.centers(), found.members
    others = centers != members
    true = fleet.apart[members[others], centers[others]]
    ratio = found.distances[others] / np.maximum(true, 1e-12)
    assert abs(np.median(ratio) - 1) < 0.05
    assert found.distances[~others].tolist() == [0.0] * len(fleet.norms)


def test_edges_are_directed() -> None:
    """‖D_i − D_j‖ = 0.55 is within 0.3·‖D_i‖ where ‖D_i‖ = 2, not where it is 1.45."""
    one = low_rank(np.random.default_rng(0), RANK)
    one /= np.linalg.norm(one)
    fleet = indexed(np.array([2.0 * one, 1.45 * one]))
    assert edge_set(fleet.edges(0.25)) == set()
    assert (1, 0) in edge_set(fleet.edges(0.3)) <= {(1, 0), (0, 1)}
    wide = fleet.edges(0.3)
    assert wide.row(1)[1][0] == pytest.approx(0.275, rel=0.2)


def test_everyone_has_a_bound_of_their_own() -> None:
    fleet = planted(0.2)
    radii = np.where(np.arange(len(fleet.norms)) % 2 == 0, 0.2, 1e-3)
    found, wide = edge_set(fleet.edges(radii)), edge_set(fleet.edges(0.2))
    narrow = edge_set(fleet.edges(1e-3))
    even = {(j, i) for j, i in wide if i % 2 == 0}
    odd = {(j, i) for j, i in narrow if i % 2}
    assert {(j, i) for j, i in found if i % 2 == 0} == even and even
    assert {(j, i) for j, i in found if i % 2} == odd


@pytest.mark.parametrize("radius", [0.2, 1.0])
def test_threads_and_memory_change_nothing(monkeypatch: pytest.MonkeyPatch, radius: float) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 50)
    fleet = planted(0.2)
    first = fleet.edges(radius, Compute(threads=1))
    other = fleet.edges(radius, Compute(threads=4, memory=4 << 20))
    for name in ("starts", "members", "distances"):
        assert np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_smallest_fleets(count: int) -> None:
    fleet = planted(0.2)
    found = edges(fleet.vectors.rows(np.arange(count)), 0.2)
    assert found.count == count and len(found.members) >= count


def test_zero_is_near_nothing_but_itself() -> None:
    dense = np.array([low_rank(np.random.default_rng(0), RANK)] * 2)
    fleet = indexed(dense)
    vectors = Vectors(
        np.vstack([fleet.sketches, fleet.sketches * 0]),
        np.array([*fleet.norms, 0.0, 0.0]),
        np.vstack([fleet.energies, fleet.energies * 0]),
        SIDE,
    )
    found = edges(vectors, 0.5)
    assert edge_set(found) == {(0, 1), (1, 0)}


def test_norms_of_any_size() -> None:
    rng = np.random.default_rng(2)
    starts = [low_rank(rng, RANK) for _ in range(6)]
    dense = [
        one * 10.0**k * f
        for k, one in zip((-12, -6, -3, 0, 4, 9), starts, strict=True)
        for f in (1, 1.01)
    ]
    found = edge_set(indexed(np.array(dense)).edges(0.05))
    assert found == {(2 * k + a, 2 * k + 1 - a) for k in range(6) for a in (0, 1)}


def test_more_pairs_than_memory() -> None:
    rng = np.random.default_rng(0)
    one = low_rank(rng, RANK)
    dense = [one + 0.1 * low_rank(rng, RANK) for _ in range(120)]
    with pytest.raises(MemoryLimitError, match=r"120 tenants have more than .* candidate pairs"):
        indexed(np.array(dense)).edges(0.2, Compute(memory=100_000))


# Near copies.


def copies(sizes: Sequence[int], noise: float, others: int = 30) -> Planted:
    """Families of near copies, `noise` from each other at most, and adapters of nobody."""
    rng = np.random.default_rng(9)
    dense = []
    for size in sizes:
        one = low_rank(rng, RANK)
        steps = [low_rank(rng, RANK) for _ in range(size)]
        norm = np.linalg.norm(one)
        dense += [one + e * (0.5 * noise * norm / np.linalg.norm(e)) for e in steps]
    dense += [low_rank(rng, RANK) for _ in range(others)]
    return indexed(np.array(dense))


@pytest.mark.parametrize(("radius", "noise"), [(0.2, 1e-3), (0.2, 0.02), (1e-3, 8e-4)])
def test_of_many_near_copies_a_few_serve(radius: float, noise: float) -> None:
    fleet = copies([200, 90, 40], noise)
    found = fleet.edges(radius)
    served = np.bincount(found.members, minlength=found.count) - 1
    serving = np.diff(found.starts) > 1
    assert serving[:200].sum() <= 60 and serving[200:290].sum() <= 60
    assert serving[290:330].all() and (served[290:330] == 39).all()  # no large family
    assert served[:290].min() >= 7 and served[330:].max() == 0
    assert serving[0] and serving[200]  # the smallest tenants
    groups = greedy_cover(found)
    assert [group.center for group in groups[:3]] == [0, 200, 290] and len(groups) == 33


def test_a_family_keeps_what_only_one_of_them_can_serve() -> None:
    """A star: rays are within the bound of the centre, the last tenant, not of each other."""
    rng = np.random.default_rng(4)
    one = low_rank(rng, RANK)
    norm = np.linalg.norm(one)
    steps = [low_rank(rng, RANK) for _ in range(150)]
    rays = [one + e * (9e-4 * norm / np.linalg.norm(e)) for e in steps]
    fleet = indexed(np.array([*rays, one]), half=False)
    found = fleet.edges(1e-3)
    assert len(found.row(150)[0]) > 120
    assert len(greedy_cover(found)) < 30


def test_only_those_who_are_alike_stand_for_each_other() -> None:
    fleet = copies([200], 1e-3, 0)
    numbers = np.where(np.arange(200) < 100, 0, -1)
    found = edges(fleet.vectors, 0.2, alike=numbers)
    serving = np.diff(found.starts) > 1
    assert serving[100:].all() and serving[:100].sum() <= 60
    halves = edges(fleet.vectors, 0.2, alike=np.arange(200) % 2)
    assert (np.diff(halves.starts) > 1)[[0, 1]].all()


def test_twenty_thousand_near_copies_fit_into_a_gigabyte() -> None:
    rng = np.random.default_rng(2)
    one = rng.standard_normal(512).astype(np.float32)
    rows = one + 5e-4 * rng.standard_normal((20_000, 512), np.float32)
    sizes = np.linalg.norm(rows, axis=1)
    energies = np.square(rows / sizes[:, None]).reshape(-1, 8, 64).sum(2)
    vectors = Vectors((rows / sizes[:, None]).astype(np.float16), sizes, energies, 8)
    tracemalloc.start()
    found = edges(vectors, 0.2, Compute(memory=1 << 30, threads=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 30
    assert [len(group.members) for group in greedy_cover(found)] == [20_000]
