"""What will become of a change, from a sample of its rows, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from adapterops.baking.delta import Delta, bands
from adapterops.baking.figures import Drift
from adapterops.baking.kernel import Rounding, bake_rows
from adapterops.baking.targets import Target
from adapterops.stream import Compute, Job, run

_SHARE = 0.01  # of the rows
_RUNS, _LEAST = 4, 8  # runs of neighbouring rows they are in, rows at least
MARGIN = 1.25  # a prediction beyond a limit by this factor is sure enough to stop


def predict(
    targets: Iterable[Target], rounding: Rounding, dtype: str | None, on: Compute
) -> list[Drift]:
    """The figures of every target, from about 1 % of its rows; `dtype` None keeps each its own.

    Sums are scaled up from rows to tensors. Runs of rows are spread evenly, so the same input gives
    the same prediction. Raises what baking the rows raises.
    """
    jobs = _jobs(targets, rounding, dtype, on)
    return list(run(jobs, on))


def _jobs(
    targets: Iterable[Target], rounding: Rounding, dtype: str | None, on: Compute
) -> Iterator[Job[Drift]]:
    for target in targets:
        how = replace(rounding, dtype=dtype or target.ref.dtype)
        peak = 24 * sum(target.matrix) * sum(term.site.rank for term in target.terms) + (16 << 20)
        yield Job(target.name, _sampled, (target, how, on.device), peak)


def _sampled(target: Target, rounding: Rounding, device: str) -> Drift:
    total = Drift()
    along = target.inputs == "rows"
    if along and rounding.mode == "compensated":  # it needs all rows; the others do not tell
        rounding = replace(rounding, mode="nearest")
    for band in bands(target):
        if not band.is_changed:
            continue
        delta = Delta(target, band, device=device)
        found, rows = Drift(), 0
        for start, stop in sample(band.start, band.stop):
            found += bake_rows(delta, start, stop, rounding)[2].drift
            rows += stop - start
        basis = delta.basis()
        if along and basis is not None:
            found = replace(found, inside=_inside(found, basis.shape[1] / basis.shape[0]))
        found = found.scaled((band.stop - band.start) / rows)
        if found.delta > delta.noise:
            total += found
    return total


def _inside(drift: Drift, share: float) -> float:
    """‖QᵀE‖² where rows alone do not tell: what was lost of D, and the noise's share of the space.

    E = (gain − 1)·D + noise, the noise spread evenly over all directions.
    """
    lost = (1 - (drift.gain or 0.0)) ** 2 * drift.delta
    return lost + share * max(0.0, drift.error - lost)


def sample(start: int, stop: int) -> list[tuple[int, int]]:
    """About 1 % of the rows [start, stop), in runs spread evenly; all of them where few."""
    rows = stop - start
    wanted = min(rows, max(_LEAST, math.ceil(_SHARE * rows)))
    runs = min(_RUNS, wanted)
    size = wanted // runs
    if wanted == rows or runs * size >= rows:
        return [(start, stop)]
    step = (rows - size) / max(1, runs - 1)
    firsts = sorted({start + round(k * step) for k in range(runs)})
    return [(first, first + size) for first in firsts]
