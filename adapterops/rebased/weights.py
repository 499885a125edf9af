"""The weight of a base model that each module of an adapter changes, arranged like ΔW."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterops.basemodel import BaseModel, ldm, names
from adapterops.basemodel.config import is_conv1d_name
from adapterops.basemodel.parts import Part
from adapterops.casts import READABLE
from adapterops.errors import IncompatibleError, UnsupportedError
from adapterops.formats.model import AdapterFile, Ref, Site

# Leaves that only torch's Linear has in models with a number in each layer's path.
_LINEAR = re.compile(
    r"[qkvo]_proj|(gate|up|down|out|qkv|gate_up)_proj|query|key|value|dense|query_key_value"
    r"|to_[qkv]|fc[12]|lin[12]|w[qkvo123]|dense_(h_to_4h|4h_to_h)"
)
_FUSED = (  # names of modules, and of one weight that a base may keep them in
    (
        ("q_proj", "k_proj", "v_proj", "query", "key", "value", "to_q", "to_k", "to_v"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "qkv", "to_qkv"),
    ),
    (("wq", "wk", "wv"), ("wqkv",)),
    (("gate_proj", "up_proj"), ("gate_up_proj",)),
)


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
    the order of a square weight cannot be told; UnsupportedError for quantised weights, experts and
    what the base keeps in a tensor with others, or in several.
    """
    chosen = {stem: file.sites[stem] for stem in stems}
    tensors = {name.removesuffix(".weight"): ref for name, ref in base.tensors.items()}

    def fits(site: Site, path: str) -> bool:
        return ways(site, tensors[path]) != set()

    base.check_not_quantised()
    stored = _stored(file, base, chosen)
    others = {stem: site for stem, site in chosen.items() if stem not in stored}
    table = names.index(tensors, base.configs)
    found = names.find(others, table, fits)
    if base.embedding and base.is_tied:  # one weight, stored once
        heads = (stem for stem in chosen if stem not in found and base.is_head(f"{stem}.weight"))
        found |= dict.fromkeys(heads, base.embedding.removesuffix(".weight"))
    _check_whole(file, base, others, found, table)
    _check_there(file, base, chosen, {*found, *stored})
    refs = {stem: tensors[path] for stem, path in found.items()}
    refs |= {stem: base.tensors[part.tensor] for stem, part in stored.items()}
    possible = {stem: ways(site, refs[stem]) for stem, site in chosen.items()}
    for stem, part in stored.items():
        if part.turned:
            possible[stem] = {True} if refs[stem].shape == chosen[stem].shape[::-1] else set()
    for stem, site in chosen.items():
        _check_number(site, refs[stem])
        if not possible[stem]:
            raise IncompatibleError(
                f"{file.path} changes a weight of {_size(site.shape)}, {base.path} has "
                f"{_size(refs[stem].shape)} as {refs[stem].name!r}; is it the base that the "
                "adapter was trained on?",
                module=stem,
            )
    if turned is None:
        turned = orientation(file, base, possible)
    return {
        stem: Weight(
            replace(ref, shape=chosen[stem].shape, transposed=turned[stem]),
            chosen[stem].shape[1] // math.prod(ref.shape[2:]),
        )
        for stem, ref in refs.items()
    }


def _stored(file: AdapterFile, base: BaseModel, chosen: Mapping[str, Site]) -> dict[str, Part]:
    """stem -> its tensor, of those modules that image models have another name for.

    Raises UnsupportedError for one that is not a whole tensor.
    """
    table = ldm.paths({name: ref.shape for name, ref in base.tensors.items()})
    found: dict[str, Part] = {}
    for stem in chosen if table else ():
        parts = ldm.find(stem, table or {})
        if parts and (len(parts) > 1 or parts[0].rows or parts[0].of):
            raise _in_pieces(file, base, stem, sorted({part.tensor for part in parts}))
        if parts:
            found[stem] = parts[0]
    return found


def _check_whole(
    file: AdapterFile,
    base: BaseModel,
    sites: Mapping[str, Site],
    found: Mapping[str, str],
    table: names.Names,
) -> None:
    """Raise UnsupportedError for a module that is missing where the base fuses it with others, or
    keeps those that it is fused of."""
    for stem, site in sites.items():
        owner, dot, leaf = stem.rpartition(".")
        if stem in found or not dot:
            continue
        for alone, fused in _FUSED:
            others = fused if leaf in alone else alone if leaf in fused else ()
            probes = {name: replace(site, stem=f"{owner}.{name}") for name in others}
            there = names.find(probes, table, lambda *_: True)
            if there:
                raise _in_pieces(file, base, stem, sorted(set(there.values())))


def _in_pieces(
    file: AdapterFile, base: BaseModel, stem: str, tensors: Sequence[str]
) -> UnsupportedError:
    if len(tensors) == 1:
        what = f"in {tensors[0]!r}, which holds other modules too"
    else:
        what = f"in {len(tensors)} tensors, {tensors[0]!r} and others"
    return UnsupportedError(
        f"the adapter is relative to the weight of {stem!r}, which {base.path} keeps {what}",
        path=file.path,
        module=stem,
        hint="give a base that keeps this weight as one tensor, as the adapter was trained on",
    )


def _check_there(
    file: AdapterFile, base: BaseModel, chosen: Mapping[str, Site], found: Collection[str]
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
    that are not square do, where they agree, and the config's fan_in_fan_out where there are none,
    but for names of Linear layers. Raises IncompatibleError where they disagree.
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
            flag = bool(file.config.get("fan_in_fan_out"))
            (result[stem],) = seen or {flag and not is_misflagged(file, stem)}
    return result


def is_misflagged(file: AdapterFile, stem: str) -> bool:
    """Whether fan_in_fan_out is set for a module of a name that only Linear layers have.

    PEFT resets the flag for them as it loads the adapter.
    """
    last = stem.rpartition(".")[2]
    named = _LINEAR.fullmatch(last) is not None and not is_conv1d_name(stem)
    return bool(file.config.get("fan_in_fan_out")) and named


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
