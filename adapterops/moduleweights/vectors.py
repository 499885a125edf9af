"""Block vectors and presets, laid over the blocks that an adapter has."""

from __future__ import annotations

from typing import NoReturn

from adapterops.errors import UnsupportedError, UsageError
from adapterops.moduleweights.blocks import block
from adapterops.moduleweights.grammar import BlockRule, shown
from adapterops.moduleweights.layouts import FAMILIES, LAYOUTS, PRESETS


def multipliers(
    rule: BlockRule, family: str | None, stems: list[str], path: str
) -> dict[str, float | None]:
    """stem -> what its weight is multiplied by; None for a module that lies in no block.

    `family` is that of all adapters, `stems` are this one's modules, `path` is for errors. A block
    that a vector leaves out is refused: the web UI multiplies by 0 there, sd-scripts by 1.
    """
    if family is None:
        raise UnsupportedError(
            f"--module-weights {shown(rule.text)}: {stems[0]!r} is no name of a U-Net's or "
            "of Flux' module, and blocks are known of these only",
            path=path,
            hint="'re:REGEX: …' gives weights by name",
        )
    vectors = PRESETS[rule.preset] if rule.preset else {len(rule.values): rule.values}
    allowed = [length for length in FAMILIES[family] if length in vectors]
    if not allowed:
        _refuse(rule, family, path)
    chosen: list[dict[str, float | None]] = []  # a preset says the same of a block in every length
    for length in allowed:
        where = {stem: block(stem, flux=length in FAMILIES["flux"]) for stem in stems}
        values = dict(zip(LAYOUTS[length].blocks, vectors[length], strict=True))
        if all(name is None or name in values for name in where.values()):
            chosen.append({stem: values.get(name or "") for stem, name in where.items()})
    if not chosen:
        _refuse_block(rule, max(allowed), family, stems, path)
    # A U-Net whose names do not tell SD from SDXL: the preset must have a meaning in both.
    if family == "unet" and rule.preset and vectors.keys().isdisjoint(FAMILIES["sdxl"]):
        raise UsageError(
            f"--module-weights {shown(rule.text)}: the names do not tell for which model, "
            "SD or SDXL",
            path=path,
            hint="give the values themselves",
        )
    if all(value is None for value in chosen[0].values()):
        raise UsageError(
            f"--module-weights {shown(rule.text)}: none of the {len(stems)} modules lies in a "
            f"block; the first is {stems[0]!r}",
            path=path,
        )
    return chosen[0]


def _refuse(rule: BlockRule, family: str, path: str) -> NoReturn:
    """Refuse what is meant for another kind of model."""
    known = " or ".join(str(length) for length in FAMILIES[family])
    model = {"sd": "SD 1 or 2", "sdxl": "SDXL", "flux": "Flux"}.get(family, "a U-Net")
    if rule.preset:
        lengths = " and ".join(str(length) for length in PRESETS[rule.preset])
        what = f"the preset {rule.preset} is defined for {lengths} blocks"
    else:
        what = f"{len(rule.values)} values are for {LAYOUTS[len(rule.values)].meant}"
    raise UsageError(
        f"--module-weights {shown(rule.text)}: {what}, and the modules are those of {model}",
        path=path,
        hint=f"give {known} values",
    )


def _refuse_block(
    rule: BlockRule, length: int, family: str, stems: list[str], path: str
) -> NoReturn:
    """Refuse an adapter with a block that the longest possible vector leaves out."""
    layout = LAYOUTS[length].blocks
    flux = length in FAMILIES["flux"]
    stem = next(s for s in stems if (name := block(s, flux=flux)) and name not in layout)
    longer = [
        other
        for other in FAMILIES[family]
        if other > length and block(stem, flux=flux) in LAYOUTS[other].blocks
    ]
    more = f"give {longer[0]} values" if longer else "'re:REGEX: …' gives weights by name"
    raise UsageError(
        f"--module-weights {shown(rule.text)}: the vector of {length} has no value for "
        f"{block(stem, flux=flux)} (web UIs take 0 there, sd-scripts takes 1)",
        path=path,
        module=stem,
        hint=more,
    )
