"""Calls of merge methods in an expression: their adapters, parameters and modifiers.

What a method takes is read from its registration; what any method takes besides is `GENERAL`.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Mapping
from typing import Any, Protocol, get_args

from adapterops.derived.rule import Calibration, Space
from adapterops.errors import UsageError
from adapterops.expression.text import Span
from adapterops.expression.tree import Call, Node, Number, Option, plural
from adapterops.rules import registry
from adapterops.rules.modify import Target
from adapterops.rules.registry import Method, Parameter
from adapterops.suggestion import meant

METHODS: Mapping[str, Method] = registry.METHODS
GENERAL = ("weights", "space", "seed", "calibrate", "match_norm")  # of any method
_TEXTS = {
    "space": get_args(Space),
    "calibrate": get_args(Calibration),
    "match_norm": get_args(Target),
}


class Reader(Protocol):
    """What reads the parts of a call, and knows where they stand."""

    def node(self, node: ast.expr) -> Node: ...

    def adapter(self, node: ast.expr, message: str, hint: str | None = None) -> Node: ...

    def number(self, node: ast.expr, message: str) -> Node: ...

    def span(self, node: ast.AST) -> Span: ...

    def shown(self, node: ast.AST) -> str: ...

    def error(self, at: Span, message: str, hint: str | None = None) -> UsageError: ...


def spelled(name: str) -> str:
    """A parameter as an expression spells it: words of Python's own get an underscore."""
    return f"{name}_" if keyword.iskeyword(name) else name


def read_call(method: Method, node: ast.Call, reader: Reader) -> Call:
    """The call of a method. Raises UsageError at the position of what it does not take."""
    at = reader.span(node.func)
    parameters = {spelled(parameter.name): parameter for parameter in method.parameters}
    example = next(iter(parameters), None)
    arguments = []
    for given in node.args:
        if isinstance(given, ast.Starred):
            raise reader.error(reader.span(given), "adapters are listed one by one, without a star")
        hint = f"parameters are written by name: {example}=…" if example else None
        arguments.append(
            reader.adapter(given, f"{method.name} takes adapters; this is a number", hint)
        )
    try:
        method.check_count(len(arguments))
    except UsageError as error:
        raise reader.error(at, error.message) from None
    options: dict[str, Option] = {}
    for pair in node.keywords:
        place = reader.span(pair)
        if pair.arg is None:
            raise reader.error(place, "parameters are listed one by one, without stars")
        place = Span(place.start, place.start + len(pair.arg))
        if pair.arg not in parameters and pair.arg not in GENERAL:
            known = [*parameters, *_taken(method)]
            hint = meant(pair.arg, known) or f"it has {', '.join(known)}"
            raise reader.error(place, f"{method.name} has no parameter {pair.arg!r}", hint)
        if pair.arg in options:
            raise reader.error(place, f"{pair.arg} is given twice")
        value: bool | str | Node | tuple[Node, ...]
        if pair.arg in parameters:
            value = _value(method, parameters[pair.arg], pair.value, reader)
        elif pair.arg == "weights":
            value = _weights(len(arguments), pair.value, reader)
        else:
            value = _general(method, pair.arg, pair.value, place, reader)
        options[pair.arg] = Option(pair.arg, value, reader.span(pair.value))
    _check(
        method,
        {p.name: options[name].value for name, p in parameters.items() if name in options},
        at,
        reader,
    )
    ordered = tuple(options[name] for name in sorted(options))
    return Call(method.name, tuple(arguments), ordered, at)


def _value(
    method: Method, parameter: Parameter, node: ast.expr, reader: Reader
) -> bool | str | Node:
    """A parameter's value, checked where it is constant."""
    shown = f"{method.name}: {parameter.name} is {{}}; expected {parameter.range}"
    plain: bool | str | int | float | None = _plain(node)
    numeric = parameter.kind in ("number", "whole")
    if plain is None and numeric:
        number = reader.number(node, shown.format("an adapter"))
        if not isinstance(number, Number):
            return number
        plain = number.value
    elif plain is None:
        values = '"' + '" or "'.join(parameter.choices) + '"'
        hint = f"write {spelled(parameter.name)}={values if parameter.choices else 'True or False'}"
        raise reader.error(reader.span(node), shown.format(reader.shown(node)), hint)
    elif parameter.kind != "text" and isinstance(plain, str):
        raise reader.error(reader.span(node), shown.format(repr(plain)), "numbers need no quotes")
    try:
        value = parameter.read(plain, method.name)
    except UsageError as error:
        near = meant(plain, parameter.choices) if isinstance(plain, str) else None
        raise reader.error(reader.span(node), error.message, near) from None
    return value if isinstance(value, bool | str) else Number(value, reader.span(node))


def _plain(node: ast.expr) -> bool | str | None:
    """A switch or a text; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | str):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    return None


def _weights(count: int, node: ast.expr, reader: Reader) -> tuple[Node, ...]:
    """One number for each adapter of the call."""
    at = reader.span(node)
    if not isinstance(node, ast.List | ast.Tuple):
        raise reader.error(at, "weights is a list of numbers", "write weights=[0.5, 0.5]")
    if len(node.elts) != count:
        raise reader.error(
            at, f"there are {len(node.elts)} weights for {plural(count)}", "each has one"
        )
    found = []
    for each in node.elts:
        if _plain(each) is not None or isinstance(each, ast.Starred):
            raise reader.error(reader.span(each), "a weight is a number")
        found.append(reader.number(each, "a weight is a number; this is an adapter"))
    return tuple(found)


def _taken(method: Method) -> list[str]:
    """What of `GENERAL` says something to a method."""
    idle = {"space": not method.spaces, "seed": "seed" not in method.needs}
    return [name for name in GENERAL if not idle.get(name)]


def _general(
    method: Method, name: str, node: ast.expr, place: Span, reader: Reader
) -> bool | str | Node:
    """The value of what every method takes; what goes with which is for `combine` to say."""
    plain, at = _plain(node), reader.span(node)
    if name in _TEXTS:
        listed = " or ".join(f'{name}="{each}"' for each in _TEXTS[name])
        if not isinstance(plain, str):
            raise reader.error(at, f"{name} is a text", f"write {listed}")
        if plain not in _TEXTS[name]:
            hint = meant(plain, _TEXTS[name]) or f"write {listed}"
            raise reader.error(at, f"there is no {name} {plain!r}", hint)
        return plain
    if "seed" not in method.needs:
        raise reader.error(place, f"{method.name} draws nothing at random; seed says nothing to it")
    if plain is None:
        seed = reader.number(node, "seed is a number; this is an adapter")
        if isinstance(seed, Number) and isinstance(seed.value, int) and seed.value >= 0:
            return seed
    raise reader.error(at, "seed is a whole number from 0 to 2⁶³ − 1")


def _check(method: Method, given: Mapping[str, Any], at: Span, reader: Reader) -> None:
    """What is missing, and what does not go together, where it is known already."""
    constant = {
        name: value.value if isinstance(value, Number) else value for name, value in given.items()
    }
    later = [
        name for name, value in constant.items() if not isinstance(value, bool | str | int | float)
    ]
    if later:  # checked when it is evaluated
        return
    try:
        method.values(constant)
    except UsageError as error:
        raise reader.error(at, error.message, error.hint) from None
