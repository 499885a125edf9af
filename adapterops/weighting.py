"""From what a user asks error to be measured in to what the modules of a plan are weighted by."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from adapterops.activations import base_note, for_modules, open_activations
from adapterops.basemodel import open_model
from adapterops.errors import IncompatibleError, NumericsError, UsageError
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.plan import Weighting
from adapterops.rebased.weights import weights

Metric = Literal["frobenius", "relative", "activation"]
_Path = str | os.PathLike[str]
_BLOCK = 1 << 20
_MOST = 1 << 16


def weighting_for(
    files: Sequence[AdapterFile],
    metric: str,
    base: _Path | None,
    activations: _Path | None,
    modules: str | None,
) -> tuple[Weighting, dict[str, Any]]:
    """The weighting that a metric means for these adapters, and what identifies its sources.

    `modules` is the pattern of those that matter. Raises UsageError for a metric that is unknown or
    lacks its file, IncompatibleError for a base model or activations of another model.
    """
    if metric not in get_args(Metric):
        raise UsageError(f"--metric {metric!r}: expected one of {', '.join(get_args(Metric))}")
    if activations is not None and metric != "activation":
        raise UsageError(
            f"--activations says nothing to --metric {metric}; add --metric activation"
        )
    if metric == "frobenius":
        return Weighting(), {}
    for file in files:
        if file.deltas:
            raise IncompatibleError(
                f"--metric {metric}: the full delta {next(iter(file.deltas))!r} is outside of it",
                path=file.path,
                hint="use --metric frobenius",
            )
    if metric == "relative":
        if base is None:
            raise UsageError("--metric relative compares with the base's weights: give --base")
        return _relative(files, base, modules)
    if activations is None:
        raise UsageError(
            "--metric activation needs the inputs of the modules: give --activations FILE",
            hint="examples/collect_activations.py makes one from a model and a text",
        )
    given = open_activations(activations)
    inputs = {}
    for file in files:
        inputs.update(for_modules(given, chosen(file, modules), file.base))
    found = (base_note(given, file.base) for file in files)
    notes = tuple(dict.fromkeys(note for note in found if note))
    return Weighting("activation", inputs=inputs, notes=notes), {"activations": given.digest}


def chosen(file: AdapterFile, pattern: str | None) -> dict[str, Site]:
    """The sites that a pattern matches as a whole; what is wrong with one is said elsewhere."""
    try:
        compiled = re.compile(pattern or ".*", 0 if pattern else re.DOTALL)
    except re.error:
        return dict(file.sites)
    return {stem: site for stem, site in file.sites.items() if compiled.fullmatch(stem)}


def _relative(
    files: Sequence[AdapterFile], base: _Path, modules: str | None
) -> tuple[Weighting, dict[str, Any]]:
    model = open_model(base)
    sizes: dict[str, float] = {}
    for file in files:
        missing = [stem for stem in chosen(file, modules) if stem not in sizes]
        for stem, weight in weights(file, model, missing).items():
            sizes[stem] = _norm(weight.ref)
            if not math.isfinite(sizes[stem]):
                raise NumericsError(
                    f"its weight {weight.ref.name!r} holds NaN or infinities",
                    path=model.path,
                    module=stem,
                    hint="the file is damaged; leave the module out with --modules",
                )
            if sizes[stem] == 0.0:
                raise IncompatibleError(
                    f"its weight {weight.ref.name!r} has the norm {sizes[stem]:g}: nothing is "
                    "relative to that",
                    path=model.path,
                    module=stem,
                    hint="leave it out with --modules, or use --metric frobenius",
                )
    return Weighting("relative", _inverse(sizes)), {"base": model.identity}


def _inverse(sizes: Mapping[str, float]) -> dict[str, float]:
    return {stem: 1 / size for stem, size in sizes.items()}


# Many adapters of one base in one run: its weights are read once, unless their file changes.
_KNOWN: dict[tuple[str, int, str], float] = {}


def _norm(ref: Ref) -> float:
    key = (ref.source.path, os.stat(ref.source.path).st_mtime_ns, ref.name)
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = norm(ref)
        ref.source.close()
    return _KNOWN[key]


def norm(ref: Ref) -> float:
    """‖W‖_F of a stored tensor, float64 sums over blocks that are read one by one."""
    width = ref.nbytes // max(1, math.prod(ref.shape))
    squares = []
    for start in range(0, ref.nbytes, max(1, _BLOCK * width)):
        size = min(_BLOCK * width, ref.nbytes - start)
        block = replace(
            ref,
            shape=(size // width,),
            offset=ref.offset + start,
            nbytes=size,
            transposed=False,
        )
        values = np.asarray(block.read())
        squares.append(float(values @ values))
    return math.sqrt(math.fsum(squares))
