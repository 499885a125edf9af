"""Rotary embeddings as configs spell them, in one form.

transformers 4 has rope_theta beside rope_scaling (and a few models' own names), transformers 5 all
of it in rope_parameters, or one of these for each kind of attention layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = {  # top-level entry -> entry of the normal form
    "rope_theta": "rope_theta",
    "global_rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_local_base_freq": "sliding_attention.rope_theta",
    "local_rope_theta": "sliding_attention.rope_theta",
}
SPELLINGS = frozenset({*_NAMES, "rope_scaling", "rope_parameters"})
# Old names; sections alone make it multimodal, and images' positions were always axial.
_TYPES = {"mrope": "default", "su": "longrope", "axial": "default"}
_MAIN = "full_attention"
# Where nothing is said. Models' own default bases differ; most have this one.
DEFAULTS: Mapping[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "sliding_attention.rope_type": "default",
    "sliding_attention.rope_theta": 10000.0,
}


def normal_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a config, by entry; those that are not there are left out.

    Entries of other kinds of layers than full attention have that kind and a dot in front.
    """
    found: dict[str, Any] = {}
    for name, entry in _NAMES.items():
        if config.get(name) is not None:
            found[entry] = config[name]
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if isinstance(given, Mapping):
            found.update(_flat(given))
    return found


def _flat(given: Mapping[str, Any], kind: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _flat(value, "" if name == _MAIN else f"{name}.")
        elif name == "rope_type" or (name == "type" and "rope_type" not in given):
            yield f"{kind}rope_type", _TYPES.get(str(value), value)
        elif value is not None and name != "type":
            yield kind + name, value
