"""What the base calls the modules of one adapter, by names alone.

By one table for image models, by one renaming of prefixes for others; flat stems of kohya are
looked up among the base's paths, flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapterops.basemodel import ldm, names
from adapterops.basemodel.parts import Parts
from adapterops.basemodel.prefixes import Renaming, renaming
from adapterops.changes.pieces import Reading, fit
from adapterops.changes.places import PARAMETERS, Base, head_of, readings
from adapterops.errors import IncompatibleError
from adapterops.formats import diffusers
from adapterops.formats.model import AdapterFile, Site

_FLAT = ("lora_", "lycoris_")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the base has each module (by stem) and full delta (by name) of an adapter.

    Those of a table have `parts` of tensors, others the `paths` of their module; `renaming` is that
    of all other names. `loaded` are modules by the name that loaders have, with the base's, and
    `lacking` those that the base has not.
    """

    paths: Mapping[str, str]
    parts: Mapping[str, Parts]
    renaming: Renaming
    loaded: Mapping[str, str]
    lacking: tuple[str, ...] = ()


def addresses(
    file: AdapterFile, base: Base, sites: Mapping[str, Site], deltas: Sequence[str]
) -> Addresses:
    """The base's names for `sites`, by stem, and full `deltas`, by name.

    Raises IncompatibleError, naming the first few and how many, for what the base lacks or may have
    under two names.
    """
    found = search(base, sites, deltas)
    _check_there(found.lacking, len(sites) + len(deltas), file, base)
    return found


def search(
    base: Base,
    sites: Mapping[str, Site],
    deltas: Sequence[str],
    fits: Callable[[Reading, Site], bool] = fit,
) -> Addresses:
    """`addresses` of whatever the base has; what it lacks is listed.

    `fits` says whether a weight may be what a module changes, where names leave a choice. Raises
    IncompatibleError for what the base may have under two names.
    """
    parts: dict[str, Parts] = {}
    flat: dict[str, str] = {}
    dotted: dict[str, str] = {}
    lacking: list[str] = []
    for key in (*sites, *deltas):
        site = sites.get(key)
        stem = key if site else key.rpartition(".")[0]
        known = ldm.find(stem, base.table) if base.table else None
        if known:
            parts[key] = known
        elif site.dialect == "kohya" if site else stem.startswith(_FLAT) and "." not in stem:
            path = names.unflattened(stem, base.names)
            flat |= {key: path} if path else {}
            lacking += [] if path else [key]
        else:
            dotted[key] = _path(stem, site)

    def holds(key: str, path: str, by_shape: bool) -> bool:
        path = base.names.stored(path)
        if key not in sites:
            return f"{path}.{PARAMETERS[key.rpartition('.')[2]]}" in base.tensors
        ways = readings(sites[key], path, base)
        return any(fits(way, sites[key]) for way in ways) if by_shape else bool(ways)

    found = renaming(
        dotted,
        base.names.heads,
        holds,
        pipeline=base.model.is_pipeline,
        where=base.model.path,
    )
    moved = {key: found(path) for key, path in dotted.items()}
    loaded = {path: base.names.loaded[path] for path in moved.values() if path in base.names.loaded}
    paths = {key: base.names.stored(path) for key, path in moved.items()}
    return Addresses({**flat, **paths}, parts, found, loaded, (*lacking, *found.lacking))


def tensor_of(found: Addresses, base: Base, path: str) -> str | None:
    """The base's name of a parameter that the adapter calls `path`, None if it has none.

    A head may have another name there.
    """
    owner, _, last = path.rpartition(".")
    parts = ldm.find(owner, base.table) if base.table else None
    if parts and len(parts) == 1 and parts[0].rows is None and not parts[0].turned:
        return parts[0].tensor if last == "weight" else parts[0].bias
    moved = f"{base.names.stored(found.renaming(owner))}.{last}"
    for name in (moved, path):
        if name in base.tensors:
            return name
    head = head_of(owner, base) if last == "weight" else None
    return head.name if head and head.name in base.tensors else None


def _path(stem: str, site: Site | None) -> str:
    """The module path that a stem names; of a parameter, or a stack of experts, its owner's."""
    if site is None:
        return diffusers.canonical(stem)
    if site.owned:
        return site.owner
    plain = stem.rpartition("[")[0] if site.expert else stem
    return plain.replace(".base_layer", "")


def _check_there(lacking: Sequence[str], count: int, file: AdapterFile, base: Base) -> None:
    if not lacking:
        return
    shown = ", ".join(map(repr, lacking[:_SHOWN]))
    more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
    first = next(iter(base.tensors), "nothing")
    raise IncompatibleError(
        f"{len(lacking)} of {count} modules are not in {base.model.path}: {shown}{more} here, "
        f"{first!r} and others there",
        path=file.path,
        module=lacking[0],
        hint="give the base model that the adapter was trained on; --modules chooses modules",
    )
