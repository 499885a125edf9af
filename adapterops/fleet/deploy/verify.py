"""Every tenant's error on the bytes that were written for the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from adapterops.activations import Activations, open_activations
from adapterops.errors import AdapterOpsError, BudgetError, FileError, IncompatibleError
from adapterops.fleet.deploy.report import Deployed, Known, TenantError
from adapterops.fleet.plans.offboarded import some
from adapterops.fleet.plans.plan import Plan, Served, figure
from adapterops.fleet.verifying.exact import Error, compare_groups
from adapterops.stream import Compute


def locations(plan: Plan, index: Mapping[str, str]) -> dict[str, str]:
    """Where tenants' own adapters are: as assigned, by the index, by originals in the plan."""
    own = {
        rep.holds[0]: rep.location
        for rep in plan.representatives.values()
        if rep.location and len(rep.holds) == 1
    }
    assigned = {name: item.location for name, item in plan.served.items() if item.location}
    return {**own, **{name: index[name] for name in index.keys() & plan.served.keys()}, **assigned}


def inputs_of(plan: Plan, given: str | None) -> Activations | None:
    """The activations that the plan's metric needs, None for a metric that needs none.

    Raises IncompatibleError where they are not given, and what opening them raises.
    """
    if plan.metric != "activation":
        return None
    if given is None:
        raise IncompatibleError(
            "the plan's errors are of outputs, for inputs that are in no plan",
            hint="give their file with --activations",
        )
    return open_activations(given)


def errors_of(
    plan: Plan,
    adapters: Sequence[Deployed],
    folders: Mapping[str, Path],
    norms: Mapping[str, float],
    places: Mapping[str, str],
    activations: Activations | None,
    on: Compute,
    *,
    allow_pickle: bool,
) -> tuple[dict[str, TenantError], list[str]]:
    """tenant -> error, of all members of `adapters`, and warnings.

    `folders` are where the adapters were written, `norms` their ‖C‖, by id; `places` where tenants'
    own adapters are. A tenant whose own adapter cannot be read has a bound: the plan's error and
    what writing has changed, ‖C′ − D‖ ≤ ‖C − D‖ + ‖C′ − C‖. Raises IncompatibleError where that is
    wanted of the activation metric.
    """
    found: dict[str, TenantError] = {}
    own = {
        rep.holds[0]: rep.id
        for rep in plan.representatives.values()
        if rep.location and len(rep.holds) == 1 and places.get(rep.holds[0]) == rep.location
    }
    nothing = 0.0 if plan.metric == "activation" else None
    groups = []
    for item in adapters:
        asked = []
        for tenant in item.members:
            served = plan.served[tenant]
            if own.get(tenant) == item.id and item.how != "written":
                found[tenant] = TenantError(
                    item.name, 0.0, served.error, 0.0, "own", 0.0, 0.0, ("", 0.0), nothing
                )
            elif tenant in places:
                asked.append(tenant)
            else:
                found[tenant] = _bounded(item, served, norms[item.id], plan.metric)
        if asked:
            groups.append((item, asked))
    unread = []
    pairs = [(str(folders[item.id]), [places[name] for name in names]) for item, names in groups]
    compared = compare_groups(pairs, on, activations=activations, allow_pickle=allow_pickle)
    with closing(compared) as results:
        for (item, names), result in zip(groups, results, strict=True):
            for tenant, error in zip(names, result, strict=True):
                served = plan.served[tenant]
                if isinstance(error, Error):
                    found[tenant] = _computed(item, served, error)
                elif isinstance(error, FileError):
                    unread.append(tenant)
                    found[tenant] = _bounded(item, served, norms[item.id], plan.metric)
                else:
                    raise _of(tenant, error)
    warnings = []
    if unread:
        warnings.append(
            f"the own adapters of {len(unread)} tenants cannot be read ({some(unread)}); their "
            "errors are bounded instead of computed"
        )
    return found, warnings


def planned(plan: Plan, adapters: Sequence[Deployed]) -> dict[str, TenantError]:
    """The plan's errors, where nothing is written."""
    return {
        tenant: _as_planned(item, plan.served[tenant], "planned")
        for item in adapters
        for tenant in item.members
    }


def of_base(plan: Plan, tenants: Sequence[str]) -> dict[str, TenantError]:
    """The errors of tenants that the base model itself serves: those of the plan."""
    nothing = Deployed("", "", "base", (), 0.0, 0, 0, "", "copied", 0.0)
    return {tenant: _as_planned(nothing, plan.served[tenant], "base") for tenant in tenants}


def check_limit(
    found: Mapping[str, TenantError], metric: str, limit: float | None, engine: str
) -> None:
    """Raise BudgetError, naming the tenants, where an error is above `limit`."""
    if limit is None:
        return
    figures = {name: figure(error, metric) for name, error in found.items()}
    over = [name for name, value in figures.items() if not value <= limit]
    if over:
        worst = max(over, key=lambda name: figures[name])
        raise BudgetError(
            f"{len(over)} of {len(found)} tenants would be above --max-error {limit:g} in the "
            f"form that {engine} takes: {some(over)}; the largest is {figures[worst]:.4g} "
            f"({worst}, planned {found[worst].planned:.4g})",
            hint=f"--max-error {_above(figures[worst])} accepts them, or plan with a lower one",
        )


def _above(value: float) -> str:
    """A number with two digits that is not below `value`."""
    if not math.isfinite(value):
        return "X"
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return f"{math.ceil(value / step) * step:.2g}"


def _computed(item: Deployed, served: Served, error: Error) -> TenantError:
    return TenantError(
        item.name,
        error.error,
        served.error,
        error.floor,
        "computed",
        error.missing,
        error.foreign,
        error.worst,
        error.measured,
    )


def _as_planned(item: Deployed, served: Served, known: Known) -> TenantError:
    return TenantError(
        item.name,
        served.error,
        served.error,
        0.0,
        known,
        served.missing,
        served.foreign,
        served.worst,
        served.measured,
    )


def _bounded(item: Deployed, served: Served, norm: float, metric: str) -> TenantError:
    if item.how != "written":
        return _as_planned(item, served, "planned")
    if metric != "frobenius":
        raise IncompatibleError(
            "the error of outputs of what was written cannot be computed without the tenants' own "
            "adapters",
            hint="index them again, for they are not where the index has them",
        )
    more = item.change * norm / served.norm if served.norm else math.inf
    return TenantError(
        item.name,
        served.error + more,
        served.error,
        0.0,
        "bounded",
        served.missing,
        served.foreign,
        served.worst,
        None,
    )


def _of(tenant: str, error: AdapterOpsError) -> AdapterOpsError:
    """The error with the tenant that it is about."""
    error.message = f"tenant {tenant}: {error.message}"
    return error
