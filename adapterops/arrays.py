"""One spelling for numpy and torch: the namespace of an array, and moves between host and device.

Core algebra is written on the functions that numpy >= 2 and torch spell alike. On the CPU it
always runs on numpy, so a merge of two adapters never imports torch; on CUDA it runs on torch.
The device name "torch" is that second spelling on the host: the tests of the CUDA path use it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor, float64 unless said otherwise


def namespace(array: Array) -> Any:
    """The module (numpy or torch) that made this array."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def put(array: np.ndarray[Any, Any], device: str) -> Array:
    """A host array on `device`: "cpu" is numpy itself, "cuda…" and "torch" are torch tensors."""
    if device == "cpu":
        return array
    import torch

    return torch.from_numpy(array).to("cpu" if device == "torch" else device)


def host(array: Array) -> np.ndarray[Any, Any]:
    """The array as numpy on the host."""
    if isinstance(array, np.ndarray):
        return array
    result: np.ndarray[Any, Any] = array.detach().cpu().numpy()
    return result


def like(array: np.ndarray[Any, Any], other: Array) -> Array:
    """A host array where `other` is."""
    if isinstance(other, np.ndarray):
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(other.device)


def double(array: Array) -> Array:
    """The array in float64."""
    return array.astype(np.float64) if isinstance(array, np.ndarray) else array.double()


def is_out_of_device_memory(error: BaseException) -> bool:
    """Whether torch ran out of CUDA memory."""
    return type(error).__name__ == "OutOfMemoryError" and type(error).__module__ == "torch"


def resolve_device(device: str) -> str:
    """Check a device name. "auto" is the CPU: a merge is done before CUDA has started.

    Raises UsageError for an unknown name or where CUDA is missing.
    """
    from adapterops.errors import UsageError

    if device in ("auto", "cpu", "torch"):
        return "cpu" if device == "auto" else device
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: this machine has no CUDA device", hint="--device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device
