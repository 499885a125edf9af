"""From measured figures to the certificate: totals, inputs and modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from adapterops.casts import format_name
from adapterops.certificate import Figures, InputReport, ModuleReport, Report, ratio, total
from adapterops.formats.model import AdapterFile
from adapterops.plan import Plan
from adapterops.provenance import Provenance

_STORAGE_NOTE = 1e-3
_NEAR = 1e-6  # share of the entries so near a limit from which on a user is told
_FULL = 0.1  # error of a result of full rank from which on a user is told


def certify(
    plan: Plan,
    measured: Sequence[Figures],
    dense: Sequence[Figures],
    provenance: Provenance,
    metric: str,
) -> Report:
    """Totals, inputs and modules from the measured figures of modules and of full deltas."""
    count = len(plan.inputs)
    squares = [[0.0] * count, [0.0] * count]
    modules: dict[str, ModuleReport] = {}
    in_metric: list[tuple[float, float]] = []
    for module, figures in zip(plan.modules, measured, strict=True):
        widths = [0] * count
        for index, site in module.origins:
            widths[index] = site.rank
        owners = [index for index, _ in module.origins]
        if module.leaves:  # their figures are those of Dᵢ, of parts those of wᵢDᵢ
            shares = [plan.weights[index] * site.factor for index, site in module.origins]
            figures = _weighted(figures, shares)
        whole, lost = figures.in_metric(module.weight)
        in_metric.append((whole, lost))
        made = _module(
            figures, owners, plan.weights, squares, module.shape, module.layer, widths, module.kept
        )
        changed = figures.changed
        modules[module.stem] = replace(
            made,
            metric_error=ratio(lost, whole),
            noise=figures.noise or None,
            changed=None if changed is None else changed / math.prod(module.shape),
            methods=figures.methods,
        )
    for delta, figures in zip(plan.deltas, dense, strict=True):
        owners = [p.input for p in delta.parts] + [p.input for p in delta.factors]
        shape = (delta.shape[0], math.prod(delta.shape[1:])) if delta.shape else (1, 1)
        widths, kept = [0] * count, min(shape)
        modules[delta.name] = _module(
            figures, owners, plan.weights, squares, shape, "full", widths, kept
        )
    measured = [*measured, *dense]
    norm = total([f.norm for f in measured])
    if metric == "frobenius":
        in_metric += [(figures.norm, figures.total) for figures in dense]
    seen = ratio(total([lost for _, lost in in_metric]), total([whole for whole, _ in in_metric]))
    return Report(
        output="",
        dialect=plan.dialect,
        dtype=format_name(plan.dtype),
        rank=plan.rank,
        size=0,
        size_before=sum(map(_bytes, plan.inputs)),
        parameters=plan.parameters([module.kept for module in plan.modules]),
        parameters_before=plan.stored_parameters,
        norm=norm,
        truncation=ratio(total([f.truncation for f in measured]), norm) or 0.0,
        storage=ratio(total([f.storage for f in measured]), norm) or 0.0,
        error=ratio(total([f.total for f in measured]), norm) or 0.0,
        metric=metric,
        metric_error=seen or 0.0,
        floor=total([f.floor for f in measured]),
        subnormal=sum(f.subnormal for f in measured),
        inputs=_inputs(plan, provenance, squares[0], squares[1]),
        modules=modules,
        dropped=tuple(module.stem for module in plan.modules if not module.kept),
    )


def _bytes(file: AdapterFile) -> int:
    """Bytes of the files that its tensors are in."""
    sources = {id(ref.source): ref.source for ref in file.tensors.values()}
    return sum(source.size() for source in sources.values())


def _module(
    figures: Figures,
    owners: Sequence[int],
    weights: Sequence[float],
    squares: list[list[float]],
    shape: tuple[int, int],
    layer: str,
    widths: Sequence[int],
    rank: int,
) -> ModuleReport:
    """One module's report; its inputs' squares and inner products are added up in `squares`."""
    shares: list[float | None] = [None] * len(weights)
    retention: list[float | None] = [None] * len(weights)
    whole = sum(figures.input_norms)
    for owner, size, inner in zip(owners, figures.input_norms, figures.inner, strict=True):
        shares[owner] = ratio(size, whole)
        retention[owner] = _quotient(inner * weights[owner], size * size)
        squares[0][owner] += size * size
        squares[1][owner] += inner
    seen = figures.norm if figures.norm > figures.floor else 0.0
    return ModuleReport(
        shape=shape,
        layer=layer,
        ranks=tuple(widths),
        rank=rank,
        norm=figures.norm,
        truncation=ratio(figures.truncation, seen),
        storage=ratio(figures.storage, seen),
        error=ratio(figures.total, seen),
        shares=tuple(shares),
        retention=tuple(retention),
        subnormal=figures.subnormal,
        route=figures.route,
        floor=figures.floor,
    )


def _weighted(figures: Figures, weights: Sequence[float]) -> Figures:
    """The figures with the inputs' multiplied by their weights."""
    sizes = zip(weights, figures.input_norms, strict=True)
    products = zip(weights, figures.inner, strict=True)
    return replace(
        figures,
        input_norms=tuple(abs(weight) * size for weight, size in sizes),
        inner=tuple(weight * product for weight, product in products),
    )


def _quotient(inner: float, squared: float) -> float | None:
    return inner / squared if squared > 0 else None


def _inputs(
    plan: Plan, provenance: Provenance, squares: Sequence[float], inner: Sequence[float]
) -> tuple[InputReport, ...]:
    sizes = [square**0.5 for square in squares]
    result = []
    for index, (file, origin) in enumerate(zip(plan.inputs, provenance.inputs, strict=True)):
        scales = sorted({site.scale for site in file.sites.values()} or {1.0})
        shown = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        origins = sorted({site.scale_from for site in file.sites.values()} or {"full deltas"})
        origin_text = origins[0] + (", …" if len(origins) > 1 else "")
        weight = origin.weight
        result.append(
            InputReport(
                name=origin.name,
                sha256=origin.sha256,
                weight=None if index in plan.mixed else weight,
                dialect=file.dialect,
                dtype=format_name(file.dtype),
                base=_public(file.base),
                modules=len(file.sites),
                rank=file.rank,
                scale=f"{shown}: {origin_text}",
                norm=sizes[index] / abs(weight) if weight else None,
                share=ratio(sizes[index], sum(sizes)) if weight else 0.0,
                retention=_quotient(inner[index] * weight, squares[index]),
            )
        )
    return tuple(result)


def _public(base: str | None) -> str | None:
    """A base model's name; of a path on somebody's machine only its last part."""
    if base and (base.startswith(("/", "~", ".")) or "\\" in base):
        return base.replace("\\", "/").rstrip("/").rpartition("/")[2] or None
    return base


def warnings(plan: Plan, report: Report) -> list[str]:
    """What methods say of their cuts, and where little of their result is left."""
    return [*_of_methods(report), *_of_what_is_left(plan, report)]


def _of_methods(report: Report) -> list[str]:
    """Each method's warnings, once, with the modules that they are about."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for stem, module in report.modules.items():
        for method in module.methods:
            for note in method.notes:
                found[method.name, note].append(stem)
    return [
        f"{name}: {note}: module {stems[0]}"
        + (f" and {len(stems) - 1} more" if len(stems) > 1 else "")
        for (name, note), stems in found.items()
    ]


def _of_what_is_left(plan: Plan, report: Report) -> list[str]:
    """A warning where a result of any rank was cut to a few, or where it is zero."""
    made = {
        part.site.scale_from
        for module in plan.modules
        for part in module.parts
        if part.site.kind == "elementwise"
    }
    if report.norm == 0.0 and any(one.norm for one in report.inputs):
        return ["the result is zero, though the adapters are not: see adapterops methods NAME"]
    if not made or report.error <= _FULL:
        return []
    kept = max(0.0, 1 - report.error**2)
    return [
        f"{' and '.join(sorted(made))} of dense changes is of full rank: rank {report.rank} keeps "
        f"{kept:.0%} of its energy (error {report.error:.2g}); adapterops bake BASE … --method "
        f"{min(made)} writes all of it, --space core or knots stays in few directions"
    ]


def notes(plan: Plan, report: Report, copy: bool) -> list[str]:
    """What a user should know that is no figure and no warning."""
    result = []
    if copy:
        result.append("one adapter with weight 1 and nothing to cut: its tensors are copied")
    if report.storage > _STORAGE_NOTE and plan.dtype != "F32":
        result.append(
            f"storing the factors in 16 bits costs {report.storage:.2g}; --dtype float32 avoids it"
        )
    if report.metric == "activation":
        blind = [
            stem
            for stem, module in report.modules.items()
            if module.metric_error is None and module.norm > module.floor
        ]
        if blind:
            more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
            result.append(f"{blind[0]}{more}: the activations make nothing of it, nor of its error")
    kinds = {part.site.kind for module in plan.modules for part in module.parts}
    kinds -= {"lora", "derived", "elementwise"}
    if kinds and len(plan.live) == 1 and report.parameters > report.parameters_before:
        result.append(
            f"as {' and '.join(sorted(kinds))} it took {report.parameters_before:,} numbers, "
            f"as LoRA of this rank it takes {report.parameters:,}"
        )
    near = sum(each.near or 0 for item in report.modules.values() for each in item.methods)
    if near > _NEAR * plan.dense:
        result.append(
            f"{near:,} entries lie within 2⁻²⁰ of a limit of the method: rounding decides on "
            "which side"
        )
    if report.norm == 0.0 and not any(one.norm for one in report.inputs):
        result.append("all inputs are zero: so is the result")
    if plan.left_out:
        result.append(f"--modules leaves out {plan.left_out} modules")
    return result
