"""Random bits for methods that drop entries: 16 raw bits an entry, the same for any chunking.

The bits are the raw output of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"), counter = entry index // 16 in the whole matrix, key = the first 128 bits of the
SHA-256 of seed, adapter label and module. They depend on nothing else: not on the other adapters,
their order, the values, the device, threads or block size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.uint16]]

_PER_COUNTER = 16  # entries that the 256 bits of a counter serve


def draws(seed: int, label: str, module: str, start: int, stop: int, columns: int) -> Bits:
    """The bits of rows [start, stop) of a matrix with so many columns, (stop − start, columns)."""
    count = (stop - start) * columns
    counter, skipped = divmod(start * columns, _PER_COUNTER)
    philox = np.random.Philox(
        key=_key(seed, label, module),
        counter=(counter - 1) % 2**256,  # numpy counts before it draws
    )
    words = philox.random_raw(4 * -(-(skipped + count) // _PER_COUNTER)).astype("<u8", copy=False)
    bits: Bits = words.view("<u2")[skipped : skipped + count]
    return bits.reshape(stop - start, columns)


def stacked(
    seed: int, labels: Sequence[str], module: str, start: int, stop: int, columns: int
) -> Bits:
    """The same for every adapter, (T, stop − start, columns)."""
    bits = np.empty((len(labels), stop - start, columns), np.uint16)
    for t, label in enumerate(labels):
        bits[t] = draws(seed, label, module, start, stop, columns)
    return bits


def _key(seed: int, label: str, module: str) -> int:
    """128 bits; the lengths keep ("a", "b·c") and ("a·b", "c") apart."""
    text = f"{seed}\0{len(label)}\0{label}\0{module}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:16], "little")
