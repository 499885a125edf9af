"""From plan to file: every tensor computed, and put where the file wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from adapterops import passes
from adapterops.casts import FORMATS
from adapterops.certificate import Figures
from adapterops.dense import measured
from adapterops.extras import Extra
from adapterops.files.writer import TensorWriter
from adapterops.layout import Layout, Slot
from adapterops.linalg import Form
from adapterops.passes import Progress
from adapterops.plan import Plan
from adapterops.stream import Compute


def write(
    plan: Plan,
    form: Layout,
    extras: Sequence[Extra],
    writer: TensorWriter,
    copy: bool,
    shape: Form,
    on: Compute,
    progress: Progress | None,
) -> tuple[list[Figures], list[Figures]]:
    """Stream every tensor to its place; what is kept are figures, of modules and of full deltas."""
    for extra in extras:
        writer.put(extra.name, extra.read())
    for name, data in form.constants.items():
        writer.put(name, data)
    if copy:
        return _copy(plan, form, writer, on, progress)
    dense: list[Figures] = []
    with closing(passes.dense(plan, on)) as sums:
        for delta in sums:
            writer.put(delta.name, delta.data)
            dense.append(delta.figures)
    place = _Placement(writer, form)
    sizes = {module.stem: (module.shape[0], module.kept) for module in plan.written}
    figures: dict[str, Figures] = {}
    with closing(passes.pieces(plan, shape, on, progress)) as results:
        for piece in results:
            figures[piece.stem] = piece.figures
            if piece.stem not in sizes:
                continue
            slots, (rows, rank) = form.roles[piece.stem], sizes[piece.stem]
            place.put(slots, "B", piece.B, rows)
            place.put(slots, "A", piece.A, rank)
            if piece.bias is not None:
                place.put(slots, "bias", piece.bias, 1)
    return [figures[module.stem] for module in plan.modules], dense


def _copy(
    plan: Plan, form: Layout, writer: TensorWriter, on: Compute, progress: Progress | None
) -> tuple[list[Figures], list[Figures]]:
    """The tensors of the only input as they are, each once, and the figures of its modules."""
    source = plan.live[0].tensors
    sources = {
        slot.name: source[module.parts[0].site.parts[role].name]
        for module in plan.modules
        for role, slot in form.roles[module.stem].items()
    }
    sources |= {delta.name: delta.parts[0].ref for delta in plan.deltas}
    for name, ref in sources.items():
        writer.put(name, ref.raw().data)
    dense = [measured(delta) for delta in plan.deltas]
    with closing(passes.measures(plan, on, progress)) as results:
        figures = dict(results)
    return [figures[module.stem] for module in plan.modules], dense


class _Placement:
    """Writes factors by their slots; a tensor of several experts once all of them are there."""

    def __init__(self, writer: TensorWriter, layout: Layout) -> None:
        self._writer = writer
        self._tensors = layout.tensors
        self._missing = Counter(
            slot.name for slots in layout.roles.values() for slot in slots.values() if slot.expert
        )
        self._shared: dict[str, np.ndarray[Any, Any]] = {}

    def put(self, slots: Mapping[str, Slot], role: str, data: memoryview, rows: int) -> None:
        """One factor's bytes, `rows` rows of them, in the order of its values."""
        slot = slots[role]
        if slot.expert is None and not slot.transposed:
            self._writer.put(slot.name, data)
            return
        code = f"<u{FORMATS[self._tensors[slot.name][0]].bits // 8}"
        values = np.frombuffer(data, code).reshape(rows, -1)
        if slot.expert is None:
            self._writer.put(slot.name, np.ascontiguousarray(values.T).reshape(-1).view("u1").data)
            return
        index, count = slot.expert
        if slot.name not in self._shared:  # experts that nobody adapted stay zero
            shape = (*values.shape, count) if slot.interleaved else (count, *values.shape)
            self._shared[slot.name] = np.zeros(shape, code)
        whole = self._shared[slot.name]
        if slot.interleaved:
            whole[..., index] = values
        else:
            whole[index] = values
        self._missing[slot.name] -= 1
        if not self._missing[slot.name]:
            self._writer.put(slot.name, self._shared.pop(slot.name).reshape(-1).view("u1").data)
