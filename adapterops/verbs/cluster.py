"""cluster: which adapters of a fleet can serve several tenants, each tenant's error proved."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from adapterops.casts import DTYPE_NAMES
from adapterops.errors import UsageError
from adapterops.files.output import check_outside
from adapterops.fleet.consent.policy import Consent, Policy, Sharing, read_policy
from adapterops.fleet.grouping.aliases import read_aliases
from adapterops.fleet.planning.cluster import Options, plan_fleet
from adapterops.fleet.plans.outcome import ClusterReport
from adapterops.fleet.ray_run import run_by
from adapterops.options import compute, is_number, is_whole

_Path = str | os.PathLike[str]
_MAX_ERROR = 0.2
_KINDS = ("best", "medoid", "mean", "minimax")


def cluster(
    fleet: _Path,
    *,
    out: _Path,
    max_error: float | None = None,
    max_adapters: int | None = None,
    metric: Literal["frobenius", "activation"] = "frobenius",
    activations: _Path | None = None,
    base_alias: _Path | None = None,
    allow_sharing: Literal["none", "group", "all"] = "none",
    policy: _Path | None = None,
    representative: Literal["best", "medoid", "mean", "minimax"] = "best",
    rank: int | Literal["same"] = "same",
    dtype: str = "keep",
    previous: _Path | None = None,
    discovery: float = 0.05,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    runner: Literal["threads", "ray"] = "threads",
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ClusterReport:
    """Plan which adapter serves each tenant of an index, and write the representatives.

    No tenant's error exceeds the bound: it is computed exactly, in float64, from the factors of
    the files that will serve, and whoever is over it keeps an adapter of their own.

    Args:
        fleet: what `index` wrote.
        out: the PLAN directory to write.
        max_error: the largest ‖C − ΔW‖_F / ‖ΔW‖_F of what serves a tenant against its own; 0.2 if
            neither this nor `max_adapters` is given.
        max_adapters: the largest number of adapters instead; the least error that allows it.
        metric: what the bound is in, "activation": of the outputs for the inputs of `activations`.
        activations: a file of inputs by module.
        base_alias: names of bases that are one and the same.
        allow_sharing: none, duplicates to 10⁻³ and no-ops apart; group, within share groups of the
            policy; all.
        policy: consent by tenant, CSV or JSON.
        representative: which adapters may serve a group: its medoid, a rank-r weighted mean, a
            relative minimax centre, or whichever of them has the smallest largest error.
        rank: of new representatives; same, the largest of their members.
        dtype: keep, float32, bfloat16 or float16, of new representatives.
        previous: a PLAN to stay close to.
        discovery: the false discovery rate of related tenants.
        runner: threads, of this machine; ray, tasks of the Ray cluster that it is a node of for
            verification and new representatives. All nodes see the files and PLAN by the same
            names; `memory` is this machine's then, and `jobs` the tasks at a time.
        device, memory, jobs, overwrite, strict, allow_pickle, progress: as in `merge`.
        dry_run: return the plan's report, read and verify everything, write nothing.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`. Nothing is written then.
    """
    if max_error is not None and max_adapters is not None:
        raise UsageError("--max-error and --max-adapters exclude each other: give one of them")
    if max_error is not None and not (is_number(max_error) and 0 <= max_error < 1):
        raise UsageError(
            f"--max-error {max_error!r}: expected a number from 0 to below 1",
            hint="1 is the error of no adapter at all",
        )
    if max_adapters is not None and not (is_whole(max_adapters) and max_adapters >= 1):
        raise UsageError(f"--max-adapters {max_adapters!r}: expected a whole number of at least 1")
    if not (is_number(discovery) and 0 < discovery < 1):
        raise UsageError(f"--discovery {discovery!r}: expected a number between 0 and 1")
    if (metric == "activation") != (activations is not None):
        raise UsageError("--metric activation and --activations FILE need each other")
    if rank != "same" and not (is_whole(rank) and int(rank) >= 1):
        raise UsageError(f"--rank {rank!r}: expected same or a whole number of at least 1")
    options = Options(
        max_error=_MAX_ERROR if max_error is None and max_adapters is None else max_error,
        max_adapters=max_adapters,
        metric=_one_of("--metric", metric, ("frobenius", "activation")),
        activations=None if activations is None else os.fspath(activations),
        aliases={} if base_alias is None else read_aliases(base_alias),
        consent=Consent(
            _one_of("--allow-sharing", allow_sharing, get_args(Sharing)),
            Policy() if policy is None else read_policy(policy),
        ),
        representative=_one_of("--representative", representative, _KINDS),
        rank=rank,
        dtype=_one_of("--dtype", dtype, ("keep", *DTYPE_NAMES)),
        discovery=discovery,
        previous=None if previous is None else os.fspath(previous),
        overwrite=overwrite,
        strict=strict,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
    )
    check_outside(out, [path for path in (fleet, previous) if path is not None])
    on = compute(device, memory, jobs)
    with run_by(runner, on, jobs) as where:
        return plan_fleet(os.fspath(fleet), os.fspath(out), options, where, progress)


def _one_of(option: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UsageError(f"{option} {value!r}: expected one of {', '.join(known)}")
    return value
