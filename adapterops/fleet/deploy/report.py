"""What `deploy` reports: adapters as written, every tenant's error, flags, memory, proposals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapterops.certificate import plain
from adapterops.fleet.plans.plan import figure

How = Literal["linked", "cloned", "copied", "written"]
# How the error of a tenant is known: it gets its own adapter's tensors, byte for byte; computed now
# from the bytes deployed and the tenant's own; the bytes are those that the plan measured; at most
# this much, by the triangle inequality; the base model serves it.
Known = Literal["own", "computed", "planned", "bounded", "base"]
Memory = Literal["slots", "adapters", "unknown"]


@dataclass(frozen=True, slots=True)
class Deployed:
    """One adapter of the deployment.

    `name` is its folder and what requests call it, "" in a dry run that has not written it; `id`
    the plan's representative. `how` says whether its tensors are the original's own bytes or were
    written for the engine, `change` is ‖C′ − C‖/‖C‖ of that. `traffic` is its members' sum.
    """

    name: str
    id: str
    kind: str
    members: tuple[str, ...]
    traffic: float
    rank: int
    size: int
    dtype: str
    how: How
    change: float


@dataclass(frozen=True, slots=True)
class TenantError:
    """The error of one tenant as it is served now, by `adapter`, "" for the base model.

    `error`, `missing`, `foreign` and `worst` are as `plan.Served` has them, of the bytes deployed;
    `planned` is what the plan said; of a computed error `floor` may be rounding noise. Where
    `known` is "bounded" the error is at most this and the other figures are the plan's. `measured`
    is in the plan's metric where that is another.
    """

    adapter: str
    error: float
    planned: float
    floor: float
    known: Known
    missing: float
    foreign: float
    worst: tuple[str, float]
    measured: float | None


@dataclass(frozen=True, slots=True)
class GpuBytes:
    """Memory of factors on one GPU by the engine's own formula, None where that is not known.

    `before` is of every tenant's own adapter, `after` of the deployment; `rank_*` are the ranks and
    `adapters_*` the counts that are paid for. `formula` says which.
    """

    kind: Memory
    formula: str
    before: int | None
    after: int | None
    rank_before: int
    rank_after: int
    adapters_before: int
    adapters_after: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A lower maximum rank: which adapters hold the fleet above it, and what they would lose.

    `errors` maps each of them to its truncation error at `rank`, relative and exact, from its
    singular values; `saves` are GPU bytes, None where the formula is not known. `over` are tenants
    who may then be above the deployment's bound, by the triangle inequality.
    """

    rank: int
    now: int
    errors: Mapping[str, float]
    tenants: int
    saves: int | None
    over: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the engine is started: environment, command line, files beside, in the order of use.

    `files` maps names in the deployment's folder to their text.
    """

    environment: Mapping[str, str]
    command: tuple[str, ...]
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeployReport:
    """The result of `deploy`, or with `dry_run` what it would be; `files` is empty then.

    `adapters` are in load order, most traffic first. `routes` maps tenants to the name of their
    adapter (its id in a dry run), None for the base model; `left` names the tenants that are routed
    nowhere, with the reason. Salts are in the files alone. `changes` compares with `previous`.
    """

    output: str
    plan: str
    engine: str
    base: str
    adapters: tuple[Deployed, ...]
    routes: Mapping[str, str | None]
    tenants: Mapping[str, TenantError]
    left: Mapping[str, str]
    limit: float | None
    metric: str
    salted: int
    size: int
    memory: GpuBytes
    proposals: tuple[Proposal, ...]
    launch: Launch
    changes: Mapping[str, tuple[str, ...]]
    published: tuple[Mapping[str, str], ...]
    files: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    schema = "adapterops.deploy/1"

    def counted(self, item: TenantError) -> float:
        """The error of a tenant in the plan's metric."""
        return figure(item, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, and the sidecar's."""
        return {"schema": self.schema, **plain(self)}
