"""Entries of a plan: how a record becomes what serves, and what is served."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from adapterops.fleet.plans.ids import DIGITS, fresh
from adapterops.fleet.plans.plan import Representative, Served
from adapterops.fleet.representing.averaging import Average
from adapterops.fleet.types import Record
from adapterops.fleet.verifying.exact import Error

BASE = "base"


def served_by(id: str, record: Record, error: Error, reason: str) -> Served:
    """The entry of a tenant that the representative `id` serves with this error."""
    return Served(
        by=id,
        error=error.error,
        missing=error.missing,
        foreign=error.foreign,
        cosine=error.cosine,
        worst=error.worst,
        measured=error.measured,
        traffic=record.tenant.traffic,
        norm=record.norm,
        rank=record.rank,
        size=record.size,
        reason=reason,
    )


def served_by_base(record: Record) -> Served:
    """The entry of a tenant whose adapter changes nothing."""
    return Served(
        BASE,
        traffic=record.tenant.traffic,
        size=record.size,
        rank=record.rank,
        reason="its change is zero",
    )


def base_of(records: Sequence[Record]) -> Representative:
    """The base model itself, as what serves these."""
    return Representative(
        BASE,
        "base",
        "",
        base=records[0].base,
        members=tuple(sorted(record.tenant.name for record in records)),
        reason="the base model itself: their change is 0",
    )


def original(record: Record, reason: str, taken: Collection[str]) -> Representative:
    """A tenant's own file as what serves it; where its id is `taken`, it gets a number."""
    return Representative(
        fresh(record.content[:DIGITS], taken),
        "original",
        record.tenant.path,
        record.tenant.location,
        members=(record.tenant.name,),
        holds=(record.tenant.name,),
        rank=record.rank,
        size=record.size,
        dtype=record.dtype,
        dialect=record.dialect,
        base=record.base,
        content=record.content,
        reason=reason,
    )


def average(
    made: Average, content: str, path: str, holds: Collection[str], like: Record, id: str
) -> Representative:
    """An average that was written to `path` in PLAN, in the dialect and for the base of `like`."""
    chosen = made.chosen
    return Representative(
        id,
        chosen.kind,
        path,
        holds=tuple(sorted(holds)),
        rank=chosen.rank,
        size=chosen.size,
        dtype=chosen.dtype,
        dialect=like.dialect,
        base=like.base,
        content=content,
        bound=chosen.bound,
        reason=chosen.reason,
    )
