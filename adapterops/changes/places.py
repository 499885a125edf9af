"""Where a base model may hold what one module of an adapter changes, by one path of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from adapterops.basemodel import BaseModel, ldm, names
from adapterops.basemodel.parts import Part, Parts
from adapterops.changes import experts, fused
from adapterops.changes.pieces import Piece, Reading, piece
from adapterops.changes.untying import head_name, is_shared
from adapterops.formats.model import Site
from adapterops.rebased import weights

# What full deltas (`.diff` and its like) change of a module.
PARAMETERS = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}


class Base:
    """A base model with the tables that names are looked up in."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.tensors = model.tensors
        self.shapes = {name: ref.shape for name, ref in model.tensors.items()}

    @cached_property
    def names(self) -> names.Names:
        """Module paths, to be looked up by head or flattened."""
        return names.index({_module(name) for name in self.tensors}, self.model.configs)

    @cached_property
    def fusable(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by full name of a tensor, also by the names that loaders have for its module."""
        stored = {name: f"{path}.weight" for name, path in self.names.loaded.items()}
        more = {f"{name}.weight": own for name, own in stored.items() if own in self.shapes}
        return {**self.shapes, **{name: self.shapes[own] for name, own in more.items()}}

    def stored(self, tensor: str) -> str:
        """The file's name of a weight of `fusable`."""
        owner = tensor.removesuffix(".weight")
        return tensor if tensor in self.tensors else f"{self.names.stored(owner)}.weight"

    @cached_property
    def table(self) -> Mapping[str, Parts] | None:
        """Every name of a weight of an image model, None for other models."""
        return ldm.paths(self.shapes)

    def config(self, path: str) -> Mapping[str, object]:
        """The config of the model that a module is in."""
        return self.model.configs.get(self.model.part(path), {})


def readings(site: Site, path: str, base: Base) -> list[Reading]:
    """Every way in which the base may hold what a site changes; none if it has no such names.

    Of these shapes choose: a weight as it is or transposed, either way round of a stack of experts.
    Raises IncompatibleError and UnsupportedError where the rows of a fused projection are unknown.
    """
    tensors = base.tensors
    if site.expert or site.owned:
        return experts.readings(site, path, tensors, base.config(path))
    spellings = (f"{path}.weight", f"{path}.in_proj_weight", path)  # MultiheadAttention's; bare
    direct = next((name for name in spellings if name in tensors), None)
    if direct:
        ref = tensors[direct]
        ways = sorted(weights.ways(site, ref))
        if not ways:
            return [(replace(piece(Part(direct), ref), misfit=True),)]
        return [(piece(Part(direct, turned=turned), ref),) for turned in ways]
    head = head_of(path, base)
    if head:
        return [(head,)]
    is_turned = base.model.is_conv1d
    parts = fused.inside(path, base.fusable, base.config(path), is_turned)
    parts = tuple(replace(part, tensor=base.stored(part.tensor)) for part in parts)
    parts = parts or fused.across(path, base.shapes, is_turned)
    if parts:
        return [tuple(piece(part, tensors[part.tensor]) for part in parts)]
    return experts.readings(site, path, tensors, base.config(path))


def head_of(path: str, base: Base) -> Piece | None:
    """A language model's head, whatever it is called, None for other modules.

    That of a base which stores it as its embedding is the embedding, under the head's name.
    """
    model = base.model
    if model.is_pipeline or not model.is_head(f"{path}.weight"):
        return None
    if model.head:
        return piece(Part(model.head), base.tensors[model.head])
    if model.embedding and is_shared(model):
        return piece(Part(model.embedding), base.tensors[model.embedding], head_name(model))
    return None


def _module(name: str) -> str:
    owner, dot, last = name.rpartition(".")
    return owner if dot and last in ("weight", "bias") else name
