"""assign: an adapter of a plan for new tenants, each verified exactly, nobody else moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from adapterops.fleet.replanning.assigning import AssignReport
from adapterops.fleet.replanning.run import Options, assign_tenants
from adapterops.options import compute

_Path = str | os.PathLike[str]


def assign(
    plan: _Path,
    new: Sequence[_Path] | _Path | Mapping[str, _Path],
    *,
    out: _Path,
    policy: _Path | None = None,
    activations: _Path | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> AssignReport:
    """Serve new tenants, or tenants' new versions, by what a plan has, as far as its bound allows.

    The plan's index says who was off-boarded since; where it cannot be read the report warns of it.

    Args:
        plan: the PLAN directory that `cluster` or an earlier `assign` wrote; it is not changed.
        new: adapters, or folders of some, whose tenants are called as `index` would call them;
            "tenant=path" or a mapping by tenant names them.
        out: the PLAN directory to write: the old one's representatives and all routes.
        policy: consent by tenant, in place of what the plan was made with.
        activations: the inputs that the plan's metric needs, where they are not in their old place.
        strict: an adapter that is broken, or cannot be compared, is an error.
        device, memory, jobs, overwrite, allow_pickle, progress: as in `merge`.
        dry_run: return the report, verify everything, write nothing.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`. Nothing is written then. A broken
            adapter among several is none, unless `strict`; the report counts it as `failed`.
    """
    options = Options(
        os.fspath(out),
        None if policy is None else os.fspath(policy),
        None if activations is None else os.fspath(activations),
        overwrite,
        strict,
        allow_pickle,
        dry_run,
    )
    return assign_tenants(os.fspath(plan), new, options, compute(device, memory, jobs), progress)
