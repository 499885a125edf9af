"""Findings about scales that were found and are odd."""

from __future__ import annotations

import math
from collections import defaultdict

from adapterops.checking.findings import Findings, finding, plural
from adapterops.formats import AdapterFile, mlx

# Trained adapters have alpha / r between 1/128 (kohya's alpha 1) and 64; beyond these somebody
# has mistaken r for alpha, or multiplied a scale that was folded in already.
LARGEST, SMALLEST = 100.0, 1e-3


def extreme(file: AdapterFile) -> Findings:
    """Scales that no training run uses."""
    wild: dict[float, list[str]] = defaultdict(list)
    for stem, site in file.sites.items():
        if not math.isnan(site.scale) and not SMALLEST <= abs(site.scale) <= LARGEST:
            wild[site.scale].append(stem)
    for scale, stems in wild.items():
        site = file.sites[stems[0]]
        yield finding(
            "scale-extreme",
            f"scale {scale:.4g} ({site.scale_from}) in {plural(len(stems), 'module')}, expected "
            f"{SMALLEST:g} to {LARGEST:g}",
            module=stems[0],
            hint="is alpha what was trained with?",
        )


def assumed(file: AdapterFile) -> Findings:
    """Scales that nothing says: 1 by the convention of the dialect."""
    silent = [stem for stem, s in file.sites.items() if s.scale_from.startswith("assumed (no")]
    if silent:
        count, total = len(silent), len(file.sites)
        which = f"all {total} modules" if count == total else f"{count} of {total} modules"
        yield finding("scale-assumed", f"no alpha for {which}: scale 1 is assumed")


def stabilised(file: AdapterFile) -> Findings:
    """rsLoRA: alpha / √r, which an engine that divides by r serves too weakly."""
    parts = [key for key, value in file.config.items() if value and key.endswith("use_rslora")]
    if parts and file.sites:
        dims = sorted({site.dim for site in file.sites.values()})
        shown = f"{dims[0]}" if len(dims) == 1 else f"{dims[0]} to {dims[-1]}"
        yield finding(
            "rslora",
            f"{parts[0]} is set: the scale is alpha / √r, r is {shown}; engines that divide by r "
            f"serve it {math.sqrt(dims[-1]):.3g} times too weakly",
            hint="merge writes it with the scale folded in",
        )


def mlx_alpha(file: AdapterFile) -> Findings:
    """MLX configs with an alpha that says otherwise than `scale`, which is the one that counts."""
    given = mlx.parameters(file.config)
    scale, alpha, rank = (given.get(name) for name in ("scale", "alpha", "rank"))
    if not all(isinstance(value, int | float) and value for value in (scale, alpha, rank)):
        return
    scale, alpha, rank = (float(given[name]) for name in ("scale", "alpha", "rank"))
    if not math.isclose(alpha / rank, scale):
        yield finding(
            "mlx-alpha",
            f"lora_parameters has scale {scale:g} and alpha {alpha:g}, rank {rank:g}: the scale is "
            f"{scale:g}, alpha / rank would be {alpha / rank:g}",
        )


CHECKS = (extreme, assumed, stabilised, mlx_alpha)
