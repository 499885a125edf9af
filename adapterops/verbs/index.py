"""index: what a fleet's adapters are, kept so that none has to be read twice."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Literal

from adapterops.errors import UsageError
from adapterops.files.output import resolved
from adapterops.fleet.indexing.alike import alike
from adapterops.fleet.indexing.creating import has_index
from adapterops.fleet.indexing.index import Done, index_source, tenants_of
from adapterops.fleet.indexing.merging import check_seed, merge_fleets, open_parts
from adapterops.fleet.indexing.opened import open_fleet
from adapterops.fleet.indexing.report import IndexReport, report
from adapterops.fleet.indexing.sources import Source
from adapterops.fleet.indexing.store import Store
from adapterops.fleet.ray_run import run_by
from adapterops.options import as_seed, compute
from adapterops.suggestion import meant

_Path = str | os.PathLike[str]


def index(
    source: _Path | Iterable[_Path] = (),
    *,
    out: _Path,
    manifest: _Path | None = None,
    pattern: str | None = None,
    shard: str | None = None,
    merge: bool = False,
    remove: str | Iterable[str] = (),
    restore: str | Iterable[str] = (),
    seed: int | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    memory: str | int | None = None,
    jobs: int | None = None,
    runner: Literal["threads", "ray"] = "threads",
    progress: Callable[[str, int, int], None] | None = None,
) -> IndexReport:
    """Bring the index FLEET at `out` up to date with the adapters of `source`, each read once.

    A run that was interrupted goes on where it stopped, and later ones read only what is new or
    changed, by ETag or size and time of change. An adapter that cannot be read is recorded and
    does not stop the run.

    Args:
        source: folders, files or URIs (`s3://`, `gs://`, `hf://`) with adapters, one or several.
        manifest: a CSV file `tenant,path[,traffic]` instead.
        pattern: who is a tenant, by the path below a source, as in
            `{tenant}/*/adapter_model.safetensors`. Without it, and without a manifest, that path
            is the tenant.
        shard: "i/n": only the i-th of n parts of the tenants, by a hash of their names.
        merge: `source` are indexes, of shards or of several sources; add what they hold to `out`.
        remove: tenants to off-board. Nothing of them stays but their names, and no later run takes
            them in again.
        restore: tenants that were off-boarded, to be taken in again by this run or a later one.
        seed: of the sketches; that of the index, 0 for a new one. Only equal seeds compare.
        strict: stop at the first adapter that is broken or cannot be compared.
        allow_pickle: read .bin and .pt files (weights_only, never code).
        memory: bytes in flight. jobs: processes. progress: called with (what, done, count).
        runner: threads, processes of this machine; ray, tasks of the Ray cluster that it is a node
            of, all of whose nodes see the files by the same names.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`. What was finished stays in the
            index, and the same call goes on from there.
    """
    out = os.fspath(out)
    resolved(out)  # or UsageError, before anything is looked for
    roots = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths = tuple(os.fspath(root) for root in roots)
    removing, restoring = _names(remove), _names(restore)
    listed = None if manifest is None else os.fspath(manifest)
    place = Source(paths, listed, pattern, _shard(shard))
    if seed is not None:
        as_seed(seed)
    on = compute("cpu", memory, jobs)
    _check(place, shard, merge, removing, restoring)
    start = time.monotonic()
    notes: list[str] = []
    adds = not merge and (paths or listed is not None)
    with run_by(runner, on, jobs) as where:
        fleets = open_parts(paths, out, seed) if merge else []
        wanted = fleets[0].seed if fleets else seed
        tenants = tenants_of(place, out, notes.append) if adds else {}
        with _opened(out, wanted, creates=bool(fleets or adds)) as store:
            _edit(store, removing, restoring)
            done = Done()
            if merge:
                done = Done(unchanged=merge_fleets(store, fleets, progress))
            elif adds:
                done = index_source(
                    store,
                    place,
                    tenants,
                    where,
                    strict=strict,
                    allow_pickle=allow_pickle,
                    progress=progress,
                    note=notes.append,
                )
            fleet = open_fleet(out)
            beside = alike(fleet, store)
    return report(
        fleet,
        beside,
        done,
        time.monotonic() - start,
        removed=removing,
        restored=restoring,
        notes=tuple(notes),
    )


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    return tuple(dict.fromkeys(names))


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f"--shard {text!r}: expected i/n with 1 ≤ i ≤ n, such as 2/8")
    return int(found[1]), int(found[2])


def _check(
    source: Source,
    shard: str | None,
    merge: bool,
    remove: tuple[str, ...],
    restore: tuple[str, ...],
) -> None:
    """Refuse combinations that make no sense, and a call that asks for nothing."""
    if merge and (source.manifest is not None or source.pattern is not None or shard is not None):
        raise UsageError("--merge puts indexes together: their tenants are known already")
    both = sorted({*remove} & {*restore})
    if both:
        raise UsageError(f"the tenant {both[0]!r} is to be removed and restored")
    if not (source.roots or source.manifest is not None or remove or restore):
        raise UsageError("no input: give PATH, or a list of tenants with --manifest FILE")


def _opened(out: str, seed: int | None, *, creates: bool) -> Store:
    """The index to write, a new one where there is none and one is wanted."""
    if creates and not has_index(out):
        return Store.create(out, seed or 0)
    store = Store.open(out)
    try:
        check_seed(out, store.seed, store.seed if seed is None else seed)
    except BaseException:
        store.close()
        raise
    return store


def _edit(store: Store, remove: tuple[str, ...], restore: tuple[str, ...]) -> None:
    """Off-board tenants and take others back. Raises UsageError for names that nobody has."""
    if not (remove or restore):
        return
    removed, known = store.removed(), store.known()
    _check_known(remove, known.keys() | removed, "in the index")
    _check_known(restore, removed, "among the removed")
    if remove:
        store.forget(remove)
    if restore:
        store.restore(restore)


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    there = set(known)
    for name in names:
        if name not in there:
            raise UsageError(f"the tenant {name!r} is not {where}", hint=meant(name, there))
