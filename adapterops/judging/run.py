"""A merged model judged from end to end: what the adapters change, and everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops.baking.provenance import history_of
from adapterops.basemodel import BaseModel
from adapterops.changes.targets import Changes, Target
from adapterops.judging.configs import compare_configs
from adapterops.judging.diagnosis import diagnose
from adapterops.judging.measure import Pair
from adapterops.judging.report import DriftReport, report
from adapterops.judging.untargeted import (
    Copied,
    Finding,
    Matched,
    compare_copies,
    compare_values,
    match_models,
)
from adapterops.judging.verdict import Judged, judge
from adapterops.rounding.precision import exact_arithmetic
from adapterops.stream import Compute, Job, run

Progress = Callable[[str, int, int], None]
_TILES = 96 << 20  # bytes of temporaries that judging a tensor takes
_BLOCK = 16 << 20
_FAITHFUL = ("stochastic", "compensated")  # roundings to either neighbour


def judge_model(
    base: BaseModel,
    changes: Changes,
    adapters: Sequence[tuple[str, float]],
    baked: BaseModel,
    on: Compute,
    *,
    max_drift: float | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[DriftReport, Matched]:
    """The verdict on `baked`, and its tensors beside the base's.

    `adapters` are paths and weights, in the order of the changes' inputs. Raises UnsupportedError
    for quantised models and types that are not judged.
    """
    baked.check_not_quantised()
    matched = match_models(base, baked, changes)
    faithful = _faithful(history_of(base), history_of(baked))
    names = [path for path, _ in adapters]
    jobs: list[Job[Judged | Copied | Finding | None]] = [
        *(_job(name, _judged, _size(pair.target), pair, faithful, names)
          for name, pair in matched.targets.items()),
        *(_job(name, compare_copies, _BLOCK, name, *pair) for name, pair in matched.copies.items()),
        *(_job(name, compare_values, 2 * _BLOCK, name, values, ref)
          for name, (values, ref) in matched.values.items()),
    ]  # fmt: skip
    judged: list[Judged] = []
    copied: list[Copied] = []
    findings: list[Finding] = []
    with exact_arithmetic():
        for done, found in enumerate(run(jobs, on)):
            if isinstance(found, Judged):
                judged.append(found)
            elif isinstance(found, Copied):
                copied.append(found)
            elif isinstance(found, Finding):
                findings.append(found)
            if progress:
                progress("tensors", done + 1, len(jobs))
    findings += compare_configs(base, baked, changes)
    result = report(
        base.path,
        adapters,
        baked.path,
        matched,
        judged,
        copied,
        findings,
        max_drift=max_drift,
        notes=[*changes.notes, *notes],
    )
    return result, matched


def _faithful(base: Sequence[Mapping[str, Any]], baked: Sequence[Mapping[str, Any]]) -> int:
    """How many bakes lie between two models, if one of them rounded to either neighbour, else 0."""
    made = baked[len(base) :] if baked[: len(base)] == base else baked
    options = [each.get("options") for each in made]
    rounds = [each.get("round") for each in options if isinstance(each, Mapping)]
    return len(made) if any(name in _FAITHFUL for name in rounds) else 0


def _job(name: str, kernel: Callable[..., Any], peak: int, *args: object) -> Job[Any]:
    return Job(name, kernel, args, peak)


def _size(target: Target) -> int:
    return _TILES + 24 * sum(target.matrix) * sum(term.site.rank for term in target.terms)


def _judged(pair: Pair, faithful: int, names: Sequence[str]) -> Judged:
    found = judge(pair, faithful)
    if found.implementation != "failed":
        return found
    return replace(found, cause=diagnose(pair, found, names))
