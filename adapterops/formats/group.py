"""From tensor names to sites: which tensors make a module, and in which dialect they are named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterops import casts
from adapterops.errors import FormatError, UnsupportedError
from adapterops.formats import diffusers, grammar, peft
from adapterops.formats.model import Layer, Ref, Site


def group(
    refs: Mapping[str, Ref], path: str
) -> tuple[dict[str, dict[str, Ref]], dict[str, str], dict[str, Ref]]:
    """Tensors by stem and role, the spelling of each stem, and what is no part of a delta."""
    grouped: dict[str, dict[str, Ref]] = {}
    spellings: dict[str, str] = {}
    rest: dict[str, Ref] = {}
    alphas: dict[str, Ref] = {}
    adapters: dict[str, str] = {}
    for name, ref in refs.items():
        key = grammar.parse(name)
        if key is None:
            grammar.refuse_variant(name, path)
            rest[name] = ref
        elif key.role == "alpha":
            alphas[key.stem] = ref
        else:
            parts = grouped.setdefault(key.stem, {})
            if key.role in parts:
                raise FormatError(
                    f"{parts[key.role].name!r} and {name!r} are both the {key.role} of one module",
                    path=path,
                    module=key.stem,
                )
            parts[key.role] = ref
            adapters.setdefault(key.adapter, name)
            if key.role != "bias":
                spellings[key.stem] = key.spelling
    if len(adapters) > 1:
        raise FormatError(
            f"holds tensors of several adapters: {' and '.join(map(repr, adapters.values()))}",
            path=path,
        )
    for stem, ref in alphas.items():
        owner = stem if stem in grouped else _processor_stem(stem, grouped)
        if owner is None and stem.startswith(peft.PREFIX):
            rest[ref.name] = ref  # a parameter of a saved head that happens to be called alpha
            continue
        if owner is None:
            raise FormatError(f"{ref.name!r} belongs to no pair of factors in this file", path=path)
        grouped[owner]["alpha"] = ref
    return grouped, spellings, rest


def _processor_stem(stem: str, grouped: Mapping[str, Any]) -> str | None:
    key = grammar.parse(f"{stem}.down.weight") or grammar.parse(f"{stem}_lora.down.weight")
    return key.stem if key and key.stem in grouped else None


def not_an_adapter(refs: Mapping[str, Ref], path: str) -> FormatError:
    """The error for a file without a single LoRA factor, showing what it holds instead."""
    shown = ", ".join(repr(name) for name in list(refs)[:3]) or "none at all"
    return FormatError(
        f"is not a LoRA adapter: none of its {len(refs)} tensors is a LoRA factor ({shown})",
        path=path,
    )


def dialect_of(
    grouped: Mapping[str, Any], spellings: Mapping[str, str], config: Mapping[str, Any], path: str
) -> str:
    """One dialect for the whole file, from every stem; the grammar decides, not the first key."""
    votes: dict[str, str] = {}
    for stem, spelling in spellings.items():
        if spelling == "kohya":
            dialect = "kohya"
        elif stem.startswith(peft.PREFIX) or spelling == "embedding":
            dialect = "peft"
        elif spelling == "peft" and str(config.get("peft_type", "")).upper() == "LORA":
            dialect = "diffusers" if diffusers.component(stem) else "peft"
        else:
            dialect = "diffusers"
        votes.setdefault(dialect, stem)
    if len(votes) > 1:
        shown = " and ".join(f"{name} ({stem})" for name, stem in votes.items())
        raise UnsupportedError(
            f"mixes dialects: {shown}; mixed files are read by a later version", path=path
        )
    return next(iter(votes), "peft")


def style_of(spellings: Mapping[str, str], dialect: str) -> str:
    """The spelling of a diffusers file, per component: "unet=processor text_encoder=lora"."""
    if dialect != "diffusers":
        return ""
    styles: dict[str, str] = {}
    for stem, spelling in spellings.items():
        part = diffusers.component(diffusers.canonical(stem))
        if styles.get(part) in (None, "lora"):
            bare = spelling == "peft" and stem != diffusers.canonical(stem)
            styles[part] = "bare" if bare else spelling
    return " ".join(f"{part}={style}" for part, style in sorted(styles.items()))


def make_sites(
    grouped: Mapping[str, Mapping[str, Ref]],
    spellings: Mapping[str, str],
    rest: Mapping[str, Ref],
    dialect: str,
    path: str,
) -> tuple[dict[str, Site], dict[str, Ref]]:
    """Sites by module, each with both its factors, and the tensors that are none: the extras."""
    sites: dict[str, Site] = {}
    for stem, parts in sorted(grouped.items()):
        module = _module(stem, dialect)
        for side, other in (("A", "B"), ("B", "A")):
            if side not in parts:
                shown = parts.get(other) or next(iter(parts.values()))
                raise FormatError(
                    f"has {shown.name!r} but no {side} factor", path=path, module=module
                )
        if module in sites:
            raise FormatError("is named twice, in two spellings", path=path, module=module)
        if "bias" in parts and spellings[stem] != "peft":
            raise UnsupportedError(
                f"the tensor {parts['bias'].name!r} beside factors named "
                f"{parts['A'].name!r} is of no known kind",
                path=path,
                module=module,
            )
        if module.endswith(".base_layer"):
            raise UnsupportedError(
                "this is MoE target_parameters (several parameters of one module), not a plain "
                "LoRA; a later version reads it",
                path=path,
                module=module,
            )
        sites[module] = _site(module, parts, path)
    owners = tuple(stem + "." for stem in grouped) if dialect != "peft" else ()
    for name in rest:
        if owners and name.startswith(owners):
            raise UnsupportedError(
                f"the tensor {name!r} of an adapted module is of no known kind", path=path
            )
    return sites, dict(rest)


def _module(stem: str, dialect: str) -> str:
    if dialect == "peft":
        return peft.module_path(stem)
    return diffusers.canonical(stem) if dialect == "diffusers" else stem


def _site(module: str, parts: Mapping[str, Ref], path: str) -> Site:
    A, B = parts["A"], parts["B"]
    where = {"path": path, "module": module}
    layer: Layer = "embedding" if ".lora_embedding_" in A.name else "linear"
    kernel: tuple[int, ...] = ()
    if len(A.shape) > 2 and layer == "linear":
        layer, kernel = "conv", A.shape[2:]
    if len(A.shape) == 2 and len(B.shape) == 3:
        raise UnsupportedError(
            f"B of shape {list(B.shape)} beside A of {list(A.shape)} is an old MergedLinear LoRA, "
            "not a plain LoRA; a later version reads it",
            **where,
        )
    if len(A.shape) < 2 or len(B.shape) < 2 or any(extent != 1 for extent in B.shape[2:]):
        raise UnsupportedError(
            f"factors of shape A {list(A.shape)}, B {list(B.shape)} are no linear, convolution or "
            "embedding LoRA",
            **where,
        )
    for ref in (A, B):
        if ref.dtype not in casts.READABLE:
            raise UnsupportedError(
                f"{ref.name!r} is of type {ref.dtype}, which is no number format of factors",
                **where,
            )
    rank = A.shape[0]
    if B.shape[1] != rank:
        if rank and B.shape[1] and rank % B.shape[1] == 0 and layer == "conv":
            raise UnsupportedError(
                f"A has rank {rank}, B has {B.shape[1]}: a grouped convolution, which has no "
                "single low-rank delta",
                **where,
            )
        raise FormatError(f"A has rank {rank}, B has rank {B.shape[1]}", **where)
    bias = parts.get("bias")
    if bias is not None and bias.shape != (B.shape[0],):
        raise FormatError(
            f"the bias has shape {list(bias.shape)}, B has {B.shape[0]} rows", **where
        )
    return Site(
        stem=module,
        layer=layer,
        shape=(B.shape[0], math.prod(A.shape[1:])),
        kernel=kernel,
        rank=rank,
        parts=parts,
    )
