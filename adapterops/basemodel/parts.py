"""Where ΔW of one module lies in what a checkpoint stores: a tensor, rows of it, or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]  # by full name of a tensor
Modules = Mapping[str, str]  # a module's path below its model -> the full name of its weight


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs `of` of ΔW (out, in) belong to outputs `rows` of a stored matrix; None means all.

    `tensor` is its full name, also of a norm's or a position's. `turned`: it is stored (in, out),
    and `rows` are its columns.
    """

    tensor: str
    rows: slice | None = None
    turned: bool = False
    of: slice | None = None

    @property
    def bias(self) -> str | None:
        """The name that the bias beside a weight has, if there is one; it has the same rows."""
        name = self.tensor.removesuffix("weight")
        return f"{name}bias" if name != self.tensor else None


Parts = tuple[Part, ...]  # of one ΔW: nearly always one
Named = tuple[str, Parts]  # a module's path below its model, and its parts


def stacked(height: int, count: int) -> list[slice]:
    """`count` equal ranges that follow one another in `height` rows."""
    size = height // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def split(paths: tuple[str, ...], tensor: str, rows: list[slice]) -> Iterator[Named]:
    """Modules of one adapter that a checkpoint stores above one another in one tensor."""
    for path, part in zip(paths, rows, strict=True):
        yield path, (Part(tensor, part),)
