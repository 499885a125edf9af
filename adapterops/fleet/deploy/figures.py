"""What a deployment costs on the GPU, from its adapters and from the index of the tenants' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapterops.fleet.deploy.memory import Held, Shapes, gpu, prepared, width
from adapterops.fleet.deploy.report import GpuBytes
from adapterops.fleet.deploy.writing import Written
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.plan import Served
from adapterops.serving.model import Engine
from adapterops.serving.scales import leaf
from adapterops.serving.zeros import BaseShapes


@dataclass(frozen=True, slots=True)
class Cost:
    """GPU bytes, the adapters as memory sees them in load order, the modules paid for.

    `targets` are the last parts of the names of all modules that an adapter changes; `note` says
    what the bytes leave out.
    """

    gpu: GpuBytes
    held: tuple[Held, ...]
    shapes: Shapes
    targets: tuple[str, ...]
    note: str


def homes(index: Fleet) -> dict[str, str]:
    """tenant -> where its own adapter is."""
    return {record.tenant.name: record.tenant.location for record in index.records}


def cost(
    served: Mapping[str, Served],
    engine: Engine,
    index: Fleet,
    base: BaseShapes | None,
    slots: int,
    done: Written,
) -> Cost:
    """What the adapters of `done` cost on one GPU, and the own ones of the tenants in `served`."""
    mine: dict[str, tuple[int, int]] = {}
    for form in done.forms.values():
        mine |= form.shapes
    held = tuple(
        Held(done.forms[item.id].rank, width(done.forms[item.id].shapes)) for item in done.adapters
    )
    layouts = _layouts(served, index)
    every = dict(mine)
    for number in set(layouts.values()):
        layout = index.layouts[number]
        every |= dict(zip(layout.stems, layout.shapes, strict=True))
    shapes, note = prepared(every, base) if engine.memory == "slots" else (every, "")
    before = _before(served, index, layouts)
    targets = tuple(sorted({leaf(stem).partition("[")[0] for stem in mine}))
    return Cost(gpu(engine, before, held, shapes, slots), held, shapes, targets, note)


def _layouts(served: Mapping[str, Served], index: Fleet) -> dict[str, int]:
    """tenant -> layout of its own adapter, for those that have one."""
    return {
        record.tenant.name: record.layout
        for record in index.records
        if record.layout >= 0 and record.tenant.name in served
    }


def _before(served: Mapping[str, Served], index: Fleet, layouts: Mapping[str, int]) -> list[Held]:
    """The tenants' own adapters, most traffic first.

    The index has no modules whose change is zero, so loaded adapters count a little too low.
    """
    widths = {}
    for number in set(layouts.values()):
        layout = index.layouts[number]
        widths[number] = sum(out + columns for out, columns in layout.shapes)
    ordered = sorted(served.items(), key=lambda pair: (-pair[1].traffic, pair[0]))
    return [Held(item.rank, widths.get(layouts.get(tenant, -1), 0)) for tenant, item in ordered]
