"""One assignment: checks, signatures, exact errors, another PLAN; complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from adapterops.errors import AdapterOpsError, ChangedError, IncompatibleError
from adapterops.files.output import SIDECAR, Staging, check_outside, stage
from adapterops.files.remote import is_remote
from adapterops.fleet.consent.policy import Consent, consent_from, read_policy
from adapterops.fleet.deploy.verify import inputs_of
from adapterops.fleet.plans.offboarded import check_members, recorded, removed_of
from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.plans.planfile import (
    PLAN,
    SKETCHES,
    plan_folder,
    read_plan,
    read_sketches,
    write_plan,
)
from adapterops.fleet.plans.standing import carry, check_consent
from adapterops.fleet.replanning.against import Against
from adapterops.fleet.replanning.assign import Assignment, assign, limit_of
from adapterops.fleet.replanning.assigning import AssignReport, assign_report
from adapterops.fleet.replanning.drifted import counters
from adapterops.fleet.replanning.newcomers import Place, new_tenants, signed
from adapterops.fleet.tenants.versions import versions
from adapterops.fleet.types import Tenant
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for; `verbs.assign` documents each."""

    out: str
    policy: str | None
    activations: str | None
    overwrite: bool
    strict: bool
    allow_pickle: bool
    dry_run: bool


def assign_tenants(
    path: str,
    new: Sequence[Place] | Place | Mapping[str, Place],
    options: Options,
    on: Compute,
    progress: Progress | None,
) -> AssignReport:
    """Assign `new` to the plan at `path`, write the plan with them, and say what became of each.

    Raises every error of `adapterops.errors`; nothing is written when it does.
    """
    folder = plan_folder(path)
    old, sketched = read_plan(folder), read_sketches(folder)
    warnings: list[str] = []
    tenants = new_tenants(new, warnings.append)
    removed = _removed(old, tenants, warnings)
    consent = _consent(old, tenants, options.policy)
    places = (tenant.location for tenant in tenants)
    check_outside(options.out, [folder, *(place for place in places if not is_remote(place))])
    inputs = inputs_of(old, options.activations)
    marks = versions(tenants)
    items = signed(
        tenants,
        old.seed,
        old.options.get("aliases") or {},
        consent,
        on,
        allow_pickle=options.allow_pickle,
        strict=options.strict,
        progress=progress,
    )
    verify = Against(folder, items, inputs, on, options.allow_pickle, warnings)
    found = assign(old, sketched, items, consent, verify)
    made = replace(
        found.plan,
        options={**old.options, **consent.to_dict(), "removed": sorted(removed)},
        assigned=counters(old, found.assigned),
    )
    now = versions(tenants)
    changed = [tenant for tenant in tenants if now[tenant.name] != marks[tenant.name]]
    if changed:
        raise ChangedError("changed while it was read", path=changed[0].path, hint="run again")
    warnings += [f"{x.tenant}: {x.reason}" for x in found.assigned if x.fate == "failed"]
    output = "" if options.dry_run else options.out
    report = assign_report(path, made, output, limit_of(old), found.assigned, warnings)
    if not options.dry_run:
        with stage(options.out, directory=True, overwrite=options.overwrite) as staging:
            _write(staging, folder, replace(found, plan=made), report)
    return report


def _removed(plan: Plan, tenants: Sequence[Tenant], warnings: list[str]) -> frozenset[str]:
    """Who was off-boarded, as far as it is known.

    Raises IncompatibleError where one of them is among `tenants` or has a part in the plan, whose
    successor `deploy` would refuse.
    """
    try:
        removed = removed_of(plan)
    except AdapterOpsError as error:
        warnings.append(
            f"the plan's index cannot be used ({error.message}): whether tenants were off-boarded "
            "since is not known, and deploy asks for it"
        )
        removed = recorded(plan)
    check_members(plan, removed)
    back = [tenant for tenant in tenants if tenant.name in removed]
    if back:
        raise IncompatibleError(
            f"the tenant {back[0].name!r} was off-boarded",
            path=back[0].path,
            hint="index --restore takes it in again; then index and cluster --previous",
        )
    return removed


def _consent(plan: Plan, tenants: Sequence[Tenant], policy: str | None) -> Consent:
    """The plan's consent, or with another policy, which the plan must not break."""
    consent = consent_from(plan.options)
    if policy is None:
        return consent
    consent = replace(consent, policy=read_policy(policy))
    consent.policy.check({*plan.served, *plan.excluded, *(tenant.name for tenant in tenants)})
    check_consent(plan, consent, limit_of(plan))
    return consent


def _write(staging: Staging, plan: Path, found: Assignment, report: AssignReport) -> None:
    """The new plan into a staged directory; what it lists of itself lets it be replaced."""
    own = [rep for rep in found.plan.representatives.values() if rep.kind != "base"]
    carried = carry(plan, [rep for rep in own if not rep.location], staging)
    write_plan(staging, found.plan, found.sketched)
    document = {**report.to_dict(), "files": [PLAN, SKETCHES, *carried]}
    staging.write(SIDECAR, [msgspec.json.format(msgspec.json.encode(document), indent=1), b"\n"])
