"""What `index` did and found, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adapterops.fleet.indexing.report import IndexReport
from adapterops.render.text import count, megabytes, printable

_SHOWN, _NAMES = 5, 4  # lines of a kind, names of a group, without -v


def text(report: IndexReport, *, verbose: bool) -> str:
    """The whole report; `verbose` leaves nothing out."""
    return "\n".join([*_totals(report), *_groups(report, verbose), *_changes(report, verbose)])


def _totals(report: IndexReport) -> Iterator[str]:
    yield f"{printable(report.output)}: {count(report.tenants, 'tenant')}, " + ", ".join(
        f"{number:,} {status}" for status, number in report.counts.items() if number
    )
    if report.read:
        rate = report.bytes / max(report.seconds, 1e-9)
        yield (
            f"read {count(report.read, 'adapter')}, {megabytes(report.bytes)} MB in "
            f"{report.seconds:.3g} s ({megabytes(rate)} MB/s); {report.unchanged:,} unchanged"
        )
    else:
        yield f"nothing to read; {report.unchanged:,} unchanged"


def _groups(report: IndexReport, verbose: bool) -> Iterator[str]:
    copies = sum(map(len, report.duplicates)) - len(report.duplicates)
    if copies:
        yield f"byte duplicates: {count(copies, 'copy').replace('copys', 'copies')} of " + (
            count(len(report.duplicates), "adapter")
        )
        yield from _lists(report.duplicates, verbose)
    if report.near_duplicates:
        near = sum(map(len, report.near_duplicates))
        yield (
            f"re-factored or near duplicates: {near:,} tenants in "
            f"{count(len(report.near_duplicates), 'group')} of other bytes, one ΔW to 0.1 %: "
            "candidates by sketch, not verified"
        )
        yield from _lists(report.near_duplicates, verbose)
    if report.no_ops:
        yield f"no-ops, which change nothing: {_names(report.no_ops, verbose)}"
    if report.lineages:
        related = sum(map(len, report.lineages))
        yield (
            f"{count(len(report.lineages), 'lineage')} of {related:,} tenants: trained from one "
            "initialisation, or one from the other"
        )
        yield from _lists(report.lineages, verbose)
    failed = report.failed if verbose else report.failed[:_SHOWN]
    for item in failed:
        yield f"{item.status}: {printable(item.tenant)}: {printable(item.reason)}"
    if len(report.failed) > len(failed):
        yield f"and {len(report.failed) - len(failed):,} more that are broken or ineligible (-v)"


def _changes(report: IndexReport, verbose: bool) -> Iterator[str]:
    for what, names in (
        ("removed", report.removed),
        ("restored", report.restored),
        ("found, but off-boarded before", report.skipped),
        ("not there any more", report.vanished),
        ("not indexed to the end yet", report.unfinished),
    ):
        if names:
            yield f"{what}: {_names(names, verbose)}"
    for note in report.notes:
        yield f"note: {printable(note)}"


def _lists(groups: Sequence[Sequence[str]], verbose: bool) -> Iterator[str]:
    shown = groups if verbose else groups[:_SHOWN]
    for names in shown:
        yield f"  {len(names):,}: {_names(names, verbose)}"
    if len(groups) > len(shown):
        yield f"  and {len(groups) - len(shown):,} more groups (-v)"


def _names(names: Sequence[str], verbose: bool) -> str:
    shown = names if verbose else names[:_NAMES]
    more = f", and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return printable(", ".join(shown)) + more
