"""GPU bytes of a plan before and after, by an engine's own allocation formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterops.fleet.deploy.memory import Held, Shapes, gpu, prepared, width
from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.serving.model import Engine
from adapterops.serving.zeros import BaseShapes


@dataclass(frozen=True, slots=True)
class Memory:
    """`gpu` with at most so many adapters on the GPU as it has slots, `resident` with all.

    `notes` say what the bytes leave out.
    """

    gpu: GpuBytes
    resident: GpuBytes
    notes: tuple[str, ...]

    def of(self, adapters: int) -> int | None:
        """Bytes of so many adapters at once, at the mean of those that the plan deploys."""
        found = self.resident
        if found.after is None or not found.adapters_after:
            return None
        return round(found.after * adapters / found.adapters_after)


def memory(
    plan: Plan, index: Fleet | None, engine: Engine, slots: int, base: BaseShapes | None
) -> Memory:
    """What the tenants' own adapters and those of the plan cost on one GPU of `engine`.

    Ranks are as files have them, and the formula pads them as the engine does. Modules are those of
    the index, which leaves those out whose change is zero; without it nothing is known.
    """
    own = _own(plan, index)
    every: dict[str, tuple[int, int]] = {}
    for shapes in {id(shapes): shapes for shapes in own.values()}.values():
        every |= shapes
    notes = []
    slotted, said = prepared(every, base) if engine.memory == "slots" and every else (every, "")
    notes += [said] if said else []
    reps = [rep for rep in plan.representatives.values() if rep.kind != "base"]
    traffic = {rep.id: sum(plan.served[name].traffic for name in rep.members) for rep in reps}
    reps.sort(key=lambda rep: (-traffic[rep.id], rep.id))
    ordered = sorted(plan.served.items(), key=lambda pair: (-pair[1].traffic, pair[0]))
    widths = {name: width(own[name]) for name in own}
    before = [Held(item.rank, widths.get(name, 0)) for name, item in ordered]
    after = [Held(rep.rank, _width(rep, own)) for rep in reps]
    lost = sum(held.width == 0 for held in after)
    if index is not None and lost:
        notes.append(f"GPU bytes leave out {lost} adapters whose modules the index does not have")
    used = tuple(
        gpu(engine, before, after, slotted, count)
        for count in (slots, max(len(before), len(after)))
    )
    if index is None:
        used = tuple(_unknown(item) for item in used)
    return Memory(used[0], used[1], tuple(notes))


def _own(plan: Plan, index: Fleet | None) -> dict[str, Shapes]:
    """tenant -> the modules that its own adapter changes; one mapping for each layout."""
    if index is None:
        return {}
    shapes = {
        number: dict(zip(layout.stems, layout.shapes, strict=True))
        for number, layout in enumerate(index.layouts)
    }
    return {
        record.tenant.name: shapes[record.layout]
        for record in index.records
        if record.layout >= 0 and record.tenant.name in plan.served
    }


def _width(rep: Representative, own: Mapping[str, Shapes]) -> int:
    """Numbers per rank of an adapter that holds parts of these tenants'; 0 where none is known."""
    return width(_union(own[name] for name in rep.holds if name in own))


def _union(many: Iterable[Shapes]) -> Shapes:
    found: dict[str, tuple[int, int]] = {}
    for shapes in {id(shapes): shapes for shapes in many}.values():
        found |= shapes
    return found


def _unknown(found: GpuBytes) -> GpuBytes:
    return GpuBytes(
        found.kind,
        found.formula,
        None,
        None,
        found.rank_before,
        found.rank_after,
        found.adapters_before,
        found.adapters_after,
    )
