"""compress: one adapter at a lower rank, in another form, or in the form that an engine takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adapterops.adapter import Adapter
from adapterops.basemodel.shapes import digest, load
from adapterops.certificate import PlanReport, Report
from adapterops.errors import UsageError
from adapterops.inputs import open_one
from adapterops.linalg import Form
from adapterops.save import save_sum
from adapterops.scaling import Scaling
from adapterops.weighting import Metric, weighting_for

_RULES = ("sv_ratio", "sv_fro", "sv_cumulative")
_CHANGES = ("rank", "energy", "max_error", "size", "ratio", *_RULES, "engine", "to")
_AS_IT_IS = {"form": "balanced", "scaling": "folded", "dtype": "keep"}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UsageError for options of `compress`, by name, that suit no adapter."""
    same = all(options.get(name, usual) == usual for name, usual in _AS_IT_IS.items())
    if same and not options.get("ragged") and all(options.get(n) is None for n in _CHANGES):
        raise UsageError(
            "nothing to do: no target, form, dtype or engine was given",
            hint="for example --max-error 0.05, --rank 16, --ratio 0.5 or --engine vllm",
        )
    if options.get("base") is not None and not (
        options.get("engine") or options.get("metric") == "relative"
    ):
        raise UsageError("--base says nothing here; it is for --metric relative and --engine")
    several = options.get("ragged") or options.get("allocate") == "global"
    if options.get("engine") and (several or any(options.get(n) is not None for n in _RULES)):
        raise UsageError(
            f"--engine {options['engine']} serves one rank for all modules; --ragged, --allocate "
            "global and the --sv rules make several"
        )


def compress(
    adapter: str | os.PathLike[str] | Adapter,
    *,
    out: str | os.PathLike[str],
    rank: int | Literal["same"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    ratio: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    allocate: Literal["uniform", "global"] = "uniform",
    ragged: bool = False,
    min_rank: int | None = None,
    max_rank: int | None = None,
    metric: Metric = "frobenius",
    base: str | os.PathLike[str] | None = None,
    activations: str | os.PathLike[str] | None = None,
    form: Form = "balanced",
    scaling: Scaling = "folded",
    engine: str | None = None,
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
    spectra: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report | PlanReport:
    """Write an adapter at the rank that a target calls for, and return its certificate.

    The cut is the best there is: per module that of Eckart & Young (1936) in the metric, computed
    from the factors. Raising the rank adds columns that change nothing.

    Args:
        adapter: a path or an Adapter.
        rank: uniform rank, or "same" for the largest that the adapter has.
        energy: keep this share of Σσ² of the whole adapter.
        max_error: relative error of the whole adapter, as written.
        size: bytes of the weights file ("20MB" is 20·10⁶).
        ratio: share of the parameters that the adapter has now, 0.5 for half of them.
        sv_ratio, sv_fro, sv_cumulative: sd-scripts' rules, module by module: keep σ > σ₁/x; the
            fewest with Σσ² ≥ x²·total; the fewest with Σσ ≥ x·total. `max_rank` caps them.
        allocate: "uniform" gives all modules one rank, as serving engines pay for the largest;
            "global" spends directions where they save most error per parameter.
        ragged: apply the target to every module by itself.
        min_rank, max_rank: bounds of every module's rank.
        metric: what error is measured in. "relative" divides every module's by its ‖W‖ and needs
            `base`; "activation" is E‖(ΔW − ΔW′)x‖² over the inputs in the file `activations`.
        form: "balanced", or of the singular value decomposition: "svd" (U√Σ, √ΣVᵀ),
            "orthonormal-a" (UΣ, Vᵀ), "orthonormal-b" (U, ΣVᵀ).
        scaling: "folded" (alpha = rank), "keep" (the adapter's own scale) or "rslora".
        engine: write what this engine serves: vllm, sglang, lorax, tgi, trtllm or portable.
        modules: regular expression of the modules to write; the others are left out.
        extras: "drop" leaves out heads, biases and token rows.
        dtype: keep, float32, bfloat16 or float16. to: dialect to write.
        alpha: for an adapter that does not say its scale.
        device: auto, cpu, cuda or cuda:N. memory: bytes in flight. jobs: worker threads.
        overwrite: replace an existing file, or a directory that holds only what adapterops wrote.
        strict: turn warnings into errors. dry_run: return the PlanReport and write nothing.
        spectra: let the report have the singular values of every module.
        progress: called with (what, done, count).

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`; nothing is written then.
    """
    check_options(locals())
    opened = open_one(adapter, alpha=alpha, allow_pickle=allow_pickle)
    weights, files = zip(*opened.terms, strict=True)
    chosen, recorded = weighting_for(files, metric, base, activations, modules)
    if engine and base is not None:  # it tells which modules are added as zeros
        recorded["shapes"] = digest(load(os.fspath(base)))
    return save_sum(
        files,
        weights,
        out,
        verb="compress",
        rank=rank,
        energy=energy,
        max_error=max_error,
        size=size,
        ratio=ratio,
        sv_ratio=sv_ratio,
        sv_fro=sv_fro,
        sv_cumulative=sv_cumulative,
        allocate=allocate,
        ragged=ragged,
        min_rank=min_rank,
        max_rank=max_rank,
        weighting=chosen,
        recorded=recorded,
        form=form,
        scaling=scaling,
        engine=engine,
        base=base,
        with_spectra=spectra,
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
