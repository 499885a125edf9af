"""The report, from what the jobs found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.analysis import totals
from adapterops.analysis.candidates import DENSE
from adapterops.analysis.kernel import Figures, Settings
from adapterops.analysis.report import AnalysisReport, AnalyzedInput, Candidate
from adapterops.analysis.signs import conflict
from adapterops.analysis.suggestion import DOMINANT, Found, suggest
from adapterops.analysis.totals import Whole
from adapterops.casts import format_name
from adapterops.certificate import ratio
from adapterops.difference.names import path_of
from adapterops.difference.task import Task
from adapterops.difference.tiles import Tile

_SCALES = 4.0  # times apart: worth a look at alpha


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave that a suggested command repeats, and whether weights were among it."""

    names: Sequence[str]
    options: Mapping[str, Any]
    weighted: bool


def build(
    task: Task, found: Sequence[Figures], deltas: Sequence[Tile], settings: Settings, given: Given
) -> AnalysisReport:
    """The whole report. The last member of each delta's tile is the weighted sum."""
    count, weights = len(task.adapters), settings.weights
    whole = totals.whole(found, deltas, count)
    modules = {one.stem: totals.module(one, weights) for one in found}
    shares = _shares(whole, weights)
    inputs = tuple(
        _input(
            task,
            index,
            given.names[index],
            float(weights[index]),
            whole,
            shares[index],
            sum((one.shares[index] or 0.0) > DOMINANT for one in modules.values()),
        )
        for index in range(count)
    )
    pairs = tuple(totals.pairs(found, whole, given.names))
    everyone = conflict([one.signs for one in found], -1)
    largest = max(one.rank for one in inputs)
    hints, needed, lossless = totals.rank_errors(found, whole, largest)
    tried = tuple(_candidates(found, deltas, whole, settings))
    paths = [path for path in map(path_of, task.adapters) if path is not None]
    suggestion = suggest(
        Found(
            inputs,
            pairs,
            hints,
            needed,
            lossless,
            whole.norm <= whole.floor,
            paths if len(paths) == count else None,
            given.options,
        )
    )
    return AnalysisReport(
        inputs=inputs,
        pairs=pairs,
        conflict=everyone,
        norm=whole.norm,
        floor=whole.floor,
        lossless=lossless,
        hints=hints,
        needed=needed,
        candidates=tried,
        suggestion=suggestion,
        modules=modules,
        seed=settings.seed,
        samples=settings.samples,
        left_out=task.plan.left_out,
        notes=tuple(_notes(inputs, given, bool(deltas))),
        warnings=task.plan.warnings,
    )


def _shares(whole: Whole, weights: Any) -> list[float | None]:
    sizes = np.abs(weights) * np.where(whole.zero, 0.0, whole.norms)
    return [ratio(float(size), float(sizes.sum())) for size in sizes]


def _input(
    task: Task,
    index: int,
    name: str,
    weight: float,
    whole: Whole,
    share: float | None,
    dominates: int,
) -> AnalyzedInput:
    files = [file for _, file in task.adapters[index].terms]
    own = [parts for module in task.plan.modules if (parts := task.parts(module)[index])]
    scales = [abs(part.site.scale) for parts in own for part in parts]
    return AnalyzedInput(
        name=name,
        weight=weight,
        dialect=" and ".join(sorted({file.dialect for file in files})),
        base=next((file.base for file in files if file.base), None),
        dtype=" and ".join(sorted({format_name(file.dtype) for file in files})),
        rank=max((sum(part.site.rank for part in parts) for parts in own), default=0),
        modules=len(own),
        scales=(min(scales), max(scales)) if scales else None,
        norm=float(whole.norms[index]),
        share=share,
        zero=whole.zero[index],
        dominates=dominates,
    )


def _candidates(
    found: Sequence[Figures], deltas: Sequence[Tile], whole: Whole, settings: Settings
) -> list[Candidate]:
    live = [float(x) for x, zero in zip(whole.norms, whole.zero, strict=True) if not zero]
    mean = math.fsum(live) / len(live) if live else 0.0
    result = []
    for place, method in enumerate(settings.methods):
        parts = [one.merged[place] for one in found]
        problem = next((part.problem for part in parts if part.problem), "")
        if problem:
            nothing = (None,) * len(whole.norms)
            result.append(Candidate(method.name, method.options, nothing, None, problem))
            continue
        inner = [part.inner for part in parts] + [tile.inner[-1, :-1] for tile in deltas]
        norms = [part.norm for part in parts] + [float(tile.norms[-1]) for tile in deltas]
        retention = tuple(
            None if zero else math.fsum(float(x[i]) for x in inner) / float(norm) ** 2
            for i, (norm, zero) in enumerate(zip(whole.norms, whole.zero, strict=True))
        )
        size = ratio(math.hypot(*norms), mean)
        result.append(Candidate(method.name, method.options, retention, size))
    return result


def _notes(inputs: Sequence[AnalyzedInput], given: Given, full: bool) -> list[str]:
    """What a reader must know of the figures, and what is odd of the adapters."""
    notes = []
    if not given.weighted:
        notes.append(f"no weights were given: {inputs[0].weight:.3g} each is assumed")
    notes += [f"{one.name} is zero: it changes nothing" for one in inputs if one.zero]
    ranks = sorted({one.rank for one in inputs})
    if len(ranks) > 1:
        listed = ", ".join(map(str, ranks))
        notes.append(f"the ranks differ ({listed}), which a merge takes as they are")
    scales = [one.scales for one in inputs if one.scales and one.scales[0] > 0]
    if scales and max(x[1] for x in scales) > _SCALES * min(x[0] for x in scales):
        said = ", ".join(f"{one.name} {one.scales[1]:g}" for one in inputs if one.scales)
        notes.append(
            f"the scales (alpha over rank) differ: {said}; a wrong one weighs like a weight"
        )
    if full:
        notes.append(
            "full deltas count in norms and cosines, in no sign conflict or spaces; no rank cuts "
            "them, and methods other than linear refuse them"
        )
    notes.append(f"not tried, for they need the dense ΔW: {DENSE}; merge and bake report theirs")
    return notes
