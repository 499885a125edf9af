"""From what a user asks error to be measured in to what the modules of a plan are weighted by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from adapterops.errors import UsageError
from adapterops.formats.model import AdapterFile
from adapterops.plan import Weighting

Metric = Literal["frobenius", "relative", "activation"]
_Path = str | os.PathLike[str]


def weighting_for(
    files: Sequence[AdapterFile],
    metric: str,
    base: _Path | None,
    activations: _Path | None,
    modules: str | None,
) -> tuple[Weighting, dict[str, Any]]:
    if metric not in get_args(Metric):
        raise UsageError(f"--metric {metric!r}: expected one of {', '.join(get_args(Metric))}")
    return Weighting(), {}
