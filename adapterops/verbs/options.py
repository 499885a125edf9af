"""What bake and drift have in common: adapters of a base, and options checked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from adapterops.adapter import Adapter
from adapterops.baking.kernel import Round
from adapterops.basemodel import BaseModel
from adapterops.errors import UsageError
from adapterops.extras import Policy
from adapterops.inputs import Input, open_for_base
from adapterops.options import check_weights, is_number

_Path = str | os.PathLike[str]


def opened(
    base: BaseModel,
    adapters: Input | Iterable[Input],
    weights: Sequence[float] | None,
    residual: _Path | None,
    alpha: float | Mapping[Any, float] | None,
    allow_pickle: bool,
) -> tuple[list[Adapter], list[float]]:
    """Adapters, those relative to their base made summable with it, and a weight for each."""
    base.check_not_quantised()
    given = [adapters] if isinstance(adapters, str | os.PathLike | Adapter) else list(adapters)
    if not given:
        raise UsageError("at least one adapter is needed")
    paths = [repr(item) if isinstance(item, Adapter) else os.fspath(item) for item in given]
    chosen = [1.0] * len(given) if weights is None else weights
    checked = check_weights(chosen, paths, normalize=False)
    terms = open_for_base(given, base, residual, alpha=alpha, allow_pickle=allow_pickle)
    return terms, checked


def as_round(name: str) -> Round:
    """A way of rounding by its name. Raises UsageError."""
    found: tuple[Round, ...] = get_args(Round)
    for mode in found:
        if mode == name:
            return mode
    raise UsageError(f"--round {name!r}: expected one of {', '.join(found)}")


def as_policy(name: str) -> Policy:
    """What becomes of extras, by its name. Raises UsageError."""
    found: tuple[Policy, ...] = get_args(Policy)
    for policy in found:
        if policy == name:
            return policy
    raise UsageError(f"--extras {name!r}: expected one of {', '.join(found)}")


def as_limit(value: Any) -> float | None:
    """A bound on drift. Raises UsageError below 0."""
    if value is None:
        return None
    if not is_number(value) or not 0 <= value < math.inf:
        raise UsageError(f"--max-drift {value!r}: expected a number of at least 0")
    return float(value)


def as_pattern(text: Any) -> str | None:
    """A regular expression as text. Raises UsageError for anything else."""
    if text is not None and not isinstance(text, str):
        raise UsageError(f"--modules {text!r}: expected a regular expression as text")
    return text
