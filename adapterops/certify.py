"""From measured figures to the certificate: totals, inputs and modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from adapterops.casts import format_name
from adapterops.certificate import Figures, InputReport, ModuleReport, Report, ratio, total
from adapterops.formats.model import AdapterFile
from adapterops.plan import Plan
from adapterops.provenance import Provenance

_STORAGE_NOTE = 1e-3


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
        for part in module.parts:
            widths[part.input] = part.site.rank
        owners = [part.input for part in module.parts]
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
                weight=weight,
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
    kinds = {part.site.kind for module in plan.modules for part in module.parts} - {"lora"}
    if kinds and len(plan.live) == 1 and report.parameters > report.parameters_before:
        result.append(
            f"as {' and '.join(sorted(kinds))} it took {report.parameters_before:,} numbers, "
            f"as LoRA of this rank it takes {report.parameters:,}"
        )
    if report.norm == 0.0:
        result.append("all inputs are zero: so is the result")
    if plan.left_out:
        result.append(f"--modules leaves out {plan.left_out} modules")
    return result
