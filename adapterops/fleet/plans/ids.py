"""Ids of adapters in a plan and names in a deployment: the start of a hash of what they hold."""

from __future__ import annotations

from collections.abc import Container
from itertools import count

DIGITS = 12  # of a representative's content
_UNREAD = "unread"  # of a file that was not read: its content is not known


def fresh(wanted: str, taken: Container[str]) -> str:
    """`wanted`, or where that is taken the first free one of `wanted-2`, `wanted-3` and so on.

    Tenants whose bytes agree but who must not share an adapter have ids of their own.
    """
    wanted = wanted or _UNREAD
    numbered = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(id for id in numbered if id not in taken)
