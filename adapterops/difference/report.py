"""What `diff` reports: how far adapters are apart, and what that says of where they come from.

A is the first of two adapters, B the second. Distances and norms are Frobenius norms; a module that
one adapter lacks counts as zero for it. A figure at or below its `floor` is rounding noise of the
arithmetic. What is undefined (a share of a zero norm) is None, never NaN; the cosine with a zero
adapter is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from adapterops.certificate import plain

Relation = Literal["equal", "split", "rounded-a", "rounded-b", "close", "differ", "alone"]


@dataclass(frozen=True, slots=True)
class Angles:
    """Principal angles between two spaces, ascending, in degrees; uncertain by `floor`."""

    degrees: tuple[float, ...] = ()
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """One module of two adapters.

    `relative` is distance/‖A‖. B is closest to A at `ratio` times A; `residual` is what is left
    then. `zero` flags a ΔW that is nothing but rounding noise. `noise` is the error, root mean
    square, that rounding each adapter's factors once to the type they are stored in makes in ΔW.
    `factors` compares the factors themselves: equal, split (equal up to powers of two that cancel),
    rounded-a or -b (that one is the other, rounded to its type), close (equal to within rounding),
    differ, or alone (one adapter lacks the module). `columns` and `rows` are the angles between the
    spaces that the two ΔW map to and read from. `shared` is how much of one adapter's column
    space and of its row space lies inside the other's, the smaller of both directions, chance
    deducted; None where one ΔW is zero.
    """

    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    relative: float | None
    cosine: float
    ratio: float | None
    residual: float
    floor: float
    zero: tuple[bool, bool]
    noise: tuple[float, float]
    factors: Relation
    columns: Angles = Angles()
    rows: Angles = Angles()
    shared: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class DeltaDifference:
    """A dense change of one parameter (`.diff`, a bias): counted in the totals, element by element.

    An adapter that lacks it has norm 0. Figures are those of `ModuleDifference`.
    """

    shape: tuple[int, ...]
    norms: tuple[float, float]
    distance: float
    relative: float | None
    cosine: float
    ratio: float | None
    residual: float
    floor: float
    zero: tuple[bool, bool]
    noise: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Extras:
    """Tensors that are values, not changes (heads, trained biases, token rows), by name.

    `equal` to the last bit in both adapters, `differ` in values, type or shape, or in one only.
    """

    equal: tuple[str, ...] = ()
    differ: tuple[str, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def disagree(self) -> bool:
        """Whether the adapters differ in any of them."""
        return bool(self.differ or self.only_a or self.only_b)


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, mean and largest of a figure over the modules that both adapters have."""

    smallest: float
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """A figure that decided, and the threshold it was held against, if there was one."""

    value: float
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures say in plain words (`kind` in one), why, and what they cannot say."""

    kind: str
    text: str
    evidence: Mapping[str, Evidence]
    caveat: str = ""


@dataclass(frozen=True, slots=True)
class PairDifference:
    """Two adapters: the whole of them, then module by module.

    `spread` maps relative, cosine, columns and rows (the largest angle of a module, degrees) to
    their spread. `only_a` and `only_b` are the modules that the other lacks.
    """

    verdict: Verdict
    norms: tuple[float, float]
    distance: float
    relative: float | None
    cosine: float
    ratio: float | None
    residual: float
    floor: float
    noise: tuple[float, float]
    spread: Mapping[str, Spread]
    modules: Mapping[str, ModuleDifference]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    deltas: Mapping[str, DeltaDifference]
    extras: Extras


@dataclass(frozen=True, slots=True)
class ComparedInput:
    """One adapter; `zero` if its ΔW is nothing but rounding noise."""

    name: str
    dialect: str
    base: str | None
    dtype: str
    rank: int
    modules: int
    norm: float
    zero: bool


@dataclass(frozen=True, slots=True)
class DiffReport:
    """Distances and cosines of N adapters, and for two of them all that sets them apart.

    `distance[i][j]` is ‖i − j‖/‖i‖, relative to the row's adapter, None where that is zero;
    `floor[i][j]` what of it is rounding noise. `left_out` counts modules that `modules` excluded.
    """

    schema: ClassVar[str] = "adapterops.diff/1"

    inputs: tuple[ComparedInput, ...]
    distance: tuple[tuple[float | None, ...], ...]
    floor: tuple[tuple[float | None, ...], ...]
    cosine: tuple[tuple[float, ...], ...]
    pair: PairDifference | None = None
    left_out: int = 0
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"schema": self.schema, **plain(self)}
