"""A planned weighted sum: which modules, whose factors, what output. Known from headers alone."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from adapterops.composed import single_terms
from adapterops.formats import peft
from adapterops.formats.model import AdapterFile, Layer, Ref, Site, leaves
from adapterops.metric import Inputs
from adapterops.scaling import Scaling, stored


@dataclass(frozen=True, slots=True)
class Part:
    """One input's share of a module: coefficient = fl64(weight · scale)."""

    input: int
    coefficient: float
    site: Site


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the result and the factor pairs that make it up; none make a module of zeros.

    `kept` is the rank it is written at, `scale` what its loader multiplies B·A by. Its error is
    measured as `weight`·‖·‖_F, or by what its `inputs` make of it. Where a method makes some part
    of it, `leaves` are the adapters' modules that all of it is made from, by the input's index.
    """

    stem: str
    dialect: str
    layer: Layer
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    parts: tuple[Part, ...]
    kept: int = 0
    scale: float = 1.0
    weight: float = 1.0
    inputs: Inputs | None = None
    leaves: tuple[tuple[int, Site], ...] = ()

    @property
    def expert(self) -> tuple[int, int] | None:
        """(index, count) where several modules share their tensors."""
        return self.parts[0].site.expert if self.parts else None

    @property
    def source(self) -> str:
        """The module's name in the first input that has it."""
        return self.parts[0].site.stem if self.parts else self.stem

    @property
    def tensors(self) -> str:
        """The stem of the tensors that hold it: an expert's are shared."""
        return self.stem.removesuffix(f"[{self.expert[0]}]") if self.expert else self.stem

    @property
    def shares(self) -> str:
        """What it must share its rank with: tensors, and in PEFT a pattern.

        One `rank_pattern` stands for both projections of a MultiheadAttention, and for nested
        parameters of one module, which only their number tells apart.
        """
        if self.dialect != "peft":
            return self.tensors
        site = self.parts[0].site if self.parts else None
        return site.owner if site and len(site.owned) > 1 else peft.target_path(self.tensors)

    @property
    def origins(self) -> tuple[tuple[int, Site], ...]:
        """The adapters' modules that it is made from, by the input's index."""
        return self.leaves or tuple((part.input, part.site) for part in self.parts)

    @property
    def columns(self) -> int:
        """Σ rᵢ: an upper bound of the result's rank."""
        return sum(part.site.rank for part in self.parts)

    @property
    def least(self) -> int:
        """The smallest rank that does not lose a shift of the bias."""
        return int(any("bias" in part.site.parts for part in self.parts))

    @property
    def bound(self) -> int:
        """The largest rank that the result can have."""
        return min(self.columns, *self.shape)


@dataclass(frozen=True, slots=True)
class Weighting:
    """What error is measured in: Frobenius norms, weighted by module, or what inputs make of it.

    Keys are the modules' names in the input; `notes` are warnings.
    """

    name: Literal["frobenius", "relative", "activation"] = "frobenius"
    weights: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Inputs] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    """Everything that is decided before a factor is read.

    `listed_targets`: the config must list its targets, for an expression would not be understood.
    `mixed` are inputs that have several places, or one within a method: their weight says nothing.
    """

    inputs: tuple[AdapterFile, ...]
    weights: tuple[float, ...]
    modules: tuple[Module, ...]
    deltas: tuple[DenseSum, ...]
    dialect: str
    dtype: str
    left_out: int
    warnings: tuple[str, ...]
    scaling: Scaling = "folded"
    listed_targets: bool = False
    mixed: frozenset[int] = frozenset()

    def expanded(self) -> Plan:
        """The plan with adapters on disk as its inputs, where methods make some of them."""
        files, weights = leaves(self.inputs, self.weights)
        if files == list(self.inputs):
            return self
        places = {id(file): index for index, file in enumerate(files)}
        single = single_terms(self.inputs, self.weights)
        firsts = [leaves([file], [1.0])[0][0] for file in self.inputs]
        own = [places[id(first)] for first in firsts]
        modules = tuple(_expanded(module, self.inputs, own, places) for module in self.modules)
        deltas = (
            replace(
                delta,
                parts=tuple(replace(part, input=own[part.input]) for part in delta.parts),
                factors=tuple(replace(part, input=own[part.input]) for part in delta.factors),
            )
            for delta in self.deltas
        )
        return replace(
            self,
            inputs=tuple(files),
            weights=tuple(weights),
            modules=modules,
            deltas=tuple(deltas),
            mixed=frozenset(at for at, file in enumerate(files) if id(file) not in single),
        )

    def measured_by(self, weighting: Weighting) -> Plan:
        """The plan with its error measured so; full deltas count in Frobenius norms only."""
        modules = (
            replace(
                module,
                weight=weighting.weights.get(module.source, 1.0),
                inputs=weighting.inputs.get(module.source),
            )
            for module in self.modules
        )
        return replace(self, modules=tuple(modules))

    def at(self, ranks: Sequence[int]) -> Plan:
        """The plan with every module at the rank it is to be written at."""
        modules = []
        for module, rank in zip(self.modules, ranks, strict=True):
            own = module.parts[0].site.scale if module.parts else 1.0
            scale = stored(self.scaling, module.dialect, own, rank)[1]
            modules.append(replace(module, kept=rank, scale=scale))
        return replace(self, modules=tuple(modules))

    @property
    def written(self) -> list[Module]:
        """The modules that have tensors in the output: those above rank 0."""
        return [module for module in self.modules if module.kept]

    @property
    def rank(self) -> int:
        """The largest rank that a module is written at."""
        return max((module.kept for module in self.modules), default=0)

    @property
    def groups(self) -> list[list[int]]:
        """Indices of modules that must have one rank, for they share their tensors."""
        found: dict[str, list[int]] = defaultdict(list)
        for index, module in enumerate(self.modules):
            found[module.shares].append(index)
        return list(found.values())

    @property
    def stored_parameters(self) -> int:
        """Numbers in the inputs' factors as they are stored."""
        return self.stored_of(range(len(self.modules)))

    def stored_of(self, members: Iterable[int]) -> int:
        """Numbers in the inputs' factors of some modules as they are stored."""
        seen = {}
        for module in (self.modules[i] for i in members):
            for index, site in module.origins:
                file = self.inputs[index]
                for role, ref in site.parts.items():
                    if role != "alpha" and ref.name in file.tensors:
                        shape = file.tensors[ref.name].shape  # of all experts together
                        seen[id(file), ref.name] = math.prod(shape)
        return sum(seen.values())

    @property
    def live(self) -> list[AdapterFile]:
        """The inputs that have a say: those of non-zero weight."""
        return [file for file, w in zip(self.inputs, self.weights, strict=True) if w]

    @property
    def input_rank(self) -> int:
        """The largest rank among the inputs, of a dense change that of the factors in it."""
        sites = (site for module in self.modules for _, site in module.origins)
        return max(((site.inner or site).rank for site in sites), default=0)

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

    def parameters(self, ranks: Sequence[int]) -> int:
        """Numbers in the output's factors at these ranks."""
        return sum(
            rank * sum(module.shape) for rank, module in zip(ranks, self.modules, strict=True)
        )

    @property
    def dense(self) -> int:
        """Numbers in the dense deltas."""
        return sum(math.prod(module.shape) for module in self.modules)


def _expanded(
    module: Module, inputs: Sequence[AdapterFile], own: Sequence[int], places: Mapping[int, int]
) -> Module:
    """A module whose parts have the numbers `own` of their inputs' first adapters on disk."""
    origins: dict[int, tuple[int, Site]] = {}
    for part in module.parts:
        found = [(inputs[part.input], part.site)]
        for file, site in part.site.made.leaves() if part.site.made else found:
            origins.setdefault(id(site), (places[id(file)], site))
    made = any(part.site.made for part in module.parts)
    return replace(
        module,
        parts=tuple(replace(part, input=own[part.input]) for part in module.parts),
        leaves=tuple(origins.values()) if made else (),
    )
