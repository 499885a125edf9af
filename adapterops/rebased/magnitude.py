"""Which side of a weight DoRA's magnitudes belong to: outputs or inputs."""

from __future__ import annotations

import math

from adapterops.errors import FormatError
from adapterops.formats.model import Site


def axis_of(site: Site, channels: int | None = None) -> int:
    """0 where each output has a magnitude, 1 where each input (channel, token) has.

    Names and shapes tell. PEFT's are the outputs', of convolutions as (1, out, 1, 1); MLX has one
    for each token of an embedding. LyCORIS writes `dora_scale` as (out, 1, …) or (1, in, …), so a
    square weight leaves no doubt; one without a second dimension was PEFT's before a conversion.
    Raises FormatError for a shape that is neither, as far as the adapter alone tells, and with the
    number of the weight's input `channels` for all.
    """
    ref = site.parts["magnitude"]
    out, columns = site.shape
    count = math.prod(ref.shape)
    if ref.name.endswith("dora_scale") and len(ref.shape) > 1:
        found = _along(ref.shape, out, columns, channels)
    elif site.dialect == "mlx" and site.layer == "embedding":
        found = 1 if count == columns else None
    else:
        found = 0 if count == out else None
    if found is None:
        raise FormatError(
            f"{ref.name!r} has shape {list(ref.shape)}, which is no magnitude of a weight of "
            f"{out} x {columns}",
            path=ref.source.path,
            module=site.stem,
        )
    return found


def _along(shape: tuple[int, ...], out: int, columns: int, channels: int | None) -> int | None:
    """The axis that a LyCORIS magnitude has numbers along; its kernel's extents are all 1."""
    if math.prod(shape[2:]) != 1:
        return None
    if shape[:2] == (out, 1):
        return 0
    fits = shape[1] == channels if channels else shape[1] > 0 and columns % shape[1] == 0
    return 1 if shape[0] == 1 and fits else None
