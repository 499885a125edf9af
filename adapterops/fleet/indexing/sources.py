"""Sources of a fleet: folders, URIs or a manifest, and which tenant is whose.

The name of a manifest is no part of what a tenant is: another source that lists the same tenant
with the same adapter takes it over. One that lists another adapter is a mistake, most likely the
wrong folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from adapterops.errors import UsageError
from adapterops.files.remote import is_remote
from adapterops.fleet.indexing.store import Known
from adapterops.fleet.types import Tenant


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be indexed: paths or URIs, or a manifest; of its tenants one shard (i, n)."""

    roots: tuple[str, ...]
    manifest: str | None = None
    pattern: str | None = None
    shard: tuple[int, int] = (1, 1)

    @property
    def places(self) -> list[str]:
        """What tells one source from another, wherever the command is run."""
        if self.manifest is not None:
            return [os.path.abspath(self.manifest)]
        return [_place(root) for root in self.roots]

    @property
    def part(self) -> str:
        """The shard as it is written."""
        return f"{self.shard[0]}/{self.shard[1]}"


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether a tenant is of shard (i, n), by the SHA-256 of its name: the same on any machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % shard[1] == shard[0] - 1


def _place(root: str) -> str:
    return root.rstrip("/") if is_remote(root) else os.path.abspath(root)


def place_of(tenant: Tenant, source: Source) -> str:
    """Which of a source's places a tenant was found in."""
    places = source.places
    if len(places) == 1:
        return places[0]
    above = [p for p in places if f"{tenant.location}/".startswith(f"{p.rstrip('/')}/")]
    return max(above, key=len, default=places[0])


def check_sources(
    source: Source, tenants: Mapping[str, Tenant], known: Mapping[str, Known]
) -> None:
    """Raise UsageError for a tenant of a source that the index has from elsewhere."""
    for name, tenant in tenants.items():
        has = known.get(name)
        if has and not has.vanished and is_elsewhere(tenant, has, source):
            raise UsageError(
                f"the tenant {name!r} is in the index from {has.tenant.path}, and is found as "
                f"{tenant.path} too",
                hint="a tenant is served by one adapter: give each a name of its own by a "
                "manifest or pattern, or index this source into another FLEET",
            )


def is_elsewhere(tenant: Tenant, known: Known, source: Source) -> bool:
    """Whether the index has a tenant from another source, with an adapter in another place."""
    return known.source not in source.places and known.tenant.location != tenant.location


def note_left(
    others: Collection[str],
    mine: Collection[str],
    known: Mapping[str, Known],
    note: Callable[[str], None],
) -> None:
    """Say which tenants other sources still have, of those that some were taken over from."""
    for other in sorted(others):
        left = sorted(
            name
            for name, has in known.items()
            if has.source == other and name not in mine and not has.vanished
        )
        if left:
            note(
                f"{len(left)} tenants stay as {other} listed them, {left[0]!r} first: "
                "--remove takes them out"
            )
