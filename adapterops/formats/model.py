"""What an adapter file says, before any tensor is read: sites, extras, scale and its origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from adapterops import casts
from adapterops.arrays import Array, put
from adapterops.errors import NumericsError
from adapterops.files.source import Source

Layer = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in a file, not read yet."""

    source: Source
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def raw(self) -> np.ndarray[Any, Any]:
        """Its bytes as they are in the file."""
        buffer = np.empty(self.nbytes, np.uint8)
        self.source.pread_into(self.offset, buffer.data)
        return buffer

    def read(self, device: str = "cpu") -> Array:
        """Its values as float64, exactly."""
        return casts.decode(put(self.raw(), device), self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Site:
    """One module of one adapter.

    `shape` is (out, in) of ΔW as a matrix: for a convolution, in counts channels x kernel; for an
    embedding of V rows of d numbers it is (d, V), and the weight changes by ΔWᵀ. `parts` maps "A"
    and "B" to their tensors, and "bias" and "alpha" where there are any. ΔW = scale · B·A; `alpha`
    is the number that the scale was made from, None where it was assumed; `alpha_given` if the user
    said it.
    """

    stem: str
    layer: Layer
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    rank: int
    parts: Mapping[str, Ref]
    scale: float = math.nan
    scale_from: str = ""
    alpha: float | None = None
    alpha_given: bool = False

    @property
    def dtype(self) -> str:
        """The wider of the two factors' types."""
        return max((self.parts[r].dtype for r in "BA"), key=lambda name: (_width(name), name))

    def factors(self, device: str = "cpu") -> tuple[Array, Array]:
        """B (out, r) and A (r, in) in float64, the scale not folded in.

        Raises NumericsError, naming the tensor, for NaN or infinities.
        """
        B = self.parts["B"].read(device).reshape(self.shape[0], self.rank)
        A = self.parts["A"].read(device).reshape(self.rank, self.shape[1])
        self.check_finite(B, A)
        return B, A

    def factors_into(self, B: np.ndarray[Any, Any], A: np.ndarray[Any, Any]) -> None:
        """`factors` into slices of larger arrays; their values are not checked."""
        for role, out in (("B", B), ("A", A)):
            ref = self.parts[role]
            casts.decode_into(ref.raw(), ref.dtype, out)

    def check_finite(self, B: Array, A: Array) -> None:
        """Raise NumericsError, naming the tensor, if a factor holds NaN or infinities."""
        for role, values in (("B", B), ("A", A)):
            wrong = casts.count_nonfinite(values)
            if wrong:
                raise NumericsError(
                    f"{wrong} of {math.prod(values.shape)} values of {self.parts[role].name} "
                    "are NaN or infinite",
                    path=self.parts[role].source.path,
                    module=self.stem,
                    hint="the training diverged or the file is damaged; leave this adapter out",
                )


def _width(dtype: str) -> int:
    return casts.FORMATS[dtype].bits if dtype in casts.FORMATS else 8


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter as its files describe it.

    `extras` are absolute tensors that travel along (heads, biases, token rows), by full name.
    `style` is the dialect's own note of how names were spelled. `notes` are warnings.
    """

    path: str
    source: Source
    dialect: str
    sites: Mapping[str, Site]
    extras: Mapping[str, Ref]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    style: str = ""
    base: str | None = None
    notes: tuple[str, ...] = ()
    weights_file: str = ""
    config_file: str | None = None
    side_files: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The type of its factors, the widest where they differ."""
        return max((site.dtype for site in self.sites.values()), key=lambda name: _width(name))

    @property
    def rank(self) -> int:
        """The largest rank of its sites."""
        return max((site.rank for site in self.sites.values()), default=0)
