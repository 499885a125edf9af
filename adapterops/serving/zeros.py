"""Modules that an engine needs beside an adapter's own, to be written as zeros, and their shapes.

Two kinds: the rest of a group that an engine fuses (q, k and v), and a kind of module in the layers
that lack it. A shape is the base's where it is known, else that of the same kind of module in
other layers, else that of a twin in the same block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapterops.errors import IncompatibleError
from adapterops.serving.model import Engine
from adapterops.serving.objections import behaviour
from adapterops.serving.scales import leaf, split_layer

SIBLINGS, LAYERS = "siblings", "missing-layers"  # the rules that ask for zeros
Shape = tuple[int, int]  # (out, in)
BaseShapes = Mapping[str, tuple[int, ...] | None]  # module path -> shape, None where it is packed

# Projections of one block that have one shape.
_TWINS = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
_Kind = tuple[str, str]  # what comes before a layer's number, and the module's name after it


@dataclass(frozen=True, slots=True)
class Zero:
    """A module to be written as zeros: its shape, and the rule of the rows that asks for it."""

    shape: Shape
    rule: str


def zero_modules(
    modules: Mapping[str, Shape], engine: Engine, base: BaseShapes | None
) -> dict[str, Zero]:
    """What `engine` needs beside `modules`, those that it serves: stem -> zero module.

    `base` are the weights of the base model by its own names; without it a kind of module is taken
    to be in as many layers as `modules` name. Raises IncompatibleError, naming --base, for a shape
    that nothing tells, and where the base has other modules.
    """
    if not modules or not (engine.fill or engine.every_layer):
        return {}
    there = None if base is None else _in_stems(base, modules)
    known = dict(modules)
    zeros: dict[str, Zero] = {}
    for rule, missing in ((SIBLINGS, _groups), (LAYERS, _layers)):
        kinds = _kinds(known)
        for stem in missing(known, engine, there):
            shape = _shape(stem, known, kinds[_kind(stem)], there)
            if shape is None:
                raise IncompatibleError(
                    "is not in the adapter, and its shape does not follow from the others: "
                    f"{behaviour(engine, rule)}",
                    module=stem,
                    hint="give the base model with --base",
                )
            known[stem] = shape
            zeros[stem] = Zero(shape, rule)
    return zeros


def _groups(known: Mapping[str, Shape], engine: Engine, there: BaseShapes | None) -> Iterator[str]:
    """Members of fused groups that are not there, those that the engine insists on first."""
    blocks: dict[str, set[str]] = defaultdict(set)
    for stem in known:
        blocks[stem.removesuffix(leaf(stem))].add(leaf(stem))
    for block, present in blocks.items():
        for group in engine.fill:
            lacking = [name for name in group if name not in present]
            if len(lacking) == len(group):
                continue
            needed = {s for name in present for s in engine.siblings.get(name, ())}
            for name in sorted(lacking, key=lambda name: name not in needed):
                if there is None or block + name in there:
                    yield block + name


def _layers(known: Mapping[str, Shape], engine: Engine, there: BaseShapes | None) -> Iterator[str]:
    """Modules of a kind that other layers have, layer by layer."""
    if not engine.every_layer:
        return
    if there is None:
        count = layer_counts(known)
        candidates = [
            f"{prefix}.{layer}.{name}"
            for prefix, name in _kinds(known)
            if prefix in count
            for layer in range(count[prefix])
        ]
    else:
        kinds = _kinds(known).keys()
        candidates = [stem for stem in there if _kind(stem) in kinds]
    yield from (stem for stem in candidates if stem not in known)


def layer_counts(modules: Mapping[str, Shape]) -> dict[str, int]:
    """Layers of each stack by the highest number named: what comes before it -> how many."""
    counts: dict[str, int] = {}
    for stem in modules:
        prefix, layer, name = split_layer(stem)
        if name != stem:
            counts[prefix] = max(counts.get(prefix, 0), layer + 1)
    return counts


def _kind(stem: str) -> _Kind:
    prefix, _, name = split_layer(stem)
    return prefix, name


def _kinds(modules: Mapping[str, Shape]) -> defaultdict[_Kind, set[Shape]]:
    """The shapes of each kind of module."""
    kinds: defaultdict[_Kind, set[Shape]] = defaultdict(set)
    for stem, shape in modules.items():
        kinds[_kind(stem)].add(shape)
    return kinds


def _shape(
    stem: str, known: Mapping[str, Shape], alike: set[Shape], there: BaseShapes | None
) -> Shape | None:
    given = there.get(stem) if there else None
    if given is not None and len(given) == 2:
        return given[0], given[1]
    if len(alike) == 1:
        return next(iter(alike))
    name = leaf(stem)
    return known.get(stem.removesuffix(name) + _TWINS.get(name, ""))


def _in_stems(base: BaseShapes, modules: Mapping[str, Shape]) -> BaseShapes:
    """The base's weights under the adapter's names, as (out, in).

    What comes before the number of a layer may differ (`model.layers`, `language_model.layers`);
    a stack of the base is the adapter's if it has all of its modules.
    """
    heads: dict[str, dict[str, tuple[int, ...] | None]] = defaultdict(dict)
    for path, shape in base.items():
        prefix, layer, name = split_layer(path)
        heads[prefix][f"{layer}.{name}"] = shape
    stacks: dict[str, dict[str, Shape]] = defaultdict(dict)
    for stem, own in modules.items():
        prefix, layer, name = split_layer(stem)
        if name != stem:
            stacks[prefix][f"{layer}.{name}"] = own
    result: dict[str, tuple[int, ...] | None] = {}
    for prefix, tails in stacks.items():
        weights = heads[_same_stack(prefix, tails, heads)]
        turned = any(
            weights[tail] == own[::-1] and weights[tail] != own for tail, own in tails.items()
        )
        for tail, shape in weights.items():
            result[f"{prefix}.{tail}"] = shape[::-1] if turned and shape else shape
    return result


def _same_stack(
    prefix: str, tails: Mapping[str, Shape], heads: Mapping[str, Mapping[str, object]]
) -> str:
    """What the base calls the stack that an adapter calls `prefix`."""
    whole = [head for head, there in heads.items() if tails.keys() <= there.keys()]
    near = [h for h in whole if h.endswith(f".{prefix}") or prefix.endswith(f".{h}")]
    for found in ([prefix] if prefix in whole else [], near, whole):
        if len(found) == 1:
            return found[0]
    has = "more than one stack of layers" if whole else "no stack of layers"
    raise IncompatibleError(
        f"the base has {has} with all modules that the adapter changes under {prefix!r}",
        module=f"{prefix}.{next(iter(tails))}",
        hint="give --base the model that the adapter was trained on",
    )
