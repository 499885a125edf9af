"""Names that tell adapters apart in a report."""

from __future__ import annotations

import os
from collections.abc import Sequence

from adapterops.adapter import Adapter
from adapterops.provenance import distinct, label_of


def names(adapters: Sequence[Adapter]) -> list[str]:
    """A name for each adapter: as much of its path's end as no other has, or the sum as written."""
    paths = [path_of(adapter) for adapter in adapters]
    ends = [os.path.abspath(path or "").split(os.sep) for path in paths]
    found = []
    for adapter, path, end in zip(adapters, paths, ends, strict=True):
        lengths = range(1, len(end))
        enough = (k for k in lengths if sum(other[-k:] == end[-k:] for other in ends) == 1)
        found.append("/".join(end[-next(enough, 1) :]) if path else _sum(adapter))
    return [os.fsencode(name).decode("utf-8", "replace") for name in distinct(found)]


def _sum(adapter: Adapter) -> str:
    if len(adapter.terms) == 1 and adapter.terms[0][0] == 1.0:
        return label_of(adapter.terms[0][1])
    return " + ".join(f"{weight:g}·{label_of(file)}" for weight, file in adapter.terms)


def path_of(adapter: Adapter) -> str | None:
    """The path of an adapter that is one file as it is, None for a sum."""
    if len(adapter.terms) != 1 or adapter.terms[0][0] != 1.0 or adapter.terms[0][1].made_of:
        return None
    return adapter.terms[0][1].path
