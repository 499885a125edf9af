"""Linear sketches of ΔW and ΔWΔWᵀ from factors: random signs on both sides, a few kB an adapter.

S = PᵀΔWQ/p with P (m, p) and Q (n, p) of independent random signs, a pair for every module.
⟨S₁, S₂⟩ is an unbiased estimate of ⟨ΔW₁, ΔW₂⟩, and S is linear in ΔW: the sketch of a weighted sum
is the sum of the sketches. For Gaussian P and Q, Var ‖S‖² = ‖ΔW‖⁴·(2/p² + 2ρ(2/p + 1/p²)) with
ρ = Σσ⁴/(Σσ²)² ≤ 1; signs have no more. Modules are independent of each other.

Signs are raw Philox4x64-10 bits (Salmon et al. 2011), keyed by seed, stem and shape. Columns come
one after the other from the stream, so that the first of many are the same as those of few: the
upper left block of a larger sketch, times p/p', is the smaller one.

M = ΔWΔWᵀ says what an adapter does to its outputs whatever the start of A was. (PᵀMP)[a, b] with
a ≠ b estimates it without bias: p_aᵀMp_b has mean 0, and E[(p_aᵀM₁p_b)(p_aᵀM₂p_b)] = ⟨M₁, M₂⟩. The
numbers above the diagonal, of all modules, are added into one vector of fixed length at random
places with random signs (count sketch; Charikar, Chen & Farach-Colton 2002). Two such vectors
compare adapters of any modules: one that is absent counts as zero.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIDES = (16, 8, 4, 2)
NUMBERS = 6144  # of a sketch at most, 12 kB in float16, where the smallest side fits
COLUMNS = 12  # of P that PᵀΔWΔWᵀP is taken of
OUTPUTS = 1024  # numbers of a sketch of ΔWΔWᵀ
_PAIRS = np.triu_indices(COLUMNS, 1)
_KEPT = 256 << 20  # bytes of signs that are remembered, one byte each


def side_of(modules: int) -> int:
    """p for a layout of this many modules: the largest of 2, 4, 8, 16 that keeps to NUMBERS."""
    return next((p for p in SIDES if modules * p * p <= NUMBERS), SIDES[-1])


def sides(
    seed: int, stem: str, shape: tuple[int, int], columns: tuple[int, int]
) -> tuple[Array, Array]:
    """Pᵀ (p, m) and Qᵀ (q, n) of a module of shape (m, n) for `columns` (p, q): ±1, int8."""
    name = f"{seed}\0{stem}\0{shape[0]}x{shape[1]}"
    return (
        _SIGNS.get(f"{name}\0P", columns[0], shape[0]),
        _SIGNS.get(f"{name}\0Q", columns[1], shape[1]),
    )


def sketch(B: Array, A: Array, P: Array, Q: Array) -> Array:
    """PᵀBAQ/p (p, p) for B (m, r), A (r, n), and Pᵀ (p, m), Qᵀ (p, n) as `sides` gives them."""
    result: Array = ((P.astype(B.dtype) @ B) @ (A @ Q.T.astype(A.dtype))) / len(P)
    return result


def smaller(S: Array, side: int) -> Array:
    """Sketches (..., p, p) as they would be at a smaller side: the upper left block, rescaled."""
    block: Array = S[..., :side, :side] * (S.shape[-1] / side)
    return block


def deviation(energies: Array, side: int) -> Array:
    """Standard deviation of ‖S‖²/‖ΔW‖² for modules' energies ‖ΔW_l‖² (..., L), at worst (ρ = 1).

    For the sketch of a difference these are the energies of the difference. 0 where all are zero.
    """
    single = 2 / side**2 + 2 * (2 / side + 1 / side**2)
    total = energies.sum(-1)
    squares = (energies * energies).sum(-1)
    result: Array = np.sqrt(single * squares) / np.where(total > 0, total, 1.0)
    return result


def output_numbers(PB: Array, gram_a: Array) -> Array:
    """What lies above the diagonal of PᵀΔWΔWᵀP (L, C(C−1)/2), from PᵀB (L, C, r) and AAᵀ (L, r, r).

    Each number squared has the mean ‖ΔWΔWᵀ‖².
    """
    return above_diagonal(PB @ gram_a @ PB.mT)


def above_diagonal(square: Array) -> Array:
    """What lies above the diagonals of (L, C, C), row by row."""
    result: Array = square[:, _PAIRS[0], _PAIRS[1]]
    return result


def folded(numbers: Array, seed: int, stems: tuple[str, ...], role: str, size: int) -> Array:
    """Count sketch (size,) of numbers (L, k), by module; `size` is a power of two.

    The expected square of its norm is the sum of all squares.
    """
    slots, signs = _folding(seed, stems, role, numbers.shape[1], size)
    return np.bincount(slots, (signs * numbers).ravel(), size)


@lru_cache(maxsize=64)
def _folding(
    seed: int, stems: tuple[str, ...], role: str, count: int, size: int
) -> tuple[Array, Array]:
    """Places (L·count,) and signs (L, count)."""
    bits = np.stack(
        [_words(f"{seed}\0{stem}\0{role}", -(-count // 4)).view("<u2")[:count] for stem in stems]
    )
    return (bits & (size - 1)).ravel().astype(np.intp), 1.0 - 2.0 * (bits >> 15)


def _words(name: str, count: int) -> Array:
    """The first raw words of the stream that a name keys."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words: Array = philox.random_raw(count).astype("<u8", copy=False)
    return words


class _Signs:
    """Rows of signs by name, the most recently used up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Array] = OrderedDict()

    def get(self, name: str, rows: int, length: int) -> Array:
        """±1 (rows, length), int8."""
        key = (name, rows)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._made(name, rows, length)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._size += made.nbytes
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].nbytes
        return made

    @staticmethod
    def _made(name: str, rows: int, length: int) -> Array:
        words = _words(name, rows * math.ceil(length / 64)).view(np.uint8).reshape(rows, -1)
        bits = np.unpackbits(words, axis=1, count=length, bitorder="little")
        signs = bits.view(np.int8)
        np.multiply(signs, 2, out=signs)
        signs -= 1
        signs.flags.writeable = False
        return signs


_SIGNS = _Signs(_KEPT)


def stacked(
    seed: int, stems: Sequence[str], shape: tuple[int, int], columns: tuple[int, int]
) -> tuple[Array, Array]:
    """`sides` of several modules of one shape: (k, p, m) and (k, q, n), int8."""
    pairs = [sides(seed, stem, shape, columns) for stem in stems]
    if len(pairs) == 1:
        return pairs[0][0][None], pairs[0][1][None]
    return np.stack([P for P, _ in pairs]), np.stack([Q for _, Q in pairs])
