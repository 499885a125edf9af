"""Factors: an immutable low-rank matrix ΔW = B·A with its scale folded in."""

from __future__ import annotations

from dataclasses import dataclass

from adapterops import linalg
from adapterops.arrays import Array, namespace


@dataclass(frozen=True, slots=True)
class Factors:
    """ΔW = B·A; B is (m, r), A is (r, n), float64. m is outputs, n is inputs.

    Sums are concatenations: nothing of size m x n is ever formed.
    """

    B: Array
    A: Array

    def __post_init__(self) -> None:
        if self.B.shape[-1] != self.A.shape[-2] or self.B.shape[:-2] != self.A.shape[:-2]:
            raise ValueError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of ΔW."""
        return int(self.B.shape[-2]), int(self.A.shape[-1])

    @property
    def rank(self) -> int:
        """Columns of B: an upper bound of the rank of ΔW."""
        return int(self.B.shape[-1])

    def __add__(self, other: Factors) -> Factors:
        xp = namespace(self.B)
        return Factors(xp.concat([self.B, other.B], axis=-1), xp.concat([self.A, other.A], axis=-2))

    def __mul__(self, scalar: float) -> Factors:
        return Factors(self.B, self.A * scalar)

    __rmul__ = __mul__

    def __neg__(self) -> Factors:
        return self * -1.0

    def __sub__(self, other: Factors) -> Factors:
        return self + -other

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of ΔW as a dense block."""
        return self.B[..., start:stop, :] @ self.A

    def dense(self) -> Array:
        """ΔW itself, (..., m, n)."""
        return self.B @ self.A

    def matmul(self, x: Array) -> Array:
        """ΔW·x for x of shape (..., n, k)."""
        return self.B @ (self.A @ x)

    def rmatmul(self, y: Array) -> Array:
        """ΔWᵀ·y for y of shape (..., m, k)."""
        return self.A.mT @ (self.B.mT @ y)

    def inner(self, other: Factors) -> float:
        """⟨ΔW, ΔW'⟩ = Σ (BᵀB' ∘ A A'ᵀ), without forming either."""
        return float(((self.B.mT @ other.B) * (self.A @ other.A.mT)).sum())

    def norm(self) -> float:
        """‖ΔW‖_F; by QR where the Gram matrices could not see the result for cancellation."""
        return linalg.norm(self.B, self.A)

    def truncate(self, rank: int) -> Factors:
        """The closest matrix of this rank (Eckart & Young 1936), balanced ‖b_j‖ = ‖a_j‖ = √σ_j."""
        result = linalg.truncate(self.B[None], self.A[None], rank)[0]
        return Factors(result.B, result.A)
