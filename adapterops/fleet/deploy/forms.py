"""A representative in the form that an engine serves right: its own bytes, or written anew."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterops.casts import DTYPE_NAMES, format_name
from adapterops.certificate import Report
from adapterops.errors import IncompatibleError
from adapterops.files.clone import duplicate
from adapterops.files.output import MAIN, SIDECAR, write_file
from adapterops.files.publish import sync_directory
from adapterops.fleet.deploy.report import How
from adapterops.formats import diffusers, open_adapter_file, peft
from adapterops.formats.locate import read_text
from adapterops.formats.model import AdapterFile
from adapterops.prepare import Options
from adapterops.ranks import Ranks
from adapterops.save import save
from adapterops.serving.model import Engine, Objection
from adapterops.serving.objections import judge
from adapterops.stream import Compute

_CARD = "README.md"
# What a flag settles, and deploy prints the flag.
_SETTLED = frozenset({"rank-default", "rank-slot"})
_FIGURES = re.compile(r"\d[\d.e-]*")


@dataclass(frozen=True, slots=True)
class Terms:
    """What adapters are written for: engine, the base's name there, the base if it is at hand.

    `most` is the largest rank that an adapter may have, None for the engine's own limit, `dtype`
    the storage type, "keep" for each its own; `link` allows hard links to originals.
    """

    engine: Engine
    served_base: str
    base: str | None = None
    most: int | None = None
    dtype: str = "keep"
    link: bool = False


@dataclass(frozen=True, slots=True)
class Formed:
    """An adapter in its form: rank, type and Σ(out + in) and shapes of its modules.

    `change` is ‖C′ − C‖/‖C‖, of all that was cut off and rounded; `notes` are rule -> what the
    engine does with it. `size` is the bytes of its weights file.
    """

    how: How
    rank: int
    dtype: str
    size: int
    change: float
    norm: float
    shapes: Mapping[str, tuple[int, int]]
    notes: Mapping[str, str]


def form(file: AdapterFile, label: str, folder: Path | None, terms: Terms, on: Compute) -> Formed:
    """Put `file` into `folder` as the engine serves it; with None say only what it would be.

    Its own bytes where the engine serves these right, else what `compress --engine` writes; either
    way the config names the served base. `label` stands for its name in what is recorded. Raises
    what `compress` raises for an adapter that has no legal form.
    """
    if _is_of_image_model(file):
        raise IncompatibleError(
            f"is an adapter of an image model ({file.dialect}), which {terms.engine.title} does "
            "not serve"
        )
    objections = judge(file, terms.engine.name)
    for objection in objections:
        if objection.rule == "added-tokens" and objection.severity != "note":
            raise IncompatibleError(objection.message)  # a rewrite would only hide them
    if _as_it_is(file, objections, terms):
        return _copied(file, folder, terms, objections)
    return _written(file, label, folder, terms, on)


def _is_of_image_model(file: AdapterFile) -> bool:
    """Whether modules are called as in a diffusion pipeline; bare names may be any model's."""
    if file.dialect == "diffusers":
        return any(diffusers.component(diffusers.canonical(stem)) for stem in file.sites)
    return file.dialect not in ("peft", "mlx")


def _as_it_is(file: AdapterFile, objections: list[Objection], terms: Terms) -> bool:
    """Whether the engine serves the file's own tensors as they are."""
    minded = {objection.rule for objection in objections}
    return (
        DTYPE_NAMES.get(terms.dtype, file.dtype) == file.dtype
        and (file.dtype in terms.engine.slot_dtypes or "dtype" not in minded)
        and "rank-portable" not in minded
        and all(objection.severity == "note" for objection in objections)
        and os.path.basename(file.weights_file) == MAIN
        and file.config_file is not None
        and (terms.most is None or file.rank <= terms.most)
    )


def _copied(
    file: AdapterFile, folder: Path | None, terms: Terms, objections: list[Objection]
) -> Formed:
    how: How = "copied"
    size = os.stat(file.weights_file).st_size
    if folder is not None:
        folder.mkdir()
        how = duplicate(Path(file.weights_file), folder / MAIN, link=terms.link)
        assert file.config_file is not None  # _as_it_is has asked
        write_file(
            folder / peft.CONFIG, [config_for(read_text(file.config_file), terms.served_base)]
        )
        sync_directory(folder)
    notes = {o.rule: o.message for o in objections if o.rule not in _SETTLED}
    if file.dtype not in terms.engine.slot_dtypes:
        notes["rounded"] = (
            f"{format_name(file.dtype)} factors are rounded to the model's own type when they are "
            "loaded, which the errors here do not include; --dtype bfloat16 rounds them here"
        )
    return _formed(file, how, file.rank, size, 0.0, notes)


def _written(
    file: AdapterFile, label: str, folder: Path | None, terms: Terms, on: Compute
) -> Formed:
    """What `compress --engine` makes of it; without a rank nothing but rounding is lost."""
    rank = terms.most if terms.most is not None and file.rank > terms.most else None
    nameless = replace(file, path=label, side_files=())  # basenames may be tenants'
    out = folder if folder is not None else Path(os.curdir, f"{label}.deployed")
    options = Options(
        os.fspath(out),
        Ranks(rank=rank),
        verb="compress",
        engine=terms.engine.name,
        base=terms.base,
        dtype=terms.dtype,
        dry_run=folder is None,
    )
    report = save([nameless], [1.0], options, on)
    rules = {_FIGURES.sub("#", note): note for note in report.notes}  # alike but for figures
    dtype = report.dtype
    if not isinstance(report, Report):
        return replace(_formed(file, "written", report.rank, report.size, 0.0, rules), dtype=dtype)
    assert folder is not None  # a dry run has returned
    for name in (_CARD, SIDECAR):  # of a single adapter; the deployment has its own
        (folder / name).unlink(missing_ok=True)
    config = folder / peft.CONFIG
    text = config_for(read_text(os.fspath(config)), terms.served_base)
    config.unlink()
    write_file(config, [text])
    sync_directory(folder)
    served = open_adapter_file(folder)
    found = _formed(served, "written", report.rank, report.size, report.error or 0.0, rules)
    return replace(found, dtype=dtype, norm=report.norm)


def _formed(
    file: AdapterFile,
    how: How,
    rank: int,
    size: int,
    change: float,
    notes: Mapping[str, str],
) -> Formed:
    shapes = {stem: site.shape for stem, site in file.sites.items()}
    return Formed(how, rank, format_name(file.dtype), size, change, 0.0, shapes, notes)


def config_for(text: bytes, served_base: str) -> bytes:
    """adapter_config.json with the served base's name; the same bytes where it has that already.

    vLLM's resolver also insists on peft_type in capitals, and every engine on UTF-8 without a mark.
    """
    config: dict[str, Any] = json.loads(text)
    kind = str(config.get("peft_type") or "LORA").upper()
    named = {**config, "peft_type": kind, "base_model_name_or_path": served_base}
    if named == config and json.detect_encoding(text) == "utf-8":
        return text
    return json.dumps(named, indent=2, sort_keys=True).encode() + b"\n"
