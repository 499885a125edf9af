"""What an operation reports: the exact error it caused, per module and in total.

Relative figures are ‖·‖_F over ‖ΔW‖_F of the exact result. They are computed from the bytes that
were written. A figure that is undefined (the error of a zero module, the retention of a zero
adapter) is None, never NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """What a merge method did in one module.

    Spectral methods left out what is at or below the singular value `cut` and kept `rank`
    directions; `gap` is σ_{k+1}/σ_k there, near 1 where the choice is arbitrary, 0 where nothing
    had to go. `fit` is the share of the adapters' energy in common subspaces, and a bound of what
    any could hold. Of elementwise methods `near` counts entries within 2⁻²⁰ of a limit, which
    rounding may have put on either side; for limits of a whole adapter, with its first module.
    `notes` are warnings.
    """

    name: str
    cut: float | None = None
    rank: int | None = None
    gap: float | None = None
    fit: tuple[float, float] | None = None
    near: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the result.

    `norm` is ‖ΔW‖_F of the exact result; at or below `floor`, the rounding noise of what went
    in, it means nothing. `truncation`, `storage` and `error` are relative to it: the part cut off,
    the part lost to the file's number format, and both together (not their sum). `retention` of an
    input D is ⟨written, D⟩/‖D‖²; `shares` are |w|‖D‖ over their sum. `route` says how the factors
    were made: copy, stack (all columns kept), gram, qr, range, or zero; dense for a full delta.
    `methods` are the merge methods that made parts of it.
    """

    shape: tuple[int, int]
    layer: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    truncation: float | None
    storage: float | None
    error: float | None
    shares: tuple[float | None, ...]
    retention: tuple[float | None, ...]
    subnormal: int
    route: str
    floor: float
    metric_error: float | None = None
    noise: float | None = None
    changed: float | None = None
    methods: tuple[MethodFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class InputReport:
    """One input: what it is, and how much of it the result holds.

    `weight` is the coefficient of its one term, None where it has several, or is within a method
    that is not all there is.
    """

    name: str
    sha256: str
    weight: float | None
    dialect: str
    dtype: str
    base: str | None
    modules: int
    rank: int
    scale: str
    norm: float | None
    share: float | None
    retention: float | None


@dataclass(frozen=True, slots=True)
class RankHint:
    """What a smaller rank would cost: relative truncation error of the whole adapter."""

    rank: int
    error: float


@dataclass(frozen=True, slots=True)
class Report:
    """The certificate of one output: totals over the whole adapter, then inputs and modules.

    `size` is the bytes of the weights file, `parameters` the numbers in its factors; both with
    `_before` are those of the inputs. `rank` is the largest of any module. `error` is
    ‖written − exact‖_F / ‖exact‖_F; a relative figure below `floor` / `norm` is rounding noise.
    `metric_error` is the same in `metric`. `gap` is by how much, at most, another allocation could
    be better (0: none is): in error for a budget, in parameters for a bound on the error. `dropped`
    are modules at rank 0. With another `method` than linear the exact result is what that makes of
    the inputs. `spectra` are singular values in the metric by module, where they were
    asked for.
    """

    output: str
    dialect: str
    dtype: str
    rank: int
    size: int
    size_before: int
    parameters: int
    parameters_before: int
    norm: float
    truncation: float
    storage: float
    error: float
    metric: str
    metric_error: float
    floor: float
    subnormal: int
    inputs: tuple[InputReport, ...]
    modules: Mapping[str, ModuleReport]
    gap: float | None = None
    dropped: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    hints: tuple[RankHint, ...] = ()
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verb: str = "merge"
    method: str = "linear"

    @property
    def schema(self) -> str:
        """The kind and version of the document."""
        return f"adapterops.{self.verb}/1"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints and the sidecar holds."""
        return {"schema": self.schema, **plain(self)}


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `--dry-run` prints: the output as it would be, with no factor written.

    `modules` maps each module to its shape and the inputs' ranks (0 where an input lacks it),
    `ranks` to that of the output.
    """

    output: str
    dialect: str
    dtype: str
    rank: int
    size: int
    modules: Mapping[str, tuple[tuple[int, int], tuple[int, ...]]]
    ranks: Mapping[str, int] = field(default_factory=dict)
    gap: float | None = None
    dropped: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    hints: tuple[RankHint, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verb: str = "merge"

    @property
    def schema(self) -> str:
        """The kind and version of the document."""
        return f"adapterops.{self.verb}-plan/1"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"schema": self.schema, **plain(self)}


@dataclass(frozen=True, slots=True)
class Figures:
    """One module's absolute figures as a kernel measured them; `inner` is ⟨written, wᵢDᵢ⟩.

    `metric` is (norm, total) by the module's inputs, None where the metric is Frobenius. Of the
    difference of two checkpoints, `noise` is what rounding to their format alone would make of it,
    `changed` how many of its numbers are not zero.
    """

    norm: float
    beta: float
    floor: float
    truncation: float
    storage: float
    total: float
    input_norms: tuple[float, ...]
    inner: tuple[float, ...]
    subnormal: int
    route: str
    metric: tuple[float, float] | None = None
    noise: float = 0.0
    changed: int | None = None
    methods: tuple[MethodFigures, ...] = ()

    def times(self, scale: float) -> Figures:
        """The figures of scale·ΔW."""
        if scale == 1.0:
            return self
        size = abs(scale)
        return dataclasses.replace(
            self,
            norm=self.norm * size,
            beta=self.beta * size,
            floor=self.floor * size,
            truncation=self.truncation * size,
            storage=self.storage * size,
            total=self.total * size,
            input_norms=tuple(each * size for each in self.input_norms),
            inner=tuple(each * scale * scale for each in self.inner),
            noise=self.noise * size,
            metric=None if self.metric is None else (self.metric[0] * size, self.metric[1] * size),
        )

    def in_metric(self, weight: float) -> tuple[float, float]:
        """(norm, total) in the metric that weights this module's Frobenius norm."""
        return self.metric or (self.norm * weight, self.total * weight)


def ratio(part: float, whole: float) -> float | None:
    """part / whole, None where whole is zero."""
    return part / whole if whole > 0 else None


def total(values: Sequence[float]) -> float:
    """Root of the sum of squares: modules are orthogonal to each other."""
    return math.hypot(*values) if values else 0.0


def fields_of(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary, one level deep: what `json` needs to write it piece by piece."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON takes them; NaN and infinities as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in fields_of(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
