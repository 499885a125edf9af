"""Absolute tensors that travel along: heads, biases, token rows. A policy, never a guess."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from adapterops import casts
from adapterops.errors import IncompatibleError, NumericsError, UsageError
from adapterops.formats.model import AdapterFile, Ref

Policy = Literal["error", "first", "average", "drop"]


@dataclass(frozen=True, slots=True)
class Extra:
    """One tensor of the output that is no factor: copied from `refs[0]`, or the weighted mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    refs: tuple[Ref, ...]
    weights: tuple[float, ...]

    @property
    def how(self) -> str:
        return "copied" if len(self.refs) == 1 else "averaged"

    def read(self) -> memoryview:
        """The tensor's bytes."""
        if len(self.refs) == 1:
            return self.refs[0].raw().data
        total = math.fsum(self.weights)
        mean = sum(
            (weight / total) * ref.read()
            for weight, ref in zip(self.weights, self.refs, strict=True)
        )
        values = np.asarray(mean)
        if casts.count_nonfinite(values):
            raise NumericsError(f"the average of {self.name!r} is not finite")
        casts.check_range(values, self.dtype, self.name)
        return casts.stored_bytes(casts.store(values, self.dtype))


def plan_extras(
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    policy: str,
    output_name: Callable[[str], str],
) -> tuple[list[Extra], list[str]]:
    """What becomes of the inputs' extras, and the names of those left out.

    Two names with one `output_name` are the same tensor. An input of weight 0 has no say.
    `error`: carried if all inputs that have the tensor agree to the last bit; `first`: of the first
    input that has it; `average`: Σwx / Σw over those that have it; `drop`: none.
    """
    if policy not in get_args(Policy):
        raise UsageError(f"--extras {policy!r}: expected one of {', '.join(get_args(Policy))}")
    owners: dict[str, list[tuple[Ref, float]]] = defaultdict(list)
    for file, weight in zip(inputs, weights, strict=True):
        for name, ref in file.extras.items() if weight else ():
            owners[output_name(name)].append((ref, weight))
    if policy == "drop":
        return [], sorted(owners)
    if policy != "first":
        _check_token_rows([file for file, w in zip(inputs, weights, strict=True) if w])
    return [_extra(name, owners[name], policy) for name in sorted(owners)], []


def _extra(name: str, owners: Sequence[tuple[Ref, float]], policy: str) -> Extra:
    refs = [ref for ref, _ in owners]
    first = refs[0]
    alone = Extra(name, first.dtype, first.shape, (first,), (1.0,))
    if policy == "first" or len(refs) == 1 or _equal(refs):
        return alone
    other = next(ref for ref in refs[1:] if not _equal([first, ref]))
    if policy == "error":
        raise IncompatibleError(
            f"{name!r} differs: {first.source.path} and {other.source.path} carry their own "
            f"({_describe(first)}, {_describe(other)}), and a head is a value, not a change that "
            "could be summed",
            hint="choose --extras first, average or drop",
        )
    if any(ref.shape != first.shape or ref.dtype not in casts.FORMATS for ref in refs):
        raise IncompatibleError(
            f"{name!r} cannot be averaged: {_describe(first)} and {_describe(other)}",
            hint="choose --extras first or drop",
        )
    chosen = tuple(weight for _, weight in owners)
    if math.fsum(chosen) == 0.0:
        raise UsageError(f"--extras average: the weights of {name!r} sum to 0")
    return Extra(name, first.dtype, first.shape, tuple(refs), chosen)


def _check_token_rows(inputs: Sequence[AdapterFile]) -> None:
    """Trained token rows mean nothing without the list of tokens they belong to."""
    lists = {
        str(file.config.get("trainable_token_indices")): file.path
        for file in inputs
        if file.config.get("trainable_token_indices")
    }
    if len(lists) > 1:
        raise IncompatibleError(
            f"the inputs trained different tokens ({' and '.join(lists.values())})",
            hint="choose --extras first or drop",
        )


def _equal(refs: Sequence[Ref]) -> bool:
    first = refs[0]
    if any((ref.dtype, ref.shape) != (first.dtype, first.shape) for ref in refs):
        return False
    return len({hashlib.sha256(ref.raw().data).digest() for ref in refs}) == 1


def _describe(ref: Ref) -> str:
    return f"{ref.dtype} {list(ref.shape)}"


def extras_by_name(extras: Sequence[Extra], dropped: Sequence[str]) -> Mapping[str, str]:
    """name -> what became of it, for the report."""
    return {**{extra.name: extra.how for extra in extras}, **dict.fromkeys(dropped, "dropped")}
