"""DoRA, PiSSA and their like, made summable beside their base model.

What PEFT computes is the authority (0.21.2): DoRA in `tuners/lora/dora.py` and `variants.py`, what
the initialisations take out of the base in `tuners/lora/layer.py`; LyCORIS 4.1.3 for `dora_scale`
(`functional/general.py`), mlx-lm for its own (`tuner/dora.py`). Headers alone are read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from adapterops.basemodel import BaseModel
from adapterops.casts import format_name
from adapterops.errors import FormatError, IncompatibleError, UnsupportedError, UsageError
from adapterops.formats import diffusers, peft
from adapterops.formats.kinds import BESIDE, KINDS, kind_of
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.provenance import base_name
from adapterops.rebased.magnitude import axis_of
from adapterops.rebased.weights import weights

_DERIVED = ("pissa", "olora")  # initialisations that follow from the base's weight alone
_HALVES = ("F16", "BF16")
_RELATIVE_KEYS = ("use_dora", "init_lora_weights")
_T = TypeVar("_T")
_LYCORIS_KEYS = ("dora_wd", "weight_decompose", "wd_on_output", "wd_on_out")


def rebase(file: AdapterFile, base: BaseModel, residual: BaseModel | None = None) -> AdapterFile:
    """An adapter that `read_adapter` found relative to its base, as one that can be summed.

    `residual` is the base as the initialisation left it, which stands in for any initialisation
    (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ). Without it PiSSA and OLoRA are derived from the base and
    stay factors, of twice the rank; DoRA, and everything with a residual, becomes dense. An adapter
    that is not relative to its base is returned as it is. Raises the file's other problems,
    IncompatibleError and UnsupportedError for a base that does not fit, or not suffice, and
    UsageError for a residual that is the base.
    """
    for problem in file.problems:
        if problem not in file.relative:
            raise problem
    if not file.relative:
        return file
    inits = {stem: _init(file, site) for stem, site in file.sites.items()}
    needed = [
        stem
        for stem, site in file.sites.items()
        if inits[stem] or "magnitude" in site.parts or _config(file, site).get("use_dora")
    ]
    for stem in needed:
        _check(file, file.sites[stem], inits[stem], residual)
    found = weights(file, base, needed)
    for stem in needed:
        if "magnitude" in file.sites[stem].parts:
            axis_of(file.sites[stem], found[stem].channels)
    bases = {stem: weight.ref for stem, weight in found.items()}
    started = {}
    if residual is not None:
        turned = {stem: ref.transposed for stem, ref in bases.items()}
        left = weights(file, residual, needed, turned)
        started = {stem: weight.ref for stem, weight in left.items()}
        _check_apart(file, base, residual, bases, started)
    sites = {
        stem: _rebased(file.sites[stem], inits[stem].lower(), bases[stem], started.get(stem))
        for stem in needed
    }
    return replace(
        file,
        sites={**file.sites, **sites},
        config=_without(file.config, _RELATIVE_KEYS),
        metadata=_plain(file.metadata),
        notes=(*file.notes, *_notes(file, sites), *_other_base(file, base)),
        problems=(),
        relative=(),
    )


def _init(file: AdapterFile, site: Site) -> str:
    """The initialisation that changed a module's base, "" if none did."""
    return peft.moved_base(_config(file, site))


def _config(file: AdapterFile, site: Site) -> Mapping[str, Any]:
    """What the config says of a module's part of the model."""
    if site.dialect not in ("peft", "diffusers"):
        return {}
    part = diffusers.component(site.stem) if site.dialect == "diffusers" else ""
    return diffusers.component_config(file.config, part)


def _check(file: AdapterFile, site: Site, init: str, residual: BaseModel | None) -> None:
    """Raise for what no base can make up for."""
    where = {"path": file.path, "module": site.stem}
    magnitude = "magnitude" in site.parts
    use_dora = _config(file, site).get("use_dora")
    if use_dora is not None and site.dialect == "peft" and bool(use_dora) != magnitude:
        what = "a magnitude" if magnitude else "no magnitude"
        raise FormatError(
            f"use_dora is {str(bool(use_dora)).lower()} in the config, and it has {what}",
            **where,
            hint="correct use_dora in adapter_config.json, or fetch the whole file",
        )
    if "bias" in site.parts:
        raise UnsupportedError(
            "lora_bias together with DoRA or an initialisation that changes the base is nothing "
            "that PEFT trains",
            **where,
        )
    if not init or residual is not None:
        return
    if init.lower() not in _DERIVED:
        raise UnsupportedError(
            f"init_lora_weights={init!r} changed the base in a way that {_why(init)}",
            **where,
            hint="give the base as the initialisation left it: --residual MODEL",
        )
    if _kind(site) != "lora" or site.layer != "linear":
        raise UnsupportedError(
            f"init_lora_weights={init!r} of {_kind(site)} on {site.layer} layers is nothing that "
            "PEFT trains",
            **where,
        )


def _why(init: str) -> str:
    """Why an initialisation cannot be derived from the base."""
    reasons = {
        "pissa": "is random: what two runs take out is 5 to 35 % of ‖W‖ apart after 4 iterations",
        "corda": "follows from the data it was shown",
        "lora_ga": "follows from the gradients it was shown",
        "loftq": "its weights do not tell: it quantised them",
    }
    found = (why for name, why in reasons.items() if init.lower().startswith(name))
    return next(found, "is not known here")


def _kind(site: Site) -> str:
    """The kind that a module's factors make, DoRA or not."""
    return kind_of(frozenset(site.parts) - BESIDE) or site.kind


def _rebased(site: Site, init: str, base: Ref, started: Ref | None) -> Site:
    """One module relative to its weight `base`; `started` is what the initialisation left of it."""
    factors = replace(site, kind=_kind(site), parts=_without(site.parts, ("magnitude",)))
    if init and started is None:
        factors = _derived(factors, init, base)
    if "magnitude" not in site.parts and started is None:
        return factors
    refs = {"base": base} if started is None else {"base": base, "residual": started}
    return replace(
        site,
        kind="dora" if "magnitude" in site.parts else "residual",
        rank=min(site.shape),
        parts={**site.parts, **refs},
        scale=1.0,
        scale_from=f"within ΔW ({site.scale_from})",
        alpha=None,
        alpha_given=False,
        inner=factors,
    )


def _derived(site: Site, init: str, base: Ref) -> Site:
    """A module with what its initialisation took out of the base subtracted."""
    if site.scale == 0:
        text = "its scale is 0, which no such initialisation allows"
        raise IncompatibleError(text, module=site.stem)
    if init == "olora" and base.transposed:
        raise UnsupportedError(
            "PEFT's OLoRA decomposes a Conv1D weight as it is stored and trains its transpose",
            module=site.stem,
            hint="give the base as the initialisation left it: --residual MODEL",
        )
    rank = KINDS[init].measure({role: ref.shape for role, ref in site.parts.items()}, ()).rank
    return replace(site, kind=init, rank=rank, parts={**site.parts, "base": base})


def _check_apart(
    file: AdapterFile,
    base: BaseModel,
    residual: BaseModel,
    found: Mapping[str, Ref],
    started: Mapping[str, Ref],
) -> None:
    """The residual must be another model of the same weights."""
    for stem, ref in started.items():
        own = found[stem]
        if os.path.realpath(own.source.path) == os.path.realpath(ref.source.path):
            raise UsageError(
                f"--residual and --base are one file, {own.source.path}",
                hint="the residual is the base as the initialisation left it",
            )
        if own.stored_shape != ref.stored_shape:
            raise IncompatibleError(
                f"{base.path} stores it as {list(own.stored_shape)}, "
                f"{residual.path} as {list(ref.stored_shape)}",
                path=file.path,
                module=stem,
            )


def _notes(file: AdapterFile, sites: Mapping[str, Site]) -> list[str]:
    """What a model in 16 bits has computed otherwise."""
    narrow = {
        site.parts["base"].dtype
        for site in sites.values()
        if site.kind in _DERIVED and site.parts["base"].dtype in _HALVES
    }
    return [
        f"{file.path}: the initialisation also rounded what it left of the base to "
        f"{format_name(dtype)}; that rounding is not in ΔW (--residual takes it along)"
        for dtype in sorted(narrow)
    ]


def _other_base(file: AdapterFile, base: BaseModel) -> list[str]:
    """A warning where the base says that it is another model than the adapter names."""
    itself = base.config.get("_name_or_path")
    if not file.base or not itself:
        return []
    names = {base_name(str(name)).lower() for name in (itself, base.name)}
    if base_name(file.base).lower() in names:
        return []
    return [f"{file.path} names the base {file.base!r}, {base.path} is {itself!r}; shapes agree"]


def _without(config: Mapping[str, _T], names: Collection[str]) -> dict[str, _T]:
    """A mapping without these keys, in any component of a pipeline."""
    return {key: value for key, value in config.items() if key.rpartition(".")[2] not in names}


def _plain(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header whose training options no longer say that this is DoRA."""
    try:
        arguments = json.loads(metadata["ss_network_args"])
    except (KeyError, ValueError):
        return dict(metadata)
    if not isinstance(arguments, dict):
        return dict(metadata)
    kept = json.dumps(_without(arguments, _LYCORIS_KEYS))
    return {**metadata, "ss_network_args": kept}
