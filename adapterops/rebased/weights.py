"""The weight of a base model that each module of an adapter changes, arranged like ΔW."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from adapterops.basemodel import BaseModel, names
from adapterops.casts import READABLE
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats.model import AdapterFile, Ref, Site


@dataclass(frozen=True, slots=True)
class Weight:
    """A base's weight as (out, columns), `transposed` if stored otherwise, and its input channels.

    A convolution has several columns for each channel.
    """

    ref: Ref
    channels: int


def weights(
    file: AdapterFile,
    base: BaseModel,
    stems: Collection[str],
    turned: Mapping[str, bool] | None = None,
) -> dict[str, Weight]:
    """stem -> its weight in the base; `turned`, if known, says which are stored as (in, out).

    Raises IncompatibleError for modules that the base lacks or has in another shape, and where
    the order of a square weight cannot be told; UnsupportedError for quantised weights and experts.
    """
    chosen = {stem: file.sites[stem] for stem in stems}
    tensors = {name.removesuffix(".weight"): ref for name, ref in base.tensors.items()}

    def fits(site: Site, path: str) -> bool:
        return ways(site, tensors[path]) != set()

    base.check_not_quantised()
    found = names.find(chosen, names.index(tensors), fits)
    if base.embedding and base.is_tied:  # one weight, stored once
        heads = (stem for stem in chosen if stem not in found and base.is_head(f"{stem}.weight"))
        found |= dict.fromkeys(heads, base.embedding.removesuffix(".weight"))
    _check_there(file, base, chosen, found)
    refs = {stem: tensors[path] for stem, path in found.items()}
    for stem, site in chosen.items():
        _check_number(site, refs[stem])
        if not ways(site, refs[stem]):
            raise IncompatibleError(
                f"{file.path} changes a weight of {_size(site.shape)}, {base.path} has "
                f"{_size(refs[stem].shape)} as {refs[stem].name!r}; is it the base that the "
                "adapter was trained on?",
                module=stem,
            )
    if turned is None:
        possible = {stem: ways(site, refs[stem]) for stem, site in chosen.items()}
        turned = orientation(file, base, possible)
    return {
        stem: Weight(
            replace(ref, shape=chosen[stem].shape, transposed=turned[stem]),
            chosen[stem].shape[1] // math.prod(ref.shape[2:]),
        )
        for stem, ref in refs.items()
    }


def _check_there(
    file: AdapterFile, base: BaseModel, chosen: Mapping[str, Site], found: Mapping[str, str]
) -> None:
    absent = [stem for stem in chosen if stem not in found]
    if absent:
        first = next(iter(base.tensors), "nothing")
        raise IncompatibleError(
            f"{len(absent)} of {len(chosen)} modules are not in {base.path}: {absent[0]!r} here, "
            f"{first!r} and others there",
            path=file.path,
            module=absent[0],
            hint="give the base model that the adapter was trained on",
        )


def _check_number(site: Site, ref: Ref) -> None:
    if site.expert is not None or site.owned:
        raise UnsupportedError(
            "experts that share a tensor cannot be taken relative to it", module=site.stem
        )
    if ref.dtype not in READABLE:
        raise UnsupportedError(
            f"{ref.name!r} is of type {ref.dtype}, which is no number format of weights",
            path=ref.source.path,
            module=site.stem,
            hint="give the base model in float16, bfloat16 or float32",
        )


def ways(site: Site, ref: Ref) -> set[bool]:
    """Whether the weight may be stored as (in, out): {False}, {True}, both if square, or neither.

    A convolution's channels and kernel are columns; an embedding is stored (V, d).
    """
    shape = ref.shape
    if len(shape) < 2:
        return set()
    if site.layer == "embedding":
        return {True} if shape == site.shape[::-1] else set()
    same = (shape[0], math.prod(shape[1:])) == site.shape
    if len(shape) > 2 or site.kernel:
        fits = same and (not site.kernel or shape[2:] in ((), site.kernel))
        return {False} if fits else set()
    may_turn = site.dialect == "peft" and shape == site.shape[::-1]
    return ({False} if same else set()) | ({True} if may_turn else set())


def orientation(
    file: AdapterFile, base: BaseModel, possible: Mapping[str, set[bool]]
) -> dict[str, bool]:
    """stem -> whether its weight is stored as (in, out), of those that its shape makes `possible`.

    Of a square one the model's kind tells, and names that only GPT-2's kin has; else the weights
    that are not square do, where they agree, and the config's fan_in_fan_out where there are none.
    Raises IncompatibleError where they disagree.
    """
    linear = [way for stem, way in possible.items() if file.sites[stem].layer == "linear"]
    seen = {turned for way in linear if len(way) == 1 for turned in way}
    result = {}
    for stem, way in possible.items():
        if len(way) == 1:
            (result[stem],) = way
        elif base.config.get("model_type") or base.is_conv1d(f"{stem}.weight"):
            result[stem] = base.is_conv1d(f"{stem}.weight")
        elif len(seen) == 2:
            raise IncompatibleError(
                f"{base.path} stores some weights as (out, in) and others as (in, out), and "
                "nothing says which of the two this square one is",
                path=file.path,
                module=stem,
                hint="put the base's config.json beside it, or leave the module out with --modules",
            )
        else:
            (result[stem],) = seen or {bool(file.config.get("fan_in_fan_out"))}
    return result


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
