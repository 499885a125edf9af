"""Block vectors of image models: which block each position is, and the presets.

The positions are those of the web UI's LoRA Block Weight (hako-mikan/sd-webui-lora-block-weight at
b403cb7, BLOCKID12 … BLOCKIDFLUX in scripts/lora_block_weight.py) and, but for Flux, of sd-scripts
(networks/svd_merge_lora.py at 48d368fa, LAYER12 … LAYER26). Presets of 17 are that extension's
DEF_WEIGHT_PRESET. For other lengths ComfyUI-Inspire-Pack (resources/lbw-preset.txt at 30974e6) has
INALL and OUTALL, always the text encoder with all input or all output blocks; the others have no
meaning there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_IN = tuple(f"IN{number:02}" for number in range(12))
_OUT = tuple(f"OUT{number:02}" for number in range(12))


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks that the values of a vector belong to, and what it is meant for."""

    meant: str
    blocks: tuple[str, ...]


def _chosen(*numbers: int) -> tuple[str, ...]:
    return tuple(_IN[number] for number in numbers)


LAYOUTS: Mapping[int, Layout] = {
    12: Layout("SDXL LoRA", ("BASE", *_chosen(4, 5, 7, 8), "MID", *_OUT[:6])),
    17: Layout("SD 1 and 2 LoRA", ("BASE", *_chosen(1, 2, 4, 5, 7, 8), "MID", *_OUT[3:])),
    20: Layout("SDXL LyCORIS and LoCon", ("BASE", *_IN[:9], "MID", *_OUT[:9])),
    26: Layout("SD 1 and 2 LyCORIS and LoCon", ("BASE", *_IN, "MID", *_OUT)),
    61: Layout(
        "Flux",
        (
            *("CLIP", "T5", "IN"),
            *(f"D{number:02}" for number in range(19)),
            *(f"S{number:02}" for number in range(38)),
            "OUT",
        ),
    ),
}

# Which vectors make sense for a family of models; of "unet" it is not known which it is, of "" the
# adapter changes text encoders only.
FAMILIES: Mapping[str, tuple[int, ...]] = {
    "sd": (17, 26),
    "sdxl": (12, 20, 26),
    "flux": (61,),
    "unet": (12, 17, 20, 26),
    "": (12, 17, 20, 26, 61),
}


def _uniform(value: float) -> dict[int, tuple[float, ...]]:
    return {length: (value,) * length for length in LAYOUTS}


def _all_of(prefix: str) -> dict[int, tuple[float, ...]]:
    """The text encoder and every block of one side of a U-Net."""
    return {
        length: tuple(
            float(block == "BASE" or block.startswith(prefix)) for block in LAYOUTS[length].blocks
        )
        for length in FAMILIES["unet"]
    }


def _of_17(digits: str) -> dict[int, tuple[float, ...]]:
    return {17: tuple(map(float, digits))}


PRESETS: Mapping[str, Mapping[int, tuple[float, ...]]] = {
    "NONE": _uniform(0.0),
    "ALL": _uniform(1.0),
    "INS": _of_17("11110000000000000"),
    "IND": _of_17("10001110000000000"),
    "INALL": _all_of("IN"),
    "MIDD": _of_17("10001111111100000"),
    "OUTD": _of_17("10000000111100000"),
    "OUTS": _of_17("10000000000011111"),
    "OUTALL": _all_of("OUT"),
    "ALL0.5": _uniform(0.5),
    "FLUXALL": {61: (1.0,) * 61},
}
