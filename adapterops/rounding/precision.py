"""Arithmetic as IEEE 754 has it, while a block of code runs.

torch's precision switches belong to the process: TF32 and bfloat16 in float32 products would make
every bound here wrong, and users turn them on. One lock guards them; blocks that overlap share it.
Flushing of denormals belongs to a thread, and threads inherit it from the one that starts them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Guard:
    """The switches as they were before the first block began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: dict[str, Any] = {}

    def enter(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = {
                    "places": [place.fp32_precision for place in _places()],
                    "precision": torch.get_float32_matmul_precision() if not _places() else None,
                    "threads": torch.get_num_threads(),
                }
                for place in _places():
                    place.fp32_precision = "ieee"
                if not _places():
                    torch.set_float32_matmul_precision("highest")
                torch.set_num_threads(1)
            self._blocks += 1

    def exit(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                for place, value in zip(_places(), self._before["places"], strict=True):
                    place.fp32_precision = value
                if not _places():
                    torch.set_float32_matmul_precision(self._before["precision"])
                torch.set_num_threads(self._before["threads"])


def _places() -> list[Any]:
    """Where torch keeps the precision of float32 products; before 2.9 it has one switch for all."""
    backends = torch.backends
    found = (
        getattr(backends.cuda, "matmul", None),
        getattr(getattr(backends, "mkldnn", None), "matmul", None),
    )
    return [place for place in found if hasattr(place, "fp32_precision")]


_GUARD = _Guard()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """IEEE float32 products, gradual underflow and one torch thread; restored afterwards.

    Parallelism is over row blocks: a pool whose workers, started inside, have a thread each.
    """
    flushes = _flushes()
    torch.set_flush_denormal(False)
    _GUARD.enter()
    try:
        yield
    finally:
        _GUARD.exit()
        torch.set_flush_denormal(flushes)


def _flushes() -> bool:
    """Whether this thread turns denormal results into zeros; torch has a switch and no question."""
    least = torch.tensor([2.0**-126], device="cpu")
    return not bool((least / 2).any())
