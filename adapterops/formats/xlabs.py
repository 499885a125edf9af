"""XLabs (x-flux): `double_blocks.N.processor.qkv_lora1.down.weight`; 1 is the image, 2 the text.

Its LoRA stands beside the attention processor, not on one of the model's own modules; there is no
alpha: scale 1.
"""

from __future__ import annotations


def names(stem: str) -> dict[str, str]:
    """The saved names of a module's tensors."""
    return {"A": f"{stem}.down.weight", "B": f"{stem}.up.weight"}
