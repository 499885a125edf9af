"""From an opened adapter to what `inspect` says of it: headers only, no tensor is read."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from adapterops.casts import format_name
from adapterops.files.output import PROVENANCE_KEY
from adapterops.files.source import LocalFile
from adapterops.formats import AdapterFile, Ref, Site
from adapterops.inspection.report import FamilyInfo, Inspection, ModuleInfo, ScaleInfo, TensorInfo
from adapterops.inspection.stems import families, ranges

_SECOND_DOWNLOAD = re.compile(r" ?\(\d+\)$")
_PARTS = ("lora_", "unet", "te", "base_model.")
_DOUBLED = re.compile(
    r"(lora_)?(?P<part>unet|te\d?|text_encoder|base_model\.model)[_.](?P=part)[_.]"
)


def describe(
    file: AdapterFile, *, base_parameters: int | None = None, brief: bool = False
) -> Inspection:
    """Everything that the headers of an adapter say. `brief` leaves out its single modules.

    `base_parameters` is the number of parameters of the base model, where it is known.
    """
    sites = file.sites
    own = {stem: _parameters(site) for stem, site in sites.items()}
    claimed = {ref.name for site in sites.values() for ref in site.parts.values()}
    claimed.update(file.extras, file.deltas)
    unread = {name: ref for name, ref in file.tensors.items() if name not in claimed}
    modules = {} if brief else {stem: _module(site, own[stem]) for stem, site in sites.items()}
    alike = Counter(map(_traits, sites.values()))  # a few sorts of modules, however many there are
    dtypes = Counter(ref.dtype for ref in file.tensors.values())
    kinds = _counted((traits.kind, count) for traits, count in alike.items())
    return Inspection(
        path=file.path,
        weights_file=os.path.basename(file.weights_file),
        config_file=os.path.basename(file.config_file) if file.config_file else None,
        dialect=file.dialect,
        dialects=_counted((traits.dialect, count) for traits, count in alike.items()),
        kinds=kinds,
        layer_types=_counted((traits.layer, count) for traits, count in alike.items()),
        base=file.base,
        module_count=len(sites),
        ranks=_by_size((traits.rank, count) for traits, count in alike.items()),
        dims=_by_size((traits.dim, count) for traits, count in alike.items()),
        scales=_scales(alike),
        dtypes=_counted((format_name(name), count) for name, count in dtypes.items()),
        size=LocalFile(file.weights_file).size(),
        parameters=sum(own.values()),
        kind_parameters={
            kind: sum(own[stem] for stem, site in sites.items() if site.kind == kind)
            for kind in kinds
        },
        adapted=sum(site.shape[0] * site.shape[1] for site in sites.values()),
        base_parameters=base_parameters,
        extras=_tensors(file.extras),
        deltas=_tensors(file.deltas),
        unread=_tensors(unread),
        side_files=file.side_files,
        provenance=_provenance(file.metadata),
        notes=(*file.notes, *quirks(file)),
        problems=tuple(problem.to_dict() for problem in file.problems),
        families=_families(modules),
        modules=modules,
    )


def quirks(file: AdapterFile) -> list[str]:
    """What is odd about an adapter by its names and headers alone, and harmless by itself."""
    found = []
    name = PurePath(file.weights_file).stem
    if _SECOND_DOWNLOAD.search(name):
        found.append(f"called {os.path.basename(file.weights_file)!r}: a second download?")
    doubled = [stem for stem in file.sites if stem.startswith(_PARTS) and _DOUBLED.match(stem)]
    if doubled:
        found.append(f"{len(doubled)} modules have a doubled prefix, such as {doubled[0]!r}")
    if not file.config and any(site.dialect in ("peft", "mlx") for site in file.sites.values()):
        found.append("no adapter_config.json: nothing says the base model, the task or the heads")
    assumed = sum(site.scale_from.startswith("assumed") for site in file.sites.values())
    if assumed:
        found.append(f"nothing says the scale of {_all(assumed, len(file.sites))}: 1 is assumed")
    if len({ref.dtype for site in file.sites.values() for ref in _factors(site)}) > 1:
        found.append("its factors are stored in several number formats")
    return found


def _all(count: int, total: int) -> str:
    return f"the {total} modules" if count == total else f"{count} of {total} modules"


def _factors(site: Site) -> list[Ref]:
    """A module's tensors, without alpha, which is no parameter."""
    return [ref for role, ref in site.parts.items() if role != "alpha"]


def _parameters(site: Site) -> int:
    return sum(math.prod(ref.shape) for ref in _factors(site))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _module(site: Site, parameters: int) -> ModuleInfo:
    return ModuleInfo(
        dialect=site.dialect,
        kind=site.kind,
        layer=site.layer,
        shape=site.shape,
        kernel=site.kernel,
        rank=site.rank,
        dim=site.dim,
        scale=_known(site.scale),
        scale_from=site.scale_from,
        alpha=site.alpha,
        dtype=format_name(site.dtype),
        parameters=parameters,
    )


class _Traits(NamedTuple):
    """What modules of one sort have in common."""

    dialect: str
    kind: str
    layer: str
    rank: int
    dim: int
    scale: float | None
    alpha: float | None
    origin: str


def _traits(site: Site) -> _Traits:
    return _Traits(
        site.dialect,
        site.kind,
        site.layer,
        site.rank,
        site.dim,
        _known(site.scale),
        site.alpha,
        site.scale_from,
    )


def _added(counts: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for value, count in counts:
        total[value] = total.get(value, 0) + count
    return total


def _counted(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """How often each value occurs, the commonest first."""
    return dict(sorted(_added(counts).items(), key=lambda item: (-item[1], item[0])))


def _by_size(counts: Iterable[tuple[int, int]]) -> dict[int, int]:
    return dict(sorted(_added(counts).items()))


def _scales(alike: Mapping[_Traits, int]) -> tuple[ScaleInfo, ...]:
    counts = _added(((t.scale, t.alpha, t.origin), count) for t, count in alike.items())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return tuple(ScaleInfo(scale, alpha, origin, n) for (scale, alpha, origin), n in ordered)


def _families(modules: Mapping[str, ModuleInfo]) -> tuple[FamilyInfo, ...]:
    names = tuple(sorted(modules))
    result = []
    for family in families(names) if names else ():
        members = [modules[names[position]] for position in family.members]
        result.append(
            FamilyInfo(
                name=family.name,
                modules=len(members),
                where=ranges(family.indices),
                missing=ranges(family.missing),
                kinds=tuple(sorted({module.kind for module in members})),
                shapes=tuple(sorted({module.shape for module in members})),
                ranks=tuple(sorted({module.rank for module in members})),
                dims=tuple(sorted({module.dim for module in members})),
                scales=tuple(dict.fromkeys(module.scale for module in members)),
                parameters=sum(module.parameters for module in members),
            )
        )
    return tuple(result)


def _tensors(refs: Mapping[str, Ref]) -> tuple[TensorInfo, ...]:
    names = tuple(sorted(refs))
    groups: dict[str, list[Ref]] = defaultdict(list)
    for family in families(names) if names else ():
        groups[family.name] += [refs[names[position]] for position in family.members]
    return tuple(
        TensorInfo(
            name=name,
            tensors=len(members),
            parameters=sum(math.prod(ref.shape) for ref in members),
            bytes=sum(ref.nbytes for ref in members),
            dtypes=tuple(sorted({format_name(ref.dtype) for ref in members})),
        )
        for name, members in groups.items()
    )


def _provenance(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """What adapterops wrote into the header, if it did."""
    try:
        made = json.loads(metadata.get(PROVENANCE_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None
