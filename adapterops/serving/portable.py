"""The portable profile: one file that all the engines serve alike."""

from __future__ import annotations

from adapterops.serving.lorax import LORAX
from adapterops.serving.model import Engine, Row
from adapterops.serving.sglang import ENGINE as SGLANG

ENGINE = Engine(
    name="portable",
    title="the portable profile",
    version="2026-11",
    dated="2026-11-22",
    read="2026-11-22",
    weights=("adapter_model.safetensors",),
    required=("peft_type", "r", "lora_alpha", "target_modules"),
    ranks=(8, 16, 32, 64, 128),
    padding=LORAX.padding,
    uniform_rank=True,
    prefix=True,
    siblings=SGLANG.siblings,
    fill=SGLANG.fill,
    every_layer=True,
)

_SOURCE = "serving/portable.py: what all engines take"

ROWS = (
    Row(
        ENGINE.name,
        ENGINE.version,
        "rank-portable",
        "note",
        "has 8, 16, 32, 64 and 128, one for all modules",
        _SOURCE,
    ),
    Row(ENGINE.name, ENGINE.version, "dtype", "note", "has BF16 and F16", _SOURCE),
)
