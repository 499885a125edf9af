"""Whether two tensors are given the same, or one is the other in another type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.basemodel import same_bytes
from adapterops.changes.targets import Target, Term, Values
from adapterops.files.source import read_bytes
from adapterops.formats.model import Ref

_BLOCK = 1 << 20  # elements


def equal(
    pair: tuple[str, str], targets: Mapping[str, Target], values: Mapping[str, Values]
) -> bool:
    """Whether both tensors of a pair get the same, so that they may remain one weight."""
    one, other = pair
    if one in values and other in values:
        return _same_values(values[one], values[other])
    if one in targets and other in targets:
        return _same_change(targets[one], targets[other])
    return False


def same_numbers(saved: Ref, base: Ref) -> bool:
    """Whether a tensor that an adapter saved is the base's, rounded to the type it was saved in."""
    if saved.shape != base.shape or base.dtype not in casts.FORMATS:
        return False
    if saved.dtype == base.dtype or saved.dtype not in casts.FORMATS:
        return same_bytes(saved, base)
    one, other = (casts.FORMATS[ref.dtype].bits // 8 for ref in (saved, base))
    count = math.prod(base.shape)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        mine = read_bytes(saved.source, saved.offset + start * one, size * one)
        theirs = read_bytes(base.source, base.offset + start * other, size * other)
        raw = np.frombuffer(theirs, np.uint8)
        with np.errstate(over="ignore"):
            stored = casts.store(casts.decode(raw, base.dtype, (size,)), saved.dtype)
        if casts.stored_bytes(stored) != mine:
            return False
    return True


def _same_values(one: Values, other: Values) -> bool:
    mine, theirs = one.extra, other.extra
    if (one.rows, one.shape, len(mine.refs)) != (other.rows, other.shape, len(theirs.refs)):
        return False
    starts = (one.ref, other.ref) if one.rows is not None else (None, None)
    if starts[0] is not None and starts[1] is not None and not same_bytes(starts[0], starts[1]):
        return False
    pairs = zip(mine.refs, theirs.refs, strict=True)
    return mine.weights == theirs.weights and all(same_bytes(a, b) for a, b in pairs)


def _same_change(one: Target, other: Target) -> bool:
    """Whether two targets start alike and add the same: PEFT stores a tied pair transposed."""
    if one.dense or other.dense or one.matrix != other.matrix:
        return False
    if len(one.terms) != len(other.terms) or not same_bytes(one.ref, other.ref):
        return False
    return all(_same_term(a, b) for a, b in zip(_ordered(one), _ordered(other), strict=True))


def _ordered(target: Target) -> list[Term]:
    return sorted(target.terms, key=lambda term: (term.input, term.site.stem))


def _same_term(one: Term, other: Term) -> bool:
    if (one.input, one.coefficient, one.rows, one.columns) != (
        other.input,
        other.coefficient,
        other.rows,
        other.columns,
    ):
        return False
    sides = zip(_sides(one), _sides(other), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in sides)


def _sides(term: Term) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The factors as they lie in the stored matrix, left and right."""
    B, A = term.factors()
    return (A.T, B.T) if term.turned else (B, A)
