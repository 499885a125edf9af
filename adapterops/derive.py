"""From adapter files and a rule to the adapter that the rule makes of them; headers alone are read.

It goes wherever a file goes: into sums, ranks, other dialects, a base model, another rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adapterops.align import align, check_coefficient
from adapterops.derived.combination import Combination, Source, gives_rows
from adapterops.derived.rule import Rule
from adapterops.derived.whole import Whole
from adapterops.errors import NumericsError, UnsupportedError, UsageError
from adapterops.formats.kinds import KINDS
from adapterops.formats.model import AdapterFile, Site
from adapterops.metric import Inputs
from adapterops.plan import Module, Plan
from adapterops.provenance import distinct, label_of


def derived(
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    rule: Rule,
    modules: str | None = None,
    inputs: Sequence[Mapping[str, Inputs]] = (),
) -> AdapterFile:
    """The adapter that `rule` makes of `files`, each with its weight, of the `modules` that match.

    `inputs` are those of each file's modules, by stem, where the rule asks for them.

    A module that some lack is zero for them. Raises what aligning them raises, UsageError for a
    number of adapters that the method does not take and weights that cannot be computed with,
    NumericsError where all are zero, UnsupportedError for full deltas and biases, which are no
    matrices, and for changes that are relative to a base model.
    """
    rule.method.check_count(len(files))
    for file in files:
        for problem in file.problems:
            raise problem
    if not any(weights):
        raise NumericsError("every weight is zero: the result is nothing but zeros")
    plan = align(files, [1.0] * len(files), modules=modules)
    files = plan.inputs
    name = rule.method.name
    for delta in plan.deltas:
        raise UnsupportedError(
            f"{name} is for factors, and this is a full delta",
            path=files[delta.parts[0].input].path,
            module=delta.name,
            hint="leave it out with --modules, or merge by linear",
        )
    if rule.is_whole:
        _check_weights(plan, name)
    labels = distinct([label_of(file) for file in files])
    whole = Whole(rule, np.array(weights)) if rule.is_whole else None
    sites = {
        module.source: _site(
            module, _sources(module, files, weights, labels, name, inputs), rule, whole
        )
        for module in plan.modules
    }
    first = files[0]
    return AdapterFile(
        path=f"{name}({', '.join(file.path for file in files)})",
        source=first.source,
        dialect=first.dialect,
        sites=sites,
        extras={},
        tensors={},
        config=first.config,
        metadata=first.metadata,
        style=first.style,
        base=first.base,
        notes=plan.warnings,
        weights_file=first.weights_file,
        made_of=tuple(zip(weights, files, strict=True)),
        made_by={
            key: value
            for key, value in {**rule.record, "modules": modules}.items()
            if value is not None
        },
        label=f"{name}({', '.join(labels)})",
    )


def _check_weights(plan: Plan, name: str) -> None:
    """Raise UsageError where an adapter has several weights, and the rule looks at all of it."""
    for module in plan.modules:
        for part in module.parts:
            if part.site.factor != 1.0:
                raise UsageError(
                    f"{name} with scope=adapter takes one weight for each adapter",
                    path=plan.inputs[part.input].path,
                    module=module.stem,
                    hint="leave out --module-weights, or scope=adapter",
                )


def _sources(
    module: Module,
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    labels: Sequence[str],
    name: str,
    inputs: Sequence[Mapping[str, Inputs]],
) -> tuple[Source, ...]:
    sites: dict[int, Site] = {}
    for part in module.parts:
        path = files[part.input].path
        if "bias" in part.site.parts:
            raise UnsupportedError(
                f"{name} is for matrices, and this adapter changes a bias too",
                path=path,
                module=module.stem,
                hint="merge by linear",
            )
        if part.site.kind not in KINDS and not part.site.made:
            raise UnsupportedError(
                f"{name} is for factors, and this is {part.site.kind}, a dense change",
                path=path,
                module=module.stem,
                hint="adapterops convert --base makes it a LoRA first",
            )
        sites[part.input] = part.site
    sources = []
    for i, (file, weight, label) in enumerate(zip(files, weights, labels, strict=True)):
        site = sites.get(i)
        factor = site.factor if site else 1.0
        if site and weight:
            made = f"its scale {site.scale:g} ({site.scale_from}), weighted by {weight:g},"
            check_coefficient(weight * factor * site.scale, made, file, site.stem)
        seen = inputs[i][site.stem] if site and inputs else None
        sources.append(Source(file, site, weight * factor, label, seen))
    return tuple(sources)


def _site(module: Module, sources: tuple[Source, ...], rule: Rule, whole: Whole | None) -> Site:
    first = module.parts[0].site
    by_rows = gives_rows(rule, [source.site for source in sources])
    rank = min(module.shape) if by_rows else _width(sources, rule, module.shape)
    made = Combination(rule, module.stem, module.shape, rank, sources, whole)
    if whole:
        whole.modules.append(made)
    return Site(
        stem=first.stem,
        dialect=module.dialect,
        kind="elementwise" if by_rows else "derived",
        layer=module.layer,
        shape=module.shape,
        kernel=module.kernel,
        rank=rank,
        dim=rank,
        parts={},
        expert=first.expert,
        owner=first.owner,
        owned=first.owned,
        meant=first.meant,
        scale=1.0,
        scale_from=rule.method.name,
        made=made,
    )


def _width(sources: Sequence[Source], rule: Rule, shape: tuple[int, int]) -> int:
    """Columns that the result's factors may take."""
    ranks = [source.site.rank if source.site else 0 for source in sources]
    if rule.method.signature == "gram" and rule.calibrate != "svc":
        return sum(ranks)
    return min(rule.method.columns(ranks, rule.values), *shape)
