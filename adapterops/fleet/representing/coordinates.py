"""Members of a group in coordinates that they share, from the Gram matrices of their factors.

Members that serve one group lie near each other, so what an average is chosen by are inner products
between them, and what a cut leaves over. These depend on the stacked factors B (m, R) and A (R, n)
by BᵀB and AAᵀ alone: any left (k, R), right (R, q) with leftᵀ·left = BᵀB, right·rightᵀ = AAᵀ give
the same. Such roots are Cholesky's of the matrix scaled to a diagonal of 1, or come from its
eigenvalues where rounding makes that indefinite, as it may where members share columns. Entries of
the products are wrong by at most about `CUT` times the lengths of the two columns (Higham 2002,
theorem 10.3), as are the inner products themselves. Distances below 10⁻⁷ of a member are lost in
that: errors are not measured here. QR of the stacks would take five times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from adapterops.factors import Factors
from adapterops.fleet.types import Array
from adapterops.formats import AdapterFile
from adapterops.formats.model import Site
from adapterops.geometry import in_common_bases
from adapterops.linalg import EPSILON
from adapterops.stream import Compute, Job, run

CUT = 64 * EPSILON


def coordinates(files: Sequence[AdapterFile], on: Compute) -> list[list[Factors]]:
    """Every module's list of the files' factors, scale folded in, in coordinates that they share.

    Raises what reading factors raises.
    """
    stems = sorted({stem for file in files for stem in file.sites})
    on = replace(on, device="cpu")
    with closing(run((_job(stem, files) for stem in stems), on)) as results:
        return list(results)


def _job(stem: str, files: Sequence[AdapterFile]) -> Job[list[Factors]]:
    sites = tuple(file.sites.get(stem) for file in files)
    present = [site for site in sites if site]
    numbers = sum(site.rank * sum(site.shape) for site in present)
    return Job(stem, _in_coordinates, (sites,), 3 * 8 * numbers)


def _in_coordinates(sites: Sequence[Site | None]) -> list[Factors]:
    m, n = next(site.shape for site in sites if site)
    pairs = []
    for site in sites:
        B, A = site.factors() if site else (np.zeros((m, 0)), np.zeros((0, n)))
        pairs.append(Factors(B, A * site.scale if site else A))
    return in_shared_coordinates(pairs)


def in_shared_coordinates(members: Sequence[Factors]) -> list[Factors]:
    """Factors B (m, r), A (r, n) of any ranks in coordinates that they share, far fewer than m, n.

    A result has B (k, r) and A (r, q). Inner products are what they were, to about `CUT` in terms
    of the members' β; where squares overflow, those of `geometry.in_common_bases`.
    """
    left = _rooted([each.B for each in members])
    right = _rooted([each.A.T for each in members])
    if left is not None and right is not None:
        return [Factors(B, A.T) for B, A in zip(left, right, strict=True)]
    B = np.concatenate([each.B for each in members], axis=1)
    A = np.concatenate([each.A for each in members], axis=0)
    return in_common_bases(B, A, [each.rank for each in members])


def _rooted(blocks: Sequence[Array]) -> list[Array] | None:
    """Columns (m, r) of every member in k coordinates, (k, r); None where squares overflow.

    What several members have in common to the last bit, as forks may, is worked on once.
    """
    distinct: list[Array] = []
    places = []
    for block in blocks:
        same = (at for at, known in enumerate(distinct) if _equal(block, known))
        places.append(next(same, len(distinct)))
        if places[-1] == len(distinct):
            distinct.append(block)
    stack = np.concatenate(distinct, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        gram = stack.T @ stack
    if not np.isfinite(gram).all():
        return None
    ends = np.cumsum([block.shape[1] for block in distinct])
    parts = np.split(_root(gram), ends[:-1], axis=1)
    return [parts[place] for place in places]


def _equal(one: Array, other: Array) -> bool:
    return np.array_equal(one[:1], other[:1]) and np.array_equal(one, other)


def _root(gram: Array) -> Array:
    """L (k, R) with LᵀL = gram."""
    sizes = np.sqrt(np.diagonal(gram))
    live = np.flatnonzero(sizes)
    unit = gram[np.ix_(live, live)] / np.outer(sizes[live], sizes[live])
    try:
        root = np.linalg.cholesky(unit).T
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(unit)
        kept = values > CUT
        root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    whole = np.zeros((len(root), len(gram)))
    whole[:, live] = root * sizes[live]
    return whole
