"""What `analyze` reports of adapters before they are merged.

Norms are Frobenius norms, of the adapters as they are unless weights are named. A module that an
adapter lacks counts as zero for it. What is undefined (a share of nothing, the retention of a zero
adapter) is None, never NaN; the cosine with a zero adapter is 0. Pairs stand in the order (0, 1),
(0, 2) … (1, 2) ….
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from adapterops.certificate import RankHint, plain

Relation = Literal[
    "zero", "duplicate", "scaled", "one-run", "shared-start", "alike", "opposed", "orthogonal"
]


@dataclass(frozen=True, slots=True)
class AnalyzedInput:
    """One adapter: `share` is |w|‖D‖ over the sum of these, `zero` if ΔW is rounding noise.

    `dominates` is the number of modules in which it has more than four fifths of the sum.
    """

    name: str
    weight: float
    dialect: str
    base: str | None
    dtype: str
    rank: int
    modules: int
    scales: tuple[float, float] | None
    norm: float
    share: float | None
    zero: bool
    dominates: int = 0


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far two adapters share a space, over the modules that both have.

    `overlap` is Σ‖Q₁ᵀQ₂‖²_F / Σmin(r₁, r₂), 1 where the smaller space lies in the larger;
    `expected` is what random spaces of these sizes have, Σ(r₁r₂/d) / Σmin(r₁, r₂). `mean` and
    `largest` are of the cosines of the principal angles.
    """

    overlap: float
    expected: float
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Conflict:
    """The share of entries in which adapters differ in sign, and its standard error.

    Of entries that at least two of the adapters change. By `count` each entry counts alike, and
    modules as many times as they have entries; by `mass` an entry counts Σ|wᵢDᵢ|. The sign is that
    of wᵢDᵢ. `entries` were looked at; the errors are 0 where that is all there are.
    """

    count: float
    count_error: float
    mass: float
    mass_error: float
    entries: int


@dataclass(frozen=True, slots=True)
class Extreme:
    """A module and its figure."""

    module: str
    value: float


@dataclass(frozen=True, slots=True)
class PairAnalysis:
    """Two adapters, by number.

    `distance` is ‖D₁ − D₂‖ relative to the larger norm, `factor` the c that brings c·D₁ nearest to
    D₂. `columns` are the spaces that the deltas map to (B), `rows` those they read from (A), None
    without a common module. `start` is the mean cosine of the A factors as they are stored, None
    where there are none to compare. `relation` says what they are to each other, `text` in words.
    """

    first: int
    second: int
    cosine: float
    distance: float | None
    factor: float | None
    lowest: Extreme | None
    highest: Extreme | None
    columns: Overlap | None
    rows: Overlap | None
    conflict: Conflict | None
    start: float | None
    relation: Relation
    text: str


@dataclass(frozen=True, slots=True)
class ModuleAnalysis:
    """One module: `ranks` are numerical, `shares` |w|‖D‖ over their sum; figures of pairs in order.

    `norm` is that of the weighted sum, `rank` what it needs for an error of 1 %. `conflict` is the
    share of entries in which any two adapters differ in sign.
    """

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    shares: tuple[float | None, ...]
    cosines: tuple[float, ...]
    columns: tuple[float | None, ...]
    rows: tuple[float | None, ...]
    conflict: float | None
    norm: float
    rank: int


@dataclass(frozen=True, slots=True)
class Needed:
    """The smallest uniform rank of the weighted sum within a relative error, and its error."""

    within: float
    rank: int
    error: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a method would give with these weights, before any cut to a rank.

    `retention` of an adapter is ⟨ΔW, D⟩/‖D‖², `size` is ‖ΔW‖ over the mean norm of the adapters.
    `note` says why there are no figures.
    """

    name: str
    options: tuple[str, ...]
    retention: tuple[float | None, ...]
    size: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A command to begin with and why; None where an adapter has no path of its own.

    `others` are further commands, each with what it is for.
    """

    command: str | None
    reasons: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class AnalysisReport:
    """Adapters before a merge: sizes, likeness, conflict, ranks, candidates, a suggestion.

    `norm` is that of the weighted sum; at or below `floor` it is rounding noise. `hints` are errors
    of its best approximation at standard ranks, storage left out; `lossless` is the rank that loses
    nothing. `samples` entries of each module were drawn for `conflict`, by `seed`. `left_out`
    counts modules that `--modules` excluded.
    """

    schema: ClassVar[str] = "adapterops.analyze/1"

    inputs: tuple[AnalyzedInput, ...]
    pairs: tuple[PairAnalysis, ...]
    conflict: Conflict | None
    norm: float
    floor: float
    lossless: int
    hints: tuple[RankHint, ...]
    needed: tuple[Needed, ...]
    candidates: tuple[Candidate, ...]
    suggestion: Suggestion
    modules: Mapping[str, ModuleAnalysis]
    seed: int
    samples: int
    left_out: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"schema": self.schema, **plain(self)}
