"""What a tenant gets instead of its own adapter, summed over modules.

    g = ⟨C, D⟩/‖D‖²,  error² = ‖C − D‖²/‖D‖² = missing² + foreign²,
    missing = |1 − g|,  foreign = ‖C − g·D‖/‖D‖,

C the adapter that serves, D the tenant's own. Each is a sum of squares of differences: module l
adds ‖C_l − g_l·D_l‖² + (g_l − g)²‖D_l‖² to foreign²·‖D‖².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from adapterops.fleet.verifying.frames import Figures
from adapterops.geometry import cosine_of


@dataclass(frozen=True, slots=True)
class Error:
    """What a tenant gets instead of its own adapter, all over ‖D‖.

    `error` of a tenant whose change is zero is 0 if what serves it is zero too, else infinite.
    `worst` is the module, of those that the tenant changes, that is farthest off by its own norm.
    `measured` is the error in terms of the modules' inputs, where these were given. Of `error`,
    `floor` may be rounding noise; `norm` is ‖D‖.
    """

    error: float
    missing: float
    foreign: float
    cosine: float
    worst: tuple[str, float]
    measured: float | None
    norm: float
    floor: float


class Row(NamedTuple):
    """One module's `frames.Figures`."""

    c: float
    d: float
    inner: float
    distance: float
    residual: float
    ratio: float
    floor: float
    own_floor: float


def rows_of(stems: Sequence[str], found: Figures) -> dict[str, Row]:
    """stem -> its row of a batch's figures."""
    columns = (getattr(found, item.name).tolist() for item in fields(Figures))
    return dict(zip(stems, map(Row._make, zip(*columns, strict=True)), strict=True))


def error_of(rows: Mapping[str, Row], measured: float | None) -> Error:
    """The whole from its modules, summed in the order of their names."""
    modules = [rows[stem] for stem in sorted(rows)]
    squared = math.fsum(row.d for row in modules)
    norm, serving = math.sqrt(squared), math.sqrt(math.fsum(row.c for row in modules))
    floor = math.hypot(*(row.floor for row in modules))
    own_floor = math.hypot(*(row.own_floor for row in modules))
    if norm <= own_floor:
        error = 0.0 if serving <= floor else math.inf
        cosine = 1.0 if error == 0.0 else 0.0
        return Error(error, 0.0, error, cosine, ("", 0.0), measured, norm, 0.0)
    inner = math.fsum(row.inner for row in modules)
    gain = inner / squared
    foreign = math.fsum(row.residual + (row.ratio - gain) ** 2 * row.d for row in modules)
    ratios = {
        stem: math.sqrt(rows[stem].distance / rows[stem].d)
        for stem in sorted(rows)
        if math.sqrt(rows[stem].d) > rows[stem].own_floor
    }
    worst = max(ratios, key=lambda stem: ratios[stem])
    return Error(
        error=math.sqrt(math.fsum(row.distance for row in modules)) / norm,
        missing=abs(1.0 - gain),
        foreign=math.sqrt(foreign) / norm,
        cosine=cosine_of(inner, norm, serving),
        worst=(worst, ratios[worst]),
        measured=measured,
        norm=norm,
        floor=floor / norm,
    )


def itself(error: Error) -> Error:
    """The error of a tenant that its own file serves: of what was computed, only its norm stays."""
    measured = None if error.measured is None else 0.0
    return Error(0.0, 0.0, 0.0, 1.0, (error.worst[0], 0.0), measured, error.norm, 0.0)
