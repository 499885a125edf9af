"""What the index says of tenants beside each other, kept with it until who they are changes."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from adapterops.fleet.indexing.lineage import lineages
from adapterops.fleet.indexing.near import near_duplicates
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.indexing.store import Store

Groups = tuple[tuple[str, ...], ...]


class Alike(NamedTuple):
    """Groups of tenants, sorted, the largest first."""

    near: Groups
    lineages: Groups


def alike(fleet: Fleet, store: Store) -> Alike:
    """Near duplicates and lineages of the index that `store` writes, found only once."""
    state = json.dumps([(r.tenant.name, r.content) for r in fleet.records if r.status == "ok"])
    digest = hashlib.sha256(state.encode()).hexdigest()
    noted = store.noted(digest)
    if noted is None:
        found = Alike(largest_first(near_duplicates(fleet)), largest_first(lineages(fleet)))
        store.note(digest, json.dumps(found))
        return found
    return Alike(*(tuple(map(tuple, groups)) for groups in json.loads(noted)))


def largest_first(groups: list[tuple[str, ...]]) -> Groups:
    """Groups in the order that they are reported in."""
    return tuple(sorted(groups, key=lambda names: (-len(names), names)))
