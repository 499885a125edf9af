"""What `index` reports: who is in the fleet, who cannot be compared, copies and lineages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from adapterops.fleet.indexing.alike import Alike, largest_first
from adapterops.fleet.indexing.index import Done
from adapterops.fleet.indexing.lineage import byte_duplicates
from adapterops.fleet.indexing.opened import Fleet


@dataclass(frozen=True, slots=True)
class Failure:
    """A tenant whose adapter is broken or cannot be compared, and why."""

    tenant: str
    path: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The index after a run, and what the run did.

    `counts` are tenants by status, `adapters` how many different contents the readable ones have.
    `read` tenants of `bytes` together were looked at in `seconds`, `unchanged` ones were not.
    `vanished` are those that this run did not find any more, `skipped` those it found that were
    off-boarded. `duplicates` are groups of the same bytes, `near_duplicates` groups of other bytes
    with the same ΔW to 10⁻³ by norm and sketch, which nothing has verified, `lineages` groups that
    started from one initialisation or adapter; all sorted, the largest first. `unfinished` are
    parts of the sources that are not in the index yet.
    """

    schema: ClassVar[str] = "adapterops.index/1"
    output: str
    seed: int
    tenants: int
    counts: Mapping[str, int]
    adapters: int
    read: int
    unchanged: int
    bytes: int
    seconds: float
    removed: tuple[str, ...]
    restored: tuple[str, ...]
    vanished: tuple[str, ...]
    skipped: tuple[str, ...]
    unfinished: tuple[str, ...]
    no_ops: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    lineages: tuple[tuple[str, ...], ...]
    failed: tuple[Failure, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {"schema": self.schema, **asdict(self)}


def report(
    fleet: Fleet,
    alike: Alike,
    done: Done,
    seconds: float,
    *,
    removed: tuple[str, ...],
    restored: tuple[str, ...],
    notes: tuple[str, ...],
) -> IndexReport:
    """What there is to say of an index after a run that took so long."""
    records = fleet.records
    failed = tuple(
        Failure(record.tenant.name, record.tenant.path, record.status, record.reason)
        for record in records
        if record.status in ("broken", "ineligible")
    )
    counts: Counter[str] = Counter(record.status for record in records)
    return IndexReport(
        output=fleet.path,
        seed=fleet.seed,
        tenants=len(records),
        counts={status: counts[status] for status in ("ok", "no-op", "ineligible", "broken")},
        adapters=len({r.content for r in records if r.status in ("ok", "no-op")}),
        read=len(done.read),
        unchanged=done.unchanged,
        bytes=done.size,
        seconds=seconds,
        removed=removed,
        restored=restored,
        vanished=done.vanished,
        skipped=done.skipped,
        unfinished=fleet.unfinished,
        no_ops=tuple(record.tenant.name for record in records if record.status == "no-op"),
        duplicates=largest_first(byte_duplicates(fleet)),
        near_duplicates=alike.near,
        lineages=alike.lineages,
        failed=failed,
        notes=notes,
        warnings=_warnings(counts, done),
    )


def _warnings(counts: Mapping[str, int], done: Done) -> tuple[str, ...]:
    said = []
    if counts["broken"]:
        said.append(f"{_adapters(counts['broken'])} cannot be read: these tenants have no sketch")
    if counts["ineligible"]:
        said.append(
            f"{_adapters(counts['ineligible'])} cannot be compared by their factors: "
            "these tenants keep their own"
        )
    if done.vanished:
        said.append(f"{_adapters(len(done.vanished))} of the index are not there any more")
    return tuple(said)


def _adapters(count: int) -> str:
    return f"{count:,} adapter{'s' * (count != 1)}"
