"""Plans of planted fleets, written without planning, and newcomers to them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from adapterops.files.output import stage
from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.plans.plan import Plan, Served
from adapterops.fleet.plans.planfile import write_plan
from adapterops.fleet.replanning.joining import Added, Newcomer, joined, singleton, sketch_of
from adapterops.fleet.replanning.newcomers import partition_key
from adapterops.fleet.signing.signature import signature
from adapterops.fleet.types import Tenant

SEED = 7
KINDS = ("bytes", "refactored", "padded", "louder", "one-module", "absent", "flipped", "decoy")


def newcomer(fleet, name, consent):
    path = str(fleet.root / name)
    found = signature(path, SEED)
    return Newcomer(
        Tenant(name, path, os.path.abspath(path)), found, partition_key(found, name, {}, consent)
    )


def write_plan_of(
    folder, fleet, served, *, max_error=0.2, consent=None, own=(), index="FLEET", removed=()
):
    """A plan in which planted tenants serve these others: {representative: [others]}.

    Those in `own` lie within the plan, as an average would; `removed` is what it says of its index.
    """
    consent = consent or Consent("all")
    items = {name: newcomer(fleet, name, consent) for name in served}
    options = {**consent.to_dict(), "removed": list(removed)}
    plan = Plan(str(index), SEED, max_error, "frobenius", options, {}, {})
    with stage(folder, directory=True, overwrite=False) as staging:
        added, given = [], {}
        for name, others in served.items():
            rep = replace(singleton(items[name], ()), members=(name, *others), id=f"of {name}")
            if name in own:
                place = f"representatives/{name.replace('/', '-')}"
                shutil.copytree(fleet.root / name, staging.path(place))
                rep = replace(rep, kind="mean", path=place, location="")
            added.append(Added(rep, sketch_of(rep.id, items[name])))
            for other in rep.members:
                error = fleet.tenants[other].error if other != name else 0.0
                given[other] = Served(rep.id, error)
        reps = {one.representative.id: one.representative for one in added}
        plan = replace(plan, served=given, representatives=reps)
        plan, sketched = joined(plan, [one.sketched for one in added], (), ())
        write_plan(staging, plan, sketched)
    return Path(folder)


def centres(fleet, count=6):
    return {f"c{n:05d}/centre": [] for n in range(count)}


def assigned(report):
    return {item.tenant: item for item in report.assigned}


def named(fleet, *names):
    return [f"{name}={fleet.root / name}" for name in names]
