"""A finding: what there is in a file that some engine may stumble over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Finding:
    """Where, and both values; `todo` where the advice depends on them.

    Whether an engine minds is in its rows, by `rule`.
    """

    rule: str
    detail: str
    modules: tuple[str, ...] = ()
    todo: str = ""


Findings = Iterator[Finding]


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, tuple[V, ...]]:
    """Second items by first ones, in order."""
    result: dict[K, list[V]] = defaultdict(list)
    for key, value in pairs:
        result[key].append(value)
    return {key: tuple(values) for key, values in result.items()}


def few(stems: Sequence[str]) -> str:
    """The first of some modules, and how many more there are."""
    return stems[0] if len(stems) == 1 else f"{stems[0]} and {len(stems) - 1} more"
