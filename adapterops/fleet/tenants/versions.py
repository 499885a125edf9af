"""Versions of tenants' files: what differs once an adapter may have changed, without reading it.

Of local files size and time of change count, of a store's its own mark (an ETag, a generation). A
copy that keeps the time keeps the version.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from adapterops.files.names import CONFIG, PICKLES, WEIGHTS, config_names
from adapterops.files.objects import Entry, folder_listing, trimmed
from adapterops.files.patience import REQUESTS
from adapterops.files.remote import is_remote, listing
from adapterops.fleet.types import Tenant

_TENSORS = (".safetensors", *PICKLES)


def versions(tenants: Sequence[Tenant], roots: Iterable[str] = ()) -> dict[str, str]:
    """By tenant the version of the weights and configs at its location, "" where there are none.

    Buckets among `roots` are listed once each, other URIs are asked one by one, `REQUESTS` at once.
    Raises FileError where a store cannot be reached.
    """
    folders: dict[str, list[Entry]] = {}
    listed = [trimmed(root) for root in roots if is_remote(root)]
    for root in listed:
        for entry in listing(root):
            folders.setdefault(entry.path.rpartition("/")[0], []).append(entry)

    def version(tenant: Tenant) -> str:
        place = tenant.location
        if not is_remote(place):
            return _text(_on_disk(place))
        if any(f"{place}/".startswith(f"{root}/") for root in listed):
            return _text(_in_store(place, folders))
        return _text(_in_store(place, None))

    if not any(is_remote(tenant.location) for tenant in tenants):
        return {tenant.name: version(tenant) for tenant in tenants}
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(version, tenants))
    return {tenant.name: text for tenant, text in zip(tenants, found, strict=True)}


def _text(files: Iterable[tuple[str, int, object]]) -> str:
    """A line `name size mark` for each file; "" without weights."""
    found = sorted(files, key=lambda file: file[0])
    if not any(name.lower().endswith(_TENSORS) for name, _, _ in found):
        return ""
    return "\n".join(f"{name} {size} {mark}" for name, size, mark in found)


def has_pickle(version: str) -> bool:
    """Whether one of the files of a version is a pickle."""
    names = (line.rsplit(" ", 2)[0].lower() for line in version.split("\n"))
    return any(name.endswith(PICKLES) for name in names)


def _on_disk(path: str) -> Iterator[tuple[str, int, object]]:
    folder, names = path, []
    if os.path.isdir(path):
        try:
            names = [name for name in os.listdir(path) if _matters(name)]
        except OSError:
            return
    else:
        folder, name = os.path.split(path)
        names = [name, *config_names(name)]
    for name in names:
        try:
            status = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):
            continue
        yield name, status.st_size, status.st_mtime_ns


def _in_store(
    uri: str, folders: dict[str, list[Entry]] | None
) -> Iterator[tuple[str, int, object]]:
    """The files of an adapter; `folders` are those of its store, None where they must be asked."""

    def inside(place: str) -> Sequence[Entry]:
        return folder_listing(place) if folders is None else folders.get(place, ())

    uri = trimmed(uri)
    below = [entry for entry in inside(uri) if entry.path != uri]
    for entry in below:
        name = entry.path.rpartition("/")[2]
        if _matters(name):
            yield name, entry.size, entry.version
    if below:
        return
    folder, _, name = uri.rpartition("/")
    wanted = {f"{folder}/{other}": other for other in (name, *config_names(name))}
    for entry in (*inside(folder), *inside(uri.rpartition(".")[0])):
        if entry.path in wanted:
            yield wanted[entry.path], entry.size, entry.version


def _matters(name: str) -> bool:
    return name == CONFIG or name in WEIGHTS or name.endswith(".safetensors")
