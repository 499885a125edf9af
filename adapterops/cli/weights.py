"""Weights behind the adapters' paths: code:0.7."""

from __future__ import annotations

import os
from collections.abc import Sequence

from adapterops.errors import UsageError


def split_weights(
    arguments: Sequence[str], weights_given: bool
) -> tuple[list[str], list[float] | None]:
    """Paths, and the weights written behind colons: None where none has any.

    Raises UsageError where some have and others not, or `--weights` is given too.
    """
    from adapterops.options import split_weight

    for argument in arguments:
        if _is_number(argument) and not os.path.exists(argument):
            raise UsageError(
                f"{argument!r} is a number, not an adapter",
                hint="weights are separated by commas, without spaces: --weights 0.7,0.3",
            )
    pairs = [split_weight(argument) for argument in arguments]
    with_weight = [path for path, weight in pairs if weight is not None]
    if not with_weight:
        return [path for path, _ in pairs], None
    if weights_given:
        raise UsageError(f"{with_weight[0]}:… gives a weight, and so does --weights; use one form")
    missing = [path for path, weight in pairs if weight is None]
    if missing:
        raise UsageError(f"{with_weight[0]} has a weight behind a colon, {missing[0]} has none")
    return [path for path, _ in pairs], [weight for _, weight in pairs if weight is not None]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
