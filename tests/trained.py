"""Adapters as training leaves them, and what people do to them afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import adapterops as ao
from adapterops.difference.report import PairDifference
from adapterops.render.diff import comparison
from tests.support import Pairs, dense, pairs, write_peft
from tests.test_linalg import gauge

SIZES = {"q": (40, 48), "v": (24, 48)}
SHAPES = {f"layers.{i}.{name}": size for i in range(3) for name, size in SIZES.items()}
STEM = "layers.0.q"


def compare(a: Any, b: Any, **options: Any) -> PairDifference:
    """The pair's part of a report that must survive the trip through JSON: no NaN."""
    report = ao.diff([a, b], **options)
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert comparison(report, verbose=True)
    assert report.pair is not None
    return report.pair


def flat(deltas: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([deltas[name].ravel() for name in sorted(deltas)])


def trained(seed: int, start: int, rank: int = 8) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """As training leaves factors: A near its start, B from nothing, columns of falling size."""
    first = pairs(start, SHAPES, rank, np.float64)
    moved = pairs(1000 + seed, SHAPES, rank, np.float64)
    decay = 0.8 ** np.arange(rank)
    return {
        name: (
            (moved[name][0] * decay).astype(np.float32),
            (first[name][1] + 0.1 * moved[name][1]).astype(np.float32),
        )
        for name in SHAPES
    }


def mixed(first: Pairs, other: Pairs, share: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B of `first` mixed with B of `other` at this cosine, on the A of `first`."""
    rest = math.sqrt(1 - share**2)
    return {
        name: ((share * B + rest * other[name][0]).astype(B.dtype), A)
        for name, (B, A) in first.items()
    }


def mapped(factors: Pairs, change: Callable[[np.ndarray, np.ndarray], Any]) -> dict[str, Any]:
    return {name: change(B, A) for name, (B, A) in factors.items()}


def cast(factors: Pairs, dtype: Any) -> dict[str, Any]:
    return mapped(factors, lambda B, A: (B.astype(dtype), A.astype(dtype)))


def turned(factors: Pairs, dtype: Any) -> dict[str, Any]:
    """The same ΔW in a gauge of condition 1e6."""
    rng = np.random.default_rng(3)
    result = {}
    for name, (B, A) in factors.items():
        G = gauge(rng, B.shape[1])
        new = B.astype(np.float64) @ G, np.linalg.solve(G, A.astype(np.float64))
        result[name] = new[0].astype(dtype), new[1].astype(dtype)
    return result


def rotated(factors: Pairs, times: int) -> dict[str, Any]:
    """The same ΔW after so many changes of basis, computed and stored in float32."""
    rng = np.random.default_rng(4)
    result = dict(factors)
    for _ in range(times):
        for name, (B, A) in result.items():
            Q = np.linalg.qr(rng.standard_normal((len(A), len(A))))[0].astype(np.float32)
            result[name] = B @ Q, Q.T @ A
    return result


def refactored(factors: Pairs, dtype: Any) -> dict[str, Any]:
    """The same ΔW by its SVD, balanced."""
    result = {}
    for name, value in dense(factors).items():
        U, s, V = np.linalg.svd(value, full_matrices=False)
        rank = factors[name][0].shape[1]
        root = np.sqrt(s[:rank])
        result[name] = (U[:, :rank] * root).astype(dtype), (root[:, None] * V[:rank]).astype(dtype)
    return result


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 and widened, by integers."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def nudged(factors: Pairs, name: str, relative: float) -> dict[str, Any]:
    """One module moved by so much of its norm."""
    B, A = factors[name]
    shift = np.random.default_rng(9).standard_normal(B.shape) @ A
    size = relative * np.linalg.norm(B @ A) / np.linalg.norm(shift)
    move = size * np.random.default_rng(9).standard_normal(B.shape)
    return {**factors, name: ((B + move).astype(B.dtype), A)}


BASE = trained(1, start=50)
COARSE = cast(BASE, np.float16)
HALF = cast(COARSE, np.float32)  # float32 numbers that float16 holds
ANY = cast(BASE, np.float64)


def small_fleet(folder: Path) -> list[Path]:
    """Three unrelated ones, a twin in another gauge, and one that lacks modules."""
    sets = {
        "a": BASE,
        "b": trained(2, 50),
        "c": pairs(3, SHAPES, 2),
        "twin": turned(BASE, np.float64),
        "part": {name: pairs(4, SHAPES, 3)[name] for name in list(SHAPES)[:4]},
    }
    return [write_peft(folder / name, factors) for name, factors in sets.items()]
