"""Ways from a weight to its merge: what W' is held against, rounding by rounding.

Where a change is small against the grid, what arrives depends on where a tool rounds: adapters
added one after the other are swallowed one after the other, and a change that was rounded to the
weights' own 16 bits makes ties, half of which stay, where one that was not would have moved two
thirds. None of this is a bug, and all of it is a slope against W + D rounded once; it is none
against the same way restated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adapterops.baking.delta import Delta
from adapterops.judging.ladder import FAITHFUL
from adapterops.rounding.exact import narrowed, round_exactly
from adapterops.rounding.grid import TORCH


@dataclass(frozen=True, slots=True)
class Route:
    """Where a merge rounds before its last rounding.

    `cast`: W first, to the type of W'. `each`: after each adapter. `delta`: the change, or each
    adapter's, to this 16-bit type; `product`: B·A first, then its multiple, where all have one
    factor. `times`: how often it is all added. `half`: all of it in float16, then cast. `faithful`:
    so many times to any of both neighbours of a sum, which is no way to compute but a promise;
    `guessed`: that nobody gave.
    """

    cast: bool = False
    each: bool = False
    delta: str = ""
    product: bool = False
    times: int = 1
    half: bool = False
    faithful: int = 0
    guessed: bool = False

    @property
    def rung(self) -> int:
        """The lowest rung that it stands on."""
        if self.each or self.half or self.times > 1:
            return FAITHFUL - 1
        return 2 + self.product if self.delta else 0


SUM = Route()


def restate(
    W: torch.Tensor,
    delta: Delta,
    steps: Sequence[Delta],
    first: int,
    single: torch.Tensor,
    route: Route,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What a tile's values are by a route: rows from `first` on, in `dtype`.

    `steps` are the changes that are rounded one after the other, `single` is `delta`'s in float32.
    """
    if route.half:
        in_half = replace(route, half=False, cast=True)
        merged = restate(W, delta, steps, first, single, in_half, torch.float16)
        return merged.float().to(dtype)
    last = first + len(W)
    start = W if W.dtype == dtype or not route.cast else narrowed(W.double(), dtype)
    several = route.each or route.times > 1
    if not several and not route.delta:
        return round_exactly(start, delta, first, last, dtype)[0]
    for step in [*steps] * route.times if several else [delta]:
        change = single if step is delta else step.single(first, last)
        if route.delta:
            change = _narrow(change, step, route)
            start = narrowed(start.double() + change.double(), dtype)
        else:
            start = round_exactly(start, step, first, last, dtype)[0]
    return start


def _narrow(change: torch.Tensor, delta: Delta, route: Route) -> torch.Tensor:
    """A change in the 16 bits of a route, its factor applied before or after the rounding."""
    dtype = TORCH[route.delta]
    factors = {term.coefficient for term in delta.band.terms}
    if not route.product or len(factors) != 1 or 0.0 in factors:
        return change.to(dtype)
    factor = factors.pop()
    return (change / factor).to(dtype) * factor
