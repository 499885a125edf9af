"""analyze: what a merge of adapters would have to deal with, before it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapterops.adapter import Adapter
from adapterops.analysis import candidates, kernel
from adapterops.analysis.building import Given, build
from adapterops.analysis.kernel import Figures, Settings
from adapterops.analysis.report import AnalysisReport
from adapterops.difference import dense
from adapterops.difference.names import names
from adapterops.difference.task import Dense, FullDelta, Task, plan_task
from adapterops.difference.tiles import Tile
from adapterops.errors import IncompatibleError, UnsupportedError, UsageError
from adapterops.extras import plan_extras
from adapterops.inputs import Input, flat, open_inputs
from adapterops.options import as_seed, check_weights, compute, is_whole
from adapterops.stream import Job
from adapterops.sums import is_dense


def analyze(
    adapters: Iterable[Input],
    weights: Sequence[float] | None = None,
    *,
    modules: str | None = None,
    seed: int = 0,
    samples: int = 4096,
    alpha: float | Mapping[Any, float] | None = None,
    memory: str | int | None = None,
    jobs: int | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> AnalysisReport:
    """Look at adapters before merging them, from their factors: no dense ΔW is formed.

    Args:
        adapters: two or more paths or Adapters.
        weights: those of the merge that is planned, one per adapter; equal ones that add up to 1
            by default.
        modules: regular expression that a module path must match as a whole.
        seed: of the entries in which signs are compared, `samples` of each module.
        alpha: for inputs that do not say their scale; a mapping gives it to single paths, where it
            wins over what the file says.
        memory: bytes in flight. jobs: worker threads. Neither changes a figure.
        strict: turn warnings into errors.
        progress: called with (what, done, count).

    Raises:
        UsageError: fewer than two adapters, weights that do not fit, a pattern without matches.
        IncompatibleError: shapes that differ, nothing in common, no scale.
        UnsupportedError: an adapter that changes whole matrices without factors.
        FileError, FormatError, NumericsError (NaN or infinities): as reading raises them.
    """
    if not is_whole(samples) or samples < 2:
        raise UsageError(f"--samples {samples!r}: expected a whole number of at least 2")
    opened = open_inputs(adapters, alpha=alpha, allow_pickle=allow_pickle)
    if len(opened) < 2:
        raise UsageError(f"analyze needs at least two adapters, and was given {len(opened)}")
    called = names(opened)
    given = [1 / len(opened)] * len(opened) if weights is None else weights
    checked = np.array(check_weights(given, called, normalize=False))
    if not checked.any():
        raise UsageError("every weight is zero: there is nothing to be merged")
    files = [file for adapter in opened for _, file in adapter.terms]
    try:
        task = plan_task(opened, modules, compute("cpu", memory, jobs), progress)
        if strict and task.plan.warnings:
            raise IncompatibleError(f"--strict: {task.plan.warnings[0]}")
        for module in task.plan.modules:
            if is_dense(module):
                raise UnsupportedError(
                    "it is changed by a whole matrix, which analyze would have to form",
                    module=module.stem,
                    hint="save that adapter at a rank first, or leave the module out by --modules",
                )
        full = task.deltas()
        settings = Settings(
            checked,
            tuple(candidates.methods(len(opened), only_linear=bool(full))),
            as_seed(seed),
            int(samples),
        )
        found = _figures(task, settings)
        deltas = _deltas(task, full, checked)
        extras = _differ(opened, checked.tolist())
        for file in files:
            for source in file.sources:
                source.check_unchanged()
    finally:
        for file in files:
            for source in file.sources:
                source.close()
    said = {"modules": modules, "alpha": alpha, "allow_pickle": allow_pickle, "extras": extras}
    return build(task, found, deltas, settings, Given(called, said, weights is not None))


def _differ(adapters: Sequence[Adapter], weights: Sequence[float]) -> bool:
    """Whether heads, biases or token rows differ, so that a merge asks which to take."""
    try:
        plan_extras(*flat(adapters, weights), "error", str)
    except IncompatibleError:
        return True
    return False


def _figures(task: Task, settings: Settings) -> list[Figures]:
    """The figures of all modules, in the plan's order."""
    sides = {module.stem: task.parts(module) for module in task.plan.modules}
    jobs = [
        Job(
            batch[0].stem,
            kernel.figures,
            (batch, [sides[module.stem] for module in batch], settings),
            kernel.peak(batch, len(task.adapters), settings),
        )
        for batch in task.batches()
    ]
    found = {one.stem: one for batch in task.run(jobs) for one in batch}
    return [found[module.stem] for module in task.plan.modules]


def _deltas(task: Task, full: Sequence[FullDelta], weights: Any) -> list[Tile]:
    """Full deltas, the weighted sum as one more member behind the adapters."""
    together = []
    for delta in full:
        tensors = tuple(
            (float(w) * c, ref)
            for w, member in zip(weights, delta.members, strict=True)
            for c, ref in member.tensors
            if w
        )
        factors = tuple(
            replace(part, coefficient=float(w) * part.coefficient)
            for w, member in zip(weights, delta.members, strict=True)
            for part in member.factors
            if w
        )
        together.append(replace(delta, members=(*delta.members, Dense(tensors, factors))))
    jobs = [Job(one.name, dense.dense_tile, (one,), dense.peak(one)) for one in together]
    return list(task.run(jobs))
