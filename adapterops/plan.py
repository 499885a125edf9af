"""A planned weighted sum: which modules, whose factors, what output. Known from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from adapterops.formats.model import AdapterFile, Layer, Ref, Site


@dataclass(frozen=True, slots=True)
class Part:
    """One input's share of a module: coefficient = fl64(weight · scale)."""

    input: int
    coefficient: float
    site: Site


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the result and the factor pairs that make it up."""

    stem: str
    dialect: str
    layer: Layer
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def expert(self) -> tuple[int, int] | None:
        """(index, count) where several modules share their tensors."""
        return self.parts[0].site.expert

    @property
    def tensors(self) -> str:
        """The stem of the tensors that hold it: an expert's are shared."""
        return self.stem.removesuffix(f"[{self.expert[0]}]") if self.expert else self.stem

    @property
    def columns(self) -> int:
        """Σ rᵢ: an upper bound of the result's rank."""
        return sum(part.site.rank for part in self.parts)

    @property
    def bound(self) -> int:
        """The largest rank that the result can have."""
        return min(self.columns, *self.shape)


@dataclass(frozen=True, slots=True)
class DensePart:
    """One input's share of a full delta."""

    input: int
    coefficient: float
    ref: Ref


@dataclass(frozen=True, slots=True)
class DenseSum:
    """A full delta of the result: Σ cᵢxᵢ, and the factor pairs that change the same weight."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[DensePart, ...]
    factors: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a factor is read."""

    inputs: tuple[AdapterFile, ...]
    weights: tuple[float, ...]
    modules: tuple[Module, ...]
    deltas: tuple[DenseSum, ...]
    dialect: str
    dtype: str
    left_out: int
    warnings: tuple[str, ...]

    @property
    def live(self) -> list[AdapterFile]:
        """The inputs that have a say: those of non-zero weight."""
        return [file for file, w in zip(self.inputs, self.weights, strict=True) if w]

    @property
    def input_rank(self) -> int:
        """The largest rank among the inputs."""
        parts = (part for module in self.modules for part in module.parts)
        return max((part.site.rank for part in parts), default=0)

    @property
    def bound(self) -> int:
        """The largest uniform rank that loses nothing whatever the values are."""
        return max((module.bound for module in self.modules), default=0)

    @property
    def whole_tensors(self) -> bool:
        """Whether every expert is there of each tensor that several share."""
        experts = Counter(module.tensors for module in self.modules if module.expert)
        counts = {module.tensors: module.expert[1] for module in self.modules if module.expert}
        return experts == counts

    def parameters(self, rank: int) -> int:
        """Numbers in the output's factors at a uniform rank."""
        return rank * sum(sum(module.shape) for module in self.modules)

    @property
    def dense(self) -> int:
        """Numbers in the dense deltas."""
        return sum(math.prod(module.shape) for module in self.modules)
