"""Names of deployed adapters: a hash of what they do, so that other content has another name.

vLLM keeps prefix blocks by adapter name and path, and serves stale ones where the files under a
name change (`v1/core/kv_cache_utils.py: _gen_lora_extra_hash_keys`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from adapterops.files.header import Entry
from adapterops.files.output import MAIN
from adapterops.files.source import LocalFile, read_header
from adapterops.fleet.plans import ids
from adapterops.formats import peft
from adapterops.formats.locate import read_text

PREFIX = "lora-"  # never that of a salt
_DIGITS = 16
_BLOCK = 4 << 20


def content(folder: Path, known: Mapping[str, bytes] | None = None) -> str:
    """SHA-256 of an adapter's tensors (names, types, shapes, bytes) and config, as hex digits.

    The metadata of the weights file is left out: it says who wrote it, which changes nothing.
    `known` are SHA-256 of the bytes of tensors, which then are not read.
    """
    digest = hashlib.sha256(read_text(os.fspath(folder / peft.CONFIG)))
    file = LocalFile(folder / MAIN)
    try:
        header = read_header(file)
        for name, entry in sorted(header.tensors.items()):
            own = (known or {}).get(name) or _bytes(file, header.data_start + entry.start, entry)
            digest.update(repr((name, entry.dtype, tuple(entry.shape), own.hex())).encode())
    finally:
        file.close()
    return digest.hexdigest()


def _bytes(file: LocalFile, offset: int, entry: Entry) -> bytes:
    """SHA-256 of a tensor's bytes, read piece by piece."""
    digest = hashlib.sha256()
    buffer = bytearray(min(entry.nbytes, _BLOCK))
    for start in range(0, entry.nbytes, _BLOCK):
        view = memoryview(buffer)[: min(_BLOCK, entry.nbytes - start)]
        file.pread_into(offset + start, view)
        digest.update(view)
    return digest.digest()


def fresh(digest: str, taken: Collection[str]) -> str:
    """The name of an adapter with that content; a second one of the same content is `…-2`."""
    return ids.fresh(f"{PREFIX}{digest[:_DIGITS]}", taken)
