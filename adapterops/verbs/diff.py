"""diff: how far adapters are apart, and what that says of where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from adapterops.casts import format_name
from adapterops.certificate import ratio
from adapterops.difference.matrix import Matrices, compare_all
from adapterops.difference.names import names
from adapterops.difference.pair import compare_pair
from adapterops.difference.report import ComparedInput, DiffReport, PairDifference
from adapterops.difference.task import Task, plan_task
from adapterops.errors import IncompatibleError, UsageError
from adapterops.inputs import Input, open_inputs
from adapterops.options import compute


def diff(
    adapters: Iterable[Input],
    *,
    modules: str | None = None,
    alpha: float | Mapping[Any, float] | None = None,
    memory: str | int | None = None,
    jobs: int | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> DiffReport:
    """Compare adapters: distances and cosines of ΔW, and of two of them all that sets them apart.

    Args:
        adapters: two or more paths or Adapters.
        modules: regular expression that a module path must match as a whole to be compared.
        alpha: for inputs that do not say their scale; a mapping gives it to single paths, where it
            wins over what the file says.
        memory: bytes in flight. jobs: worker threads. Neither changes a figure.
        strict: turn warnings into errors.
        progress: called with (what, done, count).

    Raises:
        UsageError: fewer than two adapters, or a pattern that matches nothing.
        IncompatibleError: shapes that differ, nothing in common, no scale.
        FileError, FormatError, NumericsError (NaN or infinities): as reading raises them.
    """
    opened = open_inputs(adapters, alpha=alpha, allow_pickle=allow_pickle)
    if len(opened) < 2:
        raise UsageError(f"diff needs at least two adapters, and was given {len(opened)}")
    files = [file for adapter in opened for _, file in adapter.terms]
    try:
        task = plan_task(opened, modules, compute("cpu", memory, jobs), progress)
        if strict and task.plan.warnings:
            raise IncompatibleError(f"--strict: {task.plan.warnings[0]}")
        if len(opened) == 2:
            pair, whole = compare_pair(task)
            apart = 1.0 - np.eye(2)
            found = Matrices(
                np.array(whole.norms),
                whole.distance * apart,
                whole.floor * apart,
                whole.cosine * apart + np.diag([float(not zero) for zero in whole.zero]),
                whole.zero,
            )
            report = _report(task, found, pair)
        else:
            report = _report(task, compare_all(task), None)
        for file in files:
            file.source.check_unchanged()
    finally:
        for file in files:
            file.source.close()
    return report


def _report(task: Task, found: Matrices, pair: PairDifference | None) -> DiffReport:
    def relative(values: np.ndarray[Any, Any]) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(ratio(float(value), 0.0 if zero else float(norm)) for value in row)
            for row, norm, zero in zip(values, found.norms, found.zero, strict=True)
        )

    inputs = []
    having = [task.parts(module) for module in task.plan.modules]
    for index, (name, adapter, norm, zero) in enumerate(
        zip(names(task.adapters), task.adapters, found.norms, found.zero, strict=True)
    ):
        files = [file for _, file in adapter.terms]
        inputs.append(
            ComparedInput(
                name=name,
                dialect=" and ".join(sorted({file.dialect for file in files})),
                base=next((file.base for file in files if file.base), None),
                dtype=" and ".join(sorted({format_name(file.dtype) for file in files})),
                rank=max(file.rank for file in files),
                modules=sum(bool(parts[index]) for parts in having),
                norm=float(norm),
                zero=zero,
            )
        )
    return DiffReport(
        inputs=tuple(inputs),
        distance=relative(found.distance),
        floor=relative(found.floor),
        cosine=tuple(tuple(map(float, row)) for row in found.cosine),
        pair=pair,
        left_out=task.plan.left_out,
        warnings=task.plan.warnings,
    )
