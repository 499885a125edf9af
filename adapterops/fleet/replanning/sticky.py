"""Planning again with as little movement as possible.

A tenant that is served by another adapter than before loses its prefix cache, and the engine loads
a file. So the adapters of the previous plan stay where they still may: `survivors` says which, and
`place` lets first their members, then whoever needs an adapter, prove that they are within bounds.
Only who is left is covered anew. A group is taken apart for no less than a part of it leaving
(off-boarding) or a gain that is worth the movement (`exchanges`).

All is done by name and without reading a file; errors come from the caller's `verify`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from adapterops.fleet.consent.policy import Consent
from adapterops.fleet.plans.plan import Plan, Representative

T = TypeVar("T")
Verify = Callable[[Sequence[tuple[str, Sequence[str]]]], Iterable[Mapping[str, T | None]]]
CHURN_COST = 0.1  # adapters that must be saved for each tenant that moves


@dataclass(frozen=True, slots=True)
class Survival:
    """What of a plan may stand: representatives by id, with the members that they may keep.

    Members are still to be verified, for their adapters may have changed. `gone` says of the other
    representatives why they cannot stay.
    """

    kept: Mapping[str, Representative]
    gone: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Placed(Generic[T]):
    """Who found an adapter: tenant -> (id, what `verify` said of it); `rest` found none."""

    found: Mapping[str, tuple[str, T]]
    rest: tuple[str, ...]


def survivors(
    previous: Plan, contents: Mapping[str, str], consent: Consent, removed: Collection[str] = ()
) -> Survival:
    """What of `previous` may stand in a fleet of these tenants (name -> content), by this consent.

    A representative goes if it holds weights of a tenant that was off-boarded (`removed`) or is no
    longer there, if it is a tenant's own file and that has another content now, or if no member is
    left that may be served by it. The base model is not among them: whom it serves is seen from the
    signatures.
    """
    kept, gone = {}, {}
    for id, rep in sorted(previous.representatives.items()):
        if rep.kind == "base":
            continue
        left = [name for name in rep.holds if name in removed or name not in contents]
        own = rep.kind in ("original", "medoid")
        changed = [name for name in rep.holds if own and contents.get(name) != rep.content]
        members = tuple(
            name
            for name in rep.members
            if name in contents
            and name not in removed
            and all(consent.may_be_served_by(name, server) for server in rep.holds)
        )
        if left:
            gone[id] = f"holds weights of {min(left)!r}, who left"
        elif changed:
            gone[id] = f"{min(changed)!r} has another adapter now"
        elif not members:
            gone[id] = "serves nobody any more"
        else:
            kept[id] = replace(rep, members=members)
    return Survival(kept, gone)


def place(offers: Mapping[str, Sequence[str]], verify: Verify[T]) -> Placed[T]:
    """Try for each tenant the ids it is offered, in its order, until one is verified.

    `verify` is called once a round with every id that is tried and all who try it, ids and tenants
    sorted, so that a file is read once for all of them. It gives, for each id in turn, what is to
    be kept of each tenant that the representative may serve, None for who is over its bound.
    """
    found: dict[str, tuple[str, T]] = {}
    queues = {tenant: list(reversed(ids)) for tenant, ids in sorted(offers.items())}
    while waiting := [tenant for tenant, ids in queues.items() if ids]:
        rounds: defaultdict[str, list[str]] = defaultdict(list)
        for tenant in waiting:
            rounds[queues[tenant].pop()].append(tenant)
        asked = sorted(rounds.items())
        for (id, tenants), verified in zip(asked, verify(asked), strict=True):
            for tenant in tenants:
                if (result := verified[tenant]) is not None:
                    found[tenant] = (id, result)
                    del queues[tenant]
    return Placed(found, tuple(queues))


def offers_of(
    survival: Survival, near: Mapping[str, Sequence[str]], consent: Consent
) -> dict[str, list[str]]:
    """What each tenant tries: the adapter that serves it, then those that it is `near` to.

    `near` are ids by tenant, the nearest first, for every tenant of the fleet that may share; only
    ids that stand and whose weights may serve the tenant are left of them.
    """
    own = {name: id for id, rep in survival.kept.items() for name in rep.members}
    result = {}
    for tenant in own.keys() | near.keys():
        first = [own[tenant]] if tenant in own else []
        others = [
            id
            for id in near.get(tenant, ())
            if id in survival.kept
            and all(consent.may_be_served_by(tenant, x) for x in survival.kept[id].holds)
        ]
        result[tenant] = list(dict.fromkeys(first + others))
    return result


def exchanges(
    before: Mapping[str, str],
    sticky: Mapping[str, str],
    fresh: Mapping[str, str],
    churn_cost: float = CHURN_COST,
) -> set[str]:
    """The tenants for whom planning afresh is worth the movement.

    The mappings say which adapter serves each tenant in the previous plan, in one that keeps what
    it can and in one that keeps nothing; the same id is the same adapter in all of them. `sticky`
    and `fresh` serve the same tenants. Tenants hang together where they share an adapter in either;
    a set that hangs together is exchanged if it saves more adapters than `churn_cost` times the
    tenants that move because of it.
    """
    from scipy.sparse import coo_array  # slow to import, and `assign` does not come here
    from scipy.sparse.csgraph import connected_components

    tenants = sorted(sticky)
    labels = sorted({*sticky.values(), *fresh.values()})
    number = {label: index for index, label in enumerate(labels)}
    rows = np.array([number[sticky[name]] for name in tenants], np.int64)
    columns = np.array([number[fresh[name]] for name in tenants], np.int64)
    edges = coo_array((np.ones(len(tenants)), (rows, columns)), shape=(len(labels), len(labels)))
    count, part = connected_components(edges, directed=False)
    saved = np.zeros(count)
    np.add.at(saved, part[np.unique(rows)], 1)
    np.subtract.at(saved, part[np.unique(columns)], 1)
    moved = np.zeros(count)
    for name, row in zip(tenants, rows, strict=True):
        if name in before:
            here, there = (plan[name] != before[name] for plan in (sticky, fresh))
            moved[part[row]] += int(there) - int(here)
    taken = saved > churn_cost * np.maximum(moved, 0)
    return {name for name, row in zip(tenants, rows, strict=True) if taken[part[row]]}
