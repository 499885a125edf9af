"""Targets made from arrays, and exact rational arithmetic for what rounding them must give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adapterops.changes.targets import Target, Term
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site

Array = np.ndarray[Any, Any]

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in TORCH.items()}
FORMS = {"F16": (10, -14, 15), "BF16": (7, -126, 127), "F32": (23, -126, 127)}  # p, emin, emax


def ref(name: str, values: Array | torch.Tensor) -> Ref:
    """A tensor in memory; float arrays as numpy has them, or torch tensors of any float type."""
    if isinstance(values, torch.Tensor):
        dtype, raw = NAMES[values.dtype], values.contiguous().view(-1).view(torch.uint8).numpy()
        data = raw.tobytes()
    else:
        dtype = {2: "F16", 4: "F32", 8: "F64"}[values.dtype.itemsize]
        data = np.ascontiguousarray(values).tobytes()
    shape = tuple(values.shape)
    return Ref(MemoryFile(name, data), name, dtype, shape, 0, len(data))


def site(B: Array, A: Array, scale: float = 1.0, stem: str = "layer") -> Site:
    """A LoRA module of these factors."""
    m, n, rank = B.shape[0], A.shape[1], A.shape[0]
    parts = {"B": ref(f"{stem}.B", B), "A": ref(f"{stem}.A", A)}
    return Site(stem, "peft", "lora", "linear", (m, n), (), rank, rank, parts, scale=scale)


def target(
    W: torch.Tensor,
    pairs: Sequence[tuple[float, Array, Array]],
    *,
    turned: bool = False,
    name: str = "layer.weight",
) -> Target:
    """W plus Σ c·B·A of (c, B, A), or their transposes where W is stored as (in, out)."""
    m, n = W.shape
    terms = tuple(
        Term(k, c, site(B, A, c, f"layer{k}"), slice(0, m, 1), slice(0, n, 1), turned)
        for k, (c, B, A) in enumerate(pairs)
    )
    return Target(name, ref(name, W), (m, n), terms, inputs="rows" if turned else "columns")


def exact_sums(W: torch.Tensor, pairs: Sequence[tuple[float, Array, Array]]) -> tuple[Array, int]:
    """W + Σ c·B·A as whole numbers (an object array) of a unit 2^−K; and K."""
    values = [W.double().numpy()]
    values += [x for c, B, A in pairs for x in (np.float64(c), B.astype(float), A.astype(float))]
    scaled = [_whole(value) for value in values]
    total, unit = scaled[0]
    for at in range(1, len(scaled), 3):
        (c, kc), (B, kb), (A, ka) = scaled[at : at + 3]
        product, k = c * (B @ A), kc + kb + ka
        common = max(unit, k)
        total = total * (1 << (common - unit)) + product * (1 << (common - k))
        unit = common
    return total, unit


def _whole(x: Any) -> tuple[Any, int]:
    """x as integers times 2^−k."""
    ratios = [float(v).as_integer_ratio() for v in np.ravel(x)]
    k = max((d.bit_length() - 1 for _, d in ratios), default=0)
    whole = np.array([n << (k - (d.bit_length() - 1)) for n, d in ratios], dtype=object)
    return whole.reshape(np.shape(x)), k


def rounded(whole: Array, unit: int, dtype: str) -> Array:
    """Whole numbers of 2^−unit rounded to nearest, ties to even, as float64."""
    return np.array([_round(int(v), unit, dtype) for v in whole.ravel()]).reshape(whole.shape)


def _round(value: int, unit: int, dtype: str) -> float:
    mantissa, least, largest = FORMS[dtype]
    size = abs(value)
    if not size:
        return 0.0
    exponent = max(size.bit_length() - 1 - unit, least)
    shift = exponent - mantissa + unit  # of the last place, in units
    if shift <= 0:
        count = size << -shift
    else:
        count, rest = divmod(size, 1 << shift)
        half = 1 << (shift - 1)
        count += rest > half or (rest == half and count & 1)
    result = float(count) * 2.0 ** (exponent - mantissa)
    if result >= 2.0 ** (largest + 1):
        result = np.inf
    return -result if value < 0 else result
