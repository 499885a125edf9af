"""From a tree to the Adapter that it stands for. Headers are read before, factors only by `norm`.

Equal parts are computed once and are one object, so that what is subtracted from itself is nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from adapterops.adapter import Adapter
from adapterops.combining import combine
from adapterops.errors import UsageError
from adapterops.expression.calls import METHODS, spelled
from adapterops.expression.reading import calculated
from adapterops.expression.text import Span, marked
from adapterops.expression.tree import (
    Binary,
    Call,
    Expression,
    Name,
    Negative,
    Node,
    Norm,
    Number,
    walk,
)

_Path = str | os.PathLike[str]
Activations = _Path | Mapping[str, _Path] | None


def evaluate(
    expression: Expression,
    adapters: Mapping[str, Adapter],
    *,
    modules: str | None = None,
    activations: Activations = None,
) -> Adapter:
    """The Adapter of an expression, lazy as its parts.

    `modules` is a regular expression of those that methods are to see. `activations` is a file for
    all adapters, or one for each by name. Raises UsageError with the position for numbers that
    `norm` made zero, infinite or too large for a parameter, and what `combine` raises.
    """
    return _Evaluation(expression.text, adapters, modules, activations).adapter(expression.root)


def needs_activations(expression: Expression) -> bool:
    """Whether a method in the expression looks at inputs of the modules."""
    called = (node.method for node in walk(expression.root) if isinstance(node, Call))
    return any("activations" in METHODS[name].needs for name in called)


class _Evaluation:
    def __init__(
        self,
        text: str,
        adapters: Mapping[str, Adapter],
        modules: str | None,
        activations: Activations,
    ) -> None:
        self._text = text
        self._adapters = adapters
        self._modules = modules
        self._activations = activations
        self._known: dict[Node, Adapter | int | float] = {}

    def adapter(self, node: Node) -> Adapter:
        found = self._value(node)
        assert isinstance(found, Adapter)
        return found

    def _number(self, node: Node) -> int | float:
        found = self._value(node)
        assert isinstance(found, int | float)
        return found

    def _value(self, node: Node) -> Adapter | int | float:
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Name):
            return self._adapters[node.name]
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: Negative | Binary | Norm | Call) -> Adapter | int | float:
        if isinstance(node, Negative):
            return -self._value(node.operand)
        if isinstance(node, Norm):
            return self._finite(self.adapter(node.operand).norm(), node.at)
        if isinstance(node, Call):
            return self._combined(node)
        if node.kind == "number":
            return self._arithmetic(node)
        if node.operator in ("+", "-"):
            left, right = self.adapter(node.left), self.adapter(node.right)
            return self._bounded(left + right if node.operator == "+" else left - right, node.at)
        if node.operator == "/":
            divisor = self._number(node.right)
            if divisor == 0 or not math.isfinite(1 / divisor):
                raise self._error(node.at, f"division by {divisor:g}")
            return self._bounded(self.adapter(node.left) / divisor, node.at)
        if node.left.kind == "adapter":
            return self._bounded(self.adapter(node.left) * self._number(node.right), node.at)
        return self._bounded(self._number(node.left) * self.adapter(node.right), node.at)

    def _arithmetic(self, node: Binary) -> int | float:
        left, right = self._number(node.left), self._number(node.right)
        if node.operator == "/" and right == 0:
            raise self._error(node.at, "division by zero: the norm behind it is 0")
        return self._finite(calculated(left, node.operator, right), node.at)

    def _finite(self, value: int | float, at: Span) -> int | float:
        if not math.isfinite(value):
            raise self._error(at, "this number is too large for floating point")
        return value

    def _bounded(self, found: Adapter, at: Span) -> Adapter:
        if not all(math.isfinite(weight) for weight, _ in found.terms):
            raise self._error(at, "a weight becomes too large for floating point")
        return found

    def _combined(self, node: Call) -> Adapter:
        method = METHODS[node.method]
        arguments = [self.adapter(each) for each in node.arguments]
        own = {spelled(parameter.name): parameter.name for parameter in method.parameters}
        given: dict[str, Any] = {}
        parameters: dict[str, Any] = {}
        for option in node.options:
            value: Any = option.value
            if isinstance(value, tuple):
                value = [float(self._number(each)) for each in value]
            elif not isinstance(value, bool | str):
                value = self._number(value)
            if option.name in own:
                try:
                    name = own[option.name]
                    [parameter] = [each for each in method.parameters if each.name == name]
                    parameters[name] = parameter.read(value, method.name)
                except UsageError as error:
                    raise self._error(option.at, error.message, error.hint) from None
            else:
                given[option.name] = value
        if "activations" in method.needs:
            given["activations"] = self._inputs(node)
        try:
            return combine(
                node.method, arguments, parameters=parameters, modules=self._modules, **given
            )
        except UsageError as error:
            if type(error) is not UsageError or error.path or error.module:
                raise
            raise self._error(node.at, error.message, error.hint) from None

    def _inputs(self, node: Call) -> _Path | list[_Path] | None:
        """The activations of a call's adapters: one file, or one for each."""
        if not isinstance(self._activations, Mapping):
            return self._activations
        found = []
        for argument in node.arguments:
            names = sorted({each.name for each in walk(argument) if isinstance(each, Name)})
            files = {self._activations.get(name) for name in names}
            if len(files) != 1:
                raise self._error(
                    argument.at,
                    f"{' and '.join(names)} have activations of their own, and this is one adapter",
                    "give one file for all",
                )
            [file] = files
            if file is None:
                raise self._error(
                    argument.at,
                    f"{node.method} needs activations, and there are none of {names[0]}",
                    f"--activations {names[0]}=FILE",
                )
            found.append(file)
        return found

    def _error(self, at: Span, message: str, hint: str | None = None) -> UsageError:
        return marked(self._text, at, message, hint)
