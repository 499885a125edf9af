"""What will become of a change, from a sample of its rows, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.kernel import Rounding, bake_rows, read_rows
from adapterops.baking.measuring import compared
from adapterops.changes.targets import Target
from adapterops.rounding.compensated import round_compensated
from adapterops.rounding.grid import TORCH
from adapterops.stream import Compute, Job, run

_SHARE = 0.01  # of the rows
_BLOCK = 1 << 20  # elements read at once
_PEAK = 32 << 20  # bytes of temporaries
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
        peak = max((Delta(target, band).peak for band in bands(target)), default=0) + _PEAK
        yield Job(target.name, _sampled, (target, how, on.device), peak)


def _sampled(target: Target, rounding: Rounding, device: str) -> Drift:
    total = Drift()
    for band in bands(target):
        if not band.is_changed:
            continue
        delta = Delta(target, band, device=device)
        by_columns = target.inputs == "columns" or delta.basis() is None
        if rounding.mode == "compensated" and not by_columns:
            found = _columns(delta, rounding)
        else:
            found = _rows(delta, rounding)
        if found.delta > delta.noise:
            total += found
    return total


def _rows(delta: Delta, rounding: Rounding) -> Drift:
    """The figures of a band, from a sample of its rows."""
    band, basis = delta.band, delta.basis()
    found, rows = Drift(), 0
    for start, stop in sample(band.start, band.stop):
        found += bake_rows(delta, start, stop, rounding)[2].drift
        rows += stop - start
    if delta.target.inputs == "rows" and basis is not None:
        found = replace(found, inside=_inside(found, basis.shape[1] / basis.shape[0]))
    return found.scaled((band.stop - band.start) / rows)


def _columns(delta: Delta, rounding: Rounding) -> Drift:
    """The figures of a band that is rounded with feedback down its rows, which must all be there.

    A sample of columns then tells, and the band is read as a whole. Nothing of one that holds NaN
    or infinities: baking it says so.
    """
    target, band, basis = delta.target, delta.band, delta.basis()
    assert basis is not None
    width = target.matrix[1]
    chosen = torch.cat([torch.arange(*columns) for columns in sample(0, width)])
    step = max(1, _BLOCK // max(1, width))
    blocks = [(start, min(start + step, band.stop)) for start in range(band.start, band.stop, step)]
    W = torch.cat([read_rows(target.ref, target.matrix, *block)[:, chosen] for block in blocks])
    if not bool(torch.isfinite(W).all()):
        return Drift()
    D = torch.cat([delta.double(*block)[:, chosen] for block in blocks])
    rounded, clipped = round_compensated(
        (W.double() + D).T, basis.cpu(), TORCH[rounding.dtype], module=target.name
    )
    drift, along = compared(W, rounded.T.contiguous(), D, delta, band.start, band.stop)
    inside = 0.0 if along is None else float((along * along).sum())
    share = len(chosen) / width
    elements = round(share * drift.elements)  # those of all columns
    found = replace(
        drift,
        inside=inside,
        elements=elements,
        swallowed=max(0, elements - drift.changed),
        clipped=clipped,
    )
    return found.scaled(1 / share)


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
