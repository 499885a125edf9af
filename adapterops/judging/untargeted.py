"""Everything in a merged model that no adapter was to change: bit by bit, and its config.

A tensor in another type is right if each value is the base's, rounded once. What is not there, not
expected or different is named; what harms no loader (a tied head stored once or twice, masks and
frequencies that are computed anew) is a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from adapterops.baking.kernel import read_rows
from adapterops.basemodel.model import BaseModel, same_bytes
from adapterops.changes.given import given_rows
from adapterops.changes.targets import Changes, Values, as_matrix
from adapterops.errors import UnsupportedError
from adapterops.formats.model import Ref
from adapterops.judging.measure import Pair, is_judged
from adapterops.judging.naming import match
from adapterops.rounding.exact import narrowed
from adapterops.rounding.grid import TORCH

_BLOCK = 1 << 20  # elements
# Recomputed by the model's code: old files hold them, new savers leave them out.
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|original_inv_freq|num_batches_tracked)$"
)
_MASK = re.compile(r"(^|\.)attn(ention)?\.bias$")
_ADAPTER = re.compile(r"(^|[._])lora_|\.base_layer\.|^base_model\.model\.")
_LOST = {
    torch.float16: "went through float16, which has wider steps below 6.1e-5 and ends at 65504",
    torch.bfloat16: "went through bfloat16, which keeps 8 bits",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a tensor or a config that the adapters do not explain; `fails` if a bug."""

    name: str
    kind: str
    text: str
    fails: bool = True


@dataclass(frozen=True, slots=True)
class Matched:
    """Two models side by side, nothing read yet.

    `targets`, `values` and `copies` (base, merged) are by the name of the base; `renamed` counts
    tensors of another name; `findings` are of names, shapes and types alone.
    """

    targets: Mapping[str, Pair]
    values: Mapping[str, tuple[Values, Ref]]
    copies: Mapping[str, tuple[Ref, Ref]]
    renamed: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of one tensor that should be as it was: "" if it is, bit by bit.

    `converted` says from which type to which it was rounded, where it was.
    """

    name: str
    finding: Finding | None = None
    converted: str = ""


def match_models(base: BaseModel, baked: BaseModel, changes: Changes) -> Matched:
    """What is to be compared with what.

    Raises UnsupportedError for a merged tensor in a type that merges are not judged in.
    """
    expected: dict[str, tuple[int, ...]] = {n: ref.shape for n, ref in base.tensors.items()}
    expected |= {name: ref.shape for name, ref in changes.copies.items()}
    expected |= {name: target.ref.shape for name, target in changes.targets.items()}
    expected |= {name: values.shape for name, values in changes.values.items()}
    names = match(expected, baked.tensors)
    findings = [*_missing(base, changes, expected, names), *_extra(baked, set(names.values()))]
    targets: dict[str, Pair] = {}
    values: dict[str, tuple[Values, Ref]] = {}
    copies: dict[str, tuple[Ref, Ref]] = {}
    for name, other in names.items():
        after = baked.tensors[other]
        if after.shape != expected[name]:
            findings.append(_misshapen(name, expected[name], after.shape))
        elif name in changes.targets or name in changes.values:
            if not is_judged(after):
                raise UnsupportedError(
                    f"{other!r} is {after.dtype}: merges are judged in float16, bfloat16, float32",
                    path=after.source.path,
                )
            if name in changes.targets:
                targets[name] = Pair(changes.targets[name], after)
            else:
                values[name] = (changes.values[name], after)
        else:
            copies[name] = (changes.copies.get(name) or base.tensors[name], after)
    renamed = sum(name != other for name, other in names.items())
    return Matched(targets, values, copies, renamed, tuple(findings))


def _misshapen(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> Finding:
    what = "stored transposed" if after == before[::-1] else "of another shape"
    return Finding(name, "shape", f"is {what}: {list(after)}, {list(before)} in the base")


def _missing(
    base: BaseModel,
    changes: Changes,
    expected: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
) -> Iterator[Finding]:
    """Tensors that the merged model lacks."""
    for name in expected:
        if name in names:
            continue
        ref = base.tensors.get(name)
        if name in changes.targets or name in changes.values or ref is None:
            yield Finding(name, "lost", "is missing, and the adapters change it")
        elif _is_buffer(name, ref):
            yield Finding(name, "buffer", "is left out; models compute it", fails=False)
        elif base.is_tied and _twin(name, ref, base, set(names)) is not None:
            twin = _twin(name, ref, base, set(names))
            yield Finding(name, "tied", f"is stored once, as {twin}", fails=False)
        else:
            yield Finding(name, "lost", f"is missing ({ref.dtype} {list(ref.shape)})")


def _twin(name: str, ref: Ref, base: BaseModel, among: set[str]) -> str | None:
    """Another tensor with the same bytes that is there: the other half of a tie."""
    tied = [n for n in among if base.is_embedding(n) or base.is_head(n)]
    if not (base.is_embedding(name) or base.is_head(name)):
        return None
    return next((n for n in tied if n in base.tensors and same_bytes(ref, base.tensors[n])), None)


def _extra(baked: BaseModel, used: set[str]) -> Iterator[Finding]:
    """Tensors that only the merged model has."""
    for name, ref in baked.tensors.items():
        if name in used:
            continue
        if _is_buffer(name, ref):
            yield Finding(name, "buffer", "is there too; models compute it", fails=False)
        elif _twin(name, ref, baked, used) is not None:
            yield Finding(name, "tied", "is a second copy of the tied weight", fails=False)
        elif _ADAPTER.search(name):
            yield Finding(name, "adapter", "is the adapter's: it was saved beside, not merged")
        else:
            yield Finding(name, "extra", f"is not in the base ({ref.dtype} {list(ref.shape)})")


def _is_buffer(name: str, ref: Ref) -> bool:
    return bool(_BUFFERS.search(name)) or (bool(_MASK.search(name)) and len(ref.shape) == 4)


def compare_copies(name: str, before: Ref, after: Ref) -> Copied:
    """Whether a tensor is as it was, reading a block of each at a time."""
    if same_bytes(before, after):
        return Copied(name)
    if before.dtype not in TORCH or after.dtype not in TORCH:
        what = f"differs from the base ({before.dtype}, {after.dtype} here)"
        return Copied(name, Finding(name, "changed", what))
    count, wrong, largest, zero = math.prod(before.shape), 0, 0.0, True
    ways = [torch.float16, torch.bfloat16]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        W, other = (read_rows(ref, (count, 1), start, stop) for ref in (before, after))
        kept = narrowed(W.double(), TORCH[after.dtype]) if W.dtype != other.dtype else W
        differs = ~((kept == other) | (kept.isnan() & other.isnan()))
        wrong += int(differs.sum())
        ways = [way for way in ways if _is(_by_way_of(W, way, other.dtype), other)]
        zero = zero and not bool(other.any())
        if bool(differs.any()):
            gap = (kept[differs].double() - other[differs].double()).abs()
            largest = max(largest, float(gap.nan_to_num(torch.inf).max()))
    if wrong:
        return Copied(name, _changed(name, wrong, count, largest, zero, ways))
    same = before.dtype == after.dtype
    return Copied(name, converted="" if same else f"{before.dtype} to {after.dtype}")


def _by_way_of(W: torch.Tensor, way: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """W in a 16-bit type, and then in another type."""
    return narrowed(narrowed(W.double(), way).double(), dtype)


def _is(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _changed(
    name: str, wrong: int, count: int, largest: float, zero: bool, ways: list[torch.dtype]
) -> Finding:
    if zero:
        return Finding(name, "zeroed", "is all zeros, and no adapter changes it")
    far = f"by up to {largest:.3g}" if math.isfinite(largest) else "some NaN or infinite"
    if ways:
        lost = _LOST[ways[0]]
        what = f"{lost}: {wrong} of {count} values differ from the base, {far}"
        return Finding(name, "cast", what)
    what = f"{wrong} of {count} values differ from the base, {far}; no adapter changes it"
    return Finding(name, "changed", what)


def compare_values(name: str, values: Values, after: Ref) -> Finding | None:
    """Whether a tensor has the values that an adapter gives it, rounded once to its type."""
    matrix = as_matrix(values.shape)
    step = max(1, _BLOCK // max(1, matrix[1]))
    wrong = count = 0
    for start in range(0, matrix[0], step):
        stop = min(start + step, matrix[0])
        there = read_rows(after, matrix, start, stop)
        wanted = torch.from_numpy(given_rows(values, start, stop))
        known = ~wanted.isnan()
        differs = (narrowed(wanted, there.dtype) != there) & known
        wrong, count = wrong + int(differs.sum()), count + int(known.sum())
    if not wrong:
        return None
    what = f"{wrong} of {count} values are not those that the adapter gives it"
    return Finding(name, "values", what)
