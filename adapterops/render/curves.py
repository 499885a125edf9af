"""The numbers behind the picture of a compression, from singular values alone.

Modules are orthogonal to each other, so squared singular values add up over the adapter. Keeping
the k largest of every module (Eckart & Young 1936) leaves √Σσ² of the rest; keeping single
directions wherever σ² per parameter is largest leaves √Σσ² of those not kept. A direction of an
(m, n) module costs m + n parameters, one column of B and one row of A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.casts import FORMATS
from adapterops.certificate import Report

Array = np.ndarray[Any, Any]

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Compression:
    """What was compressed and to what; every error is relative, in the same metric.

    `spectra` are each module's singular values in the metric, descending; `rest` is the norm of
    what lies beyond the values listed, in all. `shapes` are (m, n). `ranks` are those kept: a
    module that is missing there is left out, rank 0. `errors` are the modules' errors as written,
    None where a module is zero. `norm` is that of the whole adapter; `error` and `storage` are its
    error as written and the part of it due to the number format, which takes `width` bytes.
    """

    title: str
    spectra: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    errors: Mapping[str, float | None]
    norm: float
    error: float
    storage: float
    dtype: str
    width: int
    metric: str = "frobenius"
    rest: float = 0.0

    @property
    def stems(self) -> tuple[str, ...]:
        """The modules, in the order given."""
        return tuple(self.spectra)

    @property
    def kept(self) -> tuple[int, ...]:
        """The rank kept of each module, in the order of `stems`."""
        return tuple(self.ranks.get(stem, 0) for stem in self.stems)

    @property
    def parameters(self) -> int:
        """Numbers in the factors kept."""
        return sum(
            k * sum(self.shapes[stem]) for stem, k in zip(self.stems, self.kept, strict=True)
        )

    @property
    def mean_rank(self) -> float:
        """The uniform rank of as many parameters, not rounded."""
        return self.parameters / max(sum(sum(self.shapes[stem]) for stem in self.stems), 1)


def of_report(report: Report, title: str) -> Compression:
    """The numbers of a certificate that has `spectra`.

    What lies beyond the values of a range finder is counted. Modules below their own floor are
    zero. Outside the Frobenius norm a certificate has no figure for the number format alone, and
    the norm is that of the spectra.
    """
    plain = report.metric == "frobenius"
    modules = {stem: report.modules[stem] for stem in report.spectra}
    spectra = {
        stem: np.array(values) if modules[stem].error is not None else np.zeros(len(values))
        for stem, values in report.spectra.items()
    }
    unlisted = [
        math.sqrt(max(modules[stem].norm ** 2 - norm(values) ** 2, 0.0))
        for stem, values in spectra.items()
        if plain and modules[stem].route == "range" and modules[stem].error is not None
    ]
    return Compression(
        title=title,
        spectra=spectra,
        shapes={stem: module.shape for stem, module in modules.items()},
        ranks={stem: module.rank for stem, module in modules.items()},
        errors={
            stem: module.error if plain else module.metric_error for stem, module in modules.items()
        },
        norm=report.norm if plain else math.hypot(*map(norm, spectra.values())),
        error=report.error if plain else report.metric_error,
        storage=report.storage if plain else 0.0,
        dtype=report.dtype,
        width=next(f.bits for f in FORMATS.values() if f.name == report.dtype) // 8,
        metric=report.metric,
        rest=math.hypot(*unlisted),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """Relative truncation error (float64) against the number of parameters (int64), ascending."""

    parameters: Array
    errors: Array

    def point(self, parameters: int) -> int:
        """The last point with at most so many parameters; 0 and more."""
        return int(np.searchsorted(self.parameters, parameters, side="right")) - 1


def tails(values: Array, whole: float) -> Array:
    """‖what rank k cuts off‖ / whole for k = 0, 1, …, len(values); zeros where whole is zero."""
    if not whole > 0:
        return np.zeros(len(values) + 1)
    squares = (np.asarray(values, np.float64) / whole) ** 2  # divided first: no overflow
    summed = np.cumsum(squares[::-1])[::-1]  # from the smallest up: tails keep their digits
    errors: Array = np.sqrt(np.append(summed, 0.0))
    return errors


def uniform(found: Compression) -> Curve:
    """The whole adapter at rank 0, 1, 2, … for every module, zero padding counted."""
    values = list(found.spectra.values())
    squares = np.zeros(max(map(len, values), default=0) + 1)
    for one in values:
        squares[: len(one) + 1] += tails(one, found.norm) ** 2
    cost = sum(sum(found.shapes[stem]) for stem in found.stems)
    return Curve(cost * np.arange(len(squares)), _with_rest(squares, found))


def spent(found: Compression) -> Curve:
    """The whole adapter with directions spent where σ²/(m + n) is largest, one after another.

    Ties go to the module that comes first. Of equal costs no choice of as many directions is
    better; of different costs each point is the best for its own number of parameters.
    """
    costs = [max(sum(found.shapes[stem]), 1) for stem in found.stems]
    lengths = [len(one) for one in found.spectra.values()]
    cost = np.repeat(np.array(costs, np.int64), lengths)
    whole = found.norm if found.norm > 0 else 1.0
    squares = np.concatenate(
        [np.zeros(0), *((np.asarray(one) / whole) ** 2 for one in found.spectra.values())]
    )
    order = np.argsort(-squares / cost, kind="stable")
    left = np.append(np.cumsum(squares[order][::-1])[::-1], 0.0)
    return Curve(np.append(0, np.cumsum(cost[order])), _with_rest(left, found))


def _with_rest(squares: Array, found: Compression) -> Array:
    rest = found.rest / found.norm if found.norm > 0 else 0.0
    errors: Array = np.sqrt(squares + rest * rest)
    return errors


def by_module(found: Compression) -> Array:
    """(3, 1 + largest length): `QUANTILES` of the modules' own relative errors at rank 0, 1, ….

    Each module is measured against its own norm; modules that are zero are not counted.
    """
    width = max(map(len, found.spectra.values()), default=0) + 1
    table = np.zeros((len(found.spectra), width))
    for row, values in zip(table, found.spectra.values(), strict=True):
        row[: len(values) + 1] = tails(values, norm(values))
    table = table[table[:, 0] > 0]
    if not len(table):
        return np.zeros((len(QUANTILES), width))
    quantiles: Array = np.quantile(table, QUANTILES, axis=0)
    return quantiles


def norm(values: Array) -> float:
    """‖σ‖₂ without overflow."""
    return math.hypot(*map(float, values))


def enough(values: Array, energy: float) -> int:
    """The smallest rank that keeps this share of Σσ²; 0 where all of them are zero."""
    left = tails(values, norm(values))
    if not left[0] > 0:
        return 0
    return int(np.argmax(left**2 <= (1.0 - energy) * (1 + 1e-12)))


def thinned(curve: Curve, points: int) -> Curve:
    """At most about so many points of a curve, evenly on a logarithmic scale, both ends kept."""
    count = len(curve.parameters)
    if count <= points:
        return curve
    chosen = np.unique(np.rint(np.geomspace(1, count, points)).astype(np.int64) - 1)
    return Curve(curve.parameters[chosen], curve.errors[chosen])
