"""What a baked model says of itself, in its sidecar: what made it, and what made its base."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import adapterops
from adapterops.basemodel import BaseModel
from adapterops.files import checkpoint
from adapterops.files.output import SIDECAR
from adapterops.files.source import LocalFile, read_bytes, read_header
from adapterops.layout import sidecar_name
from adapterops.provenance import Origin, Provenance, base_name, file_sha256

_LARGEST = 64 << 20


def base_record(base: BaseModel, *, hashed: bool) -> dict[str, Any]:
    """The base by name, a hash of samples, and its files by size, time and hash of their headers.

    Configs say what a weight's rows are, so theirs is a hash too. `hashed` adds the sha256 of every
    file's bytes.
    """
    files = []
    for path in base.files:
        source = LocalFile(path)
        start = read_header(source).data_start
        header = hashlib.sha256(read_bytes(source, 0, start)).hexdigest()
        source.close()
        entry = {
            "name": base_name(path),
            "bytes": source.size(),
            "mtime_ns": os.stat(path).st_mtime_ns,
            "header_sha256": header,
        }
        files.append({**entry, "sha256": file_sha256(os.fspath(path))} if hashed else entry)
    configs = json.dumps({part: dict(base.configs[part]) for part in base.configs}, sort_keys=True)
    return {
        "name": base.name,
        "sampled_sha256": base.identity,
        "configs_sha256": hashlib.sha256(configs.encode()).hexdigest(),
        "files": files,
    }


def history_of(base: BaseModel) -> tuple[Mapping[str, Any], ...]:
    """The bakes that made a base, first to last, as its sidecar tells; () for one that none made.

    A sidecar speaks of the base beside it only if it has the hash of its samples. That of a file
    is its own, or its folder's, if it is all of that model.
    """
    given = Path(base.path)
    folder = given if given.is_dir() else given.parent
    sidecars = [folder / SIDECAR]
    if not given.is_dir() and not checkpoint.is_index(given):
        sidecars.insert(0, given.with_name(sidecar_name(given)))
    for document in map(_read, sidecars):
        if document.get("sampled_sha256") == base.identity:
            earlier = document.get("history")
            found = [*(earlier if isinstance(earlier, list) else []), document.get("provenance")]
            return tuple(item for item in found if isinstance(item, dict))
    return ()


def _read(sidecar: Path) -> dict[str, Any]:
    """The sidecar of a bake, {} for anything else."""
    try:
        if sidecar.stat().st_size > _LARGEST:
            return {}
        document = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("schema") != "adapterops.bake/1":
        return {}
    return document


def provenance(
    base: Mapping[str, Any], origins: Sequence[Origin], options: Mapping[str, Any]
) -> Provenance:
    """What decides the bytes of the result; times and paths are not in it."""
    files = [
        {key: value for key, value in file.items() if key != "mtime_ns"} for file in base["files"]
    ]
    return Provenance("bake", tuple(origins), {"base": {**base, "files": files}, **options})


def plan_hash(made: Provenance, base: Mapping[str, Any]) -> str:
    """What an interrupted run must agree on to be continued: everything, and the files' times."""
    document = {"made": made.to_dict(), "base": base, "version": adapterops.__version__}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
