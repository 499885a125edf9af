"""The error of serving one adapter for another in terms of what modules' inputs make of it.

    Σ_l E‖(C_l − D_l)x_l‖² / Σ_l E‖D_l·x_l‖², rooted: ‖(C − D)Σ^½‖/‖DΣ^½‖ over the whole adapter,

x_l the inputs of module l and Σ their second moments (`metric.norm`, from the difference's own
factors).
"""

from __future__ import annotations

import math

import numpy as np

from adapterops import metric
from adapterops.activations import Activations, for_modules
from adapterops.errors import UnsupportedError
from adapterops.fleet.verifying.opening import Opened
from adapterops.formats.model import Site


def response_error(own: Opened | None, item: Opened, activations: Activations) -> float:
    """The error of serving the tenant `item` by `own`, None for the base model.

    Modules agree in shape. A tenant that no input can tell from the base is 0 off if what serves it
    is so too, else infinitely. Raises UnsupportedError for changes that are no module's factors,
    and what `for_modules` and `metric.norm` raise.
    """
    sides = [side for side in (own, item) if side is not None]
    sites = {stem: site for side in sides for stem, site in sites_of(side).items()}
    inputs = for_modules(activations, sites, item.blueprint.file.base)
    apart, whole, floors = [], [], []
    for stem in sorted(sites):
        pairs = [
            side.stacks([stem]) if stem in side.pieces else None for side in (own, item) if side
        ]
        served = pairs[0] if own else None
        mine = pairs[-1]
        if mine is not None:
            size, floor = metric.norm(mine[0][0], mine[1][0], inputs[stem])
            whole.append(size)
            floors.append(floor)
        both = [(1.0, served), (-1.0, mine)]
        kept = [(sign, pair) for sign, pair in both if pair is not None]
        B = np.hstack([sign * pair[0][0] for sign, pair in kept])
        A = np.vstack([pair[1][0] for _, pair in kept])
        apart.append(metric.norm(B, A, inputs[stem]))
    norm, distance = math.hypot(*whole), math.hypot(*(size for size, _ in apart))
    if norm <= math.hypot(*floors):
        return 0.0 if distance <= math.hypot(*(floor for _, floor in apart)) else math.inf
    return distance / norm


def sites_of(item: Opened) -> dict[str, Site]:
    """The modules of an adapter. Raises UnsupportedError for changes that no inputs measure."""
    sites: dict[str, Site] = {}
    for stem, piece in item.pieces.items():
        if piece.site is None or piece.ref is not None:
            raise UnsupportedError(
                "is a full delta or a bias, which has no inputs to measure it by",
                path=item.path,
                module=stem,
                hint="use --metric frobenius",
            )
        sites[stem] = piece.site
    return sites
