"""Full deltas: dense changes of single parameters, summed element by element.

LyCORIS and ComfyUI store `.diff` (a weight), `.diff_b` (a bias), `.w_norm` and `.b_norm` (a norm's
weight and bias) beside low-rank factors. They are changes like these, not values like a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adapterops import casts
from adapterops.arrays import Array, host
from adapterops.certificate import Figures
from adapterops.errors import NumericsError
from adapterops.formats.model import Ref
from adapterops.linalg import EPSILON
from adapterops.plan import DenseSum


@dataclass(frozen=True, slots=True)
class DensePiece:
    """A finished full delta as bytes, and what rounding it lost."""

    name: str
    data: memoryview
    figures: Figures


def peak(delta: DenseSum) -> int:
    """Bytes that `summed` needs at most."""
    return 8 * 4 * math.prod(delta.shape)


def summed(delta: DenseSum, dtype: str) -> DensePiece:
    """Σ cᵢxᵢ, with the factors that change the same weight, rounded once to `dtype`.

    Raises NumericsError for NaN, infinities or what the format cannot hold.
    """
    terms = [part.coefficient * _finite(part.ref) for part in delta.parts]
    for low in delta.factors:
        B, A = low.site.factors()
        terms.append((low.coefficient * (host(B) @ host(A))).reshape(delta.shape))
    exact = np.asarray(sum(terms))
    casts.check_range(exact, dtype, delta.name)
    stored = casts.store(exact, dtype)
    written = casts.widen(stored, dtype)
    sizes = tuple(_norm(term) for term in terms)
    bound = math.fsum(sizes)
    lost = _norm(written - exact)
    figures = Figures(
        norm=_norm(exact),
        beta=bound,
        floor=len(terms) * EPSILON * bound,
        truncation=0.0,
        storage=lost,
        total=lost,
        input_norms=sizes,
        inner=tuple(float(np.vdot(written, term)) for term in terms),
        subnormal=casts.count_subnormal(exact, stored, dtype),
        route="dense",
    )
    return DensePiece(delta.name, casts.stored_bytes(stored), figures)


def measured(delta: DenseSum) -> Figures:
    """The figures of a full delta that is copied as it is."""
    values = _finite(delta.parts[0].ref)
    size = _norm(values)
    return Figures(
        norm=size,
        beta=size,
        floor=EPSILON * size,
        truncation=0.0,
        storage=0.0,
        total=0.0,
        input_norms=(size,),
        inner=(size * size,),
        subnormal=0,
        route="copy",
    )


def _finite(ref: Ref) -> Array:
    values = ref.read()
    wrong = casts.count_nonfinite(values)
    if wrong:
        raise NumericsError(
            f"{wrong} of {values.size} values of {ref.name} are NaN or infinite",
            path=ref.source.path,
            hint="the training diverged or the file is damaged; leave this adapter out",
        )
    return values


def _norm(values: Array) -> float:
    return float(np.sqrt(np.vdot(values, values)))
