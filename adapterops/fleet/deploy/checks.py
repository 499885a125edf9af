"""What must still be true of a plan when it is deployed: its base, its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from adapterops.errors import IncompatibleError
from adapterops.fleet.plans.offboarded import AGAIN, some
from adapterops.fleet.plans.plan import Plan, Representative

_UNREAD = (
    "was not read when it was planned, so neither its base nor what it does is known; index it "
    "with --allow-pickle and plan again"
)


def check_content(rep: Representative, found: str) -> None:
    """Raise IncompatibleError for a file that is not what the plan measured."""
    if rep.content and found != rep.content:
        raise IncompatibleError(
            f"the representative {rep.id} has changed since it was planned: its content is "
            f"{found[:12]}, the plan's {rep.content[:12]}",
            path=rep.path,
            hint=f"run index again and {AGAIN}",
        )


def of_base(
    plan: Plan, served: str, aliases: Mapping[str, str], bases: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Tenants that `served` is the wrong base for, with the reason, and warnings.

    A deployment serves one base. Where the plan has several, those of the one are taken whose name
    is `served`, or is in its last part if no name is as a whole, and those that name none are no
    one's, and files that were never read never are. `aliases` maps names to those they stand for,
    `bases` tenants to what their own adapters name, for those that need no adapter. Raises
    IncompatibleError where it is none of them, or several.
    """
    named: dict[str, str] = {}
    nameless: list[str] = []
    unread: dict[str, str] = {}
    for rep in plan.representatives.values():
        if rep.kind != "base" and not rep.content:
            unread |= dict.fromkeys(rep.members, _UNREAD)
            continue
        for tenant in rep.members:
            own = rep.base or bases.get(tenant, "")
            base = aliases.get(own, own)
            if base:
                named[tenant] = base
            else:
                nameless.append(tenant)
    known = sorted(set(named.values()))
    wanted = aliases.get(served, served)
    alike = [base for base in known if base == wanted] or [
        base for base in known if _last(base) == _last(wanted)
    ]
    if len(known) > 1 and len(alike) != 1:
        called = f"several of them called like {served!r}" if alike else f"none called {served!r}"
        raise IncompatibleError(
            f"the plan has adapters of {len(known)} bases ({some(known)}), {called}",
            hint="give one of these as --served-base, each is a deployment of its own; or say "
            "which are one by cluster --base-alias",
        )
    if len(known) < 2:
        return unread, _unsure(known, alike, served, nameless)
    wrong = {
        tenant: f"was trained on {base!r}, and this deployment serves {served!r}"
        for tenant, base in named.items()
        if base not in alike
    }
    unknown = "names no base, and the plan has several; a blank name in --base-alias is it"
    return unread | wrong | dict.fromkeys(nameless, unknown), []


def _unsure(
    known: Sequence[str], alike: Sequence[str], served: str, nameless: Collection[str]
) -> list[str]:
    """What the names of bases leave open, of a plan that has one base or none."""
    said = []
    if known and not alike:
        said.append(
            f"the adapters were trained on {known[0]!r}; {served!r} must have the same weights"
        )
    if nameless:
        said.append(
            f"the adapters of {len(nameless)} tenants name no base ({some(nameless)}); {served!r} "
            "must be what they were trained on"
        )
    return said


def _last(name: str) -> str:
    return Path(name.rstrip("/")).name.lower()
