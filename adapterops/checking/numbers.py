"""Findings about the numbers in a file: what one pass over the tensors has counted."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapterops.casts import FORMATS, format_name
from adapterops.checking.codes import FLOAT16_OVERFLOW, Figures, equal_lines
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.formats import AdapterFile, Ref, Site

_NOT_FACTORS = {"alpha", "bias", "magnitude"}
_FEWEST = 16  # values below which a share says nothing
_PARTS = re.compile(
    r"(lora_unet|lora_te\d?|lora_transformer|unet|transformer(_2)?|text_encoder(_[23])?|prior)[_.:]"
    r"|(.*\.)?(vision_tower|vision_model|visual|language_model|audio_tower|encoder|decoder)\."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """An adapter and the figures of its tensors, by name."""

    file: AdapterFile
    figures: Mapping[str, Figures]

    def factors(self, site: Site) -> dict[str, Figures]:
        """Figures of a module's factors by role."""
        return {
            role: self.figures[ref.name]
            for role, ref in site.parts.items()
            if role not in _NOT_FACTORS and ref.name in self.figures
        }

    def owners(self) -> dict[str, tuple[str, Site]]:
        """name -> (role, site) of every factor that is a tensor of its own, no expert's."""
        return {
            ref.name: (role, site)
            for site in self.file.sites.values()
            if site.expert is None
            for role, ref in site.parts.items()
            if role not in _NOT_FACTORS
        }

    def dead(self) -> list[str]:
        """Modules of which a factor is zero: every kind multiplies its parts."""
        return [
            stem
            for stem, site in self.file.sites.items()
            if any(figures.is_zero for figures in self.factors(site).values())
        ]


def nonfinite(found: Measured) -> Findings:
    """NaN and infinities, anywhere in the file."""
    wrong = {
        name: f
        for name, f in found.figures.items()
        if (f.nan or f.infinite) and not name.endswith(".alpha")  # the reader's business
    }
    if wrong:
        name, figures = next(iter(wrong.items()))
        total = sum(f.nan + f.infinite for f in wrong.values())
        yield finding(
            "non-finite",
            f"{plural(total, 'value')} in {plural(len(wrong), 'tensor')}, such as {name}: "
            f"{figures.nan} NaN and {figures.infinite} infinite of {figures.count:,}",
            hint="the training diverged or the file is damaged",
        )


def range_of_float16(found: Measured) -> Findings:
    """Values that a server running in float16 would turn into infinities."""
    over = {name: f for name, f in found.figures.items() if f.beyond}
    if over:
        name, figures = max(over.items(), key=lambda item: item[1].largest)
        total = sum(f.beyond for f in over.values())
        yield finding(
            "beyond-float16",
            f"{plural(total, 'value')} in {plural(len(over), 'tensor')} at or above "
            f"{FLOAT16_OVERFLOW:.0f}, the largest {figures.largest:.4g} in {name}",
            hint="it cannot be served in float16",
        )


def subnormals(found: Measured) -> Findings:
    """Tensors most of whose values lie below the normal range of their format."""
    worst, low = ("", 0.0), 0
    for name, f in found.figures.items():
        filled = f.count - f.zeros
        if filled >= _FEWEST and 2 * f.subnormal > filled:
            low += 1
            worst = max(worst, (name, f.subnormal / filled), key=lambda item: item[1])
    if low:
        form = FORMATS.get(found.file.tensors[worst[0]].dtype)
        limit = f"{form.smallest_normal:.2g}" if form else "the smallest normal"
        name = format_name(found.file.tensors[worst[0]].dtype)
        yield finding(
            "subnormal",
            f"most values of {plural(low, 'tensor')} lie below the normal range of {name} "
            f"({limit}), such as {worst[1]:.0%} of those of {worst[0]}",
            hint="digits are lost, and devices that flush them to zero see none of it; store it "
            "as bfloat16 or float32",
        )


def zeros(found: Measured) -> Findings:
    """Modules without effect: some, all of a component, or all there are."""
    file, dead = found.file, found.dead()
    if not dead:
        return
    live = any(not found.figures[ref.name].is_zero for ref in file.deltas.values())
    if len(dead) == len(file.sites) and not live:
        yield finding(
            "zero-adapter",
            f"a factor is zero in all {len(dead)} modules: it changes nothing",
            hint="was it saved before the first step?",
        )
        return
    parts: dict[str, list[str]] = defaultdict(list)
    for stem in file.sites:
        parts[_part(stem)].append(stem)
    lost = set(dead)
    for part, stems in parts.items() if len(parts) > 1 else ():
        if lost.issuperset(stems):
            lost.difference_update(stems)
            yield finding(
                "zero-part",
                f"{part or 'what is outside the components'}: a factor is zero in all "
                f"{len(stems)} modules, others are not",
                module=stems[0],
                hint="was this part trained?",
            )
    rest = [stem for stem in dead if stem in lost]
    if rest:
        yield finding(
            "dead-modules",
            f"a factor is zero in {len(rest)} of {len(file.sites)} modules: {few(rest)}",
            module=rest[0],
            hint="ΔW = 0 there; was the module trained?",
        )


def _part(stem: str) -> str:
    """The component of a model that a module is in, "" where names tell none."""
    found = _PARTS.match(stem)
    return found[0].rstrip("_.:") if found else ""


def constants(found: Measured) -> Findings:
    """Factors all of whose values are one number."""
    names = [
        name
        for name in found.owners()
        if (f := found.figures[name]).constant and f.count >= _FEWEST and not f.is_zero
    ]
    if names:
        value = found.figures[names[0]].largest
        yield finding(
            "constant",
            f"all values of {plural(len(names), 'factor')} are ±{value:.4g}: {few(names)}",
            hint="was it filled by a script, and never trained?",
        )


def equal_columns(found: Measured) -> Findings:
    """Rows of A or columns of B that repeat others: the rank is smaller than it looks."""
    hits = []
    for name, (role, site) in found.owners().items():
        figures = found.figures[name]
        plain = role in "AB" and site.kind in ("lora", "dora", "adalora")
        if plain and figures.suspect and not figures.constant and not figures.nan:
            repeated, lines, rows = equal_lines(found.file.tensors[name])
            if repeated:
                hits.append((name, repeated, lines, "rows" if rows else "columns"))
    if hits:
        name, repeated, lines, what = hits[0]
        yield finding(
            "equal-columns",
            f"{repeated} of {lines} {what} of {name} repeat others: rank {lines - repeated} at "
            f"most ({plural(len(hits), 'tensor')} so)",
            module=found.owners()[name][1].stem,
            hint="merge --energy 1 finds the rank that it has",
        )


def equal_modules(found: Measured) -> Findings:
    """Modules whose factors are the same, bit for bit."""
    groups: dict[object, list[Site]] = defaultdict(list)
    for site in found.file.sites.values():
        figures = found.factors(site)
        if site.expert is None and not any(f.is_zero for f in figures.values()):
            groups[tuple((role, f.checksum) for role, f in sorted(figures.items()))].append(site)
    for sites in groups.values():
        same = [site.stem for site in sites[1:] if _same_factors(sites[0], site)]
        if same:
            yield finding(
                "equal-modules",
                f"{sites[0].stem} and {few(same)} have the same factors",
                module=sites[0].stem,
                hint="was one copied over the other?",
            )


def _same_factors(a: Site, b: Site) -> bool:
    def bytes_of(site: Site) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
        for role, ref in sorted(site.parts.items()):
            if role not in _NOT_FACTORS:
                yield role, ref.dtype, ref.shape, _raw(ref)

    return all(x == y for x, y in zip(bytes_of(a), bytes_of(b), strict=True))


def _raw(ref: Ref) -> bytes:
    return ref.raw().tobytes()


def gain_bound(found: Measured, site: Site) -> float:
    """An estimate of the largest `gain` that factors of these norms can have."""
    bound = math.prod(figures.norm for figures in found.factors(site).values())
    return abs(site.scale) * bound / unit(site)


def unit(site: Site) -> float:
    """‖ΔW‖_F at which inputs of size 1 per entry make outputs of size 1 per entry."""
    out, columns = site.shape
    return math.sqrt(out * columns if site.layer == "embedding" else out)


CHECKS = (
    nonfinite,
    range_of_float16,
    subnormals,
    zeros,
    constants,
    equal_columns,
    equal_modules,
)
