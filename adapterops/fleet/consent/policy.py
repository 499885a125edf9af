"""Consent: which tenants' weights may serve whom.

What is not forbidden by a policy is still limited by `allow_sharing`. `none`: another's adapter may
serve a tenant only where it is, to 10⁻³ of its norm, the tenant's own (a duplicate, the same in
another gauge). `group`: tenants of one share group may share; `all`: everyone may. Three laws hold
whatever the options:

- A private tenant is served by its own file, and its weights are in nobody else's.
- Weights go from one tenant to another only inside one share group (or where neither has one), from
  one who may represent, to one who may be served by it.
- Averages are made only of weights each of which may serve every member.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from adapterops.errors import UsageError
from adapterops.fleet.consent.policy_file import GROUP, Policy, Rule, policy_from, read_policy
from adapterops.fleet.types import Array

__all__ = [
    "NEAR_EXACT",
    "Consent",
    "Permissions",
    "Policy",
    "Rule",
    "Sharing",
    "consent_from",
    "policy_from",
    "read_policy",
]

Sharing = Literal["none", "group", "all"]
Key = tuple[str, str]
NEAR_EXACT = 1e-3  # ‖C − D‖/‖D‖ up to which another's adapter is the tenant's own
_NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Consent:
    """How far sharing is allowed, and the policy that narrows it further."""

    allow_sharing: Sharing = "none"
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if self.allow_sharing not in get_args(Sharing):
            raise UsageError(
                f"allow_sharing is {self.allow_sharing!r}", hint="give none, group or all"
            )

    def may_represent(self, tenant: str) -> bool:
        """Whether a tenant's weights may serve anyone else at all, alone or averaged."""
        rule = self.policy.rule(tenant)
        return rule.may_represent and not rule.private

    def may_be_served_by(self, tenant: str, other: str) -> bool:
        """Whether the weights of `other` may serve `tenant`; its own always may."""
        if tenant == other:
            return True
        entries = self.policy.rule(tenant).may_be_served_by
        named = entries is None or other in entries
        if not named and entries:
            named = GROUP + self.policy.rule(other).share_group in entries
        return named and self.key(tenant) == self.key(other) and self.may_represent(other)

    def may_differ(self, tenant: str) -> bool:
        """Whether what serves a tenant may differ from its own by more than `NEAR_EXACT`."""
        rule = self.policy.rule(tenant)
        return not rule.private and (
            self.allow_sharing == "all" or (self.allow_sharing == "group" and rule.share_group > "")
        )

    def bound(self, tenant: str, max_error: float) -> float:
        """The largest ‖C − D‖/‖D‖ that a tenant consents to, at most `max_error`."""
        if self.policy.rule(tenant).private:
            return 0.0
        return max_error if self.may_differ(tenant) else min(max_error, NEAR_EXACT)

    def key(self, tenant: str) -> Key:
        """What tenants must have in common before their weights may meet."""
        rule = self.policy.rule(tenant)
        return ("private", tenant) if rule.private else ("group", rule.share_group)

    def groups(self, tenants: Iterable[str]) -> list[Key]:
        """The partition key of each tenant; a private one has a key of its own."""
        return [self.key(tenant) for tenant in tenants]

    def permissions(self, tenants: Sequence[str]) -> Permissions:
        """The same for many tenants at once, as arrays; `tenants` must be distinct."""
        return _permissions(self, tenants)

    def to_dict(self) -> dict[str, Any]:
        """The options of a plan that `consent_from` reads back."""
        return {"allow_sharing": self.allow_sharing, "policy": self.policy.to_dict()}


def consent_from(options: Any) -> Consent:
    """The consent that a plan's options record."""
    return Consent(options.get("allow_sharing", "none"), policy_from(options.get("policy") or {}))


@dataclass(frozen=True, slots=True)
class Permissions:
    """Consent by the index of a tenant: all arrays are (N,).

    `group` int32 is the partition, `private`, `serves` (its weights may serve others) and `differs`
    (it may be served by what is not its own to `NEAR_EXACT`) are flags. `limits` int32 numbers the
    distinct lists of who may serve, -1 for anyone; `named` and `grouped` hold, sorted, the lists
    that a tenant or its whole group is on.
    """

    group: Array
    private: Array
    serves: Array
    differs: Array
    limits: Array
    named: dict[int, Array]
    grouped: dict[int, Array]

    def allowed(self, server: int, members: Array) -> Array:
        """Whether the weights of `server` may serve each of `members` (k,): bool (k,)."""
        own = members == server
        if not self.serves[server]:
            return np.asarray(own)
        mask = self.group[members] == self.group[server]
        limits = self.limits[members]
        if (limits >= 0).any():
            lists = (self.named.get(server, _NOBODY), self.grouped.get(self.group[server], _NOBODY))
            mask &= (limits < 0) | np.isin(limits, np.concatenate(lists))
        return np.asarray(mask | own)

    def bounds(self, max_error: float) -> Array:
        """The largest error that each tenant consents to, float64 (N,); 0 for a private one."""
        near = min(max_error, NEAR_EXACT)
        return np.where(self.private, 0.0, np.where(self.differs, max_error, near))

    def blend(self, members: Array) -> Array:
        """Whose weights may be averaged into one representative of all `members`: bool (k,)."""
        able = self.serves[members] & self.differs[members]
        if len(members) == 1:
            return np.ones(1, bool)
        if (self.limits[members] < 0).all():
            return np.asarray(able & (self.group[members] == self.group[members[0]]).all())
        everyone = [bool(self.allowed(int(one), members).all()) for one in members]
        return np.asarray(able & np.array(everyone))


def _permissions(consent: Consent, tenants: Sequence[str]) -> Permissions:
    rules = [consent.policy.rule(name) for name in tenants]
    groups: dict[Key, int] = {}
    codes = [groups.setdefault(key, len(groups)) for key in consent.groups(tenants)]
    lists: dict[tuple[str, ...], int] = {}
    limits = [
        -1 if entries is None else lists.setdefault(entries, len(lists))
        for entries in (rule.may_be_served_by for rule in rules)
    ]
    index = {name: place for place, name in enumerate(tenants)} if lists else {}
    named: defaultdict[int, list[int]] = defaultdict(list)
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for entries, number in lists.items():
        for entry in entries:
            key = ("group", entry.removeprefix(GROUP))
            if entry in index:
                named[index[entry]].append(number)
            elif entry.startswith(GROUP) and key in groups:
                grouped[groups[key]].append(number)
    return Permissions(
        group=np.array(codes, np.int32),
        private=np.array([rule.private for rule in rules], bool),
        serves=np.array([rule.may_represent and not rule.private for rule in rules], bool),
        differs=np.array([consent.may_differ(name) for name in tenants], bool),
        limits=np.array(limits, np.int32),
        named={server: np.array(numbers) for server, numbers in named.items()},
        grouped={group: np.array(numbers) for group, numbers in grouped.items()},
    )
