"""Findings about the size of ΔW: diverged adapters, modules far beyond the others.

The gain of a module is ‖ΔW‖_F / √out: the size of its outputs for inputs of size 1 per entry, as
layer norms deliver them (for an embedding, ‖ΔW‖_F / √(out·tokens)). Weights of base models have
gains of 0.3 to 2, trained adapters of real repositories at most 0.3. From 4 on ΔW drowns the base:
the diverged adapter of ‖ΔW‖ = 2,597 that people published has at least that, spread over 64 modules
of a 4,096-wide model. Norms come from a sample, an upper bound by ‖B·A‖ ≤ ‖B‖·‖A‖; only modules
that it puts above a limit are read again and computed.
"""

from __future__ import annotations

import math
import statistics

from adapterops import linalg
from adapterops.checking.findings import Findings, finding, plural
from adapterops.checking.numbers import Measured, gain_bound, unit
from adapterops.errors import NumericsError
from adapterops.formats import Site
from adapterops.formats.kinds import KINDS

DIVERGED = 4.0
# A module this many times beyond the median, and as strong as a base weight, is no accident of
# training: within an adapter gains vary by a factor of ten or so.
OUTLIER, STRONG = 100.0, 1.0
_FEWEST = 8
_SURE = 2.0  # the sample's error: bounds within this factor of a limit are computed exactly


def sizes(found: Measured) -> Findings:
    """Modules whose ΔW is too large, by themselves or beside the others."""
    bounds = {
        stem: bound
        for stem, site in found.file.sites.items()
        if site.kind in KINDS and (bound := gain_bound(found, site)) > 0.0 and math.isfinite(bound)
    }
    median = statistics.median(bounds.values()) if len(bounds) >= _FEWEST else math.inf
    strong = max(STRONG, OUTLIER * median)
    limit = min(DIVERGED, strong) / _SURE
    large = {stem: _gain(found, stem) for stem, bound in bounds.items() if bound > limit}
    diverged = {stem: gain for stem, gain in large.items() if gain > DIVERGED}
    if diverged:
        worst = max(diverged, key=lambda stem: diverged[stem])
        norm = diverged[worst] * unit(found.file.sites[worst])
        yield finding(
            "diverged",
            f"{plural(len(diverged), 'module')} with ‖ΔW‖/√out above {DIVERGED:g}, the largest "
            f"{diverged[worst]:.4g} (‖ΔW‖ = {norm:.4g}); base weights have 0.3 to 2",
            module=worst,
            hint="the training diverged, or the scale is wrong",
        )
    beyond = {stem: gain for stem, gain in large.items() if strong < gain <= DIVERGED}
    if beyond:
        worst = max(beyond, key=lambda stem: beyond[stem])
        yield finding(
            "outlier-modules",
            f"{plural(len(beyond), 'module')} more than {OUTLIER:g} times beyond the others: "
            f"‖ΔW‖/√out {beyond[worst]:.4g}, the median is at most {median:.3g}",
            module=worst,
            hint="damaged, or trained with another scale",
        )


def _gain(found: Measured, stem: str) -> float:
    """The gain, computed from the factors; 0 where they are not finite (told elsewhere)."""
    site: Site = found.file.sites[stem]
    try:
        B, A = site.factors()
    except NumericsError:
        return 0.0
    return abs(site.scale) * linalg.norm(B, A) / unit(site)


CHECKS = (sizes,)
