"""calc: an expression of adapters, evaluated and saved."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adapterops.activations import open_activations
from adapterops.adapter import Adapter
from adapterops.certificate import PlanReport, Report
from adapterops.composed import places, tree
from adapterops.errors import UsageError
from adapterops.expression import evaluate, read
from adapterops.expression.evaluation import Activations, needs_activations
from adapterops.formats.model import leaves
from adapterops.inputs import Input, open_inputs
from adapterops.save import save_sum

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_name(name: object) -> str:
    """A name that an expression can use. Raises UsageError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for an adapter: letters, digits and _, beginning with a letter"
        )
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} is no name for an adapter: it is a word of Python's grammar")
    return name


def calc(
    expression: str,
    adapters: Mapping[str, Input],
    *,
    out: str | os.PathLike[str],
    activations: Activations = None,
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
    """Write the adapter that an expression stands for to `out` and return its certificate.

    Adapters are added, subtracted, multiplied and divided by numbers; functions are the merge
    methods, with their parameters, `weights`, `space`, `seed`, `calibrate` and `match_norm` by
    name, and `norm(x)`, the number ‖ΔW‖. The result is that of the same line of Python:

    >>> calc("0.7*a + 0.3*b - 0.5*project(c, a)", {"a": "x", "b": "y", "c": "z"}, out="mix")

    Args:
        expression: text such as `ties(a, b, density=0.2, weights=[0.5, 0.5])`.
        adapters: a path or an Adapter for every name in the expression, and no others.
        activations: for methods that need inputs of the modules: one file, or one by name.
        rank, energy, max_error, size, modules, extras, dtype, to, device, memory, jobs, overwrite,
            strict, allow_pickle, dry_run, progress: as in `merge`.
        alpha: for adapters that do not say their scale; a mapping gives it to single paths.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`; nothing is written then. What is
            wrong with the expression is a UsageError that shows the place.
    """
    if not isinstance(adapters, Mapping):
        raise UsageError("calc takes adapters by name, such as {'a': path}")
    names = [check_name(name) for name in adapters]
    asked = read(expression, names)
    _check_activations(activations, names, needs_activations(asked))
    opened = open_inputs(list(adapters.values()), alpha=alpha, allow_pickle=allow_pickle)
    given = dict(zip(names, opened, strict=True))
    result = evaluate(asked, given, modules=modules, activations=activations)
    result = _with_measured(given, result)
    weights, files = zip(*result.terms, strict=True)
    return save_sum(
        files,
        weights,
        out,
        verb="calc",
        recorded={
            "expression": asked.text,
            "names": _places(given, result),
            "activations": _digests(activations),
        },
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


def _with_measured(given: Mapping[str, Adapter], result: Adapter) -> Adapter:
    """The result with those that only a norm was taken of: inputs of weight 0."""
    files, _ = leaves([file for _, file in result.terms], [weight for weight, _ in result.terms])
    known = {id(file) for file in files}
    for adapter in given.values():
        own, _ = leaves([file for _, file in adapter.terms], [w for w, _ in adapter.terms])
        if not known.issuperset(map(id, own)):
            result = result + 0 * adapter
    return result


def _places(given: Mapping[str, Adapter], result: Adapter) -> dict[str, Any]:
    """Which of the inputs that are recorded each name is; the tree of an Adapter that is a sum."""
    weights, files = zip(*result.terms, strict=True)
    numbers = places(files, weights)
    found: dict[str, Any] = {}
    for name, adapter in given.items():
        terms = tree(adapter.terms, numbers)
        [weight, place] = terms[0]
        single = len(terms) == 1 and weight == 1.0 and isinstance(place, int)
        found[name] = place if single else terms
    return found


def _digests(activations: Activations) -> list[str] | dict[str, str] | None:
    """What identifies the files of activations: of the one for all, or by name."""
    if activations is None:
        return None
    if isinstance(activations, Mapping):
        return {name: open_activations(path).digest for name, path in activations.items()}
    return [open_activations(activations).digest]


def _check_activations(activations: Activations, names: list[str], wanted: bool) -> None:
    if activations is None:
        return
    if not wanted:
        raise UsageError("--activations: nothing in the expression needs inputs of the modules")
    if isinstance(activations, Mapping):
        for name in activations:
            if name not in names:
                raise UsageError(f"--activations names {name!r}, which is no adapter here")
