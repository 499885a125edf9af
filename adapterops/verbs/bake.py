"""bake: adapters added to the weights of their base model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from adapterops.baking.model import bake_model
from adapterops.baking.planning import Options
from adapterops.baking.report import BakeReport
from adapterops.basemodel import open_model
from adapterops.casts import DTYPE_NAMES
from adapterops.errors import UsageError
from adapterops.files.output import check_outside
from adapterops.inputs import Input
from adapterops.options import as_seed, compute
from adapterops.verbs.combined import combined
from adapterops.verbs.options import as_limit, as_pattern, as_policy, as_round, opened

_Path = str | os.PathLike[str]


def bake(
    base: _Path,
    adapters: Input | Iterable[Input],
    weights: Sequence[float] | None = None,
    *,
    out: _Path,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    space: Literal["dense", "core", "knots"] = "dense",
    calibrate: Literal["pico", "svc"] | None = None,
    match_norm: Literal["mean", "max", "sum"] | None = None,
    activations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    module_weights: Sequence[str] = (),
    round: Literal["exact", "nearest", "stochastic", "compensated"] = "exact",
    dtype: str = "keep",
    modules: str | None = None,
    extras: str = "error",
    residual: _Path | None = None,
    max_drift: float | None = None,
    link: bool = False,
    reversible: bool = False,
    hash: bool = False,
    seed: int = 0,
    alpha: float | Mapping[Any, float] | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BakeReport:
    """Write `base` + Σ wᵢΔWᵢ, each sum rounded once, in the base's own files and types.

    In place of Σ wᵢΔWᵢ it is what the `method` makes of the adapters, with nothing cut off: of one
    that compares entries, in dense space, the whole matrix.

    Bytes that no adapter changes are copied without being looked at. What the type of the weights
    loses of the change is measured on what is written, in the same pass.

    Args:
        base: a safetensors file, an index or folder of shards, a model's folder, or a diffusers
            pipeline. A file makes a file, anything else a directory.
        adapters: paths or Adapters, one or several.
        weights: one finite number per adapter; 1 each by default.
        method, parameters, space, calibrate, match_norm, activations, module_weights: as in
            `merge`.
        round: "exact", correctly rounded from the real number W + Σ wᵢsᵢBᵢAᵢ, the same bytes on
            any machine; "nearest", in float32; "stochastic", by `seed`; "compensated", which
            chooses of the two neighbours what keeps most of what the adapters do.
        dtype: keep (each tensor's own), float32, bfloat16 or float16, for all tensors of floats.
        modules: regular expression that a module path must match as a whole to be baked.
        extras: what becomes of heads, biases and token rows on which inputs disagree: error,
            first, average or drop.
        residual: the base as an initialisation such as CorDA's left it.
        max_drift: the largest total error within what the adapters read, ‖EQ‖ / ‖D‖.
        link: give files that nothing changes a second name, a hard link, instead of a copy.
        reversible: store what `unbake` needs to restore the base bit by bit.
        hash: record the sha256 of all files of weights, of the base and of the result.
        seed: of stochastic rounding, and of methods that draw at random.
        alpha, device, memory, jobs, overwrite, strict, allow_pickle, progress: as in `merge`.
        dry_run: return what a sample of the rows predicts and write nothing.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`. Nothing is written then; files
            that were finished when a run was interrupted are kept beside `out`, and the same
            call goes on from there.
    """
    options = Options(
        round=as_round(round),
        seed=as_seed(seed),
        dtype=_dtype(dtype),
        modules=as_pattern(modules),
        extras=as_policy(extras),
        max_drift=as_limit(max_drift),
        link=link,
        reversible=reversible,
        residual=None if residual is None else open_model(residual).identity,
        hash=hash,
        overwrite=overwrite,
        strict=strict,
        dry_run=dry_run,
    )
    on = compute(device, memory, jobs)
    check_outside(out, () if residual is None else (residual,))
    model = open_model(base)
    given, factors = opened(model, adapters, weights, residual, alpha, allow_pickle)
    files, factors, recorded = combined(
        given,
        factors,
        method=method,
        parameters=parameters,
        space=space,
        seed=seed,
        calibrate=calibrate,
        match_norm=match_norm,
        activations=activations,
        modules=options.modules,
        module_weights=module_weights,
    )
    options = replace(options, combined=recorded)
    return bake_model(model, files, factors, os.fspath(out), options, on, progress)


def _dtype(name: str) -> str | None:
    if name == "keep":
        return None
    if name not in DTYPE_NAMES:
        raise UsageError(f"--dtype {name!r}: expected keep, {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]
