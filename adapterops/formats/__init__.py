"""Reading adapters: names to sites by grammar, scale from wherever the dialect keeps it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from adapterops.files.source import LocalFile, Source, read_header
from adapterops.formats import diffusers, peft
from adapterops.formats.group import dialect_of, group, make_sites, not_an_adapter, style_of
from adapterops.formats.locate import (
    Located,
    locate,
    missing_pickle_permission,
    read_text,
)
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.formats.scale import ScaleFinder


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
    UnsupportedError (a kind that is no plain LoRA).
    """
    place = locate(path)
    refs, metadata = _open_tensors(place, allow_pickle)
    grouped, spellings, rest = group(refs, place.weights)
    config, embedded = _configs(place, metadata)
    shared = bool(place.shared_config and config)
    if shared and (embedded or not _belongs(config, grouped, spellings, place)):
        config, shared = {}, False  # of another file in the same folder
    for text, where in ((config, place.config), (embedded, place.weights)):
        for part in ("", *diffusers.COMPONENTS):
            peft.check_supported(diffusers.component_config(text, part), where or place.weights)
    if not grouped:
        raise not_an_adapter(refs, place.weights)
    dialect = dialect_of(grouped, spellings, config, place.weights)
    sites, extras = make_sites(grouped, spellings, rest, dialect, place.weights)
    resolver = ScaleFinder(os.fspath(path), dialect, metadata, alpha, alpha_wins)
    if config and place.config:
        resolver.add_config(config, place.config)
    if embedded:
        resolver.add_config(embedded, f"the header's {diffusers.METADATA_KEY}")
    sites = {stem: resolver.scaled(site) for stem, site in sites.items()}
    if shared:
        resolver.notes.append(f"{place.weights}: its config is taken to be {place.config}")
    config_file = place.config if config else None
    config = config or embedded
    return AdapterFile(
        path=os.fspath(path),
        source=next(iter(refs.values())).source,
        dialect=dialect,
        sites=sites,
        extras=extras,
        config=config,
        metadata=metadata,
        style=style_of(spellings, dialect),
        base=_base(config, metadata),
        notes=(*place.notes, *dict.fromkeys(resolver.notes)),
        weights_file=place.weights,
        config_file=config_file,
        side_files=place.side_files,
    )


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
    config: Mapping[str, Any],
    grouped: Mapping[str, Mapping[str, Ref]],
    spellings: Mapping[str, str],
    place: Located,
) -> bool:
    """Whether a config that lies in the same folder is about this file: PEFT names, its ranks."""
    if not {"peft", "embedding"}.issuperset(spellings.values()):
        return False
    scales = peft.Scales(config, place.config or "")
    ranks = {stem: parts["A"].shape[:1] for stem, parts in grouped.items() if "A" in parts}
    return all(
        scales.rank(peft.module_path(stem), rank[0]) in (None, rank[0])
        for stem, rank in ranks.items()
        if rank
    )


def _base(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    base = config.get("base_model_name_or_path") or metadata.get("ss_sd_model_name")
    return str(base) if base else None


__all__ = ["AdapterFile", "Ref", "Site", "open_adapter_file"]
