"""MLX (mlx-lm): a directory with `adapters.safetensors` and `adapter_config.json`.

Keys are the module path + `.lora_a` (in, r) and `.lora_b` (r, out); y += scale·(x·lora_a)·lora_b
(mlx-lm, `tuner/lora.py`). Switch layers stack their experts: (E, r, in) and (E, out, r). The scale
stands as it is in `lora_parameters.scale`; an alpha beside it has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adapterops.errors import FormatError

WEIGHTS = "adapters.safetensors"


def parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`lora_parameters` of a config, {} if it has none."""
    given = config.get("lora_parameters")
    return given if isinstance(given, Mapping) else {}


def scales(config: Mapping[str, Any], path: str) -> list[tuple[float, float, str]]:
    """(scale, the number it was made from, where it was found) for every module, or nothing."""
    given = parameters(config)
    for name, divisor in (("scale", 1.0), ("alpha", given.get("rank"))):
        value = given.get(name)
        if value is None or not divisor:
            continue
        if not _is_number(value) or not _is_number(divisor):
            raise FormatError(f"lora_parameters.{name} is {value!r}, not a number", path=path)
        return [(value / divisor, float(value), f"lora_parameters.{name} in adapter_config.json")]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def names(module: str) -> dict[str, str]:
    """The saved names of a module's tensors."""
    return {"A": f"{module}.lora_a", "B": f"{module}.lora_b"}


def write_config(
    configs: Sequence[Mapping[str, Any]],
    base: str | None,
    modules: Sequence[str],
    rank: int,
    scale: float,
) -> dict[str, Any]:
    """A config that mlx-lm's `load_adapters` reads: one rank and scale, modules by short name.

    mlx-lm adapts the last `num_layers` layers, all for -1; modules there that the file lacks stay
    without effect.
    """
    counts = {config.get("num_layers") for config in configs}
    layers = counts.pop() if len(counts) == 1 else -1
    return {
        "model": base,
        "fine_tune_type": "lora",
        "num_layers": layers if isinstance(layers, int) else -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({_key(module) for module in modules}),
        },
    }


def _key(module: str) -> str:
    """A module's path within its layer (`self_attn.q_proj`), whole where it is in none."""
    parts = module.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module
