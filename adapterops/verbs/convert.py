"""convert: the same adapter in another dialect, as another kind, or with another scale."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adapterops.adapter import Adapter
from adapterops.certificate import PlanReport, Report
from adapterops.errors import UsageError
from adapterops.inputs import open_one, open_rebased
from adapterops.linalg import Form
from adapterops.save import save_sum
from adapterops.scaling import Scaling

_Path = str | os.PathLike[str]


def convert(
    adapter: _Path | Adapter,
    *,
    out: _Path,
    to: str | None = None,
    scaling: Scaling = "keep",
    base: _Path | None = None,
    residual: _Path | None = None,
    rank: int | Literal["same"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    max_rank: int | None = None,
    form: Form = "balanced",
    modules: str | None = None,
    extras: str = "error",
    dtype: str = "keep",
    alpha: float | Mapping[Any, float] | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report | PlanReport:
    """Write an adapter as a plain LoRA in the dialect asked for, and return its certificate.

    Names and places change, numbers do not: with `scaling` "keep" the factors keep their values.
    LoHa, LoKr, AdaLoRA and Tucker become LoRA exactly, of the rank that takes. What is relative to
    a base model needs it: with `base`, PiSSA and OLoRA become LoRA of twice their rank, exactly;
    DoRA, and with `residual` any initialisation that moved the base, become the best LoRA of the
    rank or error asked for, of W′ − W module by module. Convolutions whose kernels LoHa, LoKr and
    AdaLoRA hide get them from `base`.

    Args:
        adapter: a path or an Adapter.
        to: dialect to write: peft, kohya, diffusers or mlx; the input's by default.
        scaling: "keep" the adapter's own scale where the dialect has a place for it, "folded"
            (alpha = rank) or "rslora" (alpha / √r).
        base: the model that the adapter was trained on: a file, folder or shard index.
        residual: that model as the adapter's initialisation left it.
        rank, energy, max_error, size, max_rank: as in `compress`. Without them nothing is cut, and
            modules keep ranks of their own where the dialect can say so.
        form, modules, extras, dtype, alpha: as in `compress`.
        device, memory, jobs, overwrite, strict, allow_pickle, dry_run, progress: as in `merge`.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`; nothing is written then.
    """
    if to not in (None, "peft", "kohya", "diffusers", "mlx"):
        raise UsageError(f"to={to!r}: expected peft, kohya, diffusers or mlx")
    if residual is not None and base is None:
        raise UsageError("--residual is relative to --base; give both")
    targets = (rank, energy, max_error, size)
    if max_rank is not None and all(target is None for target in targets):
        raise UsageError(
            "--max-rank bounds what a target chooses, and there is none",
            hint="--rank N cuts to a rank",
        )
    recorded: dict[str, Any] = {}
    if base is None:
        opened = open_one(adapter, alpha=alpha, allow_pickle=allow_pickle)
    else:
        opened, recorded = open_rebased(
            adapter, base, residual, alpha=alpha, allow_pickle=allow_pickle
        )
    weights, files = zip(*opened.terms, strict=True)
    return save_sum(
        files,
        weights,
        out,
        verb="convert",
        recorded=recorded,
        rank=rank,
        energy=energy,
        max_error=max_error,
        size=size,
        max_rank=max_rank,
        as_stored=all(target is None for target in targets),
        scaling=scaling,
        form=form,
        modules=modules,
        extras=extras,
        dtype=dtype,
        to=to,
        device=device,
        memory=memory,
        jobs=jobs,
        overwrite=overwrite,
        strict=strict,
        dry_run=dry_run,
        progress=progress,
    )
