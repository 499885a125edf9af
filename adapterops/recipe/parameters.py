"""The method that a recipe names and its parameters, checked where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterops.errors import UsageError
from adapterops.recipe.document import Document, Key, offered
from adapterops.rules.registry import Method, find

_NONE: Mapping[str, str] = {}


def method_at(document: Document, key: Key, name: str) -> Method:
    """The method of this name, which stands at `key`. Raises UsageError with the place."""
    try:
        return find(name)
    except UsageError as error:
        raise document.error(key, error.message, error.hint) from None


def check_parameters(
    document: Document,
    method: Method,
    values: Mapping[str, Any],
    places: Mapping[str, Key],
    hints: Mapping[str, str] = _NONE,
) -> None:
    """Raise UsageError with the place for what the method does not take, or lacks.

    `places` are where the values stand, `hints` what is said of names that it does not have.
    """
    known = {parameter.name: parameter for parameter in method.parameters}
    for name, value in values.items():
        if name not in known:
            hint = hints.get(name) or offered(name, known)
            raise document.error(places[name], f"{method.name} has no such parameter", hint)
        try:
            known[name].read(value, method.name)
        except UsageError as error:
            raise document.error(places[name], error.message, error.hint) from None
    try:
        method.values(values)
    except UsageError as error:
        raise document.error(("parameters",), error.message, error.hint) from None
