"""Weights as mergekit's recipes give them, a number or values by filters, as `module_weights`.

A filter is a part of a tensor's name; the first of a model's filters that is in it counts. Rules of
`module_weights` have weights for all adapters, and the last that matches counts. One is the other,
exactly, where the models that have filters have the same ones in one order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterops.options import is_number
from adapterops.recipe.document import Document, Key, offered, shown

_KEYS = ("filter", "value")
_ENDING = ".weight"  # of names of tensors, which paths of modules lack
_GRADIENT = "values along the layers depend on how many there are; give module_weights: a list of "
_GRADIENT += "rules such as 'layers 0-7: 1,0'"


@dataclass(frozen=True, slots=True)
class Weight:
    """A model's weight: its `value`, and other ones of modules with a filter in their names."""

    value: float
    filtered: Mapping[str, float]


def read_weight(document: Document, key: Key, given: Any, default: Any) -> Weight:
    """The weight that stands at `key`; `default` is what counts where no filter fits.

    Raises UsageError, with the place, for values along layers and what is no weight.
    """
    if is_number(given):
        return Weight(float(given), {})
    items = [given] if isinstance(given, Mapping) else given
    if not isinstance(items, list) or not items:
        raise document.error(key, f"is {shown(given)}; expected a number, or values by filters")
    if all(is_number(item) for item in items):
        raise document.error(key, "is a gradient", _GRADIENT)
    filtered: dict[str, float] = {}
    for index, item in enumerate(items):
        at = key if isinstance(given, Mapping) else (*key, index)
        part, value = _conditional(document, at, item)
        if part is None:
            return Weight(value, filtered)
        filtered.setdefault(part, value)
    if not is_number(default):
        raise document.error(key, "has no value for other modules", "end it with - value: NUMBER")
    return Weight(float(default), filtered)


def _conditional(document: Document, key: Key, item: Any) -> tuple[str | None, float]:
    """A filter, None for one that every name has, and its value."""
    if not isinstance(item, Mapping):
        raise document.error(key, f"is {shown(item)}; expected filter: and value:")
    for name in item:
        if name not in _KEYS:
            raise document.error((*key, name), "is no key of a value", offered(name, _KEYS))
    value: Any = item.get("value")
    part = item.get("filter")
    if isinstance(value, list):
        raise document.error((*key, "value"), "is a gradient", _GRADIENT)
    if not is_number(value):
        raise document.error((*key, "value"), f"is {shown(value)}; expected a number")
    if part is not None and not isinstance(part, str):
        raise document.error((*key, "filter"), f"is {shown(part)}; expected a part of a name")
    everywhere = part is None or part == "*" or part in _ENDING
    return (None if everywhere else part), float(value)


def rules(document: Document, keys: Sequence[Key], weights: Sequence[Weight]) -> list[str]:
    """Rules of `module_weights` for the filters of models that stand at `keys`.

    Raises UsageError where two have different ones.
    """
    having = [index for index, weight in enumerate(weights) if weight.filtered]
    if not having:
        return []
    first = list(weights[having[0]].filtered)
    for index in having:
        if list(weights[index].filtered) != first:
            raise document.error(
                (*keys[index], "parameters", "weight"),
                "has other filters, or in another order, than the models before it",
                "give all of them the same, or write module_weights: ['re:REGEX: W,W', …]",
            )
    return [
        f"re:{_pattern(part)}: {','.join(repr(w.filtered.get(part, w.value)) for w in weights)}"
        for part in reversed(first)
    ]


def _pattern(part: str) -> str:
    """An expression for whole paths of modules that `part` is in, as if they were tensors."""
    if part.endswith(_ENDING):
        return f".*{re.escape(part.removesuffix(_ENDING))}"
    return f".*{re.escape(part)}.*"
