"""A safetensors file whose tensors' sizes are not known before: data are appended, header last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapterops.files.header import Entry, encode_header
from adapterops.files.writer import TensorWriter

_LONGEST = 1 << 60  # an offset with as many digits as any can have


class AppendWriter(TensorWriter):
    """Tensors one after the other; those of bytes may grow while they are the last one.

    `header_size` must hold the final header: `reserve` says how much that can be.
    """

    def __init__(self, path: Path, header_size: int) -> None:
        self._placed: dict[str, Entry] = {}
        super().__init__(path, self._placed, header_size)

    def append(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        """A whole tensor after all others."""
        if name in self._placed:
            raise ValueError(f"{name} is written already")
        end = self.data_size + len(data)
        self._write(data, self.header_size + self.data_size)
        self._placed[name] = Entry(dtype, shape, self.data_size, end)
        self.data_size = end

    def extend(self, name: str, data: bytes) -> None:
        """Bytes at the end of a U8 tensor, which is begun if there is none of that name."""
        if name not in self._placed:
            self._placed[name] = Entry("U8", (0,), self.data_size, self.data_size)
        entry = self._placed[name]
        if entry.end != self.data_size:
            raise ValueError(f"{name} is not the last tensor")
        self._write(memoryview(data), self.header_size + self.data_size)
        self.data_size += len(data)
        size = self.data_size - entry.start
        self._placed[name] = Entry("U8", (size,), entry.start, self.data_size)


def reserve(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> int:
    """Bytes that a header of these tensors can take at most, whatever the sizes of those of shape
    () turn out to be."""
    longest = {
        name: Entry("BF16", shape or (_LONGEST,), _LONGEST, _LONGEST)
        for name, shape in shapes.items()
    }
    return len(encode_header(longest, metadata))
