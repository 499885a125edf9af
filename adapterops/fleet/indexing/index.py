"""index: tenants found, those whose files are new or changed looked at, their signatures stored.

The run is a loop over what `looking.look` gives for each tenant, in their order: some hundred at a
time, or what a quarter of a minute brought, go to the store. Memory holds the names and versions of
all tenants and the signatures of one batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial

from adapterops.batch import workers
from adapterops.batch.run import width_for
from adapterops.errors import AdapterOpsError, FileError, Interrupted, UsageError
from adapterops.files.objects import folder_listing
from adapterops.files.output import NOTHING_LEFT
from adapterops.files.remote import is_remote
from adapterops.files.scratch import scratch
from adapterops.fleet.indexing.chunks import ROWS
from adapterops.fleet.indexing.looking import Looked, Task, look, look_at_all, marked
from adapterops.fleet.indexing.sources import (
    Source,
    check_sources,
    in_shard,
    is_elsewhere,
    note_left,
    place_of,
)
from adapterops.fleet.indexing.store import Known, Store
from adapterops.fleet.tenants.finding import find_tenants
from adapterops.fleet.tenants.versions import versions
from adapterops.fleet.types import Signature, Tenant
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]
_FEW, _CHUNK = 8, 4  # tenants that are not worth another process, that one takes at a time
_FAR_CHUNK = 16  # that another machine takes at a time
_PROCESS = 300_000_000  # bytes of a process at work, half of them random signs that it remembers
_REMOTE = 8  # processes for a store, which mostly wait
_EVERY = 15.0  # seconds of work that an interruption loses at most, if no batch was full
_UNREACHABLE = 8  # tenants in a row after which the source itself is asked for


@dataclass(frozen=True, slots=True)
class Done:
    """What a run did: tenants looked at, their bytes, those as before, gone, or off-boarded."""

    read: tuple[str, ...] = ()
    size: int = 0
    unchanged: int = 0
    vanished: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def tenants_of(source: Source, out: str, note: Callable[[str], None]) -> dict[str, Tenant]:
    """The tenants of a source's shard by name, in order; nothing within `out` is one.

    Raises UsageError where that would leave out a tenant of a manifest, or all.
    """
    own = os.path.realpath(out) + os.sep
    found = find_tenants(source.roots, manifest=source.manifest, pattern=source.pattern, note=note)
    inside = {
        tenant.name: tenant
        for tenant in found
        if not is_remote(tenant.location)
        and f"{os.path.realpath(tenant.location)}/".startswith(own)
    }
    if inside:
        first = next(iter(inside))
        if source.manifest is not None or len(inside) == len(found):
            raise UsageError(
                f"the adapter of the tenant {first!r} lies within the index {out}",
                path=inside[first].path,
                hint="move it to another folder, or index into another FLEET",
            )
        note(f"{len(inside)} adapters within {out} passed over, {first!r} first")
    return {
        tenant.name: tenant
        for tenant in found
        if in_shard(tenant.name, source.shard) and tenant.name not in inside
    }


def index_source(
    store: Store,
    source: Source,
    tenants: Mapping[str, Tenant],
    on: Compute,
    *,
    strict: bool,
    allow_pickle: bool,
    progress: Progress | None,
    note: Callable[[str], None],
) -> Done:
    """Bring the index up to date with a source.

    Whatever fails, and an interruption, keeps what was finished; the error says so. With `strict`
    the first adapter that is broken or cannot be compared ends the run with its error. A tenant
    that another source listed with the same adapter (a manifest that was renamed) is of this one
    from now on; those that it leaves behind are noted. Raises UsageError for a tenant that the
    index has from another source with another adapter.
    """
    removed = store.removed()
    mine = {name: tenant for name, tenant in tenants.items() if name not in removed}
    known = store.known()
    check_sources(source, mine, known)
    found = versions(list(mine.values()), source.roots)
    found = {name: marked(version, allow_pickle) for name, version in found.items()}
    todo = [
        tenant
        for name, tenant in mine.items()
        if _is_new(tenant, known.get(name), found[name], source)
    ]
    again = {tenant.name for tenant in todo}
    others = {known[name].source for name in mine if name in known} - {*source.places}
    vanished = _vanished(source, known, tenants.keys() | removed)
    for place in source.places:
        store.set_part(place, source.part, False)
    store.update(
        (tenant, place)
        for name, tenant in mine.items()
        if name not in again and _moved(tenant, known[name], place := place_of(tenant, source))
    )
    store.vanish(vanished)
    run = _Run(store, source, strict, len(todo), progress)
    run.go([(tenant, found[tenant.name]) for tenant in todo], allow_pickle, on)
    for place in source.places:
        store.set_part(place, source.part, True)
    if others:
        store.abandon(others)
        note_left(others, mine, known, note)
    store.tidy()
    return Done(
        tuple(tenant.name for tenant in todo),
        run.size,
        len(mine) - len(todo),
        tuple(sorted(name for name in vanished if not known[name].vanished)),
        tuple(name for name in tenants if name in removed),
    )


def _is_new(tenant: Tenant, known: Known | None, version: str, source: Source) -> bool:
    """Whether a tenant has to be read."""
    if known is None or is_elsewhere(tenant, known, source):
        return True
    return not known.version or known.version != version


def _moved(tenant: Tenant, known: Known, place: str) -> bool:
    """Whether anything but the files of a tenant that is not read changed."""
    return known.vanished or tenant != known.tenant or place != known.source


def _vanished(source: Source, known: Mapping[str, Known], there: Collection[str]) -> list[str]:
    """Tenants that the index has of this part of the source and that are not there any more."""
    places = set(source.places)
    return [
        name
        for name, has in known.items()
        if has.source in places and name not in there and in_shard(name, source.shard)
    ]


class _Run:
    """The loop: what was looked at and not yet stored, and what was stored."""

    def __init__(
        self, store: Store, source: Source, strict: bool, count: int, progress: Progress | None
    ) -> None:
        self.size = 0  # bytes of the adapters looked at
        self._store, self._source, self._strict = store, source, strict
        self._count, self._progress = count, progress
        self._pending: list[tuple[Tenant, str, Signature]] = []
        self._stored, self._since, self._lost = 0, time.monotonic(), 0

    def go(self, items: Sequence[tuple[Tenant, str]], allow_pickle: bool, on: Compute) -> None:
        """Look at all of `items`, tenants with the versions that they were listed with."""
        try:
            with closing(_looks(items, self._store.seed, allow_pickle, on)) as looks:
                for (tenant, _), found in zip(items, looks, strict=True):
                    self._take(tenant, found)
            self._flush()
        except KeyboardInterrupt:
            self._flush()
            raise self._continued(Interrupted("interrupted")) from None
        except AdapterOpsError as error:
            self._keep(error)
            raise self._continued(error) from None

    def _take(self, tenant: Tenant, found: Looked) -> None:
        if self._strict and found.error is not None:
            raise found.error
        self._pending.append((tenant, *found[:2]))
        self.size += found.signature.size
        self._lost = self._lost + 1 if found.is_unreachable else 0
        if self._lost and self._lost % _UNREACHABLE == 0:
            self._check_source(tenant)
        if len(self._pending) >= ROWS or time.monotonic() - self._since > _EVERY:
            self._flush()
        if self._progress:
            done = self._stored + len(self._pending)
            self._progress("indexing", done, self._count)

    def _flush(self) -> None:
        """Store what is pending; once only, for what fails is not tried again."""
        batch, self._pending = self._pending, []
        sources: dict[str, list[tuple[Tenant, str, Signature]]] = {}
        for item in batch:
            sources.setdefault(place_of(item[0], self._source), []).append(item)
        for place, mine in sources.items():
            self._store.put(mine, place)
            self._stored += len(mine)
        self._since = time.monotonic()

    def _check_source(self, tenant: Tenant) -> None:
        """Raise FileError if a whole source has gone: what was known of its tenants is kept."""
        place = place_of(tenant, self._source)
        if is_remote(tenant.location):
            try:
                folder_listing(place if is_remote(place) else tenant.location.rpartition("/")[0])
            except FileError:
                del self._pending[-_UNREACHABLE:]
                raise
        elif not os.path.exists(place):
            del self._pending[-_UNREACHABLE:]
            raise FileError("has gone while it was indexed", path=place)

    def _keep(self, error: AdapterOpsError) -> None:
        """Store what is pending if that is not what failed."""
        try:
            self._flush()
        except AdapterOpsError as second:
            if second is not error:
                raise second from error

    def _continued(self, error: AdapterOpsError) -> AdapterOpsError:
        """The error, saying how the run goes on."""
        kept = (
            f"{self._stored} of {self._count} adapters are in the index, the same command goes on"
        )
        said = [error.hint] if error.hint and error.hint != NOTHING_LEFT else []
        error.hint = "; ".join([*said, kept])
        return error


def _looks(
    items: Sequence[tuple[Tenant, str]], seed: int, allow_pickle: bool, on: Compute
) -> Generator[Looked, None, None]:
    """What `look` gives for each item, in order, from as many processes as pay."""
    if on.spread is not None:
        chunks = [items[at : at + _FAR_CHUNK] for at in range(0, len(items), _FAR_CHUNK)]
        far = partial(look_at_all, Task(seed, allow_pickle, True))
        with closing(on.spread(far, chunks)) as results:
            for found in results:
                yield from found
        return
    remote = any(is_remote(tenant.location) for tenant, _ in items)
    jobs = max(on.threads, _REMOTE) if remote else on.threads
    jobs = max(1, min(jobs, on.memory // _PROCESS))
    width = width_for(len(items), jobs, few=_FEW, chunk=_CHUNK)
    with scratch() if remote else nullcontext() as folder:
        inside = None if folder is None else os.fspath(folder)
        work = partial(look, Task(seed, allow_pickle, width > 1, inside))
        if width > 1:
            yield from workers.ordered_map(work, items, width, _CHUNK)
        else:
            yield from map(work, items)
