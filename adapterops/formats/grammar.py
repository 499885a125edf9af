"""Names of tensors: a key is prefix + module path + suffix. The suffix says what the tensor is.

Suffixes that change what an adapter does in a way that is not a plain low-rank delta are listed by
name here, so that each is refused with its own reason and none is mistaken for a head or a bias.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterops.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Key:
    """A parsed name: the stem names the module, `role` is A, B, bias or alpha.

    `adapter` is the adapter's name where the key still has it (a dump of a live model).
    """

    stem: str
    role: str
    spelling: str
    adapter: str = ""


_DOWN_UP = {"down": "A", "up": "B"}

# (pattern, spelling); the named group `side` says which factor it is.
_FACTORS = [
    (re.compile(r"\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight$"), "peft"),
    (re.compile(r"\.lora_(?P<side>[AB])(\.default)?$"), "peft"),
    (re.compile(r"\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?$"), "embedding"),
    (re.compile(r"\.lora_(?P<side>down|up)\.weight$"), "kohya"),
    (re.compile(r"\.lora\.(?P<side>down|up)\.weight$"), "lora"),
    (re.compile(r"\.lora_linear_layer\.(?P<side>down|up)\.weight$"), "lora"),
]
_PROCESSOR = re.compile(
    r"(\.processor)?\.(?P<name>to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"_lora\.(?P<side>down|up)\.weight$"
)
_BIAS = re.compile(r"\.lora_B(\.(?P<adapter>[^.]+))?\.bias$")
_LATER = "a later version reads it"
_REFUSED = [
    (r"\.lora_magnitude_vector(\.|$)|\.dora_scale$", "DoRA", "bake it into the base and extract"),
    (r"\.hada_(w1|w2|t1|t2)", "LoHa", _LATER),
    (r"\.lokr_(w1|w2|t1|t2)", "LoKr", _LATER),
    (r"\.lora_mid\.weight$", "a CP/Tucker LoCon (lora_mid)", _LATER),
    (r"\.lora_E(\.|$)", "AdaLoRA", _LATER),
    (r"\.lora_diag(\.|$)", "KaSA", "it also changes the base"),
    (r"\.(oft_blocks|oft_diag|oft_R|boft_\w+)(\.|$)", "OFT/BOFT", "it multiplies the base weight"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA", "it multiplies the base weight"),
    (r"\.(ia3_l|on_input)(\.|$)", "(IA)³", "it multiplies the base weight"),
    (r"\.(vera_lambda_[bd]|randlora_\w+)(\.|$)", "VeRA/RandLoRA", _LATER),
    (
        r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)$",
        "a full (not low-rank) delta",
        _LATER,
    ),
    (r"\.lora_[ab]$", "MLX", _LATER),
    (r"^(unet|text_encoder):\d+:(up|down)$", "cloneofsimo's LoRA", _LATER),
    (r"\.processor\.\w+_lora\d*\.(down|up)\.weight$", "an XLabs LoRA", _LATER),
    (
        r"(^|\.)prompt_embeddings$|(^|\.)prefix_encoder\.",
        "prefix or prompt tuning",
        "no weight delta",
    ),
    (r"\.lora_\w+", "an unknown LoRA variant", ""),
]
_REFUSED_PATTERNS = [(re.compile(pattern), name, way) for pattern, name, way in _REFUSED]


def parse(name: str) -> Key | None:
    """What the tensor called `name` is, or None if it is no part of a low-rank delta."""
    for pattern, spelling in _FACTORS:
        found = pattern.search(name)
        if found:
            side = found["side"]
            adapter = found.groupdict().get("adapter") or ""
            role = _DOWN_UP.get(side, side)
            return Key(name[: found.start()], role, spelling, adapter.replace("default", ""))
    found = _PROCESSOR.search(name)
    if found:
        leaf = "to_out.0" if found["name"] == "to_out" else found["name"]
        return Key(f"{name[: found.start()]}.{leaf}", _DOWN_UP[found["side"]], "processor")
    found = _BIAS.search(name)
    if found:
        adapter = (found["adapter"] or "").replace("default", "")
        return Key(name[: found.start()], "bias", "peft", adapter)
    if name.endswith(".alpha"):
        return Key(name.removesuffix(".alpha"), "alpha", "")
    return None


def refuse_variant(name: str, path: str) -> None:
    """Raise UnsupportedError if `name` belongs to a kind that is recognised and not read."""
    for pattern, kind, way in _REFUSED_PATTERNS:
        if pattern.search(name):
            raise UnsupportedError(
                f"this is {kind} (tensor {name!r}), not a plain LoRA", path=path, hint=way or None
            )
