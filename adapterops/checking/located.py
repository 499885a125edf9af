"""Where a base model has what an adapter changes: as bake finds it, of headers or a config alone.

Unlike bake, which needs every module, this finds what is there and lists the rest; of packed
weights, which bake refuses, the names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from adapterops.basemodel import BaseModel, open_model, shapes
from adapterops.basemodel.config import is_conv1d_name
from adapterops.basemodel.parts import Part
from adapterops.changes.fused import wholes
from adapterops.changes.locate import delta, ways
from adapterops.changes.naming import Addresses, search, tensor_of
from adapterops.changes.pieces import Reading, fit
from adapterops.changes.places import Base as Places
from adapterops.checking.config import is_peft
from adapterops.errors import AdapterOpsError
from adapterops.files import checkpoint
from adapterops.files.source import LocalFile
from adapterops.formats import AdapterFile, Ref, Site, peft
from adapterops.formats.locate import read_text

_HIDDEN = (0, 0, 0)  # the shape of a packed weight: no module's
_BENEATH = ".base_layer."


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: its weights' shapes by module path, and its tensors as bake looks them up.

    `packed` are the tensors' names of weights whose shapes packing hides.
    """

    shapes: shapes.Base
    places: Places
    packed: frozenset[str]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.shapes.name

    def is_packed(self, way: Reading) -> bool:
        """Whether some of a module's weight is packed."""
        return any(piece.ref.name in self.packed for piece in way)


@dataclass(frozen=True, slots=True)
class Found:
    """What the base has of an adapter's modules (by stem) and full deltas (by name).

    `tensors` are those that each changes, by its names. `fitting` are the ways in which ΔW of a
    module lies on them; `misfits`, where none fits, one that its names allow, and `refused` why a
    full delta does not fit. Of `packed` ones no shape could be compared, `fused` ones are part of a
    weight or have several. `absent` is what the base has not.
    """

    tensors: Mapping[str, tuple[str, ...]]
    fitting: Mapping[str, list[Reading]]
    misfits: Mapping[str, Reading]
    refused: Mapping[str, AdapterOpsError]
    packed: tuple[str, ...]
    fused: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def changed(self) -> set[str]:
        """Module paths of all weights that the adapter changes."""
        return {name.removesuffix(".weight") for every in self.tensors.values() for name in every}


@lru_cache(maxsize=1)  # one base, many adapters
def load(path: str) -> Base:
    """The base at `path`: a checkpoint's file, index or folder, a pipeline's, or a config.json.

    Raises FileError, FormatError, and UnsupportedError for a config of unknown architecture.
    """
    known = shapes.load(path)
    given = Path(path)
    is_config = given.suffix == ".json" and not checkpoint.is_index(given)
    if is_config or not checkpoint.model_files(given):
        model = _of_config(path, given if is_config else given / "config.json", known)
    else:
        model = open_model(path)
    packed = [f"{name}.weight" for name, shape in known.shapes.items() if shape is None]
    if packed:
        source = next(iter(model.tensors.values())).source
        hidden = {name: Ref(source, name, "U8", _HIDDEN, 0, 0) for name in packed}
        model = replace(model, tensors={**model.tensors, **hidden})
    places = Places(model)
    _ = places.table  # what it objects to is the base's
    return Base(known, places, frozenset(packed))


def _of_config(path: str, where: Path, known: shapes.Base) -> BaseModel:
    """A model without weights: tensors of its shapes that cannot be read."""
    source = LocalFile(where)
    config = peft.read_config(read_text(os.fspath(where)), os.fspath(where))
    named = {f"{module}.weight": shape or _HIDDEN for module, shape in known.shapes.items()}
    tensors = {name: Ref(source, name, "F32", shape, 0, 0) for name, shape in named.items()}
    return BaseModel(path, tensors, {"": config}, (os.fspath(where),))


def locate(file: AdapterFile, base: Base) -> Found:
    """What `base` has of an adapter's modules.

    Raises IncompatibleError and UnsupportedError, as bake does, for what may be several weights and
    for fused projections of which nothing says the order.
    """

    def allowed(way: Reading, site: Site) -> bool:
        return base.is_packed(way) or fit(way, site)

    found = search(base.places, file.sites, list(file.deltas), allowed)
    places = _started(file, base.places, found)
    lacking = set(found.lacking)
    tensors: dict[str, tuple[str, ...]] = {}
    fitting: dict[str, list[Reading]] = {}
    misfits: dict[str, Reading] = {}
    packed: list[str] = []
    for stem, site in file.sites.items():
        every = [] if stem in lacking else ways(site, stem, places, found)
        right = [way for way in every if fit(way, site) and _may_lie(file, base, stem, way, found)]
        if every:
            shown = right[0] if right else _nearest(every, site)
            tensors[stem] = tuple(piece.ref.name for piece in shown)
        else:
            tensors[stem] = _packed_whole(stem, base)
        if not base.packed.isdisjoint(tensors[stem]):
            packed.append(stem)
        elif right:
            fitting[stem] = right
        elif every:
            misfits[stem] = shown
    refused: dict[str, AdapterOpsError] = {}
    for name in [name for name in file.deltas if name not in lacking]:
        parts = found.parts.get(name) or (Part(f"{found.paths[name]}.weight"),)
        tensors[name] = tuple(part.tensor for part in parts)
        if not base.packed.isdisjoint(tensors[name]):
            packed.append(name)
            continue
        try:
            delta(file, places, name, found)
        except AdapterOpsError as error:
            refused[name] = error
    return Found(
        {name: every for name, every in tensors.items() if every},
        fitting,
        misfits,
        refused,
        tuple(packed),
        tuple(s for s, every in fitting.items() if s in found.paths and _is_fused(every[0])),
        tuple(name for name in (*file.sites, *file.deltas) if not tensors.get(name)),
    )


def _started(file: AdapterFile, base: Places, found: Addresses) -> Places:
    """The base with what the adapter saved beneath its own factors: a resized embedding."""
    own = {
        tensor_of(found, base, saved.removeprefix(peft.PREFIX).replace(_BENEATH, ".")): ref
        for saved, ref in file.extras.items()
        if _BENEATH in saved
    }
    named = {name: ref for name, ref in own.items() if name is not None}
    if not named:
        return base
    return Places(replace(base.model, tensors={**base.model.tensors, **named}))


def _may_lie(file: AdapterFile, base: Base, stem: str, way: Reading, found: Addresses) -> bool:
    """Whether a weight may be stored as (in, out), if only that fits: a Conv1D's may.

    The base's kind says so, the adapter's flag or a name.
    """
    site, piece = file.sites[stem], way[0]
    plain = stem in found.paths and site.layer == "linear" and piece.experts is None
    if not piece.turned or not plain or site.shape[0] == site.shape[1]:
        return True
    if base.shapes.conv1d is not None:
        return base.shapes.conv1d
    flag = is_peft(file) and bool(file.config.get("fan_in_fan_out"))
    return flag or is_conv1d_name(piece.ref.name.removesuffix(".weight"))


def _nearest(every: list[Reading], site: Site) -> Reading:
    """Of ways that do not fit, one that would, were there as many experts."""
    alike = (way for way in every if fit(tuple(replace(p, experts=None) for p in way), site))
    return next(alike, every[0])


def _packed_whole(stem: str, base: Base) -> tuple[str, ...]:
    """The packed weight that holds a split projection: how it lies there is no matter."""
    names = (f"{module}.weight" for module in wholes(stem)[1])
    return tuple(name for name in names if name in base.packed)[:1]


def _is_fused(way: Reading) -> bool:
    """Whether a module is part of a weight with others, or has several; experts aside."""
    return way[0].experts is None and (len(way) > 1 or way[0].outputs is not None)
