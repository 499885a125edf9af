"""Whether tenants' files are still those that were indexed: of others nothing can be proved.

Sketches, norms and hashes are of the bytes that `index` read. Who has changed since is served by
its own file, as it is now; who is gone is not served at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from adapterops.errors import ChangedError
from adapterops.fleet.indexing.looking import Task, look, marked
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.tenants.versions import versions
from adapterops.fleet.types import Record

AGAIN = "index again, then plan"


def stale(fleet: Fleet, records: Sequence[Record]) -> dict[str, str]:
    """The versions now of those tenants whose files are not as indexed, "" for who is gone.

    Raises FileError where a store cannot be reached.
    """
    roots = set(fleet.sources.values())
    now = versions([record.tenant for record in records], roots)
    return {
        record.tenant.name: now[record.tenant.name]
        for record in records
        if not _is(record, now[record.tenant.name])
    }


def _is(record: Record, version: str) -> bool:
    return record.version in (version, marked(version, True))


def as_it_is(record: Record, version: str, seed: int, *, allow_pickle: bool) -> Record:
    """The record of a tenant whose files changed, without its place in the index."""
    task = Task(seed, allow_pickle, apart=False)
    found = look(task, (record.tenant, version)).signature
    return replace(
        record,
        version=version,
        status=found.status,
        reason=found.reason,
        content=found.content,
        extras=found.extras,
        base=found.base,
        dialect=found.dialect,
        dtype=found.dtype,
        size=found.size,
        rank=found.rank,
        needed=found.needed,
        norm=found.norm,
        layout=-1,
        row=-1,
    )


def check_still(fleet: Fleet, names: Iterable[str]) -> None:
    """Raise ChangedError, naming one, where tenants' files have changed since they were indexed.

    Raises FileError where a store cannot be reached.
    """
    wanted = set(names)
    records = [record for record in fleet.records if record.tenant.name in wanted]
    changed = stale(fleet, records)
    if changed:
        path = next(r.tenant.path for r in records if r.tenant.name == min(changed))
        raise ChangedError("changed while the fleet was planned", path=path, hint=AGAIN)
