"""What is to be compared, planned from headers: modules and full deltas, adapter by adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from adapterops.adapter import Adapter
from adapterops.align import align
from adapterops.formats.model import Ref
from adapterops.plan import Module, Part, Plan
from adapterops.stream import Compute, Job, run

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Dense:
    """One adapter's share of a full delta: tensors times numbers, and factors that change it too.

    Neither, where the adapter leaves that parameter alone.
    """

    tensors: tuple[tuple[float, Ref], ...] = ()
    factors: Parts = ()

    def __bool__(self) -> bool:
        return bool(self.tensors or self.factors)


@dataclass(frozen=True, slots=True)
class FullDelta:
    """A change of one parameter that is compared element by element, and each adapter's share."""

    name: str
    shape: tuple[int, ...]
    members: tuple[Dense, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Adapters and the plan of their files; `owners` says whose each file of the plan is."""

    adapters: tuple[Adapter, ...]
    plan: Plan
    owners: tuple[int, ...]
    on: Compute
    progress: Progress | None = None

    def parts(self, module: Module) -> tuple[Parts, ...]:
        """What makes up a module in each adapter; nothing where it lacks the module."""
        return self._by_owner(module.parts)

    def _by_owner(self, parts: Sequence[Part]) -> tuple[Parts, ...]:
        return tuple(
            tuple(part for part in parts if self.owners[part.input] == index)
            for index in range(len(self.adapters))
        )

    def batches(self) -> list[tuple[Module, ...]]:
        """Modules one by one; experts that share their tensors together, which reads these once."""
        groups: dict[object, list[Module]] = defaultdict(list)
        for position, module in enumerate(self.plan.modules):
            groups[(module.tensors, module.shape) if module.expert else position].append(module)
        return [tuple(members) for members in groups.values()]

    def deltas(self) -> list[FullDelta]:
        """Every full delta, the shifts of biases (PEFT's lora_bias) included."""
        found = []
        for module in self.plan.modules:
            members = tuple(
                Dense(
                    tuple(
                        (part.coefficient, part.site.parts["bias"])
                        for part in parts
                        if "bias" in part.site.parts
                    )
                )
                for parts in self.parts(module)
            )
            if any(members):
                found.append(FullDelta(f"{module.stem}.bias", module.shape[:1], members))
        for delta in self.plan.deltas:
            tensors: list[list[tuple[float, Ref]]] = [[] for _ in self.adapters]
            for dense in delta.parts:
                tensors[self.owners[dense.input]].append((dense.coefficient, dense.ref))
            shares = zip(tensors, self._by_owner(delta.factors), strict=True)
            members = tuple(Dense(tuple(own), factors) for own, factors in shares)
            found.append(FullDelta(delta.name, delta.shape, members))
        return found

    def run(self, jobs: Sequence[Job[T]]) -> Iterator[T]:
        """The jobs' results in their order, counted aloud."""
        with closing(run(jobs, self.on)) as results:
            for done, result in enumerate(results, 1):
                if self.progress:
                    self.progress("comparing", done, len(jobs))
                yield result


def plan_task(
    adapters: Sequence[Adapter], modules: str | None, on: Compute, progress: Progress | None
) -> Task:
    """Match the adapters' modules by stem.

    Raises IncompatibleError for shapes that differ or nothing in common, UsageError for a pattern
    that matches no module.
    """
    terms = [term for adapter in adapters for term in adapter.terms]
    plan = align([file for _, file in terms], [weight for weight, _ in terms], modules=modules)
    owners = tuple(index for index, adapter in enumerate(adapters) for _ in adapter.terms)
    return Task(tuple(adapters), plan, owners, on, progress)
