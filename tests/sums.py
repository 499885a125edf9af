"""Modules made of arrays for the range finder: differences of two tensors, and factor pairs."""

from __future__ import annotations

import numpy as np

from adapterops import casts
from adapterops.files.source import MemoryFile
from adapterops.formats.model import Ref, Site
from adapterops.plan import Module, Part


def ref(name: str, value: np.ndarray, dtype: str, turned: bool) -> Ref:
    """A stored matrix; `turned`: it is used as its transpose."""
    with np.errstate(invalid="ignore"):
        data = bytes(casts.stored_bytes(casts.store(value.astype(float), dtype)))
    shape = value.shape[::-1] if turned else value.shape
    return Ref(MemoryFile(name, data), name, dtype, shape, 0, len(data), turned)


def site(
    base: np.ndarray, tuned: np.ndarray, dtype: str = "F32", turned: bool = False, was: str = ""
) -> Site:
    parts = {
        "base": ref("base", base, was or dtype, turned),
        "tuned": ref("tuned", tuned, dtype, turned),
    }
    shape = parts["base"].shape
    assert len(shape) == 2
    size = (shape[0], shape[1])
    rank = min(size)
    return Site("m.q", "peft", "difference", "linear", size, (), rank, rank, parts, scale=1.0)


def low(B: np.ndarray, A: np.ndarray) -> Site:
    parts = {"B": ref("B", B, "F32", False), "A": ref("A", A, "F32", False)}
    size, rank = (len(B), A.shape[1]), len(A)
    return Site("m.q", "peft", "lora", "linear", size, (), rank, rank, parts, scale=1.0)


def module(*terms: tuple[float, Site]) -> Module:
    parts = tuple(Part(i, weight, each) for i, (weight, each) in enumerate(terms))
    first = terms[0][1]
    return Module("m.q", "peft", "linear", first.shape, (), parts)


def stored(value: np.ndarray, dtype: str) -> np.ndarray:
    result: np.ndarray = casts.round_to(value.astype(float), dtype)
    return result


def spread(kind: str, m: int, n: int, seed: int = 0) -> np.ndarray:
    """A change of norm about 1: all singular values alike, graded, of rank 8, or stepped."""
    rng = np.random.default_rng(seed)
    size = min(m, n)
    U = np.linalg.qr(rng.standard_normal((m, size)))[0]
    V = np.linalg.qr(rng.standard_normal((n, size)))[0]
    values = {
        "flat": np.full(size, 1.0),
        "noise": np.linspace(1.0, 0.3, size),
        "graded": np.logspace(0, -4, size),
        "rank8": np.where(np.arange(size) < 8, 1.0, 0.0),
        "steps": np.where(np.arange(size) < 40, 1.0, 0.01),
    }[kind]
    change: np.ndarray = (U * values) @ V.T / np.linalg.norm(values)
    return change
