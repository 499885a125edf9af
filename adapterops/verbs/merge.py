"""merge: the weighted sum of adapters, or what another method makes of them, at a rank."""

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
from adapterops.verbs.combined import combined


def merge(
    adapters: str | os.PathLike[str] | Adapter | Iterable[str | os.PathLike[str] | Adapter],
    weights: Sequence[float] | None = None,
    *,
    out: str | os.PathLike[str],
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    space: Literal["dense", "core", "knots"] = "dense",
    seed: int = 0,
    calibrate: Literal["pico", "svc"] | None = None,
    match_norm: Literal["mean", "max", "sum"] | None = None,
    activations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    module_weights: Sequence[str] = (),
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
    """Write what a method makes of adapters, Σ wᵢΔWᵢ by default, and return its certificate.

    Args:
        adapters: paths or Adapters, one or several.
        weights: one finite number per adapter; may be left out for a single adapter, and for
            methods other than linear (1 each).
        method: linear, or another of `adapterops methods`.
        parameters: of the method, by name.
        space: of methods that compare entries: "dense", those of ΔW; "core" or "knots", those in
            bases that the adapters share (Core space, KnOTS).
        seed: of methods that draw at random.
        calibrate: "pico" before the method, "svc" after it.
        match_norm: scale the result to the mean, max or sum of the adapters' norms, by module.
        activations: a file of the inputs of modules, or one for each adapter, of regmean.
        module_weights: weights of single modules: "layers 0-7: 1,0", "re:REGEX: 0.9,0.1",
            "attn: 0.7,0.3", "blocks[NAME]=1,0,…"; the last that matches counts.
        normalize: divide the weights by their sum; those of single modules stay as they are.
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
    if weights is None and method != "linear":
        weights = [1.0] * len(adapters)
    checked = check_weights(weights, paths, normalize=normalize)
    opened = open_inputs(adapters, alpha=alpha, allow_pickle=allow_pickle)
    files, shares, recorded = combined(
        opened,
        checked,
        method=method,
        parameters=parameters,
        space=space,
        seed=seed,
        calibrate=calibrate,
        match_norm=match_norm,
        activations=activations,
        modules=modules,
        module_weights=module_weights,
    )
    return save_sum(
        files,
        shares,
        out,
        recorded=recorded,
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
