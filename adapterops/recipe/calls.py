"""From a recipe to the call of a verb: its keys are the verb's own parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from adapterops.errors import UsageError
from adapterops.recipe.document import Document, Key, offered
from adapterops.recipe.fitting import fitted

MERGEKIT = ("models", "merge_method")  # what tells a recipe of mergekit's shape from others
Progress = Callable[[str, int, int], None]
_PROGRESS = "progress"
# What other commands and tools call it.
_OTHER_NAMES = {
    "output": "out",
    "out_path": "out",
    "output_path": "out",
    "merge_method": "method",
    "params": "parameters",
    "adapter_name_or_path": "adapter",
}
_TEXT_PATHS = {"from_file"}


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's function; `keys` are its parameters with what they take, `required` some of them.

    `progress` is a key of none, and a parameter of those that take it.
    """

    name: str
    function: Callable[..., Any]
    keys: Mapping[str, Any]
    required: frozenset[str]
    takes_progress: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A verb with its arguments; `warnings` are what is odd about how it was asked for."""

    verb: Verb
    arguments: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def verb_of(name: str, function: Callable[..., Any]) -> Verb:
    """The verb `name` that a function of keywords is."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    keys = {
        key: os.PathLike[str] | None if key in _TEXT_PATHS else hints[key]
        for key in parameters
        if key != _PROGRESS
    }
    required = {key for key in keys if parameters[key].default is inspect.Parameter.empty}
    return Verb(name, function, keys, frozenset(required), _PROGRESS in parameters)


def call_of(
    verb: Verb,
    document: Document,
    entries: Mapping[str, Any],
    folder: str,
    keys: Mapping[str, Key] | None = None,
) -> Call:
    """The call that `entries` of a recipe are; `keys` are where they stand, where not at the top.

    What is missing is left to `completed`. Raises UsageError for keys that the verb does not have,
    values of other types and, unless `keys` say that it is done, what a method does not take.
    """
    arguments = {}
    for name, value in entries.items():
        key = (keys or {}).get(name, (name,))
        if name not in verb.keys:
            raise unknown(document, key, verb)
        arguments[name] = fitted(document, key, value, verb.keys[name], folder)
    if keys is None and arguments.keys() & {"method", "parameters"}:
        _check_method(document, arguments)
    if verb.name == "calc" and {"expression", "adapters"} <= arguments.keys():
        _check_expression(document, arguments)
    return Call(verb, arguments)


def _check_expression(document: Document, arguments: Mapping[str, Any]) -> None:
    """Raise UsageError, with both places, for what is wrong with an expression."""
    from adapterops.expression import read  # where there is one

    try:
        read(arguments["expression"], list(arguments["adapters"]))
    except UsageError as error:
        raise document.error(("expression",), error.message, error.hint) from None


def _check_method(document: Document, arguments: Mapping[str, Any]) -> None:
    """Raise UsageError, with the place, for a method or a parameter that there is not."""
    from adapterops.recipe.parameters import check_parameters, method_at  # where one is asked for

    method = method_at(document, ("method",), arguments.get("method", "linear"))
    given = arguments.get("parameters") or {}
    check_parameters(document, method, given, {name: ("parameters", name) for name in given})


def completed(call: Call, document: Document, overrides: Mapping[str, Any]) -> Call:
    """The call with what was said beside the recipe, None for nothing.

    Raises UsageError where the verb has no such parameter, or lacks one.
    """
    verb = call.verb
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in given:
        if name not in verb.keys:
            raise UsageError(f"{verb.name} has no {name.replace('_', ' ')}: leave it away")
    arguments = {**call.arguments, **given}
    missing = [name for name in verb.keys if name in verb.required and name not in arguments]
    if missing:
        hint = "in the recipe, or -o PATH" if missing == ["out"] else None
        raise document.error((), f"{verb.name} needs {' and '.join(missing)}", hint)
    return Call(verb, arguments, call.warnings)


def done(call: Call, progress: Progress | None = None) -> Any:
    """The report of a call, with the call's own warnings among its."""
    arguments = dict(call.arguments)
    if call.verb.takes_progress:
        arguments["progress"] = progress
    report = call.verb.function(**arguments)
    if not call.warnings:
        return report
    return replace(report, warnings=(*call.warnings, *report.warnings))


def unknown(document: Document, key: Key, verb: Verb) -> UsageError:
    """The error for a key that a verb does not have."""
    name = str(key[-1])
    other = _OTHER_NAMES.get(name)
    hint = f"it is {other} here" if other in verb.keys else offered(name, ("verb", *verb.keys))
    return document.error(key, f"{verb.name} has no such key", hint)
