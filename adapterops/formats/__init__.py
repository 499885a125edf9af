"""Reading adapters: names to sites by grammar, scale from wherever the dialect keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterops.errors import AdapterOpsError, FormatError
from adapterops.files.source import LocalFile, Source, read_header
from adapterops.formats import diffusers, mlx, peft
from adapterops.formats.group import (
    Tensors,
    dialect_of,
    group,
    not_an_adapter,
    style_of,
    unclaimed,
)
from adapterops.formats.locate import (
    Located,
    locate,
    missing_pickle_permission,
    read_text,
)
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.formats.names import factored_weight
from adapterops.formats.scale import ScaleFinder
from adapterops.formats.sites import check_magnitudes, make_sites


def open_adapter_file(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    alpha_wins: bool = False,
    allow_pickle: bool = False,
) -> AdapterFile:
    """What the adapter at `path` says of itself; no factor is read.

    `alpha` serves modules that have no scale anywhere, all modules if `alpha_wins`.
    Raises FileError, FormatError, IncompatibleError (no scale, or two that disagree) and
    UnsupportedError (a kind that has no low-rank delta).
    """
    file = read_adapter(path, alpha=alpha, alpha_wins=alpha_wins, allow_pickle=allow_pickle)
    for problem in file.problems:
        raise problem
    return file


def read_adapter(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    alpha_wins: bool = False,
    allow_pickle: bool = False,
) -> AdapterFile:
    """`open_adapter_file` for looking: what keeps it from being summed is listed in `problems`.

    A module with a problem of its own is left out; one without a scale has NaN. Raises FileError
    and FormatError for what is missing, unreadable or no adapter at all.
    """
    place = locate(path)
    refs, metadata = _open_tensors(place, allow_pickle)
    config, embedded = _configs(place, metadata)
    heads = [str(name) for name in peft.listed(config or embedded, "modules_to_save")]
    tensors = group(refs, place.weights, heads)
    problems, relative = tensors.problems, []
    dialects = {
        stem: dialect_of(stem, module.spelling, config) for stem, module in tensors.groups.items()
    }
    shared = bool(place.shared_config and config)
    if shared and (embedded or not _belongs(config, tensors, dialects, place)):
        config, shared = {}, False  # of another file in the same folder
    for text, where in ((config, place.config), (embedded, place.weights)):
        for part in diffusers.components(text) if text else ():
            own = diffusers.component_config(text, part)
            problems += _collected(peft.check_supported, own, where)
            relative += _collected(peft.check_unmoved, own, where)
    problems += relative
    if not refs or not (tensors.groups or tensors.deltas or problems):
        raise not_an_adapter(refs, place.weights)
    sites, wrong = make_sites(tensors.groups, dialects, config or embedded, place.weights)
    dora = _collected(check_magnitudes, sites, place.weights)
    relative += dora
    problems += wrong + dora
    problems += unclaimed(tensors, dialects, place.weights)
    problems += _doubled(sites, tensors.deltas, place.weights)
    finder = ScaleFinder(os.fspath(path), metadata, alpha, alpha_wins)
    if config and place.config:
        problems += _collected(finder.add_config, config, place.config)
    if embedded:
        where = f"the header's {diffusers.METADATA_KEY}"
        problems += _collected(finder.add_config, embedded, where)
    for stem, site in sites.items():
        try:
            sites[stem] = finder.scaled(site)
        except AdapterOpsError as problem:
            problems.append(problem)
    if shared:
        finder.notes.append(f"{place.weights}: its config is taken to be {place.config}")
    config_file = place.config if config else None
    config = config or embedded
    return AdapterFile(
        path=os.fspath(path),
        source=next(iter(refs.values())).source,
        dialect=_common(site.dialect for site in sites.values())
        or _common(dialects.values())  # where no module can be read
        or "kohya",
        sites=sites,
        extras=tensors.rest,
        tensors=refs,
        deltas=tensors.deltas,
        config=config,
        metadata=metadata,
        style=style_of(tensors.groups, dialects),
        base=_base(config, metadata),
        notes=(*place.notes, *dict.fromkeys(finder.notes)),
        weights_file=place.weights,
        config_file=config_file,
        side_files=place.side_files,
        problems=tuple(problems),
        relative=tuple(relative),
    )


def _collected(check: Callable[..., None], *arguments: Any) -> list[AdapterOpsError]:
    """What `check` raises, as a list."""
    try:
        check(*arguments)
    except AdapterOpsError as problem:
        return [problem]
    return []


def _common(dialects: Iterable[str]) -> str | None:
    """The dialect of all modules, "mixed" where they differ."""
    found = set(dialects)
    return "mixed" if len(found) > 1 else next(iter(found), None)


def _doubled(
    sites: Mapping[str, Site], deltas: Mapping[str, Ref], path: str
) -> list[AdapterOpsError]:
    """Modules changed by factors and by a dense delta at once: loaders apply one of the two."""
    found = ((name, factored_weight(name, sites)) for name in deltas)
    return [
        FormatError(
            f"has factors and a full delta ({name!r}), of which loaders apply only one",
            path=path,
            module=stem,
        )
        for name, stem in found
        if stem
    ]


def _open_tensors(place: Located, allow_pickle: bool) -> tuple[dict[str, Ref], Mapping[str, str]]:
    if place.is_pickle and not allow_pickle:
        raise missing_pickle_permission(place.weights)
    source: Source = _open_pickle(place) if place.is_pickle else LocalFile(place.weights)
    header = read_header(source)
    refs = {
        name: Ref(
            source, name, entry.dtype, entry.shape, header.data_start + entry.start, entry.nbytes
        )
        for name, entry in header.tensors.items()
    }
    return refs, header.metadata


def _open_pickle(place: Located) -> Source:
    from adapterops.files.pickles import open_pickle  # rarely needed, slow to import

    return open_pickle(place.weights)


def _configs(place: Located, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config beside the weights and the one in their header, {} for one that is not there."""
    beside: dict[str, Any] = {}
    embedded: dict[str, Any] = {}
    if place.config:
        beside = peft.read_config(read_text(place.config), place.config)
    text = metadata.get(diffusers.METADATA_KEY)
    if text:
        embedded = peft.read_config(text, f"{place.weights} ({diffusers.METADATA_KEY})")
    return beside, embedded


def _belongs(
    config: Mapping[str, Any], tensors: Tensors, dialects: Mapping[str, str], place: Located
) -> bool:
    """Whether a config that lies in the same folder is about this file: its dialect, its ranks."""
    spellings = {module.spelling for module in tensors.groups.values()}
    if spellings == {"mlx"}:
        return bool(mlx.parameters(config))
    if not {"peft", "embedding", "lycoris"}.issuperset(spellings):
        return False
    if "lycoris" in spellings or config.get("target_parameters"):
        return set(dialects.values()) == {"peft"}
    scales = peft.Scales(config, place.config or "")
    ranks = {
        stem: module.parts["A"].shape[:1]
        for stem, module in tensors.groups.items()
        if "A" in module.parts
    }
    return all(
        scales.rank(peft.module_path(stem), rank[0]) in (None, rank[0])
        for stem, rank in ranks.items()
        if rank
    )


def _base(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    base = config.get("base_model_name_or_path") or config.get("model")
    base = base or metadata.get("ss_sd_model_name")
    return str(base) if base else None


__all__ = ["AdapterFile", "Ref", "Site", "open_adapter_file", "read_adapter"]
