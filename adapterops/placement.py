"""Putting finished factors where the file wants them: as they are, transposed, or among experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterops.casts import FORMATS
from adapterops.files.writer import TensorWriter
from adapterops.layout import Layout, Slot


class Placement:
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
