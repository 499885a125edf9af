"""A merge method as it is applied: with its parameters' values, in a space, and its modifiers.

`combined` gives the result as factors: Gram methods as a weighted stack of columns, spectral ones
as a core between orthonormal bases, elementwise ones in the canonical bases of Core space or KnOTS.
Elementwise methods on dense matrices are `elementwise`, Gram methods of those `weighted`; what is
known of all modules of an adapter together comes from `whole`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from adapterops import casts, linalg
from adapterops.derived.grid import voting
from adapterops.errors import UsageError
from adapterops.factors import Factors
from adapterops.rules import canonical, draws, modify, streamed
from adapterops.rules.orthonormal import orthonormal
from adapterops.rules.registry import SCOPE, Cored, Limits, Method, Value

Space = Literal["dense", "core", "knots"]
Calibration = Literal["pico", "svc"]
Matrix = np.ndarray[Any, Any]
_ROUNDED = 0.425  # root mean square of rounding, in units roundoff, over a binade
_BLOCK = 1 << 16  # entries: a few such arrays stay in a cache


@dataclass(frozen=True, slots=True)
class Rule:
    """A method with all its `values`; `seed` keys random bits.

    `space` is where entries are compared, of elementwise methods alone. Raises UsageError for a
    combination that there is not.
    """

    method: Method
    values: Mapping[str, Value] = field(default_factory=dict)
    space: Space = "dense"
    seed: int = 0
    calibrate: Calibration | None = None
    match_norm: modify.Target | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("--space", self.space, get_args(Space)),
            ("--calibrate", self.calibrate, (None, *get_args(Calibration))),
            ("--match-norm", self.match_norm, (None, *get_args(modify.Target))),
        ):
            if given not in known:
                listed = ", ".join(each for each in known if each)
                raise UsageError(f"{name} {given!r}: expected one of {listed}")
        elementwise = self.method.signature == "elements"
        if self.space != "dense" and not elementwise:
            raise UsageError(
                f"--space {self.space}: {self.method.name} gives the same in every space",
                hint="it is for methods that compare entries, such as ties",
            )
        if self.calibrate and self.method.signature == "factors":
            raise UsageError(
                f"--calibrate {self.calibrate} is for methods of the changes themselves; "
                f"{self.method.name} looks at single factors",
                hint="leave it out",
            )
        if self.is_dense and self.calibrate == "svc":
            raise UsageError(
                "--calibrate svc needs the singular vectors of the result, which a dense one has "
                "only once it is cut",
                hint="give --space core or knots",
            )

    @property
    def record(self) -> dict[str, Any]:
        """What of it decides a result, for provenance; None where there is nothing to say."""
        return {
            "method": self.method.name,
            "parameters": dict(self.values) or None,
            "space": self.space if self.method.spaces else None,
            "seed": self.seed if "seed" in self.method.needs else None,
            "calibrate": self.calibrate,
            "match_norm": self.match_norm,
        }

    @property
    def arguments(self) -> dict[str, Value]:
        """The values that the method itself takes."""
        return self.method.arguments(self.values)

    @property
    def is_whole(self) -> bool:
        """Whether the method looks at all modules of an adapter together."""
        return self.values.get(SCOPE.name) == "adapter"

    @property
    def is_dense(self) -> bool:
        """Whether the result is a matrix of any rank, known by its rows, whatever it is made of."""
        return self.method.signature == "elements" and self.space == "dense"


@dataclass(frozen=True, slots=True)
class Combined:
    """B (m, k) and A (k, n) in float64 of a module's result, and what the method says of it."""

    B: Matrix
    A: Matrix
    cored: Cored | None = None
    near: int | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of all modules together: coefficients (T,), or limits of all T adapters."""

    shares: Matrix | None = None
    limits: Limits | None = None

    def of(self, own: Sequence[int]) -> Limits:
        """The limits of some of the adapters."""
        assert self.limits is not None
        return Limits(self.limits.at[own], self.limits.near[own])


def combined(
    rule: Rule,
    members: Sequence[Factors],
    weights: Matrix,
    noise: Matrix,
    labels: Sequence[str],
    module: str,
    width: int,
    known: Known | None = None,
) -> Combined:
    """The result of a rule that is not dense, of T members with weights (T,), of rank `width`.

    `noise` (T,) bounds ‖Dᵢ as stored − Dᵢ as trained‖. An adapter that lacks the module has no
    columns. What is `known` of all modules is not found again. Raises what the method raises.
    """
    shape, near, cored = members[0].shape, None, None
    right: Matrix | None
    match = _matching(rule, members, weights)
    members = damped(rule, members, weights)
    if rule.method.signature == "gram":
        shares = known.shares if known else None
        if not rule.method.measures:
            shares = coefficients(rule, None, weights)
        if shares is not None and rule.calibrate != "svc" and rule.match_norm is None:
            return _stacked(members, shares)
        left, right, M = bases(members)
        if shares is None:
            shares = coefficients(rule, products(M), weights)
        core = np.tensordot(shares, M, 1)
        if rule.calibrate != "svc":
            return _stacked(members, shares * match(core))
    elif rule.method.signature == "core":
        left, right, M = bases(members)
        cored = rule.method.function(M, weights, noise, **rule.arguments)
        core = cored.core
    else:
        own = voting(members, weights)
        if not own:
            return Combined(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))
        left, right, M = entries(rule, [members[i] for i in own])
        weights, noise = weights[own], noise[own]
        limits = known.of(own) if known else None
        core, near = _elementwise(rule, M, weights, [labels[i] for i in own], module, limits)
    if rule.calibrate == "svc":
        core = modify.svc(core, M, weights, noise, alpha=rule.method.least_response)
    core = core * match(core)
    if right is None:
        return Combined(left, core, near=near)
    U, sizes, Vh = linalg.svd(core)
    kept = min(width, len(sizes))
    root = np.sqrt(sizes[:kept])
    B, A = left @ (U[:, :kept] * root), (root[:, None] * Vh[:kept]) @ right.T
    return Combined(B, A, cored, near)


def entries(rule: Rule, members: Sequence[Factors]) -> tuple[Matrix, Matrix | None, Matrix]:
    """Canonical Q_B (m, k), Q_A (n, k') and the cores (T, k, k') whose entries a rule compares.

    In KnOTS space Q_A is none, and the blocks are (T, k, n).
    """
    if rule.space == "core":
        return canonical.core_bases(members)
    left, blocks = canonical.knots(members)
    return left, None, blocks


def coefficients(rule: Rule, G: Matrix | None, weights: Matrix) -> Matrix:
    """(T,) what a Gram method makes of G (T, T); it is None where the method asks nothing of it."""
    return np.asarray(rule.method.function(G, weights, **rule.arguments))


def products(M: Matrix) -> Matrix:
    """G (T, T) of cores (T, k, k'): those of the factors themselves would hear their gauge."""
    flat = M.reshape(len(M), -1)
    return np.asarray(flat @ flat.T)


def _stacked(members: Sequence[Factors], shares: Matrix) -> Combined:
    """Σ cᵢDᵢ as the members' columns side by side."""
    return Combined(
        np.concatenate([one.B for one in members], 1),
        np.concatenate([c * one.A for c, one in zip(shares, members, strict=True)], 0),
    )


def _matching(rule: Rule, members: Sequence[Factors], weights: Matrix) -> Callable[[Matrix], float]:
    """What --match-norm multiplies a result by, given its core: the norms are those of `members`,
    before any calibration.
    """
    to = rule.match_norm
    if to is None:
        return lambda core: 1.0
    norms = np.array([one.norm() for one in members])
    return lambda core: modify.norm_factor(float(np.linalg.norm(core)), norms, weights, to)


def storage_noise(
    dtypes: Collection[str], factors: Factors, shape: tuple[int, int] | None = None
) -> float:
    """How far, in ‖·‖₂, rounding factors to the coarsest of these types is expected to move ΔW.

    Rounding turns B into B + E with independent entries of the size ε|b|, ε = 0.425·u the root mean
    square over a binade, u the unit roundoff. For a Gaussian E of such columns E‖EA‖₂ is at most
    ε(1 + √(r/m))·‖diag(‖b_k‖)·A‖₂ (Davidson & Szarek 2001, theorem II.13), and likewise for A. It
    is 1.2 to 1.8 times what rounding did to random adapters; what it can do at most, (2u + u²)β, is
    50 times as large. `shape` is that of ΔW, where `factors` are in coordinates.
    """
    u = max((2.0 ** -(casts.mantissa(name) + 1) for name in dtypes), default=0.0)
    if u == 0.0 or not factors.rank:
        return 0.0
    m, n = shape or factors.shape
    own_b, own_a = np.linalg.norm(factors.B, axis=0), np.linalg.norm(factors.A, axis=1)
    left = _largest(own_b[:, None] * factors.A) * (1 + math.sqrt(factors.rank / m))
    right = _largest(factors.B.T * own_a[:, None]) * (1 + math.sqrt(factors.rank / n))
    return _ROUNDED * u * math.hypot(left, right)


def _largest(rows: Matrix) -> float:
    """‖·‖₂ of a few rows."""
    return math.sqrt(max(float(np.linalg.eigvalsh(rows @ rows.T)[-1]), 0.0))


def bases(members: Sequence[Factors]) -> tuple[Matrix, Matrix, Matrix]:
    """Orthonormal Q_B (m, k), Q_A (n, k') and the cores M (T, k, k') of Dᵢ = Q_B Mᵢ Q_Aᵀ."""
    left, over = orthonormal(np.concatenate([one.B for one in members], 1))
    right, under = orthonormal(np.concatenate([one.A.T for one in members], 1))
    ends = np.cumsum([one.rank for one in members])
    cores = [
        over[:, end - one.rank : end] @ under[:, end - one.rank : end].T
        for one, end in zip(members, ends.tolist(), strict=True)
    ]
    return left, right, np.stack(cores)


def damped(rule: Rule, members: Sequence[Factors], weights: Matrix) -> Sequence[Factors]:
    """The members as the method sees them: after --calibrate pico, where that is asked for."""
    return calibrated(members, weights) if rule.calibrate == "pico" else members


def calibrated(members: Sequence[Factors], weights: Matrix) -> list[Factors]:
    """The members after Pico: output directions that many share are damped."""
    left, _, M = bases(members)
    damped = modify.pico_map(M, weights) - np.eye(left.shape[1])
    return [Factors(one.B + left @ (damped @ (left.T @ one.B)), one.A) for one in members]


def _elementwise(
    rule: Rule,
    M: Matrix,
    weights: Matrix,
    labels: Sequence[str],
    module: str,
    known: Limits | None,
) -> tuple[Matrix, int | None]:
    """The rule on cores or blocks (T, k, columns), which are held whole; entries near a limit.

    `known` are limits of more than this module, beside which entries are counted elsewhere.
    """
    if not M.size:
        return np.zeros(M.shape[1:]), None if known else 0
    drawn = None
    if "seed" in rule.method.needs:
        drawn = partial(bits, rule.seed, tuple(labels), module, M.shape[2])
    values = rule.arguments
    step = max(1, _BLOCK // M.shape[2])

    def blocks() -> Any:
        return (M[:, start : start + step] for start in range(0, M.shape[1], step))

    found = known or streamed.find_limits(rule.method, blocks, M[0].size, weights, values, drawn)
    rows = streamed.merged(rule.method, blocks, found, weights, values, drawn)
    return np.concatenate(list(rows)), None if known else beside_limits(found)


def beside_limits(limits: Limits) -> int:
    """How many entries lie within 2⁻²⁰ of a limit, those aside that the limits are."""
    return int(np.maximum(limits.near - 1, 0).sum())


def bits(seed: int, labels: Sequence[str], module: str, columns: int, i: int, j: int) -> Matrix:
    """The random bits of rows [i, j) of a matrix of so many columns, for every adapter."""
    return draws.stacked(seed, labels, module, i, j, columns)
