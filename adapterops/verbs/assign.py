"""assign: an adapter of a plan for new tenants, each verified exactly, nobody else moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from adapterops.activations import Activations
from adapterops.errors import AdapterOpsError, ChangedError, IncompatibleError
from adapterops.files.output import SIDECAR, Staging, check_outside, stage
from adapterops.files.remote import is_remote, located
from adapterops.fleet.consent.policy import consent_from, read_policy
from adapterops.fleet.deploy.verify import inputs_of
from adapterops.fleet.plans import planfile
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.fleet.plans.planfile import PLAN, SKETCHES
from adapterops.fleet.plans.standing import carry, check_consent
from adapterops.fleet.replanning.assign import Assignment, limit_of
from adapterops.fleet.replanning.assign import assign as assigned_to
from adapterops.fleet.replanning.assigning import AssignReport, assign_report
from adapterops.fleet.replanning.drifted import counters
from adapterops.fleet.replanning.joining import Newcomer
from adapterops.fleet.replanning.newcomers import new_tenants, signed
from adapterops.fleet.tenants.versions import versions
from adapterops.fleet.types import Tenant
from adapterops.fleet.verifying.exact import Error, compare_many
from adapterops.options import compute
from adapterops.stream import Compute

_Path = str | os.PathLike[str]


def assign(
    plan: _Path,
    new: Sequence[_Path] | _Path | Mapping[str, _Path],
    *,
    out: _Path,
    policy: _Path | None = None,
    activations: _Path | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> AssignReport:
    """Serve new tenants, or tenants' new versions, by what a plan has, as far as its bound allows.

    Args:
        plan: the PLAN directory that `cluster` or an earlier `assign` wrote; it is not changed.
        new: adapters, or folders of some, whose tenants are called as `index` would call them;
            "tenant=path" or a mapping by tenant names them.
        out: the PLAN directory to write: the old one's representatives and all routes.
        policy: consent by tenant, in place of what the plan was made with.
        activations: the inputs that the plan's metric needs, where they are not in their old place.
        strict: an adapter that is broken, or cannot be compared, is an error.
        device, memory, jobs, overwrite, allow_pickle, progress: as in `merge`.
        dry_run: return the report, verify everything, write nothing.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`. Nothing is written then. A broken
            adapter among several is none, unless `strict`; the report counts it as `failed`.
    """
    folder = planfile.plan_folder(plan)
    old, sketched = planfile.read_plan(folder), planfile.read_sketches(folder)
    warnings: list[str] = []
    tenants = new_tenants(new, warnings.append)
    _check_removed(old, tenants)
    consent = consent_from(old.options)
    if policy is not None:
        consent = replace(consent, policy=read_policy(policy))
        consent.policy.check({*old.served, *old.excluded, *(tenant.name for tenant in tenants)})
        check_consent(old, consent, limit_of(old))
    check_outside(out, [folder, *(t.location for t in tenants if not is_remote(t.location))])
    on = compute(device, memory, jobs)
    inputs = inputs_of(old, None if activations is None else os.fspath(activations))
    aliases = old.options.get("aliases") or {}
    marks = versions(tenants)
    items = signed(
        tenants,
        old.seed,
        aliases,
        consent,
        on,
        allow_pickle=allow_pickle,
        strict=strict,
        progress=progress,
    )
    verify = _Verify(folder, items, inputs, on, allow_pickle, warnings)
    found = assigned_to(old, sketched, items, consent, verify)
    options = {**old.options, **consent.to_dict()}
    made = replace(found.plan, options=options, assigned=counters(old, found.assigned))
    now = versions(tenants)
    changed = [tenant for tenant in tenants if now[tenant.name] != marks[tenant.name]]
    if changed:
        raise ChangedError("changed while it was read", path=changed[0].path, hint="run again")
    warnings += [f"{x.tenant}: {x.reason}" for x in found.assigned if x.fate == "failed"]
    output = "" if dry_run else os.fspath(out)
    report = assign_report(os.fspath(plan), made, output, limit_of(old), found.assigned, warnings)
    if not dry_run:
        with stage(out, directory=True, overwrite=overwrite) as staging:
            _write(staging, folder, replace(found, plan=made), report)
    return report


def _check_removed(plan: Plan, tenants: Sequence[Tenant]) -> None:
    """Refuse tenants that the plan knows to be off-boarded: `deploy` would refuse all of it."""
    gone = {str(name) for name in plan.options.get("removed") or ()}
    back = [tenant for tenant in tenants if tenant.name in gone]
    if back:
        raise IncompatibleError(
            f"the tenant {back[0].name!r} was off-boarded before this plan was made",
            path=back[0].path,
            hint="index --restore takes it in again; then index and cluster --previous",
        )


class _Verify:
    """Exact errors of serving newcomers by a representative, of the files as they are now."""

    def __init__(
        self,
        plan: _Path,
        newcomers: Sequence[Newcomer],
        activations: Activations | None,
        on: Compute,
        allow_pickle: bool,
        warnings: list[str],
    ) -> None:
        self._plan, self._activations, self._on = plan, activations, on
        self._allow_pickle, self._warnings = allow_pickle, warnings
        self._places = {item.tenant.name: item.tenant.location for item in newcomers}

    def __call__(
        self, rep: Representative, names: Sequence[str]
    ) -> Mapping[str, Error | AdapterOpsError]:
        with ExitStack() as stack:

            def local(place: str) -> str:
                return stack.enter_context(located(place, allow_pickle=self._allow_pickle))

            try:
                server = local(planfile.located(self._plan, rep.location, rep.path))
                places = [local(self._places[name]) for name in names]
                errors = compare_many(
                    server,
                    places,
                    self._on,
                    activations=self._activations,
                    allow_pickle=self._allow_pickle,
                )
                return dict(zip(names, errors, strict=True))
            except AdapterOpsError as error:
                self._warnings.append(f"{rep.id} cannot be used: {error}")
                return dict.fromkeys(names, error)


def _write(staging: Staging, plan: _Path, found: Assignment, report: AssignReport) -> None:
    """The new plan into a staged directory; what it lists of itself lets it be replaced."""
    own = [rep for rep in found.plan.representatives.values() if rep.kind != "base"]
    carried = carry(planfile.plan_folder(plan), [rep for rep in own if not rep.location], staging)
    planfile.write_plan(staging, found.plan, found.sketched)
    document = {**report.to_dict(), "files": [PLAN, SKETCHES, *carried]}
    staging.write(SIDECAR, [msgspec.json.format(msgspec.json.encode(document), indent=1), b"\n"])
