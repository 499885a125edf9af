"""Tenants whose similarity stands out from the fleet's own background, the false ones controlled.

What similarity is usual is read from the fleet itself, an empirical null (Efron 2004, Large-scale
simultaneous hypothesis testing): `background` standardises the cosine of a pair by the two tenants'
own level and spread, then by the location, scale and tail of all pairs. That gives a one-sided p of
every pair, and Benjamini & Hochberg's step-up rule (1995), over all pairs of all partitions by
deltas and by outputs together, takes those whose expected share of false ones is q: the rate is of
the whole report. The p are dependent: pairs share tenants, and a pair is tested by both kinds. That
is positive where anything (a tenant that scatters, a pair alike in both), for which the rule still
holds (Benjamini & Yekutieli 2001), but this is not proven of cosines, so the rate is nominal; the
tests simulate it. Benjamini & Yekutieli's own rule, for any dependence, would cost a factor of
log(pairs) that fleets do not show to be needed.

All pairs are compared in blocks, one product each; what is kept is only what may be significant.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
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
from adapterops.fleet.relating.cliques import cliques
from adapterops.stream import Compute, Job, run

Array = np.ndarray[Any, Any]
By = Literal["delta", "outputs"]

DISCOVERY = 0.05
FEWEST = 8  # tenants: 28 pairs, below which there is no telling what is usual
SAME_START = 0.5  # cosine of two init fingerprints from which on they had one start
_BLOCK = 2048
_KEPT = 2_000_000  # pairs that are kept by chance alone
_MOST = 4_000_000  # pairs that groups are made of: ten crowds of 10⁴ tenants have 5·10⁸


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
class Sample:
    """Rows that are compared with each other: unit `vectors` (N, D), and `starts` (N, k) or None.

    The starts, unit norm, are fingerprints of the initialisation. Two tenants that share one are
    alike for that alone, so such pairs are judged against each other; where they are too few to
    tell what is usual among them, they are not tested.
    """

    vectors: Array
    starts: Array | None = None


@dataclass(frozen=True, slots=True)
class Hits:
    """Pairs (i < j) that may be significant, with their p and cosines, float64."""

    first: Array
    second: Array
    p: Array
    cosines: Array

    def at(self, place: Array) -> Hits:
        """Some of them, by mask or places."""
        return Hits(self.first[place], self.second[place], self.p[place], self.cosines[place])

    def taken(self, most: float) -> Hits:
        """Those whose p is at most this."""
        return self.at(self.p <= most)


@dataclass(frozen=True, slots=True)
class _Tested:
    """What a sample may show, how many of its pairs were tested, what could not be told."""

    hits: Hits
    pairs: int
    note: str


def discover(
    samples: Iterable[Sample], on: Compute, *, q: float = DISCOVERY, seed: int = 0
) -> list[Discovery]:
    """Groups of rows of each sample whose cosines stand out from it, in order.

    The false discovery rate is q over all samples together. Only one sample is held at a time;
    `seed` draws each background's sample.
    """
    found = [_tested(sample, on, q, seed) for sample in samples]
    p = np.concatenate([np.zeros(0), *(one.hits.p for one in found)])
    most = step_up(p, sum(one.pairs for one in found), q)
    return [_discovery(one, one.hits.taken(most)) for one in found]


def _tested(sample: Sample, on: Compute, q: float, seed: int) -> _Tested:
    count = len(sample.vectors)
    if count < FEWEST:
        none = np.zeros(0, np.int64)
        note = _too_few(f"{count} tenants", f"{FEWEST} tenants")
        return _Tested(Hits(none, none, np.zeros(0), np.zeros(0)), 0, note)
    rows = sampled(count, seed)
    level = levels(sample.vectors, rows)
    nulls, counts = _backgrounds(level, sample.starts, rows)
    hits, pairs, dropped = _hits(level, sample.starts, nulls, q, on)
    said = [_untested(nulls, counts)]
    if dropped:
        said.append(
            f"more than {_MOST} pairs may stand out: groups are made of the most significant, and "
            "may be parts of larger ones"
        )
    return _Tested(hits, pairs, "; ".join(filter(None, said)))


def _discovery(tested: _Tested, hits: Hits) -> Discovery:
    """The groups of a sample's significant pairs, which all pairs within a group are."""
    found = cliques(hits.first, hits.second, hits.p)
    owner = np.full(1 + max(hits.second, default=0), -1)
    for place, members in enumerate(found):
        owner[members] = place
    inside = (owner[hits.first] == owner[hits.second]) & (owner[hits.first] >= 0)
    low, high = np.full(len(found), 1.0), np.full(len(found), -1.0)
    np.minimum.at(low, owner[hits.first[inside]], hits.cosines[inside])
    np.maximum.at(high, owner[hits.first[inside]], hits.cosines[inside])
    groups = [
        Group(tuple(members), (max(float(low[place]), -1.0), min(float(high[place]), 1.0)))
        for place, members in enumerate(found)
    ]
    groups.sort(key=lambda group: (-len(group.members), group.members))
    return Discovery(tuple(groups), tested.pairs, len(hits.p), tested.note)


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
) -> tuple[Hits, int, bool]:
    """The pairs whose p is small enough to matter, how many were tested, if any were dropped.

    Those of the largest p are dropped where there are more than `_MOST`: the step-up rule then
    takes fewer, and those that it takes are as significant as before.
    """
    count = len(level.vectors)
    pairs = count * (count - 1) // 2
    # By chance p ≤ `most` for at most _KEPT pairs. The step-up rule goes beyond it only where more
    # than _KEPT / q pairs are significant; pairs that are not kept then are on the safe side.
    most = min(q, _KEPT / pairs)
    cuts = [np.inf if null is None else null.cut(most) for null in nulls]
    alone = starts is None or nulls[0] is nulls[1]
    none = np.zeros(0, np.int64)
    found = [Hits(none, none, np.zeros(0), np.zeros(0))]
    tested, many = 0, 0
    jobs = _jobs(level, None if alone else starts, cuts)
    with closing(run(jobs, on)) as results:
        for rows, columns, values, same, counted in results:
            p = np.empty(len(values))
            for kind, null in enumerate(nulls):
                own = same == bool(kind)
                if null is not None:
                    p[own] = p_values(null, values[own])
                    tested += counted[kind]
            found.append(Hits(rows, columns, p, level.cosines(values, rows, columns)))
            many += len(p)
            if sum(len(part.p) for part in found) > 2 * _MOST:
                found = [_strongest(found)]
    return _strongest(found), tested, many > _MOST


def _strongest(parts: Sequence[Hits]) -> Hits:
    """All of them, as they come, or the `_MOST` of the smallest p."""
    first, second, p, cosines = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("first", "second", "p", "cosines")
    )
    hits = Hits(first, second, p, cosines)
    return hits if len(p) <= _MOST else hits.at(np.sort(np.argsort(p, kind="stable")[:_MOST]))


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


def step_up(p: Array, tested: int, q: float) -> float:
    """The largest p that Benjamini & Hochberg's rule rejects of so many tests; -1 for none.

    `p` are those that may be, in any order; the others are larger.
    """
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= q * np.arange(1, len(p) + 1) / max(tested, 1))
    return float(ordered[below[-1]]) if len(below) else -1.0


def _unit(rows: Array) -> Array:
    """Rows of norm 1, in place; a row of zeros is like no other."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, norms, out=rows, where=norms > 0)
    return rows


@dataclass(frozen=True, slots=True)
class Part:
    """Tenants of a partition, row i of `vectors` (N, D) being tenant `names[i]`.

    The rows are sketches, float32, of any norm; `starts` are as in `Sample`.
    """

    by: By
    names: Sequence[str]
    vectors: Array
    starts: Array | None = None


def related(
    parts: Iterable[Part],
    served: Mapping[str, str],
    on: Compute,
    *,
    q: float = DISCOVERY,
    seed: int = 0,
) -> tuple[tuple[Related, ...], tuple[str, ...]]:
    """`discover` in terms of tenants: the groups of all parts, and the note of each part.

    Parts are taken one after the other and not kept. `served` is the id of what serves each tenant.
    Those of a part that one adapter serves are one thing here, the first of them by name: copies of
    a tenant would make a crowd of one, and a background of themselves. A group lists them all, and
    has the cosines of the first ones; `grouped` is how many of a group the busiest adapter serves.
    What one adapter serves entirely is no news and is not listed.
    """
    known: list[tuple[By, list[list[str]]]] = []

    def samples() -> Iterator[Sample]:
        for part in parts:
            together: dict[str, list[int]] = {}
            for row in sorted(range(len(part.names)), key=lambda row: part.names[row]):
                name = part.names[row]
                together.setdefault(served.get(name, f"\0{name}"), []).append(row)
            heads = [crowd[0] for crowd in together.values()]
            crowds = [[part.names[row] for row in crowd] for crowd in together.values()]
            known.append((part.by, crowds))
            own = None if part.starts is None else part.starts[heads]
            yield Sample(_unit(part.vectors[heads]), own)

    found = discover(samples(), on, q=q, seed=seed)
    listed = []
    for (by, crowds), one in zip(known, found, strict=True):
        for group in one.groups:
            members = tuple(sorted(name for place in group.members for name in crowds[place]))
            grouped = max(len(crowds[place]) for place in group.members)
            listed.append(Related(by, members, group.cosines, grouped if grouped > 1 else 0))
    return tuple(listed), tuple(one.note for one in found)
