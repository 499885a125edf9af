"""Who is new to a plan: tenants as they are named on the command line, and their signatures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

from adapterops.errors import (
    AdapterOpsError,
    FormatError,
    MemoryLimitError,
    UnsupportedError,
    UsageError,
)
from adapterops.files.remote import is_remote, located
from adapterops.files.scratch import scratch
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.grouping.partition import kind_key
from adapterops.fleet.replanning.joining import Newcomer
from adapterops.fleet.signing.eligible import reason
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.tenants.finding import find_tenants
from adapterops.fleet.types import Signature, Tenant
from adapterops.stream import Compute, Job, run

Place = str | os.PathLike[str]
_PEAK = 256 << 20  # bytes of one signature in the making


def new_tenants(
    new: Sequence[Place] | Place | Mapping[str, Place], note: Callable[[str], None]
) -> list[Tenant]:
    """Who is new, sorted by name; UsageError for nobody, or somebody twice."""
    if isinstance(new, Mapping):
        found = [_named(name, os.fspath(path), note) for name, path in new.items()]
        new = []
    else:
        found = []
    plain = []
    for path in [new] if isinstance(new, str | os.PathLike) else list(new):
        text = os.fspath(path)
        name, equals, place = text.partition("=")
        if not equals or not name or not place or is_remote(text) or os.path.lexists(text):
            plain.append(text)
        else:
            found.append(_named(name, place, note))
    if plain:
        found += find_tenants(plain, note=note)
    found.sort(key=lambda tenant: tenant.name)
    for one, other in pairwise(found):
        if one.name == other.name:
            raise UsageError(
                f"{one.path} and {other.path} are both of the tenant {one.name!r}",
                hint="name them: tenant=path",
            )
    if not found:
        raise UsageError("no input: give the adapters to assign")
    for tenant in found:
        try:
            tenant.name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"the tenant {tenant.name!r} is not UTF-8",
                hint="name it by text that a plan can hold: tenant=path",
            ) from None
    return found


def _named(name: str, path: str, note: Callable[[str], None]) -> Tenant:
    found = find_tenants([path], note=note)
    if len(found) != 1:
        raise UsageError(
            f"{name}={path}: there are {len(found)} adapters, {found[0].path} first",
            hint="give the path of one",
        )
    return replace(found[0], name=name)


def signed(
    tenants: Sequence[Tenant],
    seed: int,
    aliases: Mapping[str, str],
    consent: Consent,
    on: Compute,
    *,
    allow_pickle: bool = False,
    strict: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Newcomer]:
    """The tenants with their adapters' signatures, in their order.

    With `strict` the first adapter that is broken (FormatError) or cannot be compared
    (UnsupportedError) is raised.
    """
    result: list[Newcomer] = []
    remote = any(is_remote(tenant.location) for tenant in tenants)
    with scratch() if remote else nullcontext() as inside:
        jobs = [
            Job(t.path, _signature, (t.location, seed, allow_pickle, inside), _PEAK)
            for t in tenants
        ]
        for tenant, found in zip(tenants, run(jobs, on), strict=True):
            if strict and found.status in ("broken", "ineligible"):
                kind = FormatError if found.status == "broken" else UnsupportedError
                raise kind(found.reason, path=tenant.path)
            key = partition_key(found, tenant.name, aliases, consent)
            result.append(Newcomer(tenant, found, key))
            if progress is not None:
                progress("reading", len(result), len(tenants))
    return result


def _signature(location: str, seed: int, allow_pickle: bool, inside: Place | None) -> Signature:
    try:
        with located(location, inside=inside, allow_pickle=allow_pickle) as path:
            return signature(path, seed, allow_pickle=allow_pickle)
    except MemoryLimitError:
        raise
    except AdapterOpsError as error:  # of a bucket
        return Signature("broken", reason(error))


def partition_key(
    found: Signature, name: str, aliases: Mapping[str, str], consent: Consent
) -> tuple[str, ...]:
    """The key of `partition.Partition` without the set of shapes, which sketches compare."""
    return kind_key(found, consent.key(name), aliases)
