"""What a deployment starts from: options, the plan and what it says of this engine and base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from adapterops.activations import Activations
from adapterops.basemodel.shapes import load
from adapterops.casts import DTYPE_NAMES
from adapterops.errors import UsageError
from adapterops.files.output import check_outside
from adapterops.files.remote import is_remote
from adapterops.fleet.deploy import checks, routes, verify
from adapterops.fleet.indexing.opened import Fleet
from adapterops.fleet.plans.offboarded import check_members, index_of, recorded
from adapterops.fleet.plans.plan import Plan, Representative
from adapterops.fleet.plans.planfile import located, plan_folder, read_plan
from adapterops.serving.model import Engine
from adapterops.serving.objections import engine_named
from adapterops.serving.zeros import BaseShapes


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for; `verbs.deploy` documents each. `cpu_memory` is in bytes."""

    engine: str
    served_base: str
    out: str
    previous: str | None = None
    fleet: str | None = None
    base: str | None = None
    activations: str | None = None
    max_error: float | None = None
    max_rank: int | None = None
    dtype: str = "keep"
    max_loras: int = 32
    cpu_memory: int = 16 * 10**9
    link: bool = False
    overwrite: bool = False
    strict: bool = False
    allow_pickle: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What is known before anything is written.

    `chosen` are the adapters to deploy, most traffic first, `places` their paths or URIs by id;
    `based` are the tenants that need none. `wrong` are tenants of another base, with the reason.
    """

    plan: Plan
    engine: Engine
    index: Fleet
    previous: Mapping[str, routes.Route]
    chosen: tuple[Representative, ...]
    places: Mapping[str, str]
    shapes: BaseShapes | None
    based: tuple[str, ...]
    wrong: Mapping[str, str]
    activations: Activations | None
    warnings: tuple[str, ...]


def known_of(path: str, options: Options) -> Known:
    """Read the plan at `path` and check it; raises every error of that."""
    plan, engine = read_plan(path), engine_named(options.engine)
    if options.max_rank is not None and engine.legal_rank(options.max_rank) != options.max_rank:
        near = engine.legal_rank(options.max_rank)
        raise UsageError(
            f"--max-rank {options.max_rank} is no rank that {engine.title} {engine.version} serves",
            hint=f"the next is {near}" if near else f"the largest is {engine.largest_rank}",
        )
    if options.dtype not in ("keep", *DTYPE_NAMES):
        raise UsageError(f"--dtype {options.dtype!r}: expected keep, {', '.join(DTYPE_NAMES)}")
    check_members(plan, recorded(plan))
    index = index_of(plan, options.fleet)
    check_members(plan, index.removed)
    bases = {record.tenant.name: record.base for record in index.records}
    aliases = plan.options.get("aliases") or {}
    wrong, said = checks.of_base(plan, options.served_base, aliases, bases)
    previous = {} if options.previous is None else routes.read(options.previous)
    reps = plan.representatives.values()
    chosen = [rep for rep in reps if rep.kind != "base" and {*rep.members} - wrong.keys()]
    based = (name for rep in reps if rep.kind == "base" for name in rep.members)
    traffic = {rep.id: sum(plan.served[tenant].traffic for tenant in rep.members) for rep in chosen}
    chosen.sort(key=lambda rep: (-traffic[rep.id], rep.id))
    places = {rep.id: located(path, rep.location, rep.path) for rep in chosen}
    mine = [os.fspath(plan_folder(path)), index.path, *filter(None, [options.previous])]
    check_outside(options.out, [*mine, *(p for p in places.values() if not is_remote(p))])
    return Known(
        plan,
        engine,
        index,
        previous,
        tuple(chosen),
        places,
        None if options.base is None else load(options.base).shapes,
        tuple(tenant for tenant in based if tenant not in wrong),
        wrong,
        verify.inputs_of(plan, options.activations),
        tuple(said),
    )
