"""Who left since a plan was made, which its index knows, and what of the plan holds their weights.

A plan says who had left when it was made. Later the index alone knows it, so a plan whose index
cannot be read, or is another one, may hold weights of anybody.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from adapterops.errors import AdapterOpsError, FileError, IncompatibleError
from adapterops.fleet.indexing import schema
from adapterops.fleet.indexing.opened import Fleet, open_fleet
from adapterops.fleet.plans.plan import Plan

_SHOWN = 5
AGAIN = "plan again: cluster FLEET --previous PLAN -o PLAN2"
_MOVED = "--fleet FLEET says where it is now; without it, index the tenants and plan again"


def some(names: Collection[str]) -> str:
    """The first of some names, sorted, and how many more there are."""
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def index_of(plan: Plan, given: str | None) -> Fleet:
    """The index that a plan was made from, where the plan says or at `given`.

    Raises what `open_fleet` does where it cannot be read, IncompatibleError where it is another one
    than the plan's: of another seed, or without tenants that the plan has from its index.
    """
    place = plan.fleet if given is None else given
    try:
        index = open_fleet(place)
    except AdapterOpsError as error:
        error.message = (
            f"the plan's index cannot be read ({error.message}), so whether tenants were "
            "off-boarded since is not known"
        )
        error.path, error.hint = place, _MOVED
        raise
    _check_seed(plan, index.seed, place)
    known = {record.tenant.name for record in index.records} | index.removed | index.vanished
    strangers = {name for name, item in plan.served.items() if not item.location} - known
    if strangers:
        raise IncompatibleError(
            f"the index does not know {some(strangers)}, whom the plan serves: it is another one, "
            "or was made anew, and does not know who was off-boarded since",
            path=place,
            hint=f"{AGAIN}; or give the plan's own index with --fleet",
        )
    return index


def removed_of(plan: Plan) -> frozenset[str]:
    """Who was off-boarded by now: as the plan says and its index, of which little else is read.

    Raises as `index_of` does, but for strangers.
    """
    folder = Path(plan.fleet)
    with (
        schema.reported(folder / schema.DATABASE),
        closing(schema.connect(folder)) as database,
    ):
        meta = schema.meta(database)
        if not meta:
            raise FileError("its creation was cut off", path=plan.fleet)
        names = database.execute("SELECT tenant FROM removed").fetchall()
    _check_seed(plan, int(meta["seed"]), plan.fleet)
    return frozenset(name for (name,) in names) | recorded(plan)


def recorded(plan: Plan) -> frozenset[str]:
    """Who had been off-boarded when the plan was made."""
    return frozenset(str(name) for name in plan.options.get("removed") or ())


def _check_seed(plan: Plan, seed: int, place: str) -> None:
    if seed != plan.seed:
        raise IncompatibleError(
            f"the index has the seed {seed}, the plan {plan.seed}: it is another one than the "
            "plan's, and does not know who was off-boarded since",
            path=place,
            hint=_MOVED,
        )


def check_members(plan: Plan, removed: Collection[str]) -> None:
    """Raise IncompatibleError where the plan holds weights of, or serves, an off-boarded tenant."""
    gone = set(removed)
    for rep in plan.representatives.values():
        held = gone & set(rep.holds)
        if held:
            raise IncompatibleError(
                f"the representative {rep.id} still holds weights of {some(held)}, off-boarded "
                "since the plan was made",
                hint=AGAIN,
            )
    served = gone & plan.served.keys()
    if served:
        raise IncompatibleError(
            f"the plan still serves {some(served)}, off-boarded since it was made", hint=AGAIN
        )
