"""What baking reports: what became of the adapters' change, tensor by tensor and in all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.baking.figures import Drift
from adapterops.baking.run import Tally
from adapterops.casts import format_name
from adapterops.certificate import plain
from adapterops.changes.targets import Target
from adapterops.rounding.exact import Counts

# The share of the change that its own inputs may lose before a warning, by type (bake.md, §2).
NOTABLE = {"F16": 0.02, "BF16": 0.05}


@dataclass(frozen=True, slots=True)
class TensorDrift:
    """What became of the change of one tensor; figures as `baking.figures.Drift` defines them.

    `norm` is ‖D‖. Undefined ones, where D = 0, are None. `modules` are the adapters' own names.
    """

    dtype: str
    modules: tuple[str, ...]
    elements: int
    norm: float
    gain: float | None
    subspace_error: float | None
    error: float | None
    swallowed: float
    changed: float
    subnormal: int
    clipped: int
    ulp_mean: float
    ulp_max: float
    bias: float
    bias_z: float
    counts: Counts


@dataclass(frozen=True, slots=True)
class Total:
    """The sums over all tensors with a change; errors and gain weighted by energy, ‖D‖²."""

    elements: int
    norm: float
    gain: float | None
    subspace_error: float | None
    error: float | None
    swallowed: float
    changed: float
    subnormal: int
    clipped: int
    bias_z: float


@dataclass(frozen=True, slots=True)
class BakeReport:
    """The result of `bake`, or with `dry_run` what it would be.

    `tensors` are ordered by subspace error, worst first; `predicted` is the total that a sample of
    rows gave before anything was written. `values` are tensors that were given the adapters'
    values, `added` those that the base lacks, `unchanged` tensors whose change is zero. `size` is
    the bytes of all weights' files; `history` the bakes that made the base, first to last.
    """

    output: str
    base: str
    adapters: tuple[tuple[str, float], ...]
    rounding: str
    dtype: str
    total: Total | None
    predicted: Total | None
    tensors: Mapping[str, TensorDrift]
    counts: Counts
    values: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    modules: int = 0
    left_out: int = 0
    files: tuple[str, ...] = ()
    copied: int = 0
    size: int = 0
    resumed: int = 0
    undo: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    schema = "adapterops.bake/1"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"schema": self.schema, **plain(self)}


def tensor_drift(target: Target, tally: Tally, dtype: str) -> TensorDrift:
    """The figures of one tensor."""
    drift = tally.drift
    modules = [term.site.stem for term in target.terms] + [term.module for term in target.dense]
    return TensorDrift(
        dtype=format_name(dtype),
        modules=tuple(dict.fromkeys(modules)),
        elements=drift.elements,
        clipped=drift.clipped,
        ulp_mean=drift.ulp_mean,
        ulp_max=drift.ulp_max,
        bias=drift.mean_bias,
        counts=tally.counts,
        **figures_of(drift),
    )


def total_of(drifts: list[Drift]) -> Total | None:
    """The sums over tensors; None where nothing changes."""
    total = sum((drift for drift in drifts if drift.delta), Drift())
    if not total.delta:
        return None
    return Total(elements=total.elements, clipped=total.clipped, **figures_of(total))


def figures_of(drift: Drift) -> dict[str, Any]:
    """The figures that every report has, of a tensor or of all, by the names of its fields."""
    return {
        "norm": math.sqrt(drift.delta),
        "gain": drift.gain,
        "subspace_error": drift.subspace_error,
        "error": drift.relative_error,
        "swallowed": drift.swallowed_share,
        "changed": drift.changed_share,
        "subnormal": drift.subnormal,
        "bias_z": drift.bias_z,
    }


def representation_warnings(total: Total | None, dtypes: set[str], rounding: str) -> list[str]:
    """What the type loses of the change, and what to do about it, where that is worth a word."""
    limit = min((NOTABLE[dtype] for dtype in dtypes if dtype in NOTABLE), default=math.inf)
    if total is None or total.subspace_error is None or not total.subspace_error > limit:
        return []
    names = " and ".join(sorted(format_name(dtype) for dtype in dtypes if dtype in NOTABLE))
    way = "" if rounding == "compensated" else "--round compensated keeps nearly all of it, "
    return [
        f"{names} loses {100 * total.subspace_error:.2g} % of the change where the adapters act "
        f"(gain {total.gain:.3f}, {100 * total.swallowed:.2g} % of the elements do not move): "
        f"{way}--dtype float32 all of it, and so does serving the adapters unmerged"
    ]
