"""The text of one rule of `--module-weights`, read.

    layers 0-7: 1,0             also `layers 3`, `layers 24-` and `layers 0-3+8-11`
    attn: 0.7,0.3               and `mlp`: the two halves of a language model's layers
    re:REGEX: 0.9,0.1           modules whose whole path matches
    blocks[NAME]=1,0,0.5,…      a block vector, or a preset's name, for one adapter or `*`

The first three give one weight per adapter, in their order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from adapterops.errors import UsageError
from adapterops.moduleweights.layouts import FAMILIES, LAYOUTS, PRESETS
from adapterops.moduleweights.paths import GROUPS, group, layer
from adapterops.suggestion import meant

_OPTION = "--module-weights"
_FORMS = "'layers 0-7: …', 'attn: …', 'mlp: …', 're:REGEX: …' or 'blocks[NAME]=…'"
_HEADS = ("layers", "re", "blocks", *GROUPS)
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_RANGE = re.compile(r"(?P<first>\d{1,9})(?P<to>\s*-\s*(?P<last>\d{1,9})?)?")
_SHOWN = 72  # characters
_EQUALS = re.compile(r"\s*=\s*")


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One weight per adapter for the modules whose path `matches`; `kind` is the rule's form."""

    text: str
    kind: str
    matches: Callable[[str], bool]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BlockRule:
    """What the weight of `adapter` (a label, a number from 1, or `*`) is multiplied by in blocks.

    By the values of a vector, or by those of a `preset`, which depend on the model's blocks.
    """

    text: str
    adapter: str
    values: tuple[float, ...] = ()
    preset: str = ""


def shown(text: str) -> str:
    """A rule as messages have it: a vector of 61 numbers would hide what is wrong with it."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")


def parse(text: str, count: int) -> WeightRule | BlockRule:
    """One rule for `count` adapters. Raises UsageError, with the place in the text."""
    if not isinstance(text, str):
        raise UsageError(f"{_OPTION}: a rule is text, not {type(text).__name__}")
    start = len(text) - len(text.lstrip())
    word = _WORD.match(text, start)
    head = word[0] if word else ""
    after = word.end() if word else start
    if head == "blocks":
        return _blocks(text, after)
    if head == "re" and text.startswith(":", after):
        colon = _colon(text, after + 1)
        pattern = _pattern(text, after + 1, colon)
        weights = _weights(text, colon, count)
        return WeightRule(text, "re", lambda path: pattern.fullmatch(path) is not None, weights)
    colon = _colon(text, start)
    if head == "layers":
        ranges = _ranges(text, after, colon)
        weights = _weights(text, colon, count)
        return WeightRule(text, "layers", lambda path: _within(layer(path), ranges), weights)
    if head in GROUPS and not text[after:colon].strip():
        weights = _weights(text, colon, count)
        return WeightRule(text, head, lambda path: group(path) == head, weights)
    hint = meant(head, _HEADS) or "a pattern of names is re:REGEX: weights"
    _wrong(text, start, f"expected {_FORMS}", hint)


def _colon(text: str, start: int) -> int:
    """Where the weights begin: patterns hold colons too, weights none."""
    colon = text.rfind(":", start)
    if colon < 0:
        _wrong(text, len(text), "expected ':' and one weight per adapter")
    return colon


def _pattern(text: str, start: int, stop: int) -> re.Pattern[str]:
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    pattern = text[start:stop].rstrip()
    if not pattern:
        _wrong(text, start, "expected a regular expression")
    try:
        return re.compile(pattern)
    except re.error as error:
        _wrong(text, start + (error.pos or 0), f"no regular expression ({error.msg})")


def _ranges(text: str, start: int, stop: int) -> list[tuple[int, float]]:
    """The layers' numbers, both ends included; an open end is infinite."""
    ranges = []
    for at, part in _split(text, start, stop, "+"):
        found = _RANGE.fullmatch(part)
        if found is None:
            hint = "layers are numbered from 0: 0-3 are the first four" if part[:1] == "-" else None
            _wrong(text, at, "expected layers such as 3, 0-7 or 24-", hint)
        first = int(found["first"])
        last = int(found["last"]) if found["last"] else math.inf if found["to"] else first
        if last < first:
            _wrong(text, at, f"the range {part!r} ends before it begins")
        ranges.append((first, last))
    return ranges


def _within(number: int | None, ranges: list[tuple[int, float]]) -> bool:
    return number is not None and any(first <= number <= last for first, last in ranges)


def _weights(text: str, colon: int, count: int) -> tuple[float, ...]:
    weights = _numbers(text, colon + 1)
    if len(weights) != count:
        of = "one adapter" if count == 1 else f"{count} adapters"
        raise UsageError(
            f"{_OPTION} {shown(text)}: gives {_many(len(weights), 'weight')} for {of}",
            hint="one per adapter, in their order, separated by commas",
        )
    return weights


def _numbers(text: str, start: int) -> tuple[float, ...]:
    numbers = []
    for at, part in _split(text, start, len(text), ","):
        value = float(part) if _NUMBER.fullmatch(part) else math.nan
        if not math.isfinite(value):
            _wrong(text, at, "expected a number")
        numbers.append(value)
    return tuple(numbers)


def _split(text: str, start: int, stop: int, mark: str) -> list[tuple[int, str]]:
    """The parts of text[start:stop] between marks, without spaces around, each with its place."""
    parts = []
    for part in text[start:stop].split(mark):
        parts.append((start + len(part) - len(part.lstrip()), part.strip()))
        start += len(part) + 1
    return parts


def _blocks(text: str, start: int) -> BlockRule:
    end = text.rfind("]")
    if not text.startswith("[", start) or end < start:
        _wrong(text, start, "expected '[NAME]=': an adapter's name or number, or *")
    name = text[start + 1 : end].strip()
    if not name:
        _wrong(text, start + 1, "expected an adapter's name or number, or *")
    equals = _EQUALS.match(text, end + 1)
    if equals is None:
        _wrong(text, end + 1, "expected '=' and a block vector or the name of a preset")
    value = text[equals.end() :].strip()
    if value in PRESETS:
        return BlockRule(text, name, preset=value)
    if _WORD.match(value) and "," not in value:
        hint = meant(value, PRESETS) or f"presets: {', '.join(PRESETS)}"
        _wrong(text, equals.end(), "expected a block vector or the name of a preset", hint)
    values = _numbers(text, equals.end())
    if len(values) not in LAYOUTS:
        lengths = ", ".join(f"{n} ({LAYOUTS[n].meant})" for n in FAMILIES[""])
        raise UsageError(
            f"{_OPTION} {shown(text)}: no block vector has {_many(len(values), 'value')}",
            hint=f"known are {lengths}",
        )
    return BlockRule(text, name, values)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _wrong(text: str, at: int, expected: str, hint: str | None = None) -> NoReturn:
    found = f"{text[at : at + 20]!r}" if text[at:].strip() else "nothing"
    raise UsageError(
        f"{_OPTION} {shown(text)}: {expected} at character {at + 1}, found {found}", hint=hint
    )
