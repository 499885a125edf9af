"""Who is a tenant: a manifest, a pattern over paths, or one adapter, one tenant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from adapterops.errors import FileError, UsageError
from adapterops.files.header import Header
from adapterops.files.objects import trimmed
from adapterops.files.remote import is_remote, listing
from adapterops.files.source import Source
from adapterops.fleet.tenants.manifest import read_manifest
from adapterops.fleet.tenants.search import LocalTree, Pattern, RemoteTree, Tree, adapters_in
from adapterops.fleet.types import Tenant
from adapterops.formats.group import group, not_an_adapter
from adapterops.formats.model import Ref
from adapterops.provenance import base_name

Note = Callable[[str], None]
Path = str | os.PathLike[str]


def find_tenants(
    root: Path | Sequence[Path] = (),
    *,
    manifest: Path | None = None,
    pattern: str | None = None,
    note: Note = lambda text: None,
) -> list[Tenant]:
    """The tenants at `root`, one folder, file or URI or several, sorted by name.

    With a manifest its lines are the tenants and no root is given. With a pattern a tenant is what
    `{tenant}` matched, else the adapter's path below its root. Nothing is opened but folders and
    the manifest; `note` is told what was passed over. Raises UsageError for two adapters of one
    tenant, naming both, FileError where there is none or a bucket cannot be reached.
    """
    roots = [root] if isinstance(root, str | os.PathLike) else list(root)
    if manifest is not None:
        if roots or pattern is not None:
            raise UsageError(
                "a manifest says where its tenants are: give no PATH and no tenant pattern",
                path=manifest,
            )
        found = read_manifest(os.fspath(manifest))
    elif not roots:
        raise UsageError("no input: give PATH, or a list of tenants with --manifest FILE")
    else:
        rule = None if pattern is None else Pattern(pattern)
        found = [tenant for path in roots for tenant in _below(os.fspath(path), rule, note)]
    return _each_once(sorted(found, key=lambda tenant: tenant.name))


def _below(root: str, pattern: Pattern | None, note: Note) -> Iterator[Tenant]:
    root = trimmed(root) if is_remote(root) else root
    whole = root if is_remote(root) else os.path.abspath(root)
    tree = _tree(root, note)
    if pattern is not None:
        hits = iter(() if tree is None else pattern.adapters_in(tree, note))
    elif tree is None:
        hits = iter([("", base_name(root))])
    else:
        hits = ((name, name or base_name(root)) for name in adapters_in(tree, note))
    empty = True
    for name, tenant in hits:
        try:
            f"{name}{tenant}".encode()
        except UnicodeEncodeError:
            note(f"{os.path.join(root, name)!r}: passed over, the name is not UTF-8")
            continue
        empty = False
        path = name if root in (".", "./") and name else f"{root.rstrip('/')}/{name}"
        place = f"{whole.rstrip('/')}/{name}"
        yield Tenant(tenant, path if name else root, place if name else whole)
    if empty:
        what = "no adapter in it: no folder with an adapter_config.json, no .safetensors file"
        nothing = f"nothing below it matches {pattern.text!r}" if pattern is not None else what
        raise FileError(nothing, path=root)


def _tree(root: str, note: Note) -> Tree | None:
    """The folders at a root, None for a single file."""
    if is_remote(root):
        entries = listing(root)
        if not entries:
            raise FileError("no such file or folder, or an empty one", path=root)
        return (
            None if [entry.path for entry in entries] == [root] else RemoteTree(root, entries, note)
        )
    if not os.path.exists(root):
        raise FileError("no such file or directory", path=root)
    return LocalTree(root, note) if os.path.isdir(root) else None


def _each_once(tenants: list[Tenant]) -> list[Tenant]:
    """The same tenants; UsageError where a name comes twice."""
    for first, second in pairwise(tenants):
        if first.name == second.name:
            raise UsageError(
                f"the tenant {first.name!r} has two adapters, {first.path} and {second.path}",
                hint="list the one that serves it in a manifest, or make the pattern narrower",
            )
    return tenants


def check_adapter(source: Source, header: Header) -> None:
    """Raise FormatError for a header without a single name that an adapter's tensors have.

    For `files.remote.located(…, accept=check_adapter)`: of a base model in a bucket no more is read
    than that.
    """
    refs = {
        name: Ref(
            source, name, entry.dtype, entry.shape, header.data_start + entry.start, entry.nbytes
        )
        for name, entry in header.tensors.items()
    }
    found = group(refs, source.path)
    if not refs or not (found.groups or found.deltas or found.problems):
        raise not_an_adapter(refs, source.path)
