"""Values of a recipe as a verb's annotations want them: their types, and paths in its folder.

The annotations of the verbs are the grammar: numbers, switches, text, one of several words, paths,
lists and mappings of these. Text for something that may be a path is one.
"""

from __future__ import annotations

import collections.abc
import math
import os
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from adapterops.formats.peft import is_safe_pattern
from adapterops.recipe.document import Document, Key, shown

_NO = object()
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, list, tuple)
_MAPPINGS = (collections.abc.Mapping, dict)


def fitted(document: Document, key: Key, value: Any, kind: Any, folder: str) -> Any:
    """`value`, found at `key`, as an annotation `kind` has it; relative paths are below `folder`.

    Raises UsageError, with the place, for another type.
    """
    kinds = list(_alternatives(kind))
    for each in kinds:
        found = _scalar(value, each, folder)
        if found is not _NO:
            return found
    if isinstance(value, list | tuple):
        for each in kinds:
            if get_origin(each) in _LISTS:
                inner = get_args(each)[0]
                return [
                    fitted(document, (*key, index), item, inner, folder)
                    for index, item in enumerate(value)
                ]
    if isinstance(value, collections.abc.Mapping):
        for each in kinds:
            if get_origin(each) in _MAPPINGS:
                return _mapping(document, key, value, get_args(each), folder)
    raise document.error(key, f"is {described(value)}; expected {expected(kind)}")


def _mapping(
    document: Document,
    key: Key,
    value: collections.abc.Mapping[Any, Any],
    kinds: tuple[Any, ...],
    folder: str,
) -> dict[Any, Any]:
    found = {}
    for name, item in value.items():
        inner = fitted(document, (*key, str(name)), item, kinds[1], folder)
        # What is said by path, as alphas are, has any key.
        by_path = kinds[0] is Any and isinstance(name, str | os.PathLike)
        found[placed(name, folder) if by_path else name] = inner
    return found


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union; paths before text, which they are written as."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    yield from sorted(members, key=lambda each: not _is_path(each))


def _is_path(kind: Any) -> bool:
    return (get_origin(kind) or kind) is os.PathLike


def _scalar(value: Any, kind: Any, folder: str) -> Any:
    """The value as a type that is no list or mapping, `_NO` where it does not fit."""
    if kind is Any:
        return value
    if kind is types.NoneType:
        return None if value is None else _NO
    if get_origin(kind) is Literal:
        fits = any(type(value) is type(word) and value == word for word in get_args(kind))
        return value if fits else _NO
    if _is_path(kind):
        return placed(value, folder) if isinstance(value, str | os.PathLike) else _NO
    if kind in (int, float):
        number = isinstance(value, int | float if kind is float else int)
        return kind(value) if number and is_held(value) else _NO
    return value if isinstance(kind, type) and isinstance(value, kind) else _NO


def is_held(value: Any) -> bool:
    """Whether a value is a finite number that floating point holds, and no switch."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def check_patterns(document: Document, key: Key, patterns: Any) -> None:
    """Raise UsageError for a pattern, or several, that could be searched for without end."""
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if not isinstance(pattern, str) or not is_safe_pattern(pattern):
            raise document.error(key, f"{shown(pattern)} could be searched for without end")


def placed(path: str | os.PathLike[str], folder: str) -> str:
    """A path of a recipe: relative ones are below its folder, URIs stay as they are.

    `tenant=path`, where that is no file's name, names a tenant first.
    """
    text = os.fspath(path)
    if not text or not folder or os.path.isabs(text) or "://" in text:
        return text
    name, equals, rest = text.partition("=")
    if equals and name and rest and not os.path.lexists(os.path.join(folder, text)):
        return text if os.path.isabs(rest) else f"{name}={os.path.join(folder, rest)}"
    return os.path.join(folder, text)


def expected(kind: Any) -> str:
    """What an annotation takes, in words."""
    words = dict.fromkeys(word for each in _alternatives(kind) for word in _words(each))
    if "a path" in words:
        words.pop("text", None)
    return " or ".join(words)


def _words(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield ", ".join(map(str, get_args(kind)))
    elif get_origin(kind) in _LISTS:
        yield f"a list of {_plural(expected(get_args(kind)[0]))}"
    elif get_origin(kind) in _MAPPINGS:
        yield "a mapping"
    elif _is_path(kind):
        yield "a path"
    else:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        if kind in names:
            yield names[kind]


def _plural(words: str) -> str:
    return {"a path": "paths", "a number": "numbers"}.get(words, words)


def described(value: Any) -> str:
    """A wrong value: numbers and switches with a hint of what they were read as."""
    if isinstance(value, collections.abc.Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    kinds = {bool: "the switch ", int: "the number ", float: "the number ", str: "the text "}
    return f"{kinds.get(type(value), '')}{shown(value)}"
