"""Names of tensors: a key is prefix + module path + suffix. The suffix says what the tensor is.

Suffixes that change what an adapter does in a way that is not a low-rank delta are listed by name
here, so that each is refused with its own reason and none is mistaken for a head or a bias.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from adapterops.errors import UnsupportedError


class Key(NamedTuple):
    """A parsed name: the stem names the module, `role` says what the tensor is to it.

    `spelling` is the family of suffixes that the name belongs to ("" where several share it);
    `adapter` is the adapter's name where the key still has it (a dump of a live model).
    """

    stem: str
    role: str
    spelling: str
    adapter: str = ""


_KEPT = 256  # characters of the longest name that is remembered
_DOWN_UP = {"down": "A", "up": "B"}
# What may be a tensor of a head or a norm as well: it belongs to a module only if factors do.
TENTATIVE = frozenset({"alpha", "m"})

_SUFFIXES: dict[str, tuple[str, str]] = {
    "lora_A.weight": ("A", "peft"),
    "lora_B.weight": ("B", "peft"),
    "lora_A": ("A", "peft"),
    "lora_B": ("B", "peft"),
    "lora_E": ("E", "peft"),
    "lora_B.bias": ("bias", "peft"),
    "lora_embedding_A": ("A", "embedding"),
    "lora_embedding_B": ("B", "embedding"),
    "lora_magnitude_vector": ("magnitude", ""),
    "lora_magnitude_vector.weight": ("magnitude", ""),
    "lora_down.weight": ("A", "kohya"),
    "lora_up.weight": ("B", "kohya"),
    "lora_mid.weight": ("mid", "kohya"),
    "dora_scale": ("magnitude", ""),
    "lora.down.weight": ("A", "lora"),
    "lora.up.weight": ("B", "lora"),
    "lora_linear_layer.down.weight": ("A", "lora"),
    "lora_linear_layer.up.weight": ("B", "lora"),
    "lora_a": ("A", "mlx"),
    "lora_b": ("B", "mlx"),
    "m": ("m", "mlx"),
    "alpha": ("alpha", ""),
    **{f"hada_{part}": (part, "lycoris") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{part}": (f"k{part}", "lycoris")
        for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
}
# Dense changes of one parameter each: not part of a module's factors, summed element by element.
_DELTAS = frozenset({"diff", "diff_b", "w_norm", "b_norm"})
_NAMED = {"lora_A", "lora_B", "lora_E", "lora_magnitude_vector"}  # may carry an adapter's name
_NAMED_BARE = {"lora_embedding_A", "lora_embedding_B", *_NAMED}

_PROCESSOR = re.compile(
    r"(\.processor)?\.(?P<name>to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"_lora\.(?P<side>down|up)\.weight$"
)
_XLABS = re.compile(r"(?P<stem>.*\.processor\.\w+_lora\d*)\.(?P<side>down|up)\.weight$")
_CLONEOFSIMO = re.compile(r"(?P<stem>(unet|text_encoder|list):\d+):(?P<side>down|up)$")
_REFUSED = [
    (r"\.lora_diag(\.|$)", "KaSA", "it also changes the base"),
    (r"\.(oft_blocks|oft_diag|oft_R|boft_\w+)(\.|$)", "OFT/BOFT", "it multiplies the base weight"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA", "it multiplies the base weight"),
    (r"\.(q_layer|p_layer|lambda_layer)(\.|$)", "T-LoRA", "its factors change with the timestep"),
    (r"\.(ia3_l|on_input)(\.|$)", "(IA)³", "it multiplies the base weight"),
    (
        r"\.(vera_lambda_[bd]|randlora_\w+)(\.|$)",
        "VeRA/RandLoRA",
        "its random projections are not all in the file",
    ),
    (
        r"\.(set_weight|reshape_weight)$",
        "a replacement of base weights",
        "it is no change of them; bake it with the tool that made it",
    ),
    (
        r"\.bias_(indices|values|size)$",
        "a sparse residual of LyCORIS' extraction",
        "extract it again without the sparse bias",
    ),
    (
        r"^lora_controlnet$|^(?!base_model\.).*\w\.(down|up)$",
        "a Control-LoRA",
        "it makes a network of its own",
    ),
    (
        r"(^|\.)prompt_embeddings$|(^|\.)prefix_encoder\.",
        "prefix or prompt tuning",
        "no weight delta",
    ),
    (r"\.(hada|lokr)_\w+|\.lora_\w+", "an unknown LoRA variant", ""),
]
_REFUSED_PATTERNS = [(re.compile(pattern), name, way) for pattern, name, way in _REFUSED]


def parse(name: str) -> Key | None:
    """What the tensor called `name` is, or None if it is no part of a low-rank delta."""
    return _parse_kept(name) if len(name) <= _KEPT else _parse(name)


@lru_cache(maxsize=1 << 14)
def _parse_kept(name: str) -> Key | None:
    """The adapters of a fleet have the same names."""
    return _parse(name)


def _parse(name: str) -> Key | None:
    parts = name.rsplit(".", 3)
    for count in range(min(3, len(parts) - 1), 0, -1):
        found = _SUFFIXES.get(".".join(parts[-count:]))
        if found:
            return Key(".".join(parts[:-count]), *found)
    if ":" in name:
        return _with_side(_CLONEOFSIMO.match(name), "cloneofsimo")
    if len(parts) == 4 and parts[1] in _NAMED:
        found = _SUFFIXES.get(f"{parts[1]}.{parts[3]}")
        if found:
            return Key(parts[0], *found, _adapter(parts[2]))
    if len(parts) > 2 and parts[-2] in _NAMED_BARE:
        return Key(".".join(parts[:-2]), *_SUFFIXES[parts[-2]], _adapter(parts[-1]))
    if "_lora" in name:
        found_name = _PROCESSOR.search(name)
        if found_name:
            leaf = "to_out.0" if found_name["name"] == "to_out" else found_name["name"]
            stem = f"{name[: found_name.start()]}.{leaf}"
            return Key(stem, _DOWN_UP[found_name["side"]], "processor")
        return _with_side(_XLABS.match(name), "xlabs")
    return None


def _with_side(found: re.Match[str] | None, spelling: str) -> Key | None:
    return Key(found["stem"], _DOWN_UP[found["side"]], spelling) if found else None


def _adapter(name: str) -> str:
    return "" if name == "default" else name


def is_delta(name: str) -> bool:
    """Whether a tensor is a dense change of one parameter (`.diff` and its like)."""
    return name.rpartition(".")[2] in _DELTAS


def refused(name: str, path: str) -> UnsupportedError | None:
    """The refusal of a tensor that belongs to a kind which is recognised and not read."""
    for pattern, kind, way in _REFUSED_PATTERNS:
        if pattern.search(name):
            return UnsupportedError(
                f"this is {kind} (tensor {name!r}), not a low-rank delta",
                path=path,
                hint=way or None,
            )
    return None
