"""Adapters baked one after the other, each sum rounded, against all of them baked at once.

After k steps the sequence holds the errors of k roundings. Those are nearly independent, so that
its error grows like √k, while the sum of all changes is rounded only once. Errors are relative to
the sum so far, S_j = D₁ + … + D_j: ‖W_j − W − S_j‖ / ‖S_j‖, in float64 from the rounded weights.
A later adapter's change is taken as it stands, also where training it on W_j would have given
another (DoRA's depends on the weight).

One tensor at a time; three copies of it, in its own type, are held, its rows worked on in blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.figures import Drift
from adapterops.baking.kernel import Round, Rounding, bake_rows, read_rows
from adapterops.certificate import plain
from adapterops.changes.targets import Target
from adapterops.formats.model import Ref
from adapterops.judging.intruders import Weight, intruders_in
from adapterops.judging.measure import as_outputs

_BLOCK = 1 << 20  # elements of a block of rows


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the sum so far: ‖E‖, ‖E‖/‖S‖, the gain and the error inside the adapters.

    As in `baking.figures.Drift`; None where S is zero. `intruders` counts intruder dimensions,
    None where that was not asked for or the tensor is no matrix.
    """

    error: float
    relative_error: float | None
    gain: float | None
    subspace_error: float | None
    intruders: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """After this many adapters: one after the other, and all of them at once."""

    adapters: int
    sequential: Figures
    at_once: Figures

    @property
    def growth(self) -> float | None:
        """How many times the error of baking at once the sequence has; None where that is 0."""
        return self.sequential.error / self.at_once.error if self.at_once.error else None


@dataclass(frozen=True, slots=True)
class ChainReport:
    """The steps of the whole model, sums over its tensors, and of each tensor by name."""

    steps: tuple[Step, ...]
    tensors: Mapping[str, tuple[Step, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, `growth` included."""

        def steps(given: Sequence[Step]) -> list[dict[str, Any]]:
            return [{**plain(step), "growth": step.growth} for step in given]

        tensors = {name: steps(mine) for name, mine in self.tensors.items()}
        return {"steps": steps(self.steps), "tensors": tensors}


@dataclass(frozen=True, slots=True)
class _Found:
    """The sums of one tensor after one step, and its intruders."""

    drift: Drift = field(default_factory=Drift)
    intruders: int | None = None


class _Held:
    """A tensor's bytes in memory, to be read like a file and written over."""

    def __init__(self, ref: Ref) -> None:
        self.path = ref.source.path
        self.raw = ref.raw()
        self.ref = replace(ref, source=self, offset=0)

    def size(self) -> int:
        """Its number of bytes."""
        return self.raw.nbytes

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = self.raw[offset : offset + len(buffer)].data

    def check_unchanged(self) -> None:
        """Nothing else writes to it."""

    def close(self) -> None:
        """It holds no descriptor."""

    def write(self, rows: torch.Tensor, start: int) -> None:
        """Replace the rows from `start` on."""
        codes = rows.contiguous().view(-1).view(torch.uint8).numpy()
        at = start * (codes.nbytes // max(1, len(rows)))
        self.raw[at : at + codes.nbytes] = codes


def chain(
    adapters: Sequence[Mapping[str, Target]],
    mode: Round = "exact",
    *,
    seed: int = 0,
    intruders: bool = False,
    without: Collection[str] = (),
) -> ChainReport:
    """Bake the targets of each adapter in turn into one base, every sum in the base's own type.

    `adapters` are `mapping.changes(base, [adapter], [weight]).targets`, in the order of baking.
    Stochastic rounding has the seed `seed` + j at step j. `intruders` counts intruder dimensions
    after every step, a decomposition of each weight but those `without`. Raises NumericsError,
    naming the tensor, for what the type cannot hold.
    """
    names = list(dict.fromkeys(name for targets in adapters for name in targets))
    tensors: dict[str, tuple[Step, ...]] = {}
    totals = [(_Found(), _Found())] * len(adapters)
    for name in names:
        counted = intruders and name not in without
        found = _of_tensor([targets.get(name) for targets in adapters], mode, seed, counted)
        tensors[name] = _steps(found)
        totals = [
            (_plus(one, mine), _plus(other, theirs))
            for (one, other), (mine, theirs) in zip(totals, found, strict=True)
        ]
    return ChainReport(_steps(totals), tensors)


def _of_tensor(
    targets: Sequence[Target | None], mode: Round, seed: int, intruders: bool
) -> list[tuple[_Found, _Found]]:
    """One after the other and at once, after each step; a step may leave the tensor alone."""
    first = next(target for target in targets if target)
    total = replace(first, terms=(), dense=())
    sequence, once = _Held(first.ref), _Held(first.ref)
    counted = intruders and len(first.ref.shape) in (2, 4, 5) and min(first.matrix) > 1
    weight = Weight(as_outputs(first, first.ref)) if counted else None
    found = (_Found(), _Found())
    if weight is not None:
        found = (_Found(intruders=0), _Found(intruders=0))
    result = []
    for index, target in enumerate(targets):
        if target is not None:
            rounding = Rounding(mode, first.ref.dtype, seed + index)
            total = replace(
                total, terms=total.terms + target.terms, dense=total.dense + target.dense
            )
            _bake(replace(target, ref=sequence.ref), rounding, sequence)
            _bake(total, rounding, once)
            found = (_judged(total, sequence, weight), _judged(total, once, weight))
        result.append(found)
    return result


def _bake(target: Target, rounding: Rounding, into: _Held) -> None:
    """The changed rows of a target, rounded, in place of those that `into` holds."""
    for band in bands(target):
        if not band.is_changed:
            continue
        delta = Delta(target, band)
        whole = rounding.mode == "compensated" and target.inputs == "rows"  # feeds back down rows
        for start, stop in _blocks(target, band.start, band.stop, whole):
            into.write(bake_rows(delta, start, stop, rounding)[1], start)


def _judged(total: Target, held: _Held, weight: Weight | None) -> _Found:
    """What became of the sum so far in the tensor as it is held, over its changed rows."""
    drift = Drift()
    for band in bands(total):
        if band.is_changed:
            drift += _of_band(Delta(total, band), held.ref)
    if weight is None:
        return _Found(drift)
    return _Found(drift, len(intruders_in(weight, as_outputs(total, held.ref)).dims))


def _of_band(delta: Delta, after: Ref) -> Drift:
    total, band, basis = delta.target, delta.band, delta.basis()
    Q = None if basis is None else basis.double()
    drift = Drift()
    along: torch.Tensor | float = 0.0  # Qᵀ·E, where inputs run along rows
    for start, stop in _blocks(total, band.start, band.stop):
        W = read_rows(total.ref, total.matrix, start, stop).double()
        moved = read_rows(after, total.matrix, start, stop).double() - W
        D = delta.double(start, stop)
        E = moved - D
        inside = _dot(E, E)
        if Q is not None and total.inputs == "columns":
            inside = _dot(E @ Q, E @ Q)
        elif Q is not None:
            inside = 0.0
            along = along + Q[start - band.start : stop - band.start].T @ E
        drift += Drift(delta=_dot(D, D), realised=_dot(moved, D), error=_dot(E, E), inside=inside)
    if isinstance(along, torch.Tensor):
        drift = replace(drift, inside=_dot(along, along))
    if drift.delta <= delta.noise:  # the changes cancel
        return Drift(error=drift.error)
    return drift


def _blocks(target: Target, start: int, stop: int, whole: bool = False) -> list[tuple[int, int]]:
    step = stop - start if whole else max(1, _BLOCK // max(1, target.matrix[1]))
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


def _plus(one: _Found, other: _Found) -> _Found:
    counts = [found.intruders for found in (one, other) if found.intruders is not None]
    return _Found(one.drift + other.drift, sum(counts) if counts else None)


def _steps(found: Sequence[tuple[_Found, _Found]]) -> tuple[Step, ...]:
    return tuple(
        Step(index + 1, _figures(sequential), _figures(at_once))
        for index, (sequential, at_once) in enumerate(found)
    )


def _figures(found: _Found) -> Figures:
    drift = found.drift
    return Figures(
        error=drift.error**0.5,
        relative_error=drift.relative_error,
        gain=drift.gain,
        subspace_error=drift.subspace_error,
        intruders=found.intruders,
    )


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))
