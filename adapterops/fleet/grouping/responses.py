"""Sketches of what adapters make of given inputs: candidates where the bound is in those terms.

Adapters that are far from each other in weights may be near in what they do to a model's inputs x,
which seldom point everywhere. Of ΔW·C^½, C = E[xxᵀ], the sketch is PᵀB·(AG)/p, where G (n, p) has
random signs for coordinates of a root of C (`metric.outer`). Each column g has E[ggᵀ] = C, so the
expected square of the sketch is tr(ΔW·C·ΔWᵀ), and it is linear in ΔW, as that of ΔW itself is. Of a
large gram G is approximate, and so is who is found by it. Norms and energies are those of the
sketches.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from adapterops import metric
from adapterops.activations import Activations, for_modules
from adapterops.errors import AdapterOpsError, MemoryLimitError
from adapterops.files.remote import is_remote, located
from adapterops.files.scratch import scratch
from adapterops.fleet.grouping.vectors import Vectors
from adapterops.fleet.indexing.opened import Columns, Fleet
from adapterops.fleet.signing.sketch import sides
from adapterops.fleet.types import Array, Record
from adapterops.fleet.verifying.opening import Opened, Opener
from adapterops.fleet.verifying.responses import sites_of
from adapterops.metric import Inputs
from adapterops.stream import Compute, Job, run

_PROBES = 256
_TOGETHER = 16  # adapters of a job
_PEAK = 64 << 20  # bytes of a job beside the adapter that it reads


def response_vectors(
    fleet: Fleet,
    records: Sequence[Record],
    activations: Activations,
    on: Compute,
    *,
    allow_pickle: bool = False,
) -> Vectors:
    """The records by what they make of these inputs; every file is read once.

    One that cannot be read, or has changes that inputs say nothing of, is `failed`: a row of 0.
    """
    columns = fleet.columns(records)
    probed = _Probed(fleet.seed, columns.side)
    count, width = len(records), len(columns.stems) * columns.side**2
    rows, energies = np.zeros((count, width), np.float16), np.zeros((count, len(columns.stems)))
    norms, failed = np.zeros(count), {}
    opener = Opener(allow_pickle=allow_pickle)
    places = [record.tenant.location for record in records]
    with ExitStack() as stack:
        inside = stack.enter_context(scratch()) if any(map(is_remote, places)) else None

        def sketched(own: Sequence[str]) -> list[Array | AdapterOpsError]:
            return [_attempt(one, opener, inside, activations, columns, probed) for one in own]

        jobs = [
            Job(
                places[at],
                sketched,
                (places[at : at + _TOGETHER],),
                _PEAK + 8 * max(record.size for record in records[at : at + _TOGETHER]),
            )
            for at in range(0, count, _TOGETHER)
        ]
        results = stack.enter_context(closing(run(jobs, on)))
        for place, found in enumerate(one for part in results for one in part):
            if isinstance(found, AdapterOpsError):
                failed[place] = found
                continue
            squares = np.einsum("lab,lab->l", found, found)
            norms[place] = norm = float(np.sqrt(squares.sum()))
            if norm > 0:
                rows[place] = (found / norm).reshape(-1)
                energies[place] = squares / squares.sum()
    return Vectors(rows, norms, energies, columns.side, failed)


class _Probed:
    """G of inputs, each made once; threads may share one."""

    def __init__(self, seed: int, side: int) -> None:
        self.seed, self.side = seed, side
        self._lock = threading.Lock()
        self._known: dict[str, Array] = {}

    def of(self, inputs: Inputs) -> Array:
        """(n, p) float64, the same for all modules that have these inputs."""
        name = inputs.ref.name
        with self._lock:
            if name not in self._known:
                self._known[name] = self._made(inputs, name)
            return self._known[name]

    def _made(self, inputs: Inputs, name: str) -> Array:
        n, p = inputs.width, self.side
        probe = self._signs(f"{name}\0probe", n, min(n, _PROBES))
        F, spread = metric.outer(inputs, probe)
        found: Array = F @ self._signs(f"{name}\0root", F.shape[1], p)
        found += spread[:, None] * self._signs(f"{name}\0spread", n, p)
        return found

    def _signs(self, name: str, rows: int, columns: int) -> Array:
        found: Array = sides(self.seed, name, (rows, 1), (columns, 1))[0].T.astype(np.float64)
        return found


def _attempt(
    location: str,
    opener: Opener,
    inside: Path | None,
    activations: Activations,
    columns: Columns,
    probed: _Probed,
) -> Array | AdapterOpsError:
    try:
        with ExitStack() as stack:
            local = located(location, inside=inside, allow_pickle=opener.allow_pickle)
            item = opener.open(stack.enter_context(local), location)
            stack.callback(item.close)
            inputs = for_modules(activations, sites_of(item), item.blueprint.file.base)
            found = _sketch(item, inputs, columns, probed)
            item.check_unchanged()
            return found
    except MemoryLimitError:
        raise
    except AdapterOpsError as error:
        return error


def _sketch(item: Opened, inputs: dict[str, Inputs], columns: Columns, probed: _Probed) -> Array:
    """(L, p, p) float64."""
    p = columns.side
    found = np.zeros((len(columns.stems), p, p))
    for place, (stem, shape) in enumerate(zip(columns.stems, columns.shapes, strict=True)):
        if stem in inputs:
            B, A = item.stacks([stem])
            P = sides(probed.seed, stem, shape, (p, p))[0]
            found[place] = (P.astype(np.float64) @ B[0]) @ (A[0] @ probed.of(inputs[stem])) / p
    return found
