"""What a fleet is made of: tenants, what is known of each adapter, layouts of modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Status = Literal["ok", "no-op", "ineligible", "broken"]


def _no_numbers() -> Array:
    return np.zeros(0)


def _no_halves() -> Array:
    return np.zeros(0, np.float16)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose adapter is where.

    `path` is as it was given to `index` (PATH joined with what was found below it, a manifest's own
    entry, or a URI), `location` the absolute path or URI that opens it from anywhere. `traffic` is
    its share of requests in any unit, at least 0.
    """

    name: str
    path: str
    location: str
    traffic: float = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """The modules of an adapter whose ΔW is not zero, sorted by stem, with their (out, in).

    `side` is p of the p x p sketch of each: a power of two, larger where modules are few. Sketches
    of two layouts compare by the upper left block of the smaller side, rescaled.
    """

    stems: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    side: int


@dataclass(frozen=True, slots=True)
class Signature:
    """What `index` keeps of one adapter, made in one pass over its bytes.

    `content` is a SHA-256 of everything that decides what it does on its base (names, shapes,
    types, bytes of all tensors, scales): equal only for byte duplicates, wherever they lie, ""
    where not all could be read. `extras` is one of the extra tensors and changes of biases alone,
    "" where there are none. `norms` (L,) float64 are ‖ΔW‖_F by module; `rank` is the largest
    nominal rank, `needed` the smallest uniform ranks that keep the error of the whole adapter
    within 1 % and 5 %. `sketch` (L, p, p) is float16 of PᵀΔWQ/p over the adapter's norm, `outputs`
    (q,) float16 of a sketch of ΔWΔWᵀ over its own norm, of one length for all layouts, `start`
    (k,) float16 a fingerprint of A that training hardly moves, normalised (0 where only embeddings
    are adapted). The arrays are empty unless
    `status` is "ok"; `reason` says why it is not.
    """

    status: Status
    reason: str = ""
    content: str = ""
    extras: str = ""
    base: str = ""
    dialect: str = ""
    dtype: str = ""
    size: int = 0
    rank: int = 0
    needed: tuple[int, int] = (0, 0)
    norm: float = 0.0
    layout: Layout | None = None
    norms: Array = field(default_factory=_no_numbers)
    sketch: Array = field(default_factory=_no_halves)
    outputs: Array = field(default_factory=_no_halves)
    start: Array = field(default_factory=_no_halves)


@dataclass(frozen=True, slots=True)
class Record:
    """A tenant with the part of its signature that is no array.

    `version` tells one state of its files from another (ETag, or size and mtime of every file);
    `layout` and `row` find the layout and the arrays in the index, -1 where there are none.
    """

    tenant: Tenant
    version: str
    status: Status
    reason: str
    content: str
    extras: str
    base: str
    dialect: str
    dtype: str
    size: int
    rank: int
    needed: tuple[int, int]
    norm: float
    layout: int = -1
    row: int = -1
