"""A plan: which adapter serves each tenant, with every tenant's error, and the files of it.

PLAN is a directory: `plan.json`, the representatives that are new under `representatives/`, and
`sketches.safetensors`, by which `assign` finds the representatives that a new tenant may share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["original", "medoid", "mean", "minimax", "base"]
Metric = Literal["frobenius", "activation"]
SCHEMA = "adapterops.plan/1"


class Figures(Protocol):
    """Errors of one tenant by what serves it, as `Served` defines them."""

    @property
    def error(self) -> float: ...
    @property
    def measured(self) -> float | None: ...


def figure(found: Figures, metric: str) -> float:
    """The error in a plan's metric, which its bound is held against.

    What was not measured in it may be anything, unless it is the same.
    """
    if metric == "frobenius" or found.error == 0.0:
        return found.error
    return math.inf if found.measured is None else found.measured


@dataclass(frozen=True, slots=True)
class Served:
    """How one tenant is served.

    `by` is the id of its representative. `error` is ‖C − D‖ / ‖D‖ of the file that serves it, C
    against the tenant's own D, exact, of the bytes on disk: error² = missing² + foreign². `missing`
    = |1 − ⟨C, D⟩/‖D‖²| is the share of its own change that it does not get (or gets beyond 1),
    `foreign` the norm of what others' training adds, over ‖D‖. `worst` is the module with the
    largest error of its own and that error. `measured` is the error in the plan's metric where that
    is not Frobenius. `location` opens the tenant's own adapter where `assign` was given it: the
    index may know an earlier version. `reason` is short; that of a group is its representative's.
    """

    by: str
    error: float = 0.0
    missing: float = 0.0
    foreign: float = 0.0
    cosine: float = 1.0
    worst: tuple[str, float] = ("", 0.0)
    measured: float | None = None
    traffic: float = 1.0
    norm: float = 0.0
    rank: int = 0
    size: int = 0
    reason: str = ""
    location: str = ""


@dataclass(frozen=True, slots=True)
class Representative:
    """One adapter that is deployed.

    `path` is relative to PLAN for one that the plan wrote, and as given to `index` for an original;
    `location` opens an original from anywhere, "" for the plan's own. "base" is no adapter at all:
    what serves those whose change is zero. `holds` are the tenants whose weights are in it,
    `members` those that it serves. `bound` is a proven lower bound of the largest error that any
    adapter of this rank has over the members, where one was computed. `content` is the signature's
    hash of it.
    """

    id: str
    kind: Kind
    path: str
    location: str = ""
    members: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    rank: int = 0
    size: int = 0
    dtype: str = ""
    dialect: str = ""
    base: str = ""
    content: str = ""
    bound: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Related:
    """Tenants whose similarity stands out from the fleet's background; no promise is made of them.

    `by` is "delta" or "outputs", `cosines` the lowest and highest within the group, of those that
    one adapter serves the first only, `grouped` how many of them one adapter serves already.
    """

    by: Literal["delta", "outputs"]
    members: tuple[str, ...]
    cosines: tuple[float, float]
    grouped: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """What another bound would give, estimated from sketches: adapters, errors, foreign energy."""

    max_error: float
    adapters: int
    largest: float
    mean: float
    foreign: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole plan; `options` are what it was made with, `fleet` where its index is.

    `routes` maps every tenant to the path of what serves it, None for the base model itself.
    `excluded` names tenants that cannot be served from here at all (broken files), with the reason.
    `discovery` is the false discovery rate that `related` was found at. `gain` is what sharing
    would save were it allowed. `assigned` are counters of what `assign` added since.
    """

    fleet: str
    seed: int
    max_error: float | None
    metric: Metric
    options: Mapping[str, Any]
    served: Mapping[str, Served]
    representatives: Mapping[str, Representative]
    excluded: Mapping[str, str] = field(default_factory=dict)
    related: tuple[Related, ...] = ()
    discovery: float = 0.0
    pareto: tuple[Point, ...] = ()
    gain: Mapping[str, Any] = field(default_factory=dict)
    assigned: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def routes(self) -> dict[str, str | None]:
        """tenant -> path of what serves it."""
        found = {tenant: self.representatives[item.by] for tenant, item in self.served.items()}
        return {name: None if rep.kind == "base" else rep.path for name, rep in found.items()}
