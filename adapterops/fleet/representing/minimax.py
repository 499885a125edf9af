"""The adapter whose largest relative error over a group is smallest: dual ascent over weights.

    min over X, rank Xₗ ≤ r, of max_i ‖Dᵢ − X‖ / ‖Dᵢ‖,   Dᵢ = (Dᵢₗ) over all modules l.

The enclosing ball minimises the absolute distance, which is another problem where norms differ.
With weights λ on the simplex, sᵢ = 1/‖Dᵢ‖², v = λ∘s, u = v/Σv and C = Σuᵢ·Dᵢ,

    g(λ) = min_X Σλᵢsᵢ‖Dᵢ − X‖² = Σv·(Σuᵢ‖Dᵢ − C‖² + ‖C − X(λ)‖²),   X(λ)ₗ = the rank-r part of Cₗ

(Eckart & Young 1936, module by module). A maximum is no less than a weighted mean, so √g(λ) is a
lower bound of what any X of that rank reaches, whatever λ is, and X(λ) itself is one that can be
written. g is concave, its supergradient is sᵢ‖Dᵢ − X(λ)‖². Rank r is not convex: between the two a
gap may remain. It is reported; optimality is not claimed.

Without a rank g is smooth, and `enclosing` solves it in the N x N distances. With one, that
solution is where cutting planes start (Kelley 1960): every X(λₖ) bounds g from above by a linear
function, their least is maximised by a linear program, and the next λ lies between its solution and
the best so far (Wentges 1997), which keeps the steps short.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterops.factors import Factors
from adapterops.fleet.grouping.enclosing import enclosing
from adapterops.linalg import EPSILON

Array = np.ndarray[Any, Any]

LARGEST = 256  # Σr over the members: eigenvalues of a module then take 16 ms a step
STEPS = 60
_WORK = 6e10  # Σk³ over modules and steps: about a minute and a half of one processor
_GAP = 1e-3  # of the error; closer is not worth another step
_LIGHT = 1e-3  # a member of less weight is left out where that costs nothing
_FREE = 1e-6
_SHORTER = 0.5
_ROUNDING = 256.0  # in inner products of what `coordinates` gives


@dataclass(frozen=True, slots=True)
class Minimax:
    """Weights, and what they reach.

    `weights` λ (N,) sum to 1; `coefficients` u (N,), sum 1, make C = Σuᵢ·Dᵢ, whose rank-r part is
    the representative. `errors` (N,) are ‖Dᵢ − X‖/‖Dᵢ‖ before it is stored, `error` the largest,
    `bound` a proven lower bound of that of any X of the rank. A member of norm zero has no relative
    error: its weight and its error are 0.
    """

    weights: Array
    coefficients: Array
    errors: Array
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How far, at most, the largest error is from the smallest possible one."""
        return max(self.error - self.bound, 0.0)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Modules of one shape: left (c, k, R) and right (c, R, q), k ≤ q, columns owned (R,)."""

    left: Array
    right: Array
    owners: Array


@dataclass(frozen=True, slots=True)
class Members:
    """A group in common bases, ready for `evaluate`: N members, modules batched by shape.

    `norms` (N,) are ‖Dᵢ‖, `squares` (N, N) ‖Dᵢ − Dⱼ‖², `floor` what rounding makes of an error².
    """

    batches: tuple[_Batch, ...]
    norms: Array
    squares: Array
    floor: float

    @property
    def live(self) -> Array:
        """Which members have a norm, (N,) of bool."""
        return np.asarray(self.norms > 0.0)

    @property
    def work(self) -> float:
        """Σk³ over the modules: what one step costs."""
        return float(sum(len(b.left) * b.left.shape[1] ** 3 for b in self.batches))


def members(modules: Sequence[Sequence[Factors]]) -> Members:
    """A group from every module's list of N members' factors in common bases.

    `coordinates.in_shared_coordinates` gives such a list; a module that a member lacks has B (k, 0)
    and A (0, q).
    """
    count = len(modules[0]) if modules else 0
    gathered: dict[tuple[int, ...], list[tuple[Array, Array, Array]]] = defaultdict(list)
    gram, betas = np.zeros((count, count)), np.zeros(count)
    for module in modules:
        widths = [item.rank for item in module]
        left = np.concatenate([item.B for item in module], axis=1)
        right = np.concatenate([item.A for item in module], axis=0)
        owners = np.repeat(np.arange(count), widths)
        member = np.eye(count)[owners]
        gram += member.T @ ((left.T @ left) * (right @ right.T)) @ member
        betas += (np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)) @ member
        if left.shape[0] > right.shape[1]:
            left, right = right.T, left.T
        gathered[(*left.shape, right.shape[1], *widths)].append((left, right, owners))
    batches = tuple(
        _Batch(np.stack([b for b, _, _ in same]), np.stack([a for _, a, _ in same]), same[0][2])
        for same in gathered.values()
    )
    diagonal = np.maximum(np.diagonal(gram), 0.0)
    noise = diagonal <= (_ROUNDING * EPSILON) * betas**2
    norms = np.where(noise, 0.0, np.sqrt(diagonal))
    squares = np.maximum(diagonal[:, None] + diagonal - 2 * gram, 0.0)
    np.fill_diagonal(squares, 0.0)
    live = norms > 0.0
    spread = float(np.max(betas[live] / norms[live], initial=1.0))
    return Members(batches, norms, (squares + squares.T) / 2, _ROUNDING * EPSILON * spread**2)


def coefficients(group: Members, weights: Array) -> Array:
    """u (N,): what each Dᵢ is multiplied by in the mean C that weights λ (N,) of errors make."""
    live = group.live
    shares = np.zeros(len(weights))
    least = group.norms[live].min(initial=math.inf)  # so that no square over- or underflows
    shares[live] = weights[live] * (least / group.norms[live]) ** 2
    return np.asarray(shares / shares.sum())


def evaluate(group: Members, shares: Array, rank: int | None) -> tuple[Array, float]:
    """sᵢ‖Dᵢ − X‖² (N,) of the rank-r part X of Σuᵢ·Dᵢ, and g(λ) of the λ that makes `shares` u.

    What is cut off is C − U·Uᵀ·C with the leading eigenvectors U of C·Cᵀ, and what is proved to be
    lost at least ‖C‖² less the eigenvalues.
    """
    live = group.live
    cut, lost, tail = np.zeros(len(shares)), 0.0, 0.0
    for batch in group.batches:
        if rank is None or rank >= int((shares[batch.owners] != 0.0).sum()):
            continue  # nothing is cut
        mean = (batch.left * shares[batch.owners]) @ batch.right
        values, vectors = np.linalg.eigh(mean @ mean.mT)
        keep = max(values.shape[1] - rank, 0)
        small = vectors[:, :, :keep]
        rest = small @ (small.mT @ mean)
        lost += float(np.sum(rest * rest))
        tail += float(np.sum(np.maximum(values[:, :keep], 0.0)))
        columns = np.einsum("crk,ckr->r", batch.right @ rest.mT, batch.left, optimize=True)
        cut += np.bincount(batch.owners, weights=columns, minlength=len(shares))
    from_mean, own = _from_mean(group.squares, shares)
    errors = np.zeros(len(shares))
    errors[live] = np.maximum(from_mean + 2 * cut - lost, 0.0)[live] / group.norms[live] ** 2
    weight = shares @ np.where(live, group.norms, 0.0) ** 2  # Σv = Σλ / Σuᵢ‖Dᵢ‖², Σλ = 1
    return errors, (own + tail) / float(weight)


def _from_mean(squares: Array, shares: Array) -> tuple[Array, float]:
    """‖Dᵢ − C‖² (N,) and Σuᵢ‖Dᵢ − C‖² of C = Σuᵢ·Dᵢ, from ‖Dᵢ − Dⱼ‖² alone."""
    apart = squares @ shares
    own = 0.5 * float(shares @ apart)
    return apart - own, own


def minimax(
    group: Members,
    rank: int | None,
    *,
    starts: Sequence[Array] = (),
    steps: int | None = None,
) -> Minimax:
    """The group's relative minimax of at most `rank` in every module; None: of any rank.

    `starts` are coefficients u (N,) that it must not be worse than, beside the best single member
    and the plain mean. `steps` are the evaluations after these, by default as many as stay within
    about a minute and a half, at most 60.
    """
    count, live = len(group.norms), group.live
    if not live.any():
        return Minimax(np.zeros(count), np.zeros(count), np.zeros(count), 0.0, 0.0)
    whole = np.zeros(count)
    whole[live] = enclosing(group.squares[np.ix_(live, live)], group.norms[live])
    search = _Search(group, rank)
    search.tried(whole)
    if rank is not None:
        relative = np.sqrt(group.squares[:, live]) / group.norms[live]
        medoid = np.eye(count)[int(np.argmin(np.where(live, relative.max(axis=1), math.inf)))]
        plain = coefficients(group, live / live.sum())
        for shares in (medoid, plain, *starts):
            search.tried(_weights_of(group, shares))
        allowed = min(STEPS, int(_WORK / max(group.work, 1.0)))
        search.ascend(allowed if steps is None else steps)
    search.lighten()
    return search.result()


def _weights_of(group: Members, shares: Array) -> Array:
    """λ (N,) of coefficients u."""
    live = group.live
    weights = np.zeros(len(shares))
    weights[live] = shares[live] * (group.norms[live] / group.norms[live].max()) ** 2
    return np.asarray(weights / weights.sum())


class _Search:
    """What has been evaluated: the best X so far, the best bound, the cutting planes."""

    def __init__(self, group: Members, rank: int | None) -> None:
        self.group = group
        self.rank = rank
        self.cuts: list[Array] = []
        self.best = (math.inf, np.zeros(0), np.zeros(0))
        self.bound = (-math.inf, np.zeros(0))

    def tried(self, weights: Array) -> bool:
        """Evaluate λ; whether it raised the bound."""
        errors, value = evaluate(self.group, coefficients(self.group, weights), self.rank)
        self.cuts.append(errors)
        if float(errors.max()) < self.best[0]:
            self.best = (float(errors.max()), weights, errors)
        if value <= self.bound[0]:
            return False
        self.bound = (value, weights)
        return True

    def ascend(self, steps: int) -> None:
        """Raise the bound until it meets the error, cannot rise, or the steps are used up."""
        closer = _SHORTER
        for _ in range(steps):
            if self._closed(self.best[0]):
                return
            target, ceiling = _highest(np.array(self.cuts)[:, self.group.live])
            if self._closed(ceiling):
                return
            weights = np.zeros(len(self.group.norms))
            weights[self.group.live] = target
            raised = self.tried(closer * self.bound[1] + (1 - closer) * weights)
            closer = _SHORTER if raised else math.sqrt(closer)

    def _closed(self, squared: float) -> bool:
        return math.sqrt(max(self.bound[0], 0.0)) >= (1 - _GAP) * math.sqrt(squared)

    def lighten(self) -> None:
        """Leave out members of hardly any weight, where the result is as good without them."""
        error, weights, _ = self.best
        heavy = np.where(weights >= _LIGHT, weights, 0.0)
        if not heavy.any() or np.array_equal(heavy, weights):
            return
        heavy = heavy / heavy.sum()
        errors, _ = evaluate(self.group, coefficients(self.group, heavy), self.rank)
        if math.sqrt(errors.max()) <= (1 + _FREE) * math.sqrt(error):
            self.best = (float(errors.max()), heavy, errors)

    def result(self) -> Minimax:
        """The best X found and the best bound, less what rounding may have added to it."""
        squared, weights, errors = self.best
        bound = math.sqrt(max(self.bound[0] - self.group.floor, 0.0))
        error = math.sqrt(squared)
        shares = coefficients(self.group, weights)
        return Minimax(weights, shares, np.sqrt(errors), error, min(bound, error))


def _highest(cuts: Array) -> tuple[Array, float]:
    """The λ (N,) that maximises the least of the cuts (K, N) @ λ, and that value."""
    from scipy.optimize import linprog  # not needed by the other verbs, and slow to import

    many, count = cuts.shape
    scale = float(cuts.max())
    found = linprog(
        np.append(np.zeros(count), -1.0),
        A_ub=np.hstack([-cuts / scale, np.ones((many, 1))]),
        b_ub=np.zeros(many),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[*[(0.0, None)] * count, (None, None)],
        method="highs",
    )
    weights = np.maximum(found.x[:count], 0.0)
    return weights / weights.sum(), scale * float(found.x[count])
