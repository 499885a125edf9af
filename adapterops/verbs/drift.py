"""drift: whether a merged model is what its base and adapters make, and what was lost of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from adapterops.activations import open_activations
from adapterops.basemodel import BaseModel, open_model
from adapterops.casts import format_name
from adapterops.changes.mapping import changes
from adapterops.errors import UsageError
from adapterops.formats.model import AdapterFile
from adapterops.inputs import Input, flat
from adapterops.judging.chain import ChainReport
from adapterops.judging.chain import chain as simulated
from adapterops.judging.deeper import check_one, count_intruders, is_matrix, mitigated_file
from adapterops.judging.forward import forward_errors
from adapterops.judging.logits import compare_logits
from adapterops.judging.report import DriftReport
from adapterops.judging.run import judge_model
from adapterops.options import as_seed, compute
from adapterops.rounding.precision import exact_arithmetic
from adapterops.save import save_sum
from adapterops.verbs.options import as_limit, as_pattern, as_policy, as_round, opened

_Path = str | os.PathLike[str]


def drift(
    base: _Path,
    adapters: Input | Iterable[Input],
    baked: _Path | None = None,
    weights: Sequence[float] | None = None,
    *,
    activations: _Path | None = None,
    logits: _Path | None = None,
    intruders: bool = False,
    mitigate: _Path | None = None,
    strength: float = 0.75,
    chain: bool = False,
    round: Literal["exact", "nearest", "stochastic", "compensated"] = "exact",
    max_drift: float | None = None,
    modules: str | None = None,
    extras: str = "error",
    residual: _Path | None = None,
    seed: int = 0,
    alpha: float | Mapping[Any, float] | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> DriftReport:
    """Judge `baked`, whoever made it, against `base` + Σ wᵢΔWᵢ.

    Two verdicts: on the implementation (did the tool add these adapters, with this scale, and leave
    everything else alone) and on the representation (what the type of the weights kept of them).
    Every tensor of both models is read.

    Args:
        base, adapters, weights: as in `bake`.
        baked: the merged model, in any sharding; None with `chain` alone.
        activations: a file of activations, for the error of the modules' outputs.
        logits: a folder with the base's config and tokenizer, for the divergence of predictions
            from those of the adapters on the fly; needs transformers.
        intruders: count the singular directions of merged weights that those of the base do not
            explain (arXiv 2410.21228): a decomposition of every weight.
        mitigate: write the adapter, of one, with its intruders scaled by `strength`.
        chain: simulate baking the adapters one after the other, against all at once.
        round, seed: how the simulated chain is rounded.
        max_drift: the largest total error within what the adapters read.
        modules, extras, residual, alpha, allow_pickle: as in `bake`.
        device, memory, jobs, overwrite, progress: as in `merge`.
        strict: the exit code of warnings is that of failures.

    Raises:
        AdapterOpsError: for inputs that cannot be read or do not go together. A merge that is
            wrong is no error: see `DriftReport.exit_code`.
    """
    if baked is None and not chain and mitigate is None:
        raise UsageError("a merged model is needed, unless a chain is simulated")
    if baked is None and (activations is not None or logits is not None or max_drift is not None):
        raise UsageError("--activations, --logits and --max-drift judge a merged model: name one")
    if baked is None and intruders and not chain:
        raise UsageError("--intruders counts those of a merged model or of --chain: name one")
    on = compute(device, memory, jobs)
    limit, mode, seeded = as_limit(max_drift), as_round(round), as_seed(seed)
    model = open_model(base)
    files, factors = flat(*opened(model, adapters, weights, residual, alpha, allow_pickle))
    policy, modules = as_policy(extras), as_pattern(modules)
    named = tuple((file.path, weight) for file, weight in zip(files, factors, strict=True))
    found = changes(model, files, factors, modules=modules, extras=policy)
    if baked is None:
        report = _without(model, named)
    else:
        merged = open_model(baked)
        report, matched = judge_model(
            model, found, named, merged, on, max_drift=limit, progress=progress
        )
        if activations is not None:
            refs = {name: pair.after for name, pair in matched.targets.items()}
            mine = {name: found.targets[name] for name in refs}
            with exact_arithmetic():
                forward = forward_errors(mine, refs, open_activations(activations))
            report = replace(report, forward=forward)
        if logits is not None:
            compared = compare_logits(model, found, merged, logits)
            report = replace(report, logits=compared)
        if intruders:
            counted = count_intruders(model, matched.targets, on, progress)
            report = replace(report, intruders=counted)
    if mitigate is not None:
        check_one(files)
        file, count = mitigated_file(model, files[0], factors[0], found.targets, strength)
        _save(file, files[0].dtype, mitigate, strength, overwrite)
        text = f"{count} intruders scaled by {strength:g} in {os.fspath(mitigate)}"
        report = replace(report, mitigated=os.fspath(mitigate), notes=(*report.notes, text))
    if chain:
        each = _one_by_one(model, files, factors, modules, intruders, mode, seeded)
        report = replace(report, chain=each)
    return replace(report, strict=strict)


def _one_by_one(
    base: BaseModel,
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    modules: str | None,
    intruders: bool,
    mode: Literal["exact", "nearest", "stochastic", "compensated"],
    seed: int,
) -> ChainReport:
    targets = [
        changes(base, [file], [weight], modules=modules, extras="first").targets
        for file, weight in zip(files, weights, strict=True)
    ]
    every = (target for mine in targets for target in mine.values())
    left = {target.name for target in every if not is_matrix(base, target)}
    with exact_arithmetic():
        return simulated(targets, mode, seed=seed, intruders=intruders, without=left)


def _save(file: AdapterFile, dtype: str, out: _Path, strength: float, overwrite: bool) -> None:
    """Written like a merge of one, in the type of the adapter given: new factors are in float64."""
    save_sum(
        [file],
        [1.0],
        out,
        dtype="float32" if dtype == "F64" else format_name(dtype),
        recorded={"mitigate": strength},
        overwrite=overwrite,
    )


def _without(base: BaseModel, adapters: tuple[tuple[str, float], ...]) -> DriftReport:
    """A report that judges nothing."""
    return DriftReport(
        base=base.path,
        adapters=adapters,
        baked="",
        implementation="undetermined",
        representation="ok",
        rung=None,
        model="",
        detectable=None,
        total=None,
        tensors={},
        summary=(),
    )
