"""PLAN on disk: plan.json, and the sketches of its representatives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import adapterops
from adapterops import casts
from adapterops.errors import FormatError, UsageError
from adapterops.files.header import encode_header, layout
from adapterops.files.output import Staging
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.fleet.plans.plan import SCHEMA, Plan
from adapterops.fleet.types import Array, Layout

PLAN = "plan.json"
SKETCHES = "sketches.safetensors"
REPRESENTATIVES = "representatives"
_KEY = "adapterops"


@dataclass(frozen=True, slots=True)
class Sketched:
    """Representatives that may serve the same tenants, by their ids, and their sketches.

    `key` is the partition's: base, dialect and extras that a newcomer must have. `sketches` (K, D)
    are float32, over the modules of `layout` side by side; `norms` (K,) are ‖ΔW‖_F. A sketch is of
    ΔW/‖ΔW‖ as `index` measured it and not normalised again, here and wherever sketches are
    compared: ν₁s₁ − ν₂s₂ is then the sketch of ΔW₁ − ΔW₂. Its own norm is 1 on average.
    """

    key: tuple[str, ...]
    ids: tuple[str, ...]
    layout: Layout
    norms: Array
    sketches: Array


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header of the sketches says of one partition."""

    key: tuple[str, ...]
    ids: tuple[str, ...]
    stems: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    side: int


def write_plan(staging: Staging, plan: Plan, sketched: Sequence[Sketched]) -> None:
    """Write both files into a staged directory."""
    document = {"schema": SCHEMA, "version": adapterops.__version__, "routes": plan.routes}
    document |= {field.name: getattr(plan, field.name) for field in fields(Plan)}
    text = msgspec.json.format(msgspec.json.encode(document, order="sorted"), indent=1)
    staging.write(PLAN, [text, b"\n"])
    tensors: dict[str, Array] = {}
    for index, part in enumerate(sketched):
        tensors[f"{index}.sketch"] = part.sketches.astype(np.float16)
        tensors[f"{index}.norm"] = part.norms.astype(np.float64)
    parts = [
        _Part(part.key, part.ids, part.layout.stems, part.layout.shapes, part.layout.side)
        for part in sketched
    ]
    metadata = {_KEY: msgspec.json.encode({"schema": SCHEMA, "parts": parts}).decode()}
    types = {"e": "F16", "d": "F64"}
    entries = layout({name: (types[x.dtype.char], x.shape) for name, x in tensors.items()})
    writer = staging.tensors(SKETCHES, entries, len(encode_header(entries, metadata)))
    for name, values in tensors.items():
        writer.put(name, casts.stored_bytes(values))
    writer.finish(metadata)


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a PLAN directory, or in a plan.json.

    Raises FileError where there is none, FormatError, naming the field, for what is no plan, and
    UsageError for one of another version.
    """
    file = plan_folder(path) / PLAN
    raw = LocalFile(file)
    try:
        document = msgspec.json.decode(bytes(read_bytes(raw, 0, raw.size())))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"is no JSON: {error}", path=str(file)) from None
    finally:
        raw.close()
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("adapterops.plan/"):
        raise FormatError("is no plan of adapterops", path=str(file))
    if schema != SCHEMA:
        raise UsageError(
            f"{file} has {schema}, this version reads {SCHEMA}", hint="plan again with cluster"
        )
    known = {field.name for field in fields(Plan)}
    try:
        plan = msgspec.convert({k: v for k, v in document.items() if k in known}, Plan)
        unknown = {item.by for item in plan.served.values()} - plan.representatives.keys()
        if unknown:
            raise ValueError(f"there is no representative {min(unknown)!r}")
        listed = [(name, id) for id, rep in plan.representatives.items() for name in rep.members]
        found = {name: item.by for name, item in plan.served.items()}
        if len(listed) != len(found) or dict(listed) != found:
            raise ValueError("members of representatives are not those whom they serve")
        if document.get("routes") != plan.routes:
            raise ValueError("routes are not those of served and representatives")
    except (msgspec.ValidationError, ValueError) as error:
        raise FormatError(f"is no plan of adapterops: {error}", path=str(file)) from None
    return plan


def plan_folder(path: str | os.PathLike[str]) -> Path:
    """The PLAN directory of a path to it or to its plan.json."""
    given = Path(path)
    return given.parent if given.name == PLAN and not given.is_dir() else given


def located(plan: str | os.PathLike[str], location: str, path: str) -> str:
    """Where a representative is: an original's own place, or below PLAN."""
    return location or str(plan_folder(plan) / path)


def read_sketches(path: str | os.PathLike[str]) -> list[Sketched]:
    """The sketches of a PLAN. Raises FileError, FormatError."""
    file = plan_folder(path) / SKETCHES
    source = LocalFile(file)
    try:
        header = read_header(source)
        listing = msgspec.json.decode(header.metadata.get(_KEY, "{}"))
        parts = msgspec.convert(_mapping(listing).get("parts"), list[_Part])
        result = []
        for index, part in enumerate(parts):
            arrays = []
            for name, dtype, kind in (
                (f"{index}.sketch", "F16", "<f2"),
                (f"{index}.norm", "F64", "<f8"),
            ):
                entry = header.tensors[name]
                if entry.dtype != dtype:
                    raise ValueError(f"{name} is {entry.dtype}, expected {dtype}")
                raw = read_bytes(source, header.data_start + entry.start, entry.nbytes)
                arrays.append(np.frombuffer(raw, kind).reshape(entry.shape))
            sketches, norms = arrays
            expected = (len(part.ids), len(part.stems) * part.side**2)
            if sketches.shape != expected or norms.shape != expected[:1]:
                raise ValueError(f"{index}.sketch is {sketches.shape}, expected {expected}")
            shape = Layout(part.stems, part.shapes, part.side)
            narrow = sketches.astype(np.float32)
            result.append(Sketched(part.key, part.ids, shape, norms, narrow))
        return result
    except (KeyError, ValueError, msgspec.MsgspecError) as error:
        raise FormatError(f"holds no sketches of a plan: {error}", path=str(file)) from None
    finally:
        source.close()


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("its metadata is no object")
    return value
