"""Factors as a file holds them, and what rounding them did."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from adapterops import casts, linalg
from adapterops.arrays import Array, namespace
from adapterops.certificate import Figures
from adapterops.linalg import Truncation
from adapterops.plan import Module


@dataclass(frozen=True, slots=True)
class Piece:
    """One module's finished tensors as bytes, and what was lost in making them."""

    stem: str
    B: memoryview
    A: memoryview
    bias: memoryview | None
    figures: Figures

    def times(self, scale: float) -> Piece:
        """With the figures of what its loader makes of it."""
        return replace(self, figures=self.figures.times(scale))

    def padded(self, module: Module, rank: int) -> Piece:
        """Factors of this rank with columns and rows of zeros up to what the module is kept at."""
        if rank == module.kept:
            return self
        m, n = module.shape
        B = np.frombuffer(self.B, np.uint8).reshape(m, rank, -1)
        wide = np.zeros((m, module.kept, B.shape[2]), np.uint8)
        wide[:, :rank] = B
        long = np.zeros(module.kept * n * B.shape[2], np.uint8)
        long[: len(self.A)] = np.frombuffer(self.A, np.uint8)
        return replace(self, B=wide.reshape(-1).data, A=long.data)


@dataclass(frozen=True, slots=True)
class Stored:
    """Factors as the file holds them (float64 values of the narrow type) and what rounding did."""

    dtype: str
    bytes_b: memoryview
    bytes_a: memoryview
    B: Array
    A: Array
    error_b: Array
    error_a: Array
    subnormal: int

    @classmethod
    def of(cls, module: Module, result: Truncation, dtype: str) -> Stored:
        casts.check_range(result.B, dtype, module.stem)
        casts.check_range(result.A, dtype, module.stem)
        stored_b, stored_a = casts.store(result.B, dtype), casts.store(result.A, dtype)
        B, A = casts.widen(stored_b, dtype), casts.widen(stored_a, dtype)
        return cls(
            dtype,
            casts.stored_bytes(stored_b),
            casts.stored_bytes(stored_a),
            B,
            A,
            B - result.B,
            A - result.A,
            casts.count_subnormal(result.B, stored_b, dtype)
            + casts.count_subnormal(result.A, stored_a, dtype),
        )

    def change(self, result: Truncation) -> tuple[Array, Array]:
        """Factors of W̃ − W′ = E_B·A′ + B̃·E_A: no cancellation, unlike ‖W̃‖² − ‖W′‖²."""
        xp = namespace(self.B)
        return xp.concat([self.error_b, self.B], -1), xp.concat([result.A, self.error_a], 0)

    def piece(
        self,
        module: Module,
        result: Truncation,
        storage: float,
        cross: float,
        input_norms: tuple[float, ...],
        inner: tuple[float, ...],
    ) -> Piece:
        """The finished module; `storage` is ‖W̃ − W′‖, `cross` is ⟨ΔW − W′, W̃ − W′⟩."""
        squared = result.tail**2 + storage**2 - 2 * cross
        figures = Figures(
            norm=result.norm,
            beta=result.beta,
            floor=linalg.rank_floor(*module.shape, result.beta),
            truncation=result.tail,
            storage=storage,
            total=math.sqrt(max(squared, 0.0)) if result.tail else storage,
            input_norms=input_norms,
            inner=inner,
            subnormal=self.subnormal,
            route=result.route,
        )
        return Piece(
            module.stem, self.bytes_b, self.bytes_a, stored_bias(module, self.dtype), figures
        )


def stored_bias(module: Module, dtype: str) -> memoryview | None:
    """Σ cᵢ·bᵢ of the parts that shift the bias (PEFT's lora_bias), None if none does."""
    if not any("bias" in part.site.parts for part in module.parts):
        return None
    bias = np.sum([part.coefficient * part.site.bias() for part in module.parts], axis=0)
    casts.check_range(bias, dtype, module.stem)
    return casts.stored_bytes(casts.store(bias, dtype))
