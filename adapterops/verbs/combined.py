"""What merge and bake have in common: the adapters' sum, or what another method makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from adapterops.adapter import Adapter
from adapterops.formats.model import AdapterFile
from adapterops.inputs import flat
from adapterops.options import as_seed

Path = str | os.PathLike[str]


def combined(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str,
    parameters: Mapping[str, Any] | None,
    space: str,
    seed: int,
    calibrate: str | None,
    match_norm: str | None,
    activations: Path | Sequence[Path] | None,
    modules: str | None,
    module_weights: Sequence[str],
) -> tuple[list[AdapterFile], list[float], dict[str, Any]]:
    """Files and weights whose sum is the result, and what of it provenance records."""
    seed = as_seed(seed)
    given = (parameters, calibrate, match_norm, activations, module_weights, space != "dense")
    if method == "linear" and not any(given):
        return *flat(adapters, weights), {}
    from adapterops import combining  # methods are imported where one is asked for

    rule = combining.rule_for(method, parameters, space, seed, calibrate, match_norm)
    files, shares = combining.terms(adapters, weights, rule, modules, module_weights, activations)
    return files, shares, combining.recorded(rule, module_weights, activations)
