"""When a plan that tenants were assigned to has drifted so far that planning again would pay.

Assigning never takes a group apart or forms one of tenants that are there: the more have come, and
the fewer of them find an adapter, the more a new plan may save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.fleet.plans.plan import Plan
from adapterops.fleet.replanning.joining import Assigned

_GROWTH = 0.1  # of the tenants planned for
_ALONE = 0.2  # more of the newcomers served alone than of the tenants planned for
_FEWEST = 20  # newcomers before shares say anything


def counters(plan: Plan, found: Iterable[Assigned]) -> dict[str, Any]:
    """`plan.assigned` after these, `plan` being as it was before them.

    `kept` counts new versions since planning that what served the tenant still serves, `assigned`
    all other tenants and versions: `alone` those of them served by their own adapter, `moved` those
    that had another adapter before; `mean_error` is that of the `shared` ones, which an adapter
    that was there serves. `planned` says the same of the plan as it was made.
    """
    old = dict(plan.assigned)
    planned = old.get("planned") or _planned(plan)
    served = [(item, item.served) for item in found if item.served is not None]
    items = [item for item, _ in served if item.fate != "kept"]
    errors = [now.error for item, now in served if item.fate not in ("kept", "alone")]
    shared = int(old.get("shared", 0))
    total = float(old.get("mean_error", 0.0)) * shared + sum(errors)
    more = {
        "assigned": len(items),
        "kept": len(served) - len(items),
        "alone": sum(item.fate == "alone" for item in items),
        "moved": sum(bool(item.before) for item in items),
        "shared": len(errors),
    }
    counted: dict[str, Any] = {name: int(old.get(name, 0)) + n for name, n in more.items()}
    counted["planned"] = planned
    counted["mean_error"] = total / counted["shared"] if counted["shared"] else 0.0
    return {**counted, "hint": hint(counted)}


def _planned(plan: Plan) -> dict[str, Any]:
    alone = {rep.members[0] for rep in plan.representatives.values() if len(rep.members) == 1}
    errors = [item.error for name, item in plan.served.items() if name not in alone]
    return {
        "tenants": len(plan.served),
        "alone": len(alone),
        "mean_error": sum(errors) / len(errors) if errors else 0.0,
    }


def hint(counted: Mapping[str, Any]) -> str:
    """Why to plan again, "" where nothing speaks for it."""
    planned, assigned = counted["planned"], counted["assigned"]
    reasons = []
    if assigned > _GROWTH * planned["tenants"]:
        reasons.append(f"{assigned} were assigned to a plan for {planned['tenants']}")
    share = counted["alone"] / assigned if assigned else 0.0
    expected = planned["alone"] / planned["tenants"] if planned["tenants"] else 0.0
    if assigned >= _FEWEST and share > expected + _ALONE:
        reasons.append(f"{share:.0%} of them are served alone, {expected:.0%} when it was made")
    return f"{', and '.join(reasons)}: a new plan may serve more by fewer" if reasons else ""
