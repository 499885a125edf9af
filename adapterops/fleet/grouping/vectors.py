"""What a search for candidates compares: a row of numbers for each adapter, linear in its change.

A row is a sketch of an adapter over its norm, module by module, as `index` keeps it: it is not
normalised again, so that the difference of two rows, times their norms, is the sketch of the
difference of the adapters, exactly. Its own norm is 1 on average only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from adapterops.errors import AdapterOpsError
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.types import Array, Record


@dataclass(frozen=True, slots=True)
class Vectors:
    """N adapters: `sketches` (N, L·side²) float16 or float32, `norms` (N,), `energies` (N, L).

    `energies` are the modules' shares of ‖D‖². What has norm 0 is near nothing but itself. `failed`
    are rows that could not be made, with what was said.
    """

    sketches: Array
    norms: Array
    energies: Array
    side: int
    failed: Mapping[int, AdapterOpsError] = field(default_factory=dict)

    def rows(self, places: Array) -> Vectors:
        """Some of them, in the order of `places`."""
        index = {int(place): row for row, place in enumerate(places)}
        failed = {index[row]: error for row, error in self.failed.items() if row in index}
        parts = self.sketches[places], self.norms[places], self.energies[places]
        return Vectors(*parts, self.side, failed)

    def within(self, some: Sequence[int], others: Sequence[int], reach: float) -> bool:
        """Whether no sketch of some is farther from any of others than `reach` of either norm."""
        one, two = (
            self.sketches[list(rows)].astype(np.float64) * self.norms[list(rows)][:, None]
            for rows in (some, others)
        )
        apart = np.linalg.norm(one[:, None] - two, axis=2)
        least = np.minimum(self.norms[list(some)][:, None], self.norms[list(others)])
        return bool((apart <= reach * least).all())


def delta_vectors(fleet: Fleet, records: Sequence[Record]) -> Vectors:
    """The records by ΔW, in float16, which holds what the index says to the bit."""
    sketches, energies, _ = fleet.matrix(records)
    norms = np.array([record.norm for record in records])
    return Vectors(sketches.astype(np.float16), norms, energies, fleet.columns(records).side)
