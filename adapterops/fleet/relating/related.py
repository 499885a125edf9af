"""Tenants whose similarity stands out from the fleet's own background, the false ones controlled.

What similarity is usual is read from the fleet itself, an empirical null (Efron 2004, Large-scale
simultaneous hypothesis testing): `background` standardises the cosine of a pair by the two tenants'
own level and spread, then by the location, scale and tail of all pairs. That gives a one-sided p of
every pair, and Benjamini & Hochberg's step-up rule (1995) takes those whose expected share of false
ones is q. Pairs share tenants, so their p are dependent, mildly and positively; that the rate holds
all the same is simulated in the tests.

Groups are grown from the most significant pair down, and two of them join only where every pair
across is significant by itself (complete linkage). Single linkage would chain: a like b and b like
c makes one group of a and c, which nothing relates. Average linkage would let strong pairs pay for
pairs that do not stand out, and the stated rate would say nothing of those.

All pairs are compared in blocks, one product each; what is kept is only what may be significant.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adapterops.fleet.plans.plan import Related
from adapterops.fleet.relating.background import (
    Background,
    Levels,
    background,
    levels,
    p_values,
    sampled,
)
from adapterops.stream import Compute, Job, run

Array = np.ndarray[Any, Any]
By = Literal["delta", "outputs"]

DISCOVERY = 0.05
FEWEST = 8  # tenants: 28 pairs, below which there is no telling what is usual
SAME_START = 0.5  # cosine of two init fingerprints from which on they had one start
_BLOCK = 2048
_KEPT = 2_000_000  # pairs that are kept by chance alone


@dataclass(frozen=True, slots=True)
class Group:
    """Related rows, ascending, and the lowest and highest cosine among them."""

    members: tuple[int, ...]
    cosines: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Discovery:
    """Groups, the largest first; how many pairs were tested and how many stood out.

    `note` says what could not be told, "" where everything could.
    """

    groups: tuple[Group, ...] = ()
    tested: int = 0
    significant: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Hits:
    """Pairs (i < j) that may be significant, with their p."""

    first: Array
    second: Array
    p: Array


def discover(
    vectors: Array,
    on: Compute,
    *,
    starts: Array | None = None,
    q: float = DISCOVERY,
    seed: int = 0,
) -> Discovery:
    """Groups of rows of `vectors` (N, D), unit norm, whose cosines stand out, at false discovery q.

    `starts` (N, k), unit norm, are fingerprints of the initialisation. Two tenants that share one
    are alike for that alone, so such pairs are judged against each other; where they are too few
    to tell what is usual among them, they are not tested. `seed` draws the background's sample.
    """
    count = len(vectors)
    if count < FEWEST:
        return Discovery(note=_too_few(f"{count} tenants", f"{FEWEST} tenants"))
    sample = sampled(count, seed)
    level = levels(vectors, sample)
    nulls, counts = _backgrounds(level, starts, sample)
    hits, tested = _hits(level, starts, nulls, q, on)
    first, second, p = _step_up(hits, tested, q)
    groups = [
        Group(tuple(members), _extremes(vectors[members])) for members in cliques(first, second, p)
    ]
    groups.sort(key=lambda group: (-len(group.members), group.members))
    return Discovery(tuple(groups), tested, len(p), _untested(nulls, counts))


def _too_few(found: str, needed: str) -> str:
    return f"{found} are too few to tell what similarity is usual; it takes {needed}"


def _untested(nulls: Sequence[Background | None], counts: Sequence[int]) -> str:
    """What to say of the pairs that no background could be had for."""
    what = ("pairs of tenants with starts of their own", "pairs of tenants that share their start")
    needed = f"{FEWEST * (FEWEST - 1) // 2} pairs with a spread"
    found = [
        _too_few(f"the {many} {name} in the sample", needed)
        for name, null, many in zip(what, nulls, counts, strict=True)
        if null is None and many
    ]
    return "; ".join(found)


def _backgrounds(
    level: Levels, starts: Array | None, sample: Array
) -> tuple[list[Background | None], list[int]]:
    """What is usual among pairs of different start, and among those of one start."""
    upper = np.triu_indices(len(sample), 1)
    values = level.between(sample, sample)[upper].astype(np.float64)
    same = np.zeros(len(values), bool)
    if starts is not None:
        same = ((starts[sample] @ starts[sample].T) > SAME_START)[upper]
    parts = (values[~same], values[same])
    fewest = FEWEST * (FEWEST - 1) // 2
    found = [background(part) if len(part) >= fewest else None for part in parts]
    return found, [len(part) for part in parts]


def _hits(
    level: Levels,
    starts: Array | None,
    nulls: Sequence[Background | None],
    q: float,
    on: Compute,
) -> tuple[_Hits, int]:
    """The pairs whose p is small enough to matter, and how many were tested."""
    count = len(level.vectors)
    pairs = count * (count - 1) // 2
    # By chance p ≤ `most` for at most _KEPT pairs. The step-up rule never goes beyond it unless
    # more than _KEPT / q pairs are significant; then it stops there, which is on the safe side.
    most = min(q, _KEPT / pairs)
    cuts = [np.inf if null is None else null.cut(most) for null in nulls]
    alone = starts is None or nulls[0] is nulls[1]
    found: list[tuple[Array, Array, Array]] = []
    tested = 0
    jobs = _jobs(level, None if alone else starts, cuts)
    for rows, columns, values, same, counted in run(jobs, on):
        p = np.empty(len(values))
        for kind, null in enumerate(nulls):
            own = same == bool(kind)
            if null is not None:
                p[own] = p_values(null, values[own])
                tested += counted[kind]
        found.append((rows, columns, p))
    parts = [np.concatenate(part) for part in zip(*found, strict=True)]
    return _Hits(*parts), tested


Block = tuple[Array, Array, Array, Array, tuple[int, int]]


def _jobs(
    level: Levels, starts: Array | None, cuts: Sequence[float]
) -> Generator[Job[Block], None, None]:
    """Blocks on and above the diagonal."""
    count = len(level.vectors)
    for row in range(0, count, _BLOCK):
        for column in range(row, count, _BLOCK):
            args = (level, starts, tuple(cuts), row, column)
            yield Job(f"rows {row}, columns {column}", _block, args, 16 * _BLOCK * _BLOCK)


def _block(
    level: Levels, starts: Array | None, cuts: tuple[float, float], row: int, column: int
) -> Block:
    """(rows, columns, values, whether of one start) above the cuts, and the pairs of each kind."""
    here, there = slice(row, row + _BLOCK), slice(column, column + _BLOCK)
    values = level.between(here, there)
    pairs = values.size
    if row == column:
        values[np.tril_indices(len(values))] = -np.inf
        pairs = len(values) * (len(values) - 1) // 2
    if starts is None:
        rows, columns = np.nonzero(values > cuts[0])
        same = np.zeros(len(rows), bool)
        alike = 0
    else:
        shared = (starts[here] @ starts[there].T) > SAME_START
        alike = int((shared & np.isfinite(values)).sum())
        rows, columns = np.nonzero(values > np.where(shared, cuts[1], cuts[0]))
        same = shared[rows, columns]
    kept = values[rows, columns].astype(np.float64)
    return rows + row, columns + column, kept, same, (pairs - alike, alike)


def _step_up(hits: _Hits, tested: int, q: float) -> tuple[Array, Array, Array]:
    """The pairs that Benjamini & Hochberg's rule rejects, the smallest p first, ties by index."""
    order = np.lexsort((hits.second, hits.first, hits.p))
    p = hits.p[order]
    below = np.flatnonzero(p <= q * np.arange(1, len(p) + 1) / max(tested, 1))
    order = order[: below[-1] + 1] if len(below) else order[:0]
    return hits.first[order], hits.second[order], hits.p[order]


def cliques(first: Array, second: Array, p: Array) -> list[list[int]]:
    """Groups of two and more in the graph of these edges, every pair within one an edge of it.

    The smallest p first, two groups join where all pairs across are edges. Where some are missing
    they stay missing however the groups grow, so one pass over the edges decides.
    """
    owner: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    across: dict[int, dict[int, int]] = {}
    order = np.lexsort((second, first, p))
    edges = list(zip(first[order].tolist(), second[order].tolist(), strict=True))
    for i, j in edges:
        for node in (i, j):
            owner.setdefault(node, node)
            groups.setdefault(node, [node])
            across.setdefault(node, {})
        across[i][j] = across[j][i] = 1
    for i, j in edges:
        a, b = owner[i], owner[j]
        if a == b or across[a].get(b, 0) < len(groups[a]) * len(groups[b]):
            continue
        if len(across[a]) < len(across[b]):
            a, b = b, a
        _join(a, b, owner, groups, across)
    return [sorted(members) for members in groups.values() if len(members) > 1]


def _join(
    a: int,
    b: int,
    owner: dict[int, int],
    groups: dict[int, list[int]],
    across: dict[int, dict[int, int]],
) -> None:
    """Group b becomes part of group a, the smaller table of edges moved into the larger."""
    for node in groups[b]:
        owner[node] = a
    groups[a] += groups.pop(b)
    del across[a][b]
    for other, edges in across.pop(b).items():
        if other != a:
            del across[other][b]
            total = across[a].get(other, 0) + edges
            across[a][other] = across[other][a] = total


def _extremes(vectors: Array) -> tuple[float, float]:
    """The lowest and highest cosine of two rows, (k, D) with k ≥ 2."""
    low, high = np.inf, -np.inf
    for start in range(0, len(vectors) - 1, _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ vectors[start:].T
        above = cosines[np.triu_indices(len(cosines), 1, cosines.shape[1])]
        low, high = min(low, float(above.min())), max(high, float(above.max()))
    return max(low, -1.0), min(high, 1.0)


def _unit(rows: Array) -> Array:
    """Rows of norm 1, in place; a row of zeros is like no other."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, norms, out=rows, where=norms > 0)
    return rows


def related(
    names: Sequence[str],
    vectors: Array,
    by: By,
    served: Mapping[str, str],
    on: Compute,
    *,
    starts: Array | None = None,
    q: float = DISCOVERY,
    seed: int = 0,
) -> tuple[tuple[Related, ...], str]:
    """`discover` in terms of tenants, row i of `vectors` being tenant `names[i]`; and its note.

    The rows are sketches, float32, of any norm.

    `served` is the id of what serves each tenant. Those that one adapter serves are one thing here,
    the first of them by name: copies of a tenant would make a crowd of one, and a background of
    themselves. A group lists them all; of a group, `grouped` is how many the busiest adapter
    serves. What one adapter serves entirely is no news and is not listed.
    """
    together: dict[str, list[int]] = {}
    for row in sorted(range(len(names)), key=lambda row: names[row]):
        together.setdefault(served.get(names[row], f"\0{names[row]}"), []).append(row)
    crowds = list(together.values())
    heads = [crowd[0] for crowd in crowds]
    own = None if starts is None else starts[heads]
    found = discover(_unit(vectors[heads]), on, starts=own, q=q, seed=seed)
    listed = []
    for group in found.groups:
        rows = sorted(row for place in group.members for row in crowds[place])
        members = tuple(sorted(names[row] for row in rows))
        grouped = max(len(crowds[place]) for place in group.members)
        listed.append(
            Related(by, members, _extremes(_unit(vectors[rows])), grouped if grouped > 1 else 0)
        )
    return tuple(listed), found.note
