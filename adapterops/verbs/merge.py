"""merge: the exact weighted sum of adapters, at the rank asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from adapterops.adapter import Adapter
from adapterops.certificate import PlanReport, Report
from adapterops.errors import UsageError
from adapterops.inputs import open_inputs
from adapterops.options import check_weights
from adapterops.save import save_sum


def merge(
    adapters: str | os.PathLike[str] | Adapter | Iterable[str | os.PathLike[str] | Adapter],
    weights: Sequence[float] | None = None,
    *,
    out: str | os.PathLike[str],
    normalize: bool = False,
    rank: int | Literal["same"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    modules: str | None = None,
    extras: str = "error",
    dtype: str = "keep",
    to: str | None = None,
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
    """Write Σ wᵢΔWᵢ of adapters to `out` and return its certificate.

    Args:
        adapters: paths or Adapters, one or several.
        weights: one finite number per adapter; may be left out for a single adapter (1.0).
        normalize: divide the weights by their sum.
        rank: uniform rank of the output, or "same" for the largest rank among the inputs. Without
            any of rank, energy, max_error and size nothing is cut off.
        energy: keep this share of Σσ² of the whole adapter, at the smallest uniform rank.
        max_error: smallest uniform rank whose relative Frobenius error, as written, is within
            this.
        size: largest uniform rank whose weights file fits ("20MB" is 20·10⁶ bytes, with header).
        modules: regular expression that a module path must match as a whole to be merged.
        extras: what becomes of heads, biases and token rows on which inputs disagree: error,
            first, average or drop.
        dtype: keep (the first input's), float32, bfloat16 or float16.
        to: dialect to write; the first input's by default.
        alpha: for inputs that do not say their scale; a mapping gives it to single paths, where it
            wins over what the file says.
        device: auto, cpu, cuda or cuda:N. memory: bytes in flight. jobs: worker threads.
        overwrite: replace an existing file, or a directory that holds only what adapterops wrote.
        strict: turn warnings into errors.
        dry_run: return the PlanReport and write nothing.
        progress: called with (what, done, count).

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`; nothing is written then.
    """
    if isinstance(adapters, str | os.PathLike | Adapter):
        adapters = [adapters]
    adapters = list(adapters)
    if not adapters:
        raise UsageError("merge needs at least one adapter")
    if to not in (None, "peft", "kohya", "diffusers", "mlx"):
        raise UsageError(f"to={to!r}: expected peft, kohya, diffusers or mlx")
    paths = [repr(item) if isinstance(item, Adapter) else os.fspath(item) for item in adapters]
    checked = check_weights(weights, paths, normalize=normalize)
    opened = open_inputs(adapters, alpha=alpha, allow_pickle=allow_pickle)
    terms = [
        (weight * inner, file)
        for adapter, weight in zip(opened, checked, strict=True)
        for inner, file in adapter.terms
    ]
    return save_sum(
        [file for _, file in terms],
        [weight for weight, _ in terms],
        out,
        rank=rank,
        energy=energy,
        max_error=max_error,
        size=size,
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
