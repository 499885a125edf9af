"""The data of a fleet's page as columns: what its tables and its map are drawn from."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from adapterops.fleet.summary.map import Rows, Similarity
from adapterops.fleet.summary.served import FleetReport, Tenant
from adapterops.render.text import printable

ROWS = 20_000  # of a table: beyond, a page takes too long to open
_DIGITS = 6
_NONE = -128


class _Words:
    """Texts that repeat, each stored once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self._places.setdefault(printable(word), len(self._places))

    @property
    def listed(self) -> list[str]:
        return list(self._places)


def columns(report: FleetReport, rows: int = ROWS) -> dict[str, Any]:
    """Adapters and tenants as columns of at most `rows` each, and the map.

    Numbers have six digits. Of more tenants those with the largest errors are taken, those that
    nothing serves first; of more adapters those that serve most. `only` is the tenant of an adapter
    that serves one alone. `words` are the texts that
    others name by place, -1 for none. Names are as they are shown: control characters are spelled.
    """
    words = _Words()
    reps = report.groups
    found = sorted(report.served.items(), key=lambda pair: (-report.counted(pair[1]), pair[0]))
    lost = sorted(report.excluded.items())
    shown = found[: max(rows - len(lost), 0)]
    tenants = {
        "name": [printable(name) for name, _ in lost[:rows]] + [printable(n) for n, _ in shown],
        **_tenant_columns(len(lost[:rows]), [item for _, item in shown], words),
        "reason": [words(reason) for _, reason in lost[:rows]]
        + [words(x.reason) for _, x in shown],
    }
    kept = reps[:rows]
    adapters = {
        "id": [words(rep.id) for rep in kept],
        "kind": [words(rep.kind) for rep in kept],
        "members": [len(rep.members) for rep in kept],
        "traffic": _short(sum(report.served[n].traffic for n in rep.members) for rep in kept),
        "rank": [rep.rank for rep in kept],
        "size": [rep.size for rep in kept],
        "error": _short(report.error_of(rep, report.counted) for rep in kept),
        "foreign": _short(report.error_of(rep, lambda item: item.foreign) for rep in kept),
        "bound": [None if rep.bound is None else _digits(rep.bound) for rep in kept],
        "only": [printable(rep.members[0]) if len(rep.members) == 1 else "" for rep in kept],
        "path": [printable(rep.path) for rep in kept],
        "reason": [words(rep.reason) for rep in kept],
    }
    return {
        "schema": report.schema,
        "tenants": tenants,
        "tenant_total": len(found) + len(lost),
        "adapters": adapters,
        "adapter_total": len(reps),
        "map": None if report.similarity is None else _map(report.similarity),
        "words": words.listed,
    }


def _tenant_columns(lost: int, items: list[Tenant], words: _Words) -> dict[str, list[Any]]:
    """Figures by tenant, after so many without any."""
    nothing: list[Any] = [None] * lost
    measured = any(item.measured is not None for item in items)
    found: dict[str, list[Any]] = {
        "fate": ["none"] * lost + [item.fate for item in items],
        "by": [-1] * lost + [-1 if x.fate == "base" else words(x.by) for x in items],
        "kind": [-1] * lost + [words(item.kind) for item in items],
        "error": nothing + _short(item.error for item in items),
        "missing": nothing + _short(item.missing for item in items),
        "foreign": nothing + _short(item.foreign for item in items),
        "cosine": nothing + _short(item.cosine for item in items),
        "worst": [-1] * lost + [words(x.worst[0]) if x.worst[0] else -1 for x in items],
        "worst_error": nothing + _short(item.worst[1] for item in items),
        "traffic": nothing + _short(item.traffic for item in items),
        "rank": nothing + [item.rank for item in items],
    }
    if measured:
        found["measured"] = nothing + [
            None if item.measured is None else _digits(item.measured) for item in items
        ]
    return found


def _short(values: Iterable[float]) -> list[float | None]:
    return [_digits(value) for value in values]


def _digits(value: float) -> float | None:
    number = float(f"{value:.{_DIGITS}g}")
    return number if abs(number) < float("inf") else None


def _map(found: Similarity) -> dict[str, Any]:
    places = {id: place for place, id in enumerate(dict.fromkeys(found.groups))}
    return {
        "names": [printable(name) for name in found.names],
        "groups": [places[id] for id in found.groups],
        "delta": _packed(found.delta),
        "outputs": _packed(found.outputs),
    }


def _packed(rows: Rows) -> str:
    """Cosines in hundredths as signed bytes, row by row, in base64; -128 where there is none."""
    numbers = (_NONE if value is None else round(100 * value) for row in rows for value in row)
    return base64.b64encode(bytes(number & 0xFF for number in numbers)).decode()
