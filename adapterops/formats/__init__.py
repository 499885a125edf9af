"""Reading adapters: names to sites by grammar, scale from wherever the dialect keeps it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adapterops.errors import FormatError, IncompatibleError, UnsupportedError
from adapterops.files.pickles import open_pickle
from adapterops.files.source import LocalFile, Source, read_header
from adapterops.formats import diffusers, grammar, kohya, peft
from adapterops.formats.locate import (
    Located,
    locate,
    missing_pickle_permission,
    read_text,
)
from adapterops.formats.model import AdapterFile, Layer, Ref, Site

_Scale = tuple[float, float, str]  # scale, the alpha it was made from, where that was found


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
    grouped, spellings, rest = _group(refs, place.weights)
    config, embedded = _configs(place, metadata)
    shared = bool(place.shared_config and config)
    if shared and (embedded or not _belongs(config, grouped, spellings, place)):
        config, shared = {}, False  # of another file in the same folder
    for text, where in ((config, place.config), (embedded, place.weights)):
        for part in ("", *diffusers.COMPONENTS):
            peft.check_supported(diffusers.component_config(text, part), where or place.weights)
    if not grouped:
        raise _not_an_adapter(refs, place.weights)
    dialect = _dialect(grouped, spellings, config or embedded, place.weights)
    sites, extras = _sites(grouped, spellings, rest, dialect, place.weights)
    resolver = _Resolver(os.fspath(path), dialect, metadata, alpha, alpha_wins)
    if config and place.config:
        resolver.add_config(config, place.config)
    if embedded:
        resolver.add_config(embedded, f"the header's {diffusers.METADATA_KEY}")
    sites = {stem: resolver.scaled(site) for stem, site in sites.items()}
    if shared:
        resolver.notes.append(f"{place.weights}: its config is taken to be {place.config}")
    config = config or embedded
    return AdapterFile(
        path=os.fspath(path),
        dialect=dialect,
        sites=sites,
        extras=extras,
        config=config,
        metadata=metadata,
        style=_style(spellings, dialect),
        base=_base(config, metadata),
        notes=(*place.notes, *dict.fromkeys(resolver.notes)),
        weights_file=place.weights,
        side_files=place.side_files,
    )


def _open_tensors(place: Located, allow_pickle: bool) -> tuple[dict[str, Ref], Mapping[str, str]]:
    if place.is_pickle and not allow_pickle:
        raise missing_pickle_permission(place.weights)
    source: Source = open_pickle(place.weights) if place.is_pickle else LocalFile(place.weights)
    header = read_header(source)
    refs = {
        name: Ref(
            source, name, entry.dtype, entry.shape, header.data_start + entry.start, entry.nbytes
        )
        for name, entry in header.tensors.items()
    }
    return refs, header.metadata


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
    return all(scales.rank(peft.module_path(stem)) in (None, *rank) for stem, rank in ranks.items())


def _group(
    refs: Mapping[str, Ref], path: str
) -> tuple[dict[str, dict[str, Ref]], dict[str, str], dict[str, Ref]]:
    """Tensors by stem and role, the spelling of each stem, and what is no part of a delta."""
    grouped: dict[str, dict[str, Ref]] = {}
    spellings: dict[str, str] = {}
    rest: dict[str, Ref] = {}
    alphas: dict[str, Ref] = {}
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
            if key.role != "bias":
                spellings[key.stem] = key.spelling
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


def _not_an_adapter(refs: Mapping[str, Ref], path: str) -> FormatError:
    shown = ", ".join(repr(name) for name in list(refs)[:3]) or "none at all"
    return FormatError(
        f"is not a LoRA adapter: none of its {len(refs)} tensors is a LoRA factor ({shown})",
        path=path,
    )


def _dialect(
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


def _style(spellings: Mapping[str, str], dialect: str) -> str:
    """The spelling of a diffusers file, per component: "unet=processor text_encoder=lora"."""
    if dialect != "diffusers":
        return ""
    styles: dict[str, str] = {}
    for stem, spelling in spellings.items():
        part = diffusers.component(diffusers.canonical(stem))
        if styles.get(part) in (None, "lora"):
            styles[part] = spelling
    return " ".join(f"{part}={style}" for part, style in sorted(styles.items()))


def _sites(
    grouped: Mapping[str, Mapping[str, Ref]],
    spellings: Mapping[str, str],
    rest: Mapping[str, Ref],
    dialect: str,
    path: str,
) -> tuple[dict[str, Site], dict[str, Ref]]:
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


class _Resolver:
    """Finds each module's scale, and that no two places contradict each other."""

    def __init__(
        self,
        path: str,
        dialect: str,
        metadata: Mapping[str, str],
        alpha: float | None,
        alpha_wins: bool,
    ) -> None:
        self._path = path
        self._dialect = dialect
        self._metadata = metadata
        self._alpha = alpha
        self._alpha_wins = alpha_wins
        self._configs: list[tuple[str, dict[str, peft.Scales]]] = []
        self.notes: list[str] = []

    def add_config(self, config: Mapping[str, Any], where: str) -> None:
        """Take `config` for a source of scales; a diffusers config has a part per component."""
        parts = ("", *diffusers.COMPONENTS) if self._dialect == "diffusers" else ("",)
        scales = {
            part: peft.Scales(diffusers.component_config(config, part), where, self.notes)
            for part in parts
        }
        self._configs.append((where, scales))

    def scaled(self, site: Site) -> Site:
        """The site with its scale and where it came from."""
        if self._alpha is not None and self._alpha_wins:
            return _given(site, self._alpha)
        found = [
            replace(site, scale=scale, alpha=alpha, scale_from=origin)
            for scale, alpha, origin in (
                *self._from_tensor(site),
                *self._from_config(site),
                *self._from_header(site),
            )
        ]
        for other in found[1:]:
            if not math.isclose(other.scale, found[0].scale, rel_tol=_tolerance(site)):
                raise IncompatibleError(
                    f"two scales disagree: {found[0].scale:.6g} by {found[0].scale_from}, "
                    f"{other.scale:.6g} by {other.scale_from}",
                    path=self._path,
                    module=site.stem,
                    hint=f"say which with --alpha {self._path}=X",
                )
        if found:
            return found[0]
        if self._alpha is not None:
            return _given(site, self._alpha)
        if self._dialect == "peft":
            raise IncompatibleError(
                "no scale: there is no adapter_config.json and no alpha anywhere",
                path=self._path,
                hint="give the alpha it was trained with: --alpha X",
            )
        return replace(site, scale=1.0, scale_from="assumed (no alpha: alpha = rank)")

    def _from_tensor(self, site: Site) -> Iterator[_Scale]:
        ref = site.parts.get("alpha")
        if ref is None:
            return
        if math.prod(ref.shape) != 1:
            raise FormatError(
                f"{ref.name!r} has shape {list(ref.shape)}, expected one number", path=self._path
            )
        value = float(ref.read().reshape(-1)[0])
        if not math.isfinite(value):
            raise FormatError(f"{ref.name!r} is {value}", path=self._path)
        if value == 0.0:
            raise IncompatibleError(
                "alpha is 0, which some loaders read as alpha = rank and others as no effect",
                path=self._path,
                module=site.stem,
                hint=f"say what is meant with --alpha {self._path}=X",
            )
        scale = value / site.rank if site.rank else 1.0
        yield scale, value, f"alpha {value:g} / rank {site.rank}"

    def _from_config(self, site: Site) -> Iterator[_Scale]:
        part = diffusers.component(site.stem) if self._dialect == "diffusers" else ""
        module = site.stem.removeprefix(part + ".") if part else site.stem
        for where, parts in self._configs:
            scales = parts[part]
            if not scales.known:
                continue
            expected = scales.rank(module)
            if expected is not None and expected != site.rank:
                raise IncompatibleError(
                    f"the config says r={expected:g}, its tensors have rank {site.rank}, so "
                    "alpha / r is unknown",
                    path=self._path,
                    module=site.stem,
                    hint=f"correct rank_pattern in the config, or give --alpha {self._path}=X",
                )
            origin = f"lora_alpha in {os.path.basename(where)}"
            yield scales.scale(module, site.rank), scales.alpha(module), origin

    def _from_header(self, site: Site) -> Iterator[_Scale]:
        if not site.rank:
            return
        if self._dialect == "kohya":
            spatial = any(extent != 1 for extent in site.kernel)
            alpha = kohya.header_alpha(self._metadata, site.rank, spatial)
            if alpha is not None:
                yield alpha / site.rank, alpha, "ss_network_alpha"
            return
        part = diffusers.component(site.stem)
        prefix = f"{part}." if part and f"{part}.lora_alpha" in self._metadata else ""
        text = self._metadata.get(f"{prefix}lora_alpha") or self._metadata.get("alpha")
        if text is None:
            return
        rank_text = self._metadata.get(f"{prefix}r") or self._metadata.get("rank")
        try:
            alpha, rank = float(text), float(rank_text) if rank_text else float(site.rank)
        except ValueError:
            raise FormatError(
                f"the header's alpha {text!r} or rank {rank_text!r} is no number", path=self._path
            ) from None
        if math.isfinite(alpha) and rank == site.rank:
            yield alpha / site.rank, alpha, "alpha in the header"


def _given(site: Site, alpha: float) -> Site:
    scale = alpha / site.rank if site.rank else 1.0
    return replace(
        site, scale=scale, alpha=alpha, scale_from=f"--alpha {alpha:g} / rank {site.rank}"
    )


def _tolerance(site: Site) -> float:
    """Two sources of a scale agree up to the rounding of a stored alpha."""
    ref = site.parts.get("alpha")
    return {"F16": 2.0**-10, "BF16": 2.0**-7}.get(ref.dtype if ref else "", 1e-6)


def _base(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    base = config.get("base_model_name_or_path") or metadata.get("ss_sd_model_name")
    return str(base) if base else None


__all__ = ["AdapterFile", "Ref", "Site", "open_adapter_file"]
