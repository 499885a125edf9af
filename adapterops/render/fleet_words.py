"""What a fleet's report says in sentences, for a page, for Markdown and for a terminal."""

from __future__ import annotations

from adapterops.fleet.plans.plan import Related
from adapterops.fleet.summary.served import FleetReport
from adapterops.render.markup import percent
from adapterops.render.text import count

FATES = {
    "new": "an adapter made of several",
    "shared": "an original that others share",
    "own": "their own adapter, alone",
    "base": "the base model: no change",
    "none": "nothing: not deployable",
}
MEANINGS = {
    "error": "‖C − D‖ / ‖D‖ over all modules: C what serves the tenant, D its own change of the "
    "weights. Exact, in float64, from the files that serve. error² = missing² + foreign².",
    "missing": "|1 − ⟨C, D⟩ / ‖D‖²|: the share of its own change that a tenant does not get.",
    "foreign": "What others' training adds to its answers, over ‖D‖.",
    "cosine": "of C and D: 1 is the same direction.",
    "worst module": "the module that is farthest off by its own norm.",
    "no less than": "a proven bound: no adapter of that rank has a smaller largest error over the "
    "same tenants.",
}


def headline(report: FleetReport) -> str:
    """The report in one line: 80 tenants, 21 adapters."""
    return f"{count(report.tenants, 'tenant')}, {count(report.adapters, 'adapter')}"


def lead(report: FleetReport) -> list[str]:
    """The first paragraph: what came of it and what holds."""
    said = (
        f"{count(report.tenants, 'tenant')} with {count(report.before, 'different adapter')} "
        f"are served by {report.adapters:,}."
    )
    if report.max_error is None:
        said += f" The largest error of a tenant is {percent(report.largest)}."
    else:
        said += (
            f" No tenant is further than {percent(report.max_error)} from its own adapter: the "
            f"largest error is {percent(report.largest)}"
        )
        said += ", in terms of outputs." if report.metric == "activation" else "."
    said += " Every error was computed exactly from the files that serve."
    if report.excluded:
        said += f" {count(len(report.excluded), 'tenant')} cannot be served from here."
    return [said]


def sharing(report: FleetReport) -> list[str]:
    """Who may share, and what more sharing would give."""
    if report.allow_sharing == "all":
        return []
    who = {
        "none": "Only duplicates share here, which is the default",
        "group": "Tenants share within their groups here",
    }
    said = who.get(report.allow_sharing, f"Sharing here: {report.allow_sharing}")
    adapters = report.gain.get("adapters")
    if isinstance(adapters, int) and adapters < report.adapters:
        said += (
            f". Were all allowed to, an estimated {count(adapters, 'adapter')} would do within "
            f"the same bound, {report.adapters - adapters:,} fewer"
        )
    return [f"{said}."]


def map_rows(report: FleetReport) -> str:
    """What the rows of the map are."""
    found = report.similarity
    if found is None:
        return ""
    rows = {
        "tenants": f"All {found.total:,} tenants with a sketch",
        "adapters": f"One tenant of each of the {len(found.names):,} adapters, the nearest to it "
        f"({found.total:,} tenants have a sketch)",
        "largest": f"One tenant of each of the {len(found.names):,} adapters that serve most, the "
        f"nearest to it ({found.total:,} tenants have a sketch)",
    }
    return (
        f"{rows[found.each]}, ordered by group. Cosines are estimates from sketches; of ΔW they "
        f"have a standard deviation of at most {found.sigma:.2g} as a rule."
    )


def related_words(report: FleetReport) -> str:
    """What related tenants are, and how many of them may be so by chance."""
    return (
        f"{count(len(report.related), 'group')} whose similarity stands out from this fleet's own "
        f"background, at a nominal false discovery rate of {percent(report.discovery)}: of the "
        "pairs found, of all partitions and by both kinds together, that share is expected to be "
        "chance, as far as the fleet's other pairs are unrelated and no more dependent than those "
        "of simulated fleets. They are candidates for training together; nothing is promised of "
        "sharing one adapter as they are."
    )


def cosines_of(group: Related) -> str:
    """The lowest and highest cosine of a group, once where they are the same."""
    low, high = (f"{each:.2f}" for each in group.cosines)
    return low if low == high else f"{low} to {high}"


def kind_of(group: Related) -> str:
    """What a related group was found by."""
    return {"delta": "ΔW", "outputs": "outputs"}[group.by]
