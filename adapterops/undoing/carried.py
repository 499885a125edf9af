"""A target's low-rank change as an undo file carries it: factors with their values, terms as JSON.

Restoring must not depend on the adapter being at hand, nor on how another version of a library
expands its kind, so the factors themselves are kept: B and A as they were added, in the narrowest
type that holds them exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from adapterops import casts
from adapterops.changes.targets import Target, Term
from adapterops.errors import FormatError
from adapterops.formats.model import Ref, Site

Slice = tuple[int, int, int]
_SHARED = 1024  # terms of one pair, as many as a layer has experts or heads
_TYPES = ("F16", "BF16", "F32", "F64")


class TermRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A term: `factors` counts the pairs of the file, `input` the adapters; else as in `Term`."""

    factors: int
    input: int
    coefficient: float
    rows: Slice
    columns: Slice
    turned: bool = False
    outputs: Slice | None = None
    inputs: Slice | None = None


class TargetRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A target: the matrix that its tensor is seen as, which way inputs run, and its terms."""

    matrix: tuple[int, int]
    inputs: Literal["columns", "rows"]
    terms: tuple[TermRecord, ...]


def sites_of(targets: Sequence[Target]) -> list[Site]:
    """Every site that the targets have terms of, once each, in their order."""
    found = {id(term.site): term.site for target in targets for term in target.terms}
    return list(found.values())


def record(target: Target, sites: Sequence[Site]) -> TargetRecord:
    """A target without dense changes, its sites counted as in `sites`."""
    if target.dense:
        raise ValueError(f"{target.name}: a dense change is not carried")
    index = {id(site): k for k, site in enumerate(sites)}
    terms = [
        TermRecord(
            factors=index[id(term.site)],
            input=term.input,
            coefficient=term.coefficient,
            rows=term.rows.indices(target.matrix[0]),
            columns=term.columns.indices(target.matrix[1]),
            turned=term.turned,
            outputs=term.outputs and term.outputs.indices(term.site.shape[0]),
            inputs=term.inputs and term.inputs.indices(term.site.shape[1]),
        )
        for term in target.terms
    ]
    return TargetRecord(target.matrix, target.inputs, tuple(terms))


def narrowest(values: np.ndarray[Any, Any]) -> tuple[str, memoryview]:
    """The first of float16, bfloat16, float32 and float64 that holds all values, and the bytes."""
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in _TYPES:
            stored = casts.store(values, dtype)
            if np.array_equal(casts.widen(stored, dtype), values):
                return dtype, casts.stored_bytes(stored)
    raise ValueError("factors that are not finite")


def target_of(name: str, kept: TargetRecord, ref: Ref, pairs: Sequence[tuple[Ref, Ref]]) -> Target:
    """The target again, over the tensor `ref`; `pairs` are the file's B and A.

    Raises FormatError where the pieces do not fit each other.
    """
    terms = []
    places: Counter[tuple[int, int]] = Counter()
    for term in kept.terms:
        if not 0 <= term.factors < len(pairs):
            raise _broken(name, f"needs factors {term.factors} of {len(pairs)}", pairs)
        B, A = pairs[term.factors]
        if len(B.shape) != 2 or len(A.shape) != 2 or B.shape[1] != A.shape[0]:
            raise _broken(name, f"has factors {B.shape} and {A.shape}", pairs)
        m, n = B.shape[0], A.shape[1]
        stored = _count(term.rows, kept.matrix[0]), _count(term.columns, kept.matrix[1])
        taken = _count(term.outputs or (0, m, 1), m), _count(term.inputs or (0, n, 1), n)
        if -1 in stored + taken or stored != (taken[::-1] if term.turned else taken):
            what = f"{taken[0]} x {taken[1]} of factors for {stored[0]} x {stored[1]}"
            raise _broken(name, f"has parts that do not fit, {what}", pairs)
        # What one adapter adds by one pair lies side by side, never twice at one place.
        places[term.factors, term.input] += max(1, math.prod(stored))
        if places[term.factors, term.input] > math.prod(kept.matrix):
            raise _broken(name, f"adds factors {term.factors} twice at one place", pairs)
        terms.append(
            Term(
                term.input,
                term.coefficient,
                _site(name, B, A),
                slice(*term.rows),
                slice(*term.columns),
                term.turned,
                term.outputs and slice(*term.outputs),
                term.inputs and slice(*term.inputs),
            )
        )
    used = {term.factors for term in kept.terms}
    total = sum(max(1, term.site.rank) for term in terms)
    if total > _SHARED * sum(max(1, pairs[index][0].shape[1]) for index in used):
        raise _broken(name, f"has terms of rank {total} of {len(used)} factors", pairs)
    return Target(name, ref, kept.matrix, tuple(terms), (), kept.inputs)


def _site(name: str, B: Ref, A: Ref) -> Site:
    rank = B.shape[1]
    parts: Mapping[str, Ref] = {"B": B, "A": A}
    return Site(
        stem=name,
        dialect="undo",
        kind="lora",
        layer="linear",
        shape=(B.shape[0], A.shape[1]),
        kernel=(),
        rank=rank,
        dim=rank,
        parts=parts,
        scale=1.0,
        scale_from="the undo file",
    )


def _count(part: Slice, size: int) -> int:
    """How many indices a slice has; −1 if it leads outside of `size`."""
    start, stop, step = part
    return len(range(start, stop, step)) if 0 <= start <= stop <= size and step > 0 else -1


def _broken(name: str, what: str, pairs: Sequence[tuple[Ref, Ref]]) -> FormatError:
    path = pairs[0][0].source.path if pairs else None
    return FormatError(f"tensor {name!r} {what}: the undo file is damaged", path=path)
