"""Options as users write them, checked: weights, sizes, devices, memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from adapterops.arrays import resolve_device
from adapterops.errors import UsageError
from adapterops.stream import Compute, available_memory, available_threads

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str | float, name: str) -> int:
    """Bytes from 20MB (10⁶), 1.5GiB (2³⁰) or a plain number."""
    if not isinstance(text, str):
        return int(text) if math.isfinite(text) else 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise UsageError(f"{name} {text!r}: expected a size such as 20MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_seed(value: Any) -> int:
    """A seed of 63 bits. Raises UsageError."""
    if not is_whole(value) or not 0 <= value < 2**63:
        raise UsageError(f"--seed {value!r}: expected a whole number from 0 to 2⁶³ − 1")
    return int(value)


def compute(
    device: str = "auto", memory: str | int | None = None, jobs: int | None = None
) -> Compute:
    """Where to run: defaults from this process's share of processors and memory."""
    if jobs is not None and (not is_whole(jobs) or jobs < 1):
        raise UsageError(f"-j {jobs!r}: expected a whole number of at least 1")
    size = available_memory() if memory is None else parse_size(memory, "--memory")
    if memory is not None and size <= 0:
        raise UsageError(f"--memory {memory}: expected more than 0 bytes")
    return Compute(resolve_device(device), size, jobs or available_threads())


def check_weights(
    weights: Sequence[float] | None, paths: Sequence[str], *, normalize: bool
) -> list[float]:
    """One finite weight per input; required for two or more, 1 for one.

    Raises UsageError that says how many were given and how many are needed.
    """
    if weights is None:
        if len(paths) > 1:
            example = ",".join(["0.5"] * min(len(paths), 3)) + (",…" if len(paths) > 3 else "")
            raise UsageError(
                f"{len(paths)} adapters need {len(paths)} weights; there is no default, because "
                "their sum sets the strength of the result",
                hint=f"--weights {example} (averages) or 1,1 (adds)",
            )
        weights = [1.0]
    try:
        given = list(weights)
    except TypeError:
        raise UsageError(f"weights {weights!r}: expected one number per adapter") from None
    for weight in given:
        if not is_number(weight):
            raise UsageError(f"the weight {weight!r} is not a number")
    result = [float(weight) for weight in given]
    if len(result) != len(paths):
        raise UsageError(
            f"{len(result)} weights for {len(paths)} adapters: "
            f"{','.join(f'{w:g}' for w in result)} for {', '.join(paths[:4])}"
        )
    for weight, path in zip(result, paths, strict=True):
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} of {path} is not a finite number")
    if not normalize:
        return result
    total = sum(result)
    if not math.isfinite(total) or abs(total) <= 1e-12 * sum(map(abs, result)):
        raise UsageError(f"--normalize divides by the sum of the weights, which is {total:.3g}")
    return [weight / total for weight in result]


def parse_weights(text: str) -> list[float]:
    """Weights as written: 0.7,0.3."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--weights {text!r}: expected numbers separated by commas, such as 0.7,0.3"
        ) from None


def split_weight(argument: str) -> tuple[str, float | None]:
    """`path:0.7` at the last colon, if the tail is a number and no such file exists."""
    path, colon, tail = argument.rpartition(":")
    if not colon or not path or os.path.exists(argument):
        return argument, None
    try:
        return path, float(tail)
    except ValueError:
        return argument, None
