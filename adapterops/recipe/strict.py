"""YAML without its traps: the plain values of YAML 1.2's core schema, each with its place.

`1e-3` is a number; `on`, `off`, `yes`, `no`, dates and `1:30` are text. Refused, with line and
column: a key that stands twice, keys that are no text, anchors and aliases (a few lines of them
expand to gigabytes), tags, directives, several documents, deep nesting, and files above 1 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.reader import Reader

from adapterops.errors import UsageError
from adapterops.recipe.document import Document, Key, shown

LARGEST = 1_000_000  # bytes
DEEPEST = 12  # lists and mappings inside each other
_LONGEST = 60  # digits of a number
_NULL = re.compile(r"null|Null|NULL|~|")
_SWITCH = {"true": True, "false": False}
_WHOLE = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_yaml(data: bytes, name: str) -> Document:
    """The one document in `data`, the bytes of the file `name`. Raises UsageError."""
    if len(data) > LARGEST:
        raise UsageError(f"has {len(data)} bytes; a recipe has at most {LARGEST}", path=name)
    text = _text(data, name)
    reader = _Reader(name)
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        return Document(name, reader.document(iter(events)), reader.places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise _error(name, mark, f"is no YAML: {what}", _hint(what)) from None


def _text(data: bytes, name: str) -> str:
    """The bytes as text that may stand in YAML."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(data[: error.start].decode("utf-8", "replace"))
        raise UsageError(
            f"is no text in UTF-8: byte 0x{data[error.start]:02x}", path=f"{name}:{place}"
        ) from None
    odd = Reader.NON_PRINTABLE.search(text)
    if odd:
        raise UsageError(
            f"is no text: it holds the character U+{ord(odd[0]):04X}",
            path=f"{name}:{_place(text[: odd.start()])}",
        )
    return text


def _place(before: str) -> str:
    """Line and column of what follows this text."""
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


class _Reader:
    """Builds values from a parser's events, and notes where they stand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Key, tuple[int, int]] = {}

    def document(self, events: Iterator[Any]) -> Any:
        next(events)  # the start of the stream
        start = next(events)
        if isinstance(start, yaml.StreamEndEvent):
            raise UsageError("is empty", path=self.name, hint="a recipe has keys, such as verb")
        if start.version or start.tags:
            raise _error(self.name, start.start_mark, "has a directive (%…); leave it away")
        value = self._value(next(events), events, ())
        next(events)  # the end of the document
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _error(
                self.name, after.start_mark, "a second document starts here; a recipe is one"
            )
        return value

    def _value(self, event: Any, events: Iterator[Any], key: Key) -> Any:
        mark = event.start_mark
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise _error(
                self.name,
                mark,
                f"{sign}{event.anchor} is an {'alias' if sign == '*' else 'anchor'}, which "
                "recipes do not have",
                "write the value out, or put it in quotes if it is text",
            )
        if event.tag is not None:
            raise _error(
                self.name,
                mark,
                f"{shown(event.tag)} is a tag, which recipes do not have",
                "put the value in quotes if it is text",
            )
        if len(key) > DEEPEST:
            raise _error(self.name, mark, f"is nested deeper than {DEEPEST} levels")
        self.places.setdefault(key, (mark.line + 1, mark.column + 1))
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(events, key)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, key)
        if event.style is not None:
            return event.value
        try:
            return _plain(event.value)
        except ValueError as error:
            raise _error(self.name, mark, str(error), "text stands in quotes") from None

    def _list(self, events: Iterator[Any], key: Key) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            found.append(self._value(event, events, (*key, len(found))))
        return found

    def _mapping(self, events: Iterator[Any], key: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            mark = event.start_mark
            if not isinstance(event, yaml.ScalarEvent):
                is_alias = isinstance(event, yaml.AliasEvent)
                what = "an alias" if is_alias else "a list or a mapping"
                raise _error(self.name, mark, f"{what} stands where a key is expected")
            name = self._value(event, events, (*key, event.value))
            if not isinstance(name, str):
                raise _error(
                    self.name, mark, f"the key {shown(name)} is no text", "put it in quotes"
                )
            if name in found:
                line = self.places[(*key, name)][0]
                raise _error(
                    self.name, mark, f"the key {shown(name)} stands twice, first in line {line}"
                )
            found[name] = self._value(next(events), events, (*key, name))
        return found


def _plain(text: str) -> Any:
    """What an unquoted scalar is. Raises ValueError for numbers that nothing can hold."""
    if _NULL.fullmatch(text):
        return None
    if text.lower() in _SWITCH and text in (text.lower(), text.upper(), text.capitalize()):
        return _SWITCH[text.lower()]
    numeric = _WHOLE, _BASED, _NUMBER, _SPECIAL
    if not any(pattern.fullmatch(text) for pattern in numeric):
        return text
    if len(text) > _LONGEST:
        raise ValueError(f"is a number of {len(text)} characters")
    if _WHOLE.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(text.replace(".", "", 1) if _SPECIAL.fullmatch(text) else text)


def _hint(problem: str) -> str | None:
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "text with a colon stands in quotes"
    return None


def _error(name: str, mark: Any, message: str, hint: str | None = None) -> UsageError:
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    return UsageError(message, path=place, hint=hint)
