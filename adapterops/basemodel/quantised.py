"""Quantised base models, recognised by config, names and types of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.formats.model import Ref

# Names that only quantisation adds, and who adds them.
_NAMES = (
    (re.compile(r"\.weight\.(absmax|quant_map|quant_state|nested_absmax)|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_packed|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"(^|\.)(weight_scale(_inv)?|input_scale|scale_weight|scaled_fp8)$"), "scaled fp8"),
)
_PACKED = {"U8", "I8", "I32", "U32", "F4", "F8_E8M0"}


def quantised(config: Mapping[str, Any], tensors: Iterable[tuple[str, Ref]]) -> str:
    """What quantised a model and which tensor shows it, "" for a model in floating point."""
    given = config.get("quantization_config")
    method = (
        str(given.get("quant_method") or "an unnamed method") if isinstance(given, dict) else ""
    )
    for name, ref in tensors:
        found = next((who for pattern, who in _NAMES if pattern.search(name)), "")
        if found or (ref.dtype in _PACKED and name.endswith("weight")):
            return f"{method or found or 'a packed format'} ({name!r} is {ref.dtype})"
    return f"{method} (config.json)" if method else ""
