"""What is written when the weights are: indexes, configs, tokenizers and the sidecar."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from adapterops.baking.beside import index_json, index_metadata
from adapterops.baking.planning import Job
from adapterops.baking.report import BakeReport
from adapterops.baking.shards import Shard
from adapterops.basemodel import open_model
from adapterops.certificate import fields_of, plain
from adapterops.files import checkpoint
from adapterops.files.clone import duplicate
from adapterops.files.output import SIDECAR
from adapterops.files.resumable import Resumed
from adapterops.layout import sidecar_name
from adapterops.provenance import Provenance, base_name, file_sha256
from adapterops.undoing.folder import folder_record
from adapterops.undoing.record import NAME, write_record
from adapterops.undoing.undo import SUFFIX


class Place(Protocol):
    """Where files are staged: a path for each, by its name in the output."""

    def path(self, name: str) -> Path: ...
    def write(self, name: str, chunks: Iterable[bytes]) -> None: ...


def write_rest(
    job: Job,
    place: Place,
    report: BakeReport,
    made: Provenance,
    record: Mapping[str, Any],
) -> list[str]:
    """Indexes, configs, tokenizers and the sidecar; the names of all files of the output."""
    main = Path(job.final).name
    names = [shard.name for shard in job.shards] if job.is_directory else [main]
    for name, content in _indexes(job):
        place.write(name, [content])
        names.append(name)
    for file in job.beside:
        if file.source is not None:
            duplicate(Path(file.source), place.path(file.name))
        else:
            place.write(file.name, [file.content or b""])
        names.append(file.name)
    names += _undo(job, place, record)
    sidecar = SIDECAR if job.is_directory else sidecar_name(Path(job.final))
    baked = open_model(place.root if isinstance(place, Resumed) else place.path(main))
    names.append(sidecar)
    document = {
        "schema": report.schema,
        "output": base_name(job.final),
        "sampled_sha256": baked.identity,
        "files": sorted(names),
        "provenance": made.to_dict(),
        "base_files": record["files"],
        **_measured(report),
    }
    for ref in baked.tensors.values():
        ref.source.close()
    if job.options.hash:
        paths = {n: place.path(n) for n in names[: len(job.shards)]}
        document["sha256"] = {name: file_sha256(os.fspath(p)) for name, p in paths.items()}
    encoded = msgspec.json.format(msgspec.json.encode(plain(document)), indent=1)
    place.write(sidecar, [encoded])
    return names


def _undo(job: Job, place: Place, record: Mapping[str, Any]) -> list[str]:
    """The undo files, written already, and for a folder the record of what they do not restore."""
    if not job.options.reversible:
        return []
    changed = [shard.name for shard in job.shards if not shard.untouched]
    if not job.is_directory:
        return [Path(job.final).name + SUFFIX] if changed else []
    weights = {
        shard.name: file["sha256"] for shard, file in zip(job.shards, record["files"], strict=True)
    }
    write_record(place.path(NAME), *folder_record(job.base, weights, changed, job.beside))
    return [*(name + SUFFIX for name in changed), NAME]


def _measured(report: BakeReport) -> dict[str, Any]:
    """The report without what names paths, or only concerned this run."""
    left = ("output", "base", "adapters", "files", "warnings", "notes", "resumed")
    return {name: value for name, value in fields_of(report).items() if name not in left}


def _indexes(job: Job) -> Iterator[tuple[str, bytes]]:
    """The index of every folder of shards that has one, with the true sizes."""
    folders: dict[str, list[Shard]] = {}
    for shard in job.shards:
        folders.setdefault(os.path.dirname(shard.name), []).append(shard)
    given = Path(job.base.path)
    for folder, shards in folders.items() if job.is_directory else ():
        source = given if checkpoint.is_index(given) else checkpoint.index_of(given / folder)
        if source is None:
            continue
        where = {
            tensor: os.path.basename(shard.name) for shard in shards for tensor in shard.entries
        }
        entries = {tensor: e for shard in shards for tensor, e in shard.entries.items()}
        sizes = {tensor: entry.nbytes for tensor, entry in entries.items()}
        count = sum(math.prod(entry.shape) for entry in entries.values())
        name = os.path.join(folder, source.name)
        yield name, index_json(where, sizes, index_metadata(source), count)
