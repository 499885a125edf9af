"""deploy: the adapters of a plan in a serving engine's form, with routes and flags."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from adapterops.errors import UsageError
from adapterops.fleet.deploy.planning import Options
from adapterops.fleet.deploy.report import DeployReport
from adapterops.fleet.deploy.run import deploy_plan
from adapterops.options import compute, is_number, is_whole, parse_size
from adapterops.serving.objections import engine_named

_Path = str | os.PathLike[str]


def deploy(
    plan: _Path,
    *,
    engine: str,
    served_base: str,
    out: _Path,
    previous: _Path | None = None,
    fleet: _Path | None = None,
    base: _Path | None = None,
    activations: _Path | None = None,
    max_error: float | None = None,
    max_rank: int | None = None,
    dtype: str = "keep",
    max_loras: int = 32,
    cpu_memory: str | int = "16GB",
    link: bool = False,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> DeployReport:
    """Write the adapters that a plan serves as an engine takes them, and say how to serve them.

    `out` gets a folder per adapter, named by its content, `routes.json` (tenant -> model, with a
    random cache salt where tenants share an adapter), a router's config and the report. Every
    tenant's error is computed again, exactly, on the bytes written. Originals are never touched;
    the previous deployment is complete in its own folder, and going back to it is the rollback.

    Args:
        plan: a PLAN directory.
        engine: vllm, sglang, lorax, tgi, trtllm or portable.
        served_base: the base model as the engine is given it; vLLM compares it letter by letter.
        out: the directory to write.
        previous: the deployment that runs now: tenants that stay on an adapter keep their salts,
            and the report says which adapters are new, kept and gone.
        fleet: the index, where it is not where the plan says. It must be the plan's own, for it
            knows who was off-boarded since.
        base: the base model, a checkpoint or config.json, for the shapes of modules that the
            engine needs and no adapter has.
        activations: inputs by module, of a plan whose errors are of outputs.
        max_error: the largest error of any tenant, instead of the plan's own bound.
        max_rank: cut adapters of larger ranks to this one.
        dtype: keep, float32, bfloat16 or float16. An engine rounds wider factors when it loads
            them; rounded here, the errors include it.
        max_loras: adapters in one batch, which GPU memory is reserved for.
        cpu_memory: bytes of the host that hold adapters, for the engine's cache.
        link: give originals that need no change a second name, a hard link, instead of a copy.
        device, memory, jobs, overwrite, strict, allow_pickle, progress: as in `merge`.
        dry_run: return the report of what would be, with the plan's errors, and write nothing.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`, among them IncompatibleError for a
            plan that holds weights of an off-boarded tenant, has changed or is of another index,
            FileError where the index is gone, BudgetError for an error above the bound. Nothing is
            written then.
    """
    engine_named(engine)
    if not isinstance(served_base, str) or not served_base.strip():
        raise UsageError("--served-base is empty: expected the model that the engine is given")
    if max_error is not None and not (is_number(max_error) and 0 <= max_error < math.inf):
        raise UsageError(f"--max-error {max_error!r}: expected a number of at least 0")
    options = Options(
        engine=engine,
        served_base=served_base,
        out=os.fspath(out),
        previous=_text(previous),
        fleet=_text(fleet),
        base=_text(base),
        activations=_text(activations),
        max_error=None if max_error is None else float(max_error),
        max_rank=None if max_rank is None else _count("--max-rank", max_rank),
        dtype=dtype,
        max_loras=_count("--max-loras", max_loras),
        cpu_memory=parse_size(cpu_memory, "--cpu-memory"),
        link=link,
        overwrite=overwrite,
        strict=strict,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
    )
    return deploy_plan(os.fspath(plan), options, compute(device, memory, jobs), progress)


def _text(path: _Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def _count(option: str, value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise UsageError(f"{option} {value!r}: expected a whole number of at least 1")
    return int(value)
