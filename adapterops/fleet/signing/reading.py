"""One pass over an adapter's bytes: every tensor read once, in the order of the file, and hashed.

Tensors that modules need come out as soon as a module has all of its own, and are let go after the
last module that shares them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapterops.formats.model import AdapterFile, Ref, Site

Array = np.ndarray[Any, Any]

_WINDOW = 1 << 20  # bytes read at once, unless one tensor is larger


class Pass:
    """The one pass over a file: `modules` yields them as they are complete.

    `digests` are SHA-256 of the tensors read so far, by name; `raw` serves the bytes of a module's
    tensors, or parts of them, while that module is at hand (`Site.factors` takes it).
    """

    def __init__(self, file: AdapterFile) -> None:
        self._file = file
        self.digests: dict[str, bytes] = {}
        self._held: dict[str, Array] = {}

    def raw(self, ref: Ref) -> Array:
        """The bytes of a tensor that is held, or of a part of it."""
        start = ref.offset - self._file.tensors[ref.name].offset
        return self._held[ref.name][start : start + ref.nbytes]

    def modules(self, sites: Mapping[str, Site]) -> Iterator[list[Site]]:
        """Those modules whose tensors are complete after each read; all tensors are read."""
        waiting = {stem: {r.name for r in site.parts.values()} for stem, site in sites.items()}
        users: defaultdict[str, set[str]] = defaultdict(set)
        for stem, names in waiting.items():
            for name in names:
                users[name].add(stem)
        for window in self._windows():
            ready = []
            for ref in window:
                for stem in users.get(ref.name, ()):
                    waiting[stem].discard(ref.name)
                    if not waiting[stem]:
                        ready.append(stem)
            self._read(window, users)
            if ready:
                yield [sites[stem] for stem in sorted(ready)]
            for stem in ready:
                for name in {ref.name for ref in sites[stem].parts.values()}:
                    users[name].discard(stem)
                    if not users[name]:
                        del self._held[name]

    def _windows(self) -> Iterator[list[Ref]]:
        """Tensors in the order of the file, as many as are read at once."""
        window: list[Ref] = []
        size = 0
        for ref in sorted(self._file.tensors.values(), key=lambda ref: ref.offset):
            if window and size + ref.nbytes > _WINDOW:
                yield window
                window, size = [], 0
            window.append(ref)
            size += ref.nbytes
        if window:
            yield window

    def _read(self, window: list[Ref], users: Mapping[str, set[str]]) -> None:
        first, last = window[0], window[-1]
        if len(window) == 1 and first.name not in users:
            self.digests[first.name] = _hashed(first)
            return
        buffer = np.empty(last.offset + last.nbytes - first.offset, np.uint8)
        first.source.pread_into(first.offset, buffer.data)
        for ref in window:
            start = ref.offset - first.offset
            part = buffer[start : start + ref.nbytes]
            self.digests[ref.name] = hashlib.sha256(part.data).digest()
            if ref.name in users:
                self._held[ref.name] = part


def _hashed(ref: Ref) -> bytes:
    """SHA-256 of a tensor that nothing else needs, read piece by piece."""
    digest = hashlib.sha256()
    buffer = np.empty(min(ref.nbytes, _WINDOW), np.uint8)
    for start in range(0, ref.nbytes, _WINDOW):
        part = buffer[: min(_WINDOW, ref.nbytes - start)]
        ref.source.pread_into(ref.offset + start, part.data)
        digest.update(part.data)
    return digest.digest()
