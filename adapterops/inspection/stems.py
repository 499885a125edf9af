"""Names as families: `model.layers.3.q_proj` is one of `model.layers.*.q_proj`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

_INDEX = re.compile(r"(?<![^._:\[])\d{1,9}(?![^._:\]])")  # a number between separators
_DIGITS = re.compile(r"(\d{1,9})")
_HERE = "\0"  # no name of a tensor holds it
Indices = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Names that differ in indices only.

    `name` has a `*` for every index that varies; `indices` are the values there, one tuple a
    member, in order; `members` the positions of these names in the list that was given. `missing`
    are values that other families of the same prefix have (layers that this one leaves out).
    """

    name: str
    indices: tuple[Indices, ...]
    members: tuple[int, ...]
    missing: tuple[Indices, ...] = ()


@lru_cache(maxsize=32)  # the adapters of a fleet name the same modules
def families(names: tuple[str, ...]) -> tuple[Family, ...]:
    """The families of these names, sorted by name."""
    grouped: dict[str, list[tuple[Indices, int]]] = defaultdict(list)
    for position, name in enumerate(names):
        indices = tuple(int(number) for number in _INDEX.findall(name))
        grouped[_INDEX.sub(_HERE, name)].append((indices, position))
    found = [_family(template, sorted(members)) for template, members in grouped.items()]
    known: dict[str, set[Indices]] = defaultdict(set)
    for family in found:
        known[_prefix(family.name)].update(family.indices)
    return tuple(
        Family(
            family.name,
            family.indices,
            family.members,
            tuple(sorted(known[_prefix(family.name)].difference(family.indices)))
            if "*" in family.name
            else (),
        )
        for family in sorted(found, key=lambda family: family.name)
    )


def _family(template: str, members: Sequence[tuple[Indices, int]]) -> Family:
    """A family whose constant indices are part of its name."""
    columns = list(zip(*(indices for indices, _ in members), strict=True))
    varies = [len(set(column)) > 1 for column in columns]
    parts = template.split(_HERE)
    name = parts[0]
    for column, varying, part in zip(columns, varies, parts[1:], strict=True):
        name += ("*" if varying else str(column[0])) + part
    kept = tuple(
        tuple(value for value, varying in zip(indices, varies, strict=True) if varying)
        for indices, _ in members
    )
    return Family(name, kept, tuple(position for _, position in members))


def _prefix(name: str) -> str:
    return name[: name.rfind("*") + 1]


def natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts layer 10 behind layer 9."""
    parts = _DIGITS.split(name)
    return list(zip(parts[::2], [*map(int, parts[1::2]), -1], strict=True))


def ranges(indices: Iterable[Indices]) -> str:
    """Index tuples as people write them: "0–4, 6–29", "0–3 × 0–1", "0.1, 2.0"."""
    found = sorted(set(indices))
    if not found or not found[0]:
        return ""
    columns = [sorted(set(column)) for column in zip(*found, strict=True)]
    count = 1
    for column in columns:
        count *= len(column)
    if count == len(found):
        return " × ".join(map(_runs, columns))
    return ", ".join(".".join(map(str, one)) for one in found)


def _runs(values: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
