"""What became of a change when it was rounded into a weight: sums that add up over blocks.

W is the stored weight, D the change, W′ what was written, E = W′ − W − D. Sums are of elements in
float32 (relative error about 10⁻⁶; of ‖E‖² below 10⁻³), in float64 where W′ is float32 and E no
larger than float32's own error; elements without a change are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Drift:
    """The sums of one tensor, or of several.

    `inside` is Σ‖E·Q‖², Q an orthonormal basis of what the adapters read (their A's). `changed` and
    `swallowed` count elements with W′ ≠ W, and with W′ = W though D ≠ 0; `clipped` those that
    a rounding with feedback could not move. `subnormal` counts, only where W and W′ are
    both float16 and 0 for all other types, elements of W′ below the normal range, W being normal or
    zero. Of `ulp_count` elements, a sample of rows, `ulp_max` is the largest |E| in units of
    ulp(max(|W|, |W′|)), of W′'s type, and `ulp_sum` is Σ|E| in them.
    """

    elements: int = 0
    delta: float = 0.0
    realised: float = 0.0
    error: float = 0.0
    inside: float = 0.0
    bias: float = 0.0
    changed: int = 0
    swallowed: int = 0
    subnormal: int = 0
    clipped: int = 0
    ulp_max: float = 0.0
    ulp_sum: float = 0.0
    ulp_count: int = 0

    def __add__(self, other: Drift) -> Drift:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Drift(**{**sums, "ulp_max": max(self.ulp_max, other.ulp_max)})

    def scaled(self, factor: float) -> Drift:
        """The sums of `factor` times as many rows like these."""
        scaled = {f.name: factor * getattr(self, f.name) for f in fields(self)}
        counts = {f.name: round(scaled[f.name]) for f in fields(self) if f.type == "int"}
        return Drift(**{**scaled, **counts, "ulp_max": self.ulp_max})

    @property
    def gain(self) -> float | None:
        """⟨W′ − W, D⟩ / ‖D‖²: 1 where all of the change arrived; None where D = 0."""
        return self.realised / self.delta if self.delta else None

    @property
    def relative_error(self) -> float | None:
        """‖E‖ / ‖D‖; None where D = 0."""
        return math.sqrt(self.error / self.delta) if self.delta else None

    @property
    def subspace_error(self) -> float | None:
        """‖E·Q‖ / ‖D·Q‖, and D·Q has D's norm: what the adapter's own inputs see of E."""
        return math.sqrt(self.inside / self.delta) if self.delta else None

    @property
    def swallowed_share(self) -> float:
        """Share of the elements with a change that did not move."""
        return self.swallowed / self.elements if self.elements else 0.0

    @property
    def changed_share(self) -> float:
        """Share of the elements that moved."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def mean_bias(self) -> float:
        """The mean of E, in units of the weights."""
        return self.bias / self.elements if self.elements else 0.0

    @property
    def bias_z(self) -> float:
        """The mean of E in units of its standard error."""
        return self.bias / math.sqrt(self.error) if self.error else 0.0

    @property
    def ulp_mean(self) -> float:
        """The mean of |E| in units of the last place."""
        return self.ulp_sum / self.ulp_count if self.ulp_count else 0.0
