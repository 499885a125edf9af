"""One safetensors file, written at its tensors' places in any order, its header last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from adapterops.errors import FileError, FormatError
from adapterops.files.header import Entry, encode_header
from adapterops.files.source import file_header

_HASH_BLOCK = 1 << 20


class TensorWriter:
    """A safetensors file with a reserved header: data at their offsets first, the header last."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], header_size: int) -> None:
        self.path = path
        self.entries = entries
        self.header_size = header_size
        self.data_size = max((entry.end for entry in entries.values()), default=0)
        self._missing = set(entries)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write one tensor's bytes at its place."""
        entry = self.entries[name]
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if len(view) != entry.nbytes:
            raise ValueError(f"{name}: {len(view)} bytes for a tensor of {entry.nbytes}")
        self._write(view, self.header_size + entry.start)
        self._missing.discard(name)

    def data_sha256(self) -> tuple[str, bytes]:
        """sha256 of the data section and the data section's first 2 MiB as written."""
        digest = hashlib.sha256()
        start = b""
        position = 0
        while position < self.data_size:
            block = os.pread(
                self._descriptor,
                min(_HASH_BLOCK, self.data_size - position),
                self.header_size + position,
            )
            if not block:
                raise FileError(
                    f"ends at byte {self.header_size + position}: it was cut while being written",
                    path=self.path,
                )
            if len(start) < 2 * _HASH_BLOCK:
                start += block
            digest.update(block)
            position += len(block)
        return digest.hexdigest(), start

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, flush to disk, read it back and compare."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written: {self._missing}")
        self._write(memoryview(encode_header(self.entries, metadata, self.header_size)), 0)
        os.ftruncate(self._descriptor, self.header_size + self.data_size)
        os.fsync(self._descriptor)
        try:
            written = file_header(self.path)
        except FormatError as error:
            raise FileError(
                f"the file read back is not what was written ({error.message})", path=self.path
            ) from None
        if dict(written.tensors) != dict(self.entries) or written.metadata != dict(metadata):
            raise FileError("the header read back differs from what was written", path=self.path)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done
