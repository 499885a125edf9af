"""Who can be compared at all: tenants on one base, of one dialect, with equal extras and consent.

Sharing never crosses partitions. Two adapters go together if they name the same base (after
`--base-alias`), are written in one dialect, carry the same extras to the bit (heads and trained
tokens are values, not changes), may meet by policy, and agree in shape wherever they change the
same module. Which modules they change may differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterops.fleet.types import Layout, Record, Signature

Key = tuple[str, ...]


class _Fleet(Protocol):
    @property
    def records(self) -> Sequence[Record]: ...
    @property
    def layouts(self) -> Sequence[Layout]: ...


class _Consent(Protocol):
    def groups(self, tenants: Iterable[str]) -> Sequence[tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class Partition:
    """Tenants, sorted by name, that may be compared with each other.

    `key` is what all have in common: base, dialect, hash of the extras, the policy's kind of key
    and its name, and the number of their set of shapes. `why` says it in words.
    """

    records: tuple[Record, ...]
    key: Key
    why: str


def partitions(fleet: _Fleet, aliases: Mapping[str, str], consent: _Consent) -> list[Partition]:
    """The partitions of all tenants whose adapters change something, sorted by key.

    `aliases` maps names of bases to those that they stand for.
    """
    records = sorted(
        (record for record in fleet.records if record.status == "ok" and record.layout >= 0),
        key=lambda record: record.tenant.name,
    )
    owners = consent.groups([record.tenant.name for record in records])
    alike: defaultdict[Key, list[Record]] = defaultdict(list)
    for record, owner in zip(records, owners, strict=True):
        alike[kind_key(record, owner, aliases)].append(record)
    found = []
    for key in sorted(alike):
        worlds = _worlds({record.layout for record in alike[key]}, fleet.layouts)
        members: defaultdict[int, list[Record]] = defaultdict(list)
        for record in alike[key]:
            members[worlds[record.layout]].append(record)
        count = len(members)
        found += [
            Partition(tuple(members[world]), (*key, str(world)), _why(key, world, count))
            for world in sorted(members)
        ]
    return found


def kind_key(found: Record | Signature, owner: Key, aliases: Mapping[str, str]) -> Key:
    """A partition's key without its set of shapes; `owner` is the policy's (`Consent.key`)."""
    return aliases.get(found.base, found.base), found.dialect, found.extras, *owner


def _worlds(used: Iterable[int], layouts: Sequence[Layout]) -> dict[int, int]:
    """layout -> the set of shapes that it belongs to, the widest layouts deciding."""
    order = sorted(
        used, key=lambda one: (-len(layouts[one].stems), layouts[one].stems, layouts[one].shapes)
    )
    worlds: list[dict[str, Any]] = []
    result = {}
    for one in order:
        shapes = dict(zip(layouts[one].stems, layouts[one].shapes, strict=True))
        for number, world in enumerate(worlds):
            if _fit(shapes, world):
                world.update(shapes)
                result[one] = number
                break
        else:
            worlds.append(shapes)
            result[one] = len(worlds) - 1
    return result


def _fit(shapes: Mapping[str, Any], world: Mapping[str, Any]) -> bool:
    common = shapes.keys() & world.keys()
    return bool(common) and all(shapes[stem] == world[stem] for stem in common)


def _why(key: Key, world: int, count: int) -> str:
    base, dialect, extras, kind, name = key
    parts = [f"base {base!r}" if base else "no base named", dialect]
    if extras:
        parts.append(f"extras {extras[:8]}")
    if kind == "private":
        parts.append("private")
    elif name:
        parts.append(f"share group {name!r}")
    if count > 1:
        parts.append(f"set {world + 1} of {count} of module shapes")
    return ", ".join(parts)
