"""kohya (sd-scripts, LyCORIS, musubi-tuner): one file, flat stems, `.alpha` beside the factors.

The flat stem (`lora_unet_down_blocks_0_…`) is the module's identity: flattening lost the dots.
A missing `.alpha` means alpha = rank, the header's `ss_network_alpha` aside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence

from adapterops.files.header import Entry, encode_header

# What tells image UIs which base a file belongs to; inputs that differ here deserve a warning.
IDENTITY = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_hash",
    "ss_sd_model_name",
    "ss_network_module",
    "modelspec.architecture",
    "modelspec.implementation",
)
_LEGACY_WINDOW = (0x100000, 0x110000)


def names(stem: str) -> dict[str, str]:
    """The saved names of a module's tensors."""
    return {
        "A": f"{stem}.lora_down.weight",
        "B": f"{stem}.lora_up.weight",
        "alpha": f"{stem}.alpha",
    }


def header_alpha(metadata: Mapping[str, str], rank: int, spatial: bool) -> float | None:
    """The alpha that the training options give a module of this rank, None where they are silent.

    Convolutions wider than 1 x 1 (`spatial`) have their own options, and block-wise ones or rs_lora
    change alpha per module.
    """
    arguments = metadata.get("ss_network_args", "")
    if spatial or "block" in arguments or "rs_lora" in arguments:
        return None
    try:
        dim = float(metadata["ss_network_dim"])
        alpha = float(metadata["ss_network_alpha"])
    except (KeyError, ValueError):
        return None
    return alpha if dim == rank and math.isfinite(alpha) else None


def carried_metadata(inputs: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The first input's training metadata, and the keys of identity in which others differ."""
    first = {
        key: value for key, value in inputs[0].items() if key.startswith(("ss_", "modelspec."))
    }
    differ = [
        key
        for key in IDENTITY
        if any(other.get(key) not in (None, first.get(key)) for other in inputs[1:])
    ]
    first.pop("modelspec.hash_sha256", None)
    return first, differ


def rewritten(metadata: Mapping[str, str], sizes: Collection[tuple[int, float]]) -> dict[str, str]:
    """Metadata with dim and alpha of the output, also where the options repeat them.

    `sizes` are the (rank, alpha) of its modules. Where they differ sd-scripts writes "Dynamic".
    """
    ranks, alphas = {rank for rank, _ in sizes}, {alpha for _, alpha in sizes}
    dim = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    alpha = str(float(max(alphas))) if len(alphas) == 1 else "Dynamic"
    result = {**metadata, "ss_network_dim": dim, "ss_network_alpha": alpha}
    try:
        arguments = json.loads(metadata["ss_network_args"])
    except (KeyError, ValueError):
        return result
    if isinstance(arguments, dict):
        for name, value in (("conv_dim", dim), ("conv_alpha", alpha)):
            if name in arguments:
                arguments[name] = value.removesuffix(".0")
        result["ss_network_args"] = json.dumps(arguments)
    return result


def model_hashes(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], data_sha256: str, start: bytes
) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` as sd-scripts computes them.

    The first is the sha256 of the data section. The second hashes bytes 0x100000 to 0x110000 of a
    file whose header holds only the `ss_*` keys; `start` is the data section's first 2 MiB.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    blob = encode_header(entries, training) + start
    legacy = hashlib.sha256(blob[slice(*_LEGACY_WINDOW)]).hexdigest()[:8]
    return {"sshs_model_hash": data_sha256, "sshs_legacy_hash": legacy}
