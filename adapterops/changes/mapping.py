"""Every change that adapters make to a base model's tensors, from headers and configs alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from adapterops.basemodel import BaseModel
from adapterops.changes.drafts import Drafts, gather, target
from adapterops.changes.locate import locate
from adapterops.changes.naming import addresses, tensor_of
from adapterops.changes.places import Base
from adapterops.changes.targets import Changes, Target
from adapterops.changes.untying import untie
from adapterops.changes.values import started, values
from adapterops.errors import NumericsError, UnsupportedError, UsageError
from adapterops.extras import Policy
from adapterops.formats.model import AdapterFile, Site, leaves

_ROUNDED = ("F16", "BF16", "F32")
_TWICE = ".base_layer.out_proj"  # of a MultiheadAttention


_Chosen = tuple[dict[str, Site], list[str]]  # modules by stem, names of full deltas


def changes(
    base: BaseModel,
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    *,
    modules: str | None = None,
    extras: Policy = "error",
) -> Changes:
    """What baking `inputs`, each with its weight, into `base` changes.

    Inputs that are relative to the base are rebased on it; one of weight 0 changes nothing.
    `modules` chooses by full match of the module path, `extras` says what becomes of heads, biases
    and token rows. Every module must have its place: raises IncompatibleError for those that the
    base lacks, has in another shape or may have in two places, UnsupportedError for quantised and
    8-bit weights and for what has no place of its own, UsageError for a pattern without matches
    and coefficients that cannot be computed with, and the inputs' own problems.
    """
    base.check_not_quantised()
    _check_inputs(inputs, weights)
    chosen, left_out = _select(inputs, weights, modules)
    plain = Base(base)
    found = {
        index: addresses(inputs[index], plain, *chosen[index])
        for index, weight in enumerate(weights)
        if weight
    }
    mine = {id(inputs[index]): own for index, own in found.items()}
    origins, shares = leaves([inputs[index] for index in found], [weights[i] for i in found])
    for file in origins:
        if id(file) not in mine:
            mine[id(file)] = addresses(file, plain, *_matching(file.sites, file.deltas, modules))
    carried = values(
        base,
        origins,
        shares,
        extras,
        lambda file, path: tensor_of(mine[id(file)], plain, path),
    )
    grown = Base(started(base, carried.values))
    drafts: Drafts = {}
    notes: list[str] = []
    for index, own in found.items():
        sites, deltas = chosen[index]
        located = locate(inputs[index], grown, own, sites, deltas)
        gather(drafts, grown, index, inputs[index], weights[index], sites, located)
        notes += [*located.notes, *_attention_notes(inputs[index], sites)]
    targets = {name: target(name, draft) for name, draft in sorted(drafts.items())}
    untied = untie(base, targets, carried.values, inputs)
    _check_types(untied.targets.values(), base)
    return Changes(
        targets=untied.targets,
        values=untied.values,
        copies=untied.copies,
        config=untied.config,
        modules=len({stem for sites, deltas in chosen for stem in (*sites, *map(_stem, deltas))}),
        left_out=left_out,
        dropped=carried.dropped,
        notes=(*notes, *carried.notes, *untied.notes),
    )


def _check_inputs(inputs: Sequence[AdapterFile], weights: Sequence[float]) -> None:
    for file, weight in zip(inputs, weights, strict=True):
        for problem in file.problems if weight else ():
            raise problem
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} of {file.path} is not a finite number")
    if not any(weights):
        raise NumericsError("every weight is zero: the result would be the base itself")


def _select(
    inputs: Sequence[AdapterFile], weights: Sequence[float], pattern: str | None
) -> tuple[list[_Chosen], int]:
    """What each input changes, of what a pattern matches, and how many modules it leaves out."""
    given: list[_Chosen] = [
        (dict(file.sites), list(file.deltas)) if weight else ({}, [])
        for file, weight in zip(inputs, weights, strict=True)
    ]
    chosen = [_matching(*each, pattern) for each in given]
    if pattern is None:
        return chosen, 0
    every = {stem for sites, deltas in given for stem in (*sites, *map(_stem, deltas))}
    kept = {stem for sites, deltas in chosen for stem in (*sites, *map(_stem, deltas))}
    if not kept:
        raise UsageError(
            f"--modules {pattern!r} matches none of the {len(every)} modules as a whole",
            hint=f"the first is {min(every)!r}" if every else None,
        )
    return chosen, len(every) - len(kept)


def _matching(sites: Mapping[str, Site], deltas: Iterable[str], pattern: str | None) -> _Chosen:
    """What of an adapter matches as a whole; all without a pattern."""
    try:
        matches = re.compile("(?s:.*)" if pattern is None else pattern).fullmatch
    except re.error as error:
        raise UsageError(f"--modules {pattern!r} is no regular expression ({error})") from None
    return (
        {stem: site for stem, site in sites.items() if matches(stem)},
        [name for name in deltas if matches(_stem(name))],
    )


def _stem(name: str) -> str:
    """The module that a full delta is of."""
    return name.rpartition(".")[0]


def _attention_notes(file: AdapterFile, sites: Mapping[str, Site]) -> list[str]:
    """A note where PEFT's own result is another."""
    count = sum(stem.endswith(_TWICE) and sites[stem].dialect == "peft" for stem in sites)
    if not count:
        return []
    return [
        f"{file.path}: out_proj of {count} MultiheadAttention: its change is added once; PEFT, up "
        "to 0.21, adds it twice, merged or not"
    ]


def _check_types(targets: Iterable[Target], base: BaseModel) -> None:
    """Raise UnsupportedError, naming the tensor, where a target is no 16- or 32-bit float."""
    for each in targets:
        if each.ref.dtype not in _ROUNDED:
            raise UnsupportedError(
                f"{each.name!r} is of type {each.ref.dtype}, which nothing is added to here",
                path=base.path,
                hint="give the base model in float16, bfloat16 or float32",
            )
