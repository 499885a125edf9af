"""A fingerprint of where training started: A moves little, so that copies of one start stay alike.

Two adapters whose A was drawn from one seed have nearly equal A, whatever they were trained on,
and unrelated ΔW. The first rows of every module's A, each module normalised, are multiplied by
random signs and folded into one vector: the cosine of two fingerprints estimates the cosine of the
two A's. Adapters of different rank share the rows that both have. It depends on the gauge, as it
must, and says nothing of what an adapter does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterops.fleet.signing import sketch
from adapterops.fleet.signing.measured import PROBES, ROWS

Array = np.ndarray[Any, Any]

NUMBERS = 256


def start_numbers(AQ: Array, gram_a: Array) -> Array:
    """(L, ROWS·PROBES) of modules' A·Q (L, r, q) and AAᵀ (L, r, r): the first rows, normalised."""
    rows = min(ROWS, AQ.shape[1])
    norms = np.sqrt(np.diagonal(gram_a, axis1=1, axis2=2)[:, :rows].sum(1))
    numbers = np.zeros((len(AQ), ROWS, PROBES))
    numbers[:, :rows] = AQ[:, :rows, :PROBES]
    numbers /= np.where(norms > 0, norms, 1.0)[:, None, None]
    return numbers.reshape(len(AQ), -1)


def fingerprint(numbers: Array, seed: int, stems: tuple[str, ...]) -> Array:
    """(NUMBERS,) float16 of norm 1 from `start_numbers`, by module; zero where there are none."""
    if not stems:
        return np.zeros(NUMBERS, np.float16)
    vector = sketch.folded(numbers, seed, stems, "start", NUMBERS)
    norm = float(np.linalg.norm(vector))
    return (vector / (norm or 1.0)).astype(np.float16)
