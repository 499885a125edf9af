"""What serves each group: an original, or an average, which may join several groups."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from adapterops.errors import AdapterOpsError
from adapterops.fleet.consent.policy import NEAR_EXACT
from adapterops.fleet.grouping.groups import Compare, Group, Value, fits
from adapterops.fleet.grouping.sets import Sets
from adapterops.fleet.grouping.unions import Middle, Union, middle, unions
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.representing.averaging import Asked, Average
from adapterops.fleet.types import Array
from adapterops.fleet.verifying.exact import Error

FARTHEST = 1.0  # apart: what is nearly orthogonal has no average worth trying
_ROUNDS = 6
_LESS = 0.9  # of what was promised in vain

Write = Callable[[Sequence[Asked], Path], Generator[Average, None, None]]


@dataclass(frozen=True, slots=True)
class Making:
    """How adapters are made and judged: errors of the `bound` are `value` of what `compare` says.

    `write` makes averages, as files below a folder.
    """

    bound: float
    value: Value
    compare: Compare
    write: Write


@dataclass(frozen=True, slots=True)
class Represented:
    """A group and the average made for it; None where the original of its centre serves."""

    group: Group
    average: Average | None


def represented(
    each: Sets, groups: Sequence[Represented], how: Making, work: Path
) -> Iterator[Represented]:
    """The groups, in order, each with what serves it best; averages are written below `work`."""
    bounds = each.bounds(how.bound)
    wide = [one.average is None and _differ(one.group, how.value) for one in groups]
    asked = [
        _asked(each, sorted(one.group.errors), one.group.center, bounds, one.group.errors)
        for one, yes in zip(groups, wide, strict=True)
        if yes
    ]
    with closing(how.write(asked, work)) as made:
        for one, yes in zip(groups, wide, strict=True):
            yield Represented(one.group, next(made)) if yes else one


def joined(
    each: Sets,
    groups: Sequence[Group],
    near: Sequence[set[int]],
    vectors: Vectors,
    how: Making,
    work: Path,
) -> tuple[list[Represented], dict[int, AdapterOpsError]]:
    """The groups, those made one that a single adapter serves within everyone's bound.

    `near` are for each group the places of others to try it with. What sketches promise is written
    to `work`, and holds only if every error of the bytes is within its bound; where it is not, less
    is tried of these groups. Originals farther apart than `FARTHEST` are not put together. Beside
    the groups come the nodes whose files could not be read; their groups stay as they are.
    """
    bounds = each.bounds(how.bound)

    @cache
    def estimate(rows: tuple[int, ...]) -> Middle | None:
        return middle(vectors, bounds, rows, each.permissions.blend(np.array(rows)))

    centers = [group.center for group in groups]
    far: set[tuple[int, int]] = set()

    def together(some: tuple[int, ...], others: tuple[int, ...]) -> bool:
        if 2 * how.bound <= FARTHEST:
            return True
        one, two = ([centers[place] for place in places] for places in (some, others))
        return far.isdisjoint(product(some, others)) and vectors.within(one, two, FARTHEST)

    left = {place: sorted(group.errors) for place, group in enumerate(groups)}
    ceilings = [1.0] * len(groups)
    done: list[Represented] = []
    failed: dict[int, AdapterOpsError] = {}
    for number in range(_ROUNDS):
        tried = unions(left, near, estimate, ceilings, together)
        while more := _far(each, groups, tried, how):
            far |= more
            tried = unions(left, near, estimate, ceilings, together)
        if not tried:
            break
        asked = [_asked(each, one.rows, one.middle.center, bounds, {}) for one in tried]
        inside = work / f"joined-{number}"
        inside.mkdir()
        with closing(how.write(asked, inside)) as results:
            for one, want, made in zip(tried, asked, results, strict=True):
                errors = _within(made, want, how.value)
                broken = _broken(made, one.rows, want)
                failed |= broken
                for part in one.parts:
                    if errors is not None:
                        del left[part]
                    elif not broken:
                        ceilings[part] = _LESS * one.middle.share
                    elif not broken.keys().isdisjoint(left[part]):
                        done.append(Represented(groups[part], None))
                        del left[part]
                if errors is not None:
                    group = Group(one.middle.center, dict(zip(one.rows, errors, strict=True)))
                    done.append(Represented(group, made if made.signature else None))
    done += [Represented(groups[place], None) for place in left]
    return sorted(done, key=lambda one: one.group.center), failed


def _far(
    each: Sets, groups: Sequence[Group], found: Sequence[Union], how: Making
) -> set[tuple[int, int]]:
    """Pairs of parts of one union, both ways round, whose originals are too far apart, exactly.

    Whom one adapter serves within half of `FARTHEST` are not. An original that cannot be read is
    far from all.
    """
    if 2 * how.bound <= FARTHEST:
        return set()
    files = {p: each.nodes[groups[p].center].record.tenant.location for u in found for p in u.parts}
    asked = {p: [other for other in u.parts if other != p] for u in found for p in u.parts}
    compared = how.compare([(files[p], [files[o] for o in others]) for p, others in asked.items()])
    return {
        pair
        for (part, others), results in zip(asked.items(), compared, strict=True)
        for other, result in zip(others, results, strict=True)
        if not (isinstance(result, Error) and fits(result, FARTHEST, how.value))
        for pair in ((part, other), (other, part))
    }


def _within(made: Average, asked: Asked, value: Value) -> list[Error] | None:
    """Everyone's error by what was made, in the order asked, if all are within their bounds."""
    found = []
    for name, limit in asked.limits.items():
        error = made.chosen.errors.get(name)
        if not isinstance(error, Error) or not fits(error, limit, value):
            return None
        found.append(error)
    return found


def _broken(made: Average, rows: Sequence[int], asked: Asked) -> dict[int, AdapterOpsError]:
    """The errors of those whose files could not be read."""
    errors = (made.chosen.errors.get(name) for name in asked.limits)
    found = zip(rows, errors, strict=True)
    return {row: error for row, error in found if isinstance(error, AdapterOpsError)}


def _asked(
    each: Sets, rows: Sequence[int], center: int, bounds: Array, errors: Mapping[int, Error]
) -> Asked:
    """What is asked for a group of nodes; `errors` are those by the original, empty if unknown."""
    place = np.asarray(rows)
    records = [each.nodes[row].record for row in rows]
    names = [record.tenant.name for record in records]
    able = each.permissions.blend(place)
    return Asked(
        each.nodes[center].record,
        records,
        allowed=[name for name, yes in zip(names, able, strict=True) if yes],
        limits=dict(zip(names, bounds[place].tolist(), strict=True)),
        errors={name: errors[row] for name, row in zip(names, rows, strict=True) if row in errors},
    )


def _differ(group: Group, value: Value) -> bool:
    """Whether a group's members are more than duplicates."""
    return len(group.errors) > 1 and max(map(value, group.errors.values())) > NEAR_EXACT
