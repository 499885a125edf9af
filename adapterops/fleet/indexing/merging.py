"""Indexes put together: of shards, or of several sources.

The result does not depend on the order or on how the indexes are grouped: tenants, parts and
removals are united, and a tenant that two of them know in two ways is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from adapterops.errors import IncompatibleError, UsageError
from adapterops.fleet.indexing.chunks import ROWS
from adapterops.fleet.indexing.opened import Fleet, open_fleet
from adapterops.fleet.indexing.store import Known, Store
from adapterops.fleet.types import Record

Progress = Callable[[str, int, int], None]


def open_parts(paths: Sequence[str], out: str, seed: int | None) -> list[Fleet]:
    """The indexes to merge. Raises UsageError, and IncompatibleError where their seeds differ."""
    if not paths:
        raise UsageError("no input: give the FLEETs to merge")
    for path in paths:
        if os.path.realpath(path) == os.path.realpath(out):
            raise UsageError("the output is one of the indexes to merge", path=out)
    fleets = [open_fleet(path) for path in paths]
    for fleet in fleets:
        check_seed(fleet.path, fleet.seed, fleets[0].seed if seed is None else seed)
    return fleets


def check_seed(path: str, seed: int, wanted: int) -> None:
    """Raise IncompatibleError for an index of another seed: its sketches compare to none else."""
    if seed != wanted:
        raise IncompatibleError(
            f"the index has the seed {seed}, expected {wanted}",
            path=path,
            hint="sketches of two seeds cannot be compared; index with one, into a new FLEET",
        )


def merge_fleets(store: Store, fleets: Sequence[Fleet], progress: Progress | None) -> int:
    """Add to an index all that others hold; how many tenants were new to it.

    Run again after an interruption it goes on with what is missing. Raises IncompatibleError for a
    tenant that two indexes know with different files.
    """
    for fleet in fleets:
        _set_parts(store, fleet, finished=False)
    store.forget(frozenset().union(*(fleet.removed for fleet in fleets)))
    removed = store.removed()
    total, done, added = sum(len(fleet.records) for fleet in fleets), 0, 0
    for fleet in fleets:
        known = store.known()
        new = []
        for record in fleet.records:
            if record.tenant.name in removed:
                continue
            has = known.get(record.tenant.name)
            if has is None:
                new.append(record)
            else:
                _check_same(fleet, record, has)
        for batch in _batches(fleet, new):
            store.put(
                [
                    (record.tenant, record.version, found)
                    for record, found in zip(batch, fleet.signatures(batch), strict=True)
                ],
                fleet.sources[batch[0].tenant.name],
            )
            added += len(batch)
            if progress:
                progress("merging", done + added, total)
        done += len(fleet.records) - len(new)
    for fleet in fleets:
        _set_parts(store, fleet, finished=True)
    store.tidy()
    return added


def _batches(fleet: Fleet, records: Sequence[Record]) -> list[list[Record]]:
    """Records of one source each, some hundred at a time."""
    sources: dict[str, list[Record]] = {}
    for record in records:
        sources.setdefault(fleet.sources[record.tenant.name], []).append(record)
    return [
        mine[first : first + ROWS]
        for mine in sources.values()
        for first in range(0, len(mine), ROWS)
    ]


def _check_same(fleet: Fleet, record: Record, has: Known) -> None:
    mine = record.version, fleet.sources[record.tenant.name], record.status, record.reason
    if mine != (has.version, has.source, has.status, has.reason) or has.vanished:
        raise IncompatibleError(
            f"the tenant {record.tenant.name!r} is known already, from other files or another "
            f"state of them: {has.tenant.path} and {record.tenant.path}",
            path=fleet.path,
            hint="index the newer source again, and merge into a new FLEET",
        )


def _set_parts(store: Store, fleet: Fleet, *, finished: bool) -> None:
    """Note the parts of an index; those that it had not finished itself stay unfinished."""
    there = store.parts()
    for (source, shard), is_done in fleet.parts.items():
        if not there.get((source, shard)):
            store.set_part(source, shard, finished and is_done)
