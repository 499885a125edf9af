"""Planning a weighted sum from headers: inputs matched by module, and checked to go together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from adapterops.casts import READABLE
from adapterops.errors import IncompatibleError, NumericsError, UnsupportedError, UsageError
from adapterops.formats import diffusers
from adapterops.formats.components import lined_up
from adapterops.formats.model import AdapterFile, Site
from adapterops.formats.names import DIRECTORIES, factored_weight, two_names
from adapterops.plan import DensePart, DenseSum, Module, Part, Plan
from adapterops.target import (
    base_warnings,
    check_deltas,
    orientation_warnings,
    output_dtype,
    output_names,
)

_SMALLEST, _LARGEST = 1e-30, 1e30


def align(
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    *,
    modules: str | None = None,
    dtype: str = "keep",
    to: str | None = None,
) -> Plan:
    """Match the inputs' modules by stem and check that they go together.

    A module that an input lacks counts as zero for it. Raises IncompatibleError for shapes that
    differ or nothing in common, UsageError for an unknown dtype or a pattern without matches.
    """
    inputs = lined_up(inputs)
    warnings = [note for file in inputs for note in file.notes]
    for file, weight in zip(inputs, weights, strict=True):
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} of {file.path} is not a finite number")
    changed = _changed_by(inputs)
    _check_names(inputs, changed)
    _check_overlap(inputs, changed)
    gathered: dict[str, list[Part]] = defaultdict(list)
    dense: dict[str, list[DensePart]] = defaultdict(list)
    for index, (file, weight) in enumerate(zip(inputs, weights, strict=True)):
        for stem, site in file.sites.items() if weight else ():
            where = f"its scale {site.scale:g} ({site.scale_from}), weighted by {weight:g},"
            coefficient = weight * site.factor * site.scale
            check_coefficient(coefficient, where, file, stem)
            gathered[stem].append(Part(index, coefficient, site))
        for name, ref in file.deltas.items() if weight else ():
            check_coefficient(weight, f"the weight {weight:g}", file, name)
            dense[changed[index][name]].append(DensePart(index, weight, ref))
    if not gathered and not dense:
        raise NumericsError("every weight is zero: the result is nothing but zeros")
    chosen, sums, left_out = _select(gathered, dense, modules)
    _check_owners(gathered, chosen)
    deltas = [_dense_sum(name, parts, chosen, inputs) for name, parts in sorted(sums.items())]
    target = to or inputs[0].dialect
    check_deltas(deltas, target, inputs[0])
    names = output_names(chosen, inputs[0], target)
    result = tuple(
        _module(stem, name, tuple(chosen[stem]), inputs, target)
        for stem, name in sorted(names.items(), key=lambda pair: _natural(pair[0]))
    )
    warnings += base_warnings(inputs) + orientation_warnings(inputs)
    if not any(module.columns for module in result) and not deltas:
        raise IncompatibleError("all adapters have rank 0: there is nothing to write")
    dialects = {module.dialect for module in result} or {target}
    return Plan(
        inputs=tuple(inputs),
        weights=tuple(weights),
        modules=result,
        deltas=tuple(deltas),
        dialect=dialects.pop() if len(dialects) == 1 else "mixed",
        dtype=output_dtype(dtype, inputs[0]),
        left_out=left_out,
        warnings=tuple(warnings),
    )


def _natural(stem: str) -> tuple[str, int]:
    """Experts in the order of their numbers, everything else by name."""
    head, bracket, index = stem.rpartition("[")
    return (head, int(index[:-1])) if bracket and index[:-1].isdigit() else (stem, 0)


def _changed_by(inputs: Sequence[AdapterFile]) -> list[dict[str, str]]:
    """For every input: full delta -> its name with the module's name as the factors have it.

    Old diffusers files leave out `unet.`, which modules are called by here; whether a delta's name
    is such a one, only the names of the factors tell.
    """
    stems = {stem for file in inputs for stem in file.sites}
    dotted = any(s.dialect == "diffusers" for file in inputs for s in file.sites.values())

    def known(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        full = diffusers.canonical(stem)
        return f"{full}.{suffix}" if stem not in stems and (full in stems or dotted) else name

    return [{name: known(name) for name in file.deltas} for file in inputs]


def _check_names(inputs: Sequence[AdapterFile], changed: Sequence[Mapping[str, str]]) -> None:
    """Modules are matched by stem: that works where no module goes by two names."""
    clash = two_names(
        {
            file.path: [*file.sites, *map(_changed, names.values())]
            for file, names in zip(inputs, changed, strict=True)
        }
    )
    families = {
        site.dialect in DIRECTORIES: file
        for file in reversed(inputs)
        for site in file.sites.values()
    }
    if clash is None and len(families) > 1:
        one, other = families[True], families[False]
        clash = f"{one.path} is in the {one.dialect} dialect, {other.path} in {other.dialect}"
    if clash is not None:
        raise UnsupportedError(
            f"{clash}; matching module names across dialects is not supported yet",
            hint="convert one of them with the tool that wrote it",
        )


def _dense_sum(
    name: str,
    parts: Sequence[DensePart],
    chosen: dict[str, list[Part]],
    inputs: Sequence[AdapterFile],
) -> DenseSum:
    """A full delta with what the other inputs change by factors in the same weight."""
    first = parts[0].ref
    for part in parts:
        if part.ref.shape != first.shape:
            raise IncompatibleError(
                f"{inputs[parts[0].input].path} has {list(first.shape)}, "
                f"{inputs[part.input].path} has {list(part.ref.shape)}; "
                "are both adapters of the same base model?",
                module=name,
            )
        if part.ref.dtype not in READABLE:
            raise UnsupportedError(
                f"is of type {part.ref.dtype}, which is no number format of a delta", module=name
            )
    weight = factored_weight(name, chosen)
    factors = chosen.pop(weight) if weight else []
    for low in factors:
        if low.site.shape != (first.shape[0], math.prod(first.shape[1:])):
            raise IncompatibleError(
                f"{inputs[parts[0].input].path} changes it by a full delta of shape "
                f"{list(first.shape)}, {inputs[low.input].path} by factors of "
                f"{_describe(low.site)}; are both adapters of the same base model?",
                module=low.site.stem,
            )
    return DenseSum(parts[0].ref.name, first.shape, tuple(parts), tuple(factors))


def check_coefficient(coefficient: float, made: str, file: AdapterFile, stem: str) -> None:
    """Raise UsageError, naming what `made` it, for a coefficient that cannot be computed with.

    Products of two such factors must neither vanish nor overflow in float64.
    """
    if not _SMALLEST <= abs(coefficient) <= _LARGEST:
        raise UsageError(
            f"{made} makes the coefficient {coefficient:g}; coefficients from {_SMALLEST:g} to "
            f"{_LARGEST:g} can be computed with",
            path=file.path,
            module=stem,
            hint="if the file states a wrong alpha, --alpha PATH=X gives the right one",
        )


def _check_overlap(inputs: Sequence[AdapterFile], deltas: Sequence[Mapping[str, str]]) -> None:
    """Every input must share a module with some other one."""
    owners: dict[str, int] = defaultdict(int)
    changed = [
        {*file.sites, *file.left_out, *map(_changed, names.values())}
        for file, names in zip(inputs, deltas, strict=True)
    ]
    for stems in changed:
        for stem in stems:
            owners[stem] += 1
    for index, (file, stems) in enumerate(zip(inputs, changed, strict=True)):
        if len(inputs) > 1 and not any(owners[stem] > 1 for stem in stems):
            other = 0 if index else 1
            raise IncompatibleError(
                f"has no module in common with the other inputs: it names {min(stems)!r}, "
                f"{inputs[other].path} names {min(changed[other])!r}; "
                "are they adapters of the same base model?",
                path=file.path,
            )


def _changed(name: str) -> str:
    """The module that a full delta changes."""
    return name.rpartition(".")[0]


def _select(
    gathered: dict[str, list[Part]], dense: dict[str, list[DensePart]], pattern: str | None
) -> tuple[dict[str, list[Part]], dict[str, list[DensePart]], int]:
    """The modules that a pattern matches, and how many it leaves out."""
    if pattern is None:
        return gathered, dense, 0
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--modules {pattern!r} is no regular expression ({error})") from None
    chosen = {stem: parts for stem, parts in gathered.items() if compiled.fullmatch(stem)}
    sums = {name: parts for name, parts in dense.items() if compiled.fullmatch(_changed(name))}
    if not chosen and not sums:
        raise UsageError(
            f"--modules {pattern!r} matches none of the {len(gathered)} modules as a whole",
            hint=f"the first is {min([*gathered, *map(_changed, dense)])!r}",
        )
    return chosen, sums, len(gathered) + len(dense) - len(chosen) - len(sums)


def _check_owners(gathered: Mapping[str, list[Part]], chosen: Mapping[str, list[Part]]) -> None:
    """PEFT tells nested parameters of one module apart by their number: all stay, or none."""
    pairs: dict[str, set[str]] = defaultdict(set)
    for stem, parts in gathered.items():
        if parts[0].site.owned:
            pairs[parts[0].site.owner].add(stem.partition("[")[0])
    kept = {stem.partition("[")[0] for stem in chosen}
    for owner, stems in pairs.items():
        if kept & stems not in (set(), stems):
            raise UsageError(
                f"--modules takes {min(kept & stems)} and leaves out {min(stems - kept)}, "
                f"two parameters of {owner} that PEFT can only tell apart together"
            )


def _module(
    stem: str, name: str, parts: tuple[Part, ...], inputs: Sequence[AdapterFile], to: str
) -> Module:
    shown = next((part for part in parts if part.site.kernel), parts[0])
    first = shown.site
    for part in parts:
        site = part.site
        if _layout(site) != _layout(first):
            raise IncompatibleError(
                f"{inputs[shown.input].path} adapts {_experts(first)}, "
                f"{inputs[part.input].path} {_experts(site)}: which tensors belong together cannot "
                "be told",
                module=stem,
            )
        if site.shape != first.shape or _kernels_differ(site, first):
            raise IncompatibleError(
                f"{inputs[shown.input].path} has {_describe(first)}, "
                f"{inputs[part.input].path} has {_describe(site)}; "
                "are both adapters of the same base model?",
                module=stem,
            )
        if "embedding" in (site.layer, first.layer) and site.layer != first.layer:
            raise IncompatibleError(
                f"is an {first.layer} layer in {inputs[shown.input].path} and a {site.layer} "
                f"layer in {inputs[part.input].path}",
                module=stem,
            )
    by_module = to == inputs[0].dialect and to not in DIRECTORIES
    dialect = parts[0].site.dialect if by_module else to
    return Module(name, dialect, first.layer, first.shape, first.kernel, parts)


def _kernels_differ(site: Site, other: Site) -> bool:
    """Whether two kernels cannot be the same; factors that are matrices do not show theirs."""
    return bool(site.kernel and other.kernel) and _extent(site.kernel) != _extent(other.kernel)


def _layout(site: Site) -> tuple[int, tuple[str, ...]]:
    """How many experts share a tensor, and which parameters of their module are adapted."""
    nested = site.expert is not None or site.stem.endswith(".base_layer")
    return (site.expert[1] if site.expert else 1, site.owned if nested else ())


def _experts(site: Site) -> str:
    count = f"{site.expert[1]} experts" if site.expert else "one matrix"
    return f"{count} of {', '.join(site.owned) or 'the module'}"


def _extent(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution is a linear layer."""
    return kernel if any(size != 1 for size in kernel) else ()


def _describe(site: Site) -> str:
    kernel = f", kernel={list(site.kernel)}" if site.kernel else ""
    return f"out={site.shape[0]}, in={site.shape[1] // math.prod(site.kernel)}{kernel}"
