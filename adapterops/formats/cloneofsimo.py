"""cloneofsimo's lora: `unet:12:up` and `unet:12:down`, modules by number; scale 1.

The numbers are the order in which the tool walked the module classes that the header lists under
`unet` and `text_encoder` (JSON); `unet:12:rank` repeats the rank. Older files are bare lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def names(stem: str) -> dict[str, str]:
    """The saved names of a module's tensors."""
    return {"A": f"{stem}:down", "B": f"{stem}:up"}


def metadata(inputs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The classes that the numbers count, and the marks of trained tokens."""
    carried: dict[str, str] = {}
    for given in reversed(inputs):
        kept = {key: value for key, value in given.items() if value == "<embed>"}
        kept |= {key: given[key] for key in ("unet", "text_encoder") if key in given}
        carried |= kept
    return carried
