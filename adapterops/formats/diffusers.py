"""diffusers: dotted module paths below a component (`unet.`, `transformer.`, `text_encoder.`, …).

Three spellings are in use: `.lora_A.weight` (current, scale in the header's
`lora_adapter_metadata`), `.lora.down.weight` (`.lora_linear_layer.` in text encoders), and the old
attention processors' `.processor.to_q_lora.down.weight`. No alpha anywhere means scale 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "connectors",
)
# transformers 5 left this level out of CLIPTextModel; a target's tail matches with and without.
_TEXT_MODEL = "text_model."
_WRAPPER = "base_model.model."
_BARE_UNET = re.compile(
    r"^((down_blocks|mid_block|up_blocks|time_embedding|add_embedding|class_embedding)\.|conv_in$"
    r"|conv_out$)"
)
_OLD_TEXT = re.compile(
    r"^(?P<block>text_encoder.*\.self_attn)\.(?P<leaf>to_q|to_k|to_v|to_out\.0)$"
)
_ATTENTION = re.compile(r"^(?P<block>.*\.attn\d*)\.(?P<leaf>to_q|to_k|to_v|to_out\.0)$")


def canonical(stem: str) -> str:
    """A stem with its component and the module's own name.

    Old attention processor files leave out `unet.` and call a text encoder's `q_proj` `to_q`; some
    trainers leave PEFT's wrapper in the middle (`unet.base_model.model.`).
    """
    part = component(stem)
    if part:
        stem = f"{part}.{stem.removeprefix(part + '.').removeprefix(_WRAPPER)}"
    if _BARE_UNET.match(stem):
        return f"unet.{stem}"
    old = _OLD_TEXT.match(stem)
    if old:
        return f"{old['block']}.{old['leaf'].removesuffix('.0').removeprefix('to_')}_proj"
    return stem


def component(stem: str) -> str:
    """The model component that a stem belongs to, "" if it names none."""
    head = stem.partition(".")[0]
    return head if head in COMPONENTS else ""


def names(stem: str, spelling: str) -> dict[str, str]:
    """The saved names of a module's tensors in one of the three spellings.

    "bare" is the current one without the component: what a model's own `save_lora_adapter` writes.
    """
    if spelling == "bare":
        stem, spelling = stem.removeprefix(component(stem) + "."), "peft"
    if spelling == "peft":
        return {
            "A": f"{stem}.lora_A.weight",
            "B": f"{stem}.lora_B.weight",
            "bias": f"{stem}.lora_B.bias",
        }
    attention = _ATTENTION.match(stem)
    if spelling == "processor" and attention:
        leaf = attention["leaf"].removesuffix(".0")
        middle = f"{attention['block']}.processor.{leaf}_lora"
    elif component(stem).startswith("text_encoder"):
        middle = f"{stem}.lora_linear_layer"
    else:
        middle = f"{stem}.lora"
    return {"A": f"{middle}.down.weight", "B": f"{middle}.up.weight"}


def components(config: Mapping[str, Any]) -> list[str]:
    """The components that a config speaks of, "" for what it says of none."""
    named = {key.partition(".")[0] for key in config if "." in key}
    return ["", *(part for part in COMPONENTS if part in named)]


def component_config(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The part of a component-prefixed config that belongs to one component."""
    if not part:
        return dict(config)
    prefix = part + "."
    return {
        key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)
    }


def write_config(ranks: Mapping[str, int], *, bias: bool) -> str | None:
    """`lora_adapter_metadata` for an output of scale 1, per component: module -> rank.

    Ranks other than the commonest become exact, anchored patterns. None if a module names no
    component: loaders find no part for it and take PEFT's defaults, whereas without any config they
    take alpha = rank.
    """
    if not all(component(stem) for stem in ranks):
        return None
    parts: dict[str, dict[str, int]] = {}
    for stem, rank in ranks.items():
        part = component(stem)
        name = stem.removeprefix(f"{part}.").removeprefix(_TEXT_MODEL)
        parts.setdefault(part, {})[name] = rank
    config: dict[str, Any] = {}
    for part, sizes in parts.items():
        common = Counter(sizes.values()).most_common(1)[0][0]
        level = rf"({re.escape(_TEXT_MODEL)})?" if part.startswith("text_encoder") else ""
        others = {f"^{level}{re.escape(n)}": r for n, r in sorted(sizes.items()) if r != common}
        values: dict[str, Any] = {
            "r": common,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(sizes),
        }
        if bias:
            values["lora_bias"] = True
        config.update({f"{part}.{key}": value for key, value in values.items()})
    return json.dumps(config, sort_keys=True)
