"""From text to tree: Python's grammar, of which only what is handled here is taken.

Everything that can be wrong without reading a file is found here, at its position: names, types of
operands, methods and their parameters. Constant numbers are folded as Python would compute them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection

from adapterops.errors import UsageError
from adapterops.expression.calls import METHODS, read_call
from adapterops.expression.grammar import DEEPEST, parsed, too_deep
from adapterops.expression.text import Span, marked, normalized
from adapterops.expression.tree import (
    Binary,
    Call,
    Expression,
    Kind,
    Name,
    Negative,
    Node,
    Norm,
    Number,
    Operator,
)
from adapterops.suggestion import meant

_NESTED = 20  # methods within one another
_LARGEST = 2**63  # of whole numbers; larger ones become floating
_OPERATORS: dict[type[ast.operator], Operator] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_NO_OPERATOR = {ast.Pow: "**", ast.FloorDiv: "//"}


def read(text: object, names: Collection[str]) -> Expression:
    """The tree of an expression in which `names` are adapters.

    Raises UsageError, with the position, for whatever is no expression of these adapters, and for a
    name that it does not use.
    """
    plain = normalized(text)
    reader = _Reader(plain, names)
    root = reader.node(parsed(plain))
    if root.kind == "number":
        raise marked(plain, Span(0, len(plain)), "the result is a number, not an adapter")
    for name in names:
        if name not in reader.used:
            raise UsageError(
                f"the expression does not use {name}",
                hint=f"leave {name}=… away, or use it\n    {plain}",
            )
    return Expression(plain, root, tuple(reader.used))


class _Reader:
    """Turns nodes of Python's grammar into ours; `used` collects names in order."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self.text = text
        self.names = names
        self.used: dict[str, None] = {}
        self._depth = 0
        self._calls = 0

    def error(self, at: Span, message: str, hint: str | None = None) -> UsageError:
        """An error at a position of the text."""
        return marked(self.text, at, message, hint)

    def span(self, node: ast.AST) -> Span:
        """Where a node of Python's grammar stands."""
        start = getattr(node, "col_offset", 0)
        return Span(start, getattr(node, "end_col_offset", None) or start + 1)

    def shown(self, node: ast.AST) -> str:
        """A node of Python's grammar as it is written."""
        at = self.span(node)
        return self.text[at.start : at.stop]

    def adapter(self, node: ast.expr, message: str, hint: str | None = None) -> Node:
        """A node that must be an adapter."""
        found = self.node(node)
        if found.kind != "adapter":
            raise self.error(self.span(node), message, hint)
        return found

    def number(self, node: ast.expr, message: str) -> Node:
        """A node that must be a number."""
        found = self.node(node)
        if found.kind != "number":
            raise self.error(self.span(node), message)
        return found

    def node(self, node: ast.expr) -> Node:
        """Any node, with all below it."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise too_deep(self.text, self.span(node))
        try:
            if isinstance(node, ast.Constant):
                return self._constant(node)
            if isinstance(node, ast.Name):
                return self._name(node)
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
                return self._signed(node)
            if isinstance(node, ast.BinOp):
                return self._binary(node)
            if isinstance(node, ast.Call):
                return self._call(node)
        finally:
            self._depth -= 1
        raise self._no_part(node)

    def _no_part(self, node: ast.expr) -> UsageError:
        at = self.span(node)
        if isinstance(node, ast.Attribute):
            at = Span(max(at.stop - len(node.attr) - 1, 0), at.stop)
            return self.error(at, "nothing is looked up behind a dot in an expression")
        if isinstance(node, ast.Tuple) and re.search(r"\d,\d", self.shown(node)):
            hint = "a number has a point: 0.5, not 0,5"
            return self.error(at, "a comma separates arguments of a function only", hint)
        what = {
            ast.List: "a list stands only behind weights=",
            ast.Tuple: "a comma separates arguments of a function only",
            ast.Subscript: "nothing is taken out of an adapter in an expression",
            ast.Starred: "a star stands only between two factors",
            ast.JoinedStr: "a text stands only behind the name of a parameter",
        }.get(type(node), "an expression has numbers, adapters, + - * / and functions only")
        return self.error(at, what)

    def _constant(self, node: ast.Constant) -> Number:
        value, at = node.value, self.span(node)
        if isinstance(value, bool):
            raise self.error(at, f"{value} stands only behind the name of a parameter")
        if isinstance(value, int | float):
            return self._folded(value, at)
        if isinstance(value, str):
            raise self.error(
                at,
                "a text stands only behind the name of a parameter",
                "adapters are named without quotes" if value in self.names else None,
            )
        raise self.error(at, f"{self.shown(node)} is neither a number nor an adapter")

    def _folded(self, value: int | float, at: Span) -> Number:
        try:
            found = value if isinstance(value, int) and abs(value) < _LARGEST else float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise self.error(at, "this number is too large for floating point")
        return Number(found, at)

    def _name(self, node: ast.Name) -> Name:
        name, at = node.id, self.span(node)
        if name in self.names:
            self.used.setdefault(name)
            return Name(name, at)
        if name.startswith("_"):
            raise self.error(at, "names do not begin with an underscore")
        if name.lower() in ("nan", "inf", "infinity"):
            raise self.error(at, f"{name} is not a finite number")
        if name in METHODS or name == "norm":
            raise self.error(at, f"{name} is a function: write {name}(…)")
        raise self.error(
            at, f"there is no adapter {name!r}", meant(name, self.names) or f"give {name}=PATH"
        )

    def _signed(self, node: ast.UnaryOp) -> Node:
        inner = self.node(node.operand)
        if isinstance(node.op, ast.UAdd):
            return inner
        if isinstance(inner, Number):
            return Number(-inner.value, self.span(node))
        return Negative(inner, inner.kind, self.span(node))

    def _binary(self, node: ast.BinOp) -> Node:
        left, right = self.node(node.left), self.node(node.right)
        at = self._operator(node)
        operator = _OPERATORS.get(type(node.op))
        if operator is None:
            shown = _NO_OPERATOR.get(type(node.op), "this")
            raise self.error(at, f"{shown} is no operator here", "there are + - * /")
        kinds = (left.kind, right.kind)
        if operator in ("+", "-") and left.kind != right.kind:
            said = "a number cannot be added to an adapter"
            if operator == "-":
                said = "a number cannot be subtracted from an adapter, nor one from a number"
            raise self.error(at, said, "a number multiplies: 3*a")
        if operator == "*" and kinds == ("adapter", "adapter"):
            raise self.error(
                at,
                "adapters are not multiplied by one another",
                "they are multiplied by numbers, and combined by methods",
            )
        if operator == "/" and right.kind == "adapter":
            raise self.error(
                at, "nothing is divided by an adapter", "norm(a) is the number that measures it"
            )
        if isinstance(right, Number) and operator == "/" and right.value == 0:
            raise self.error(self.span(node.right), "division by zero")
        if isinstance(left, Number) and isinstance(right, Number):
            return self._folded(calculated(left.value, operator, right.value), self.span(node))
        kind: Kind = "adapter" if "adapter" in kinds else "number"
        return Binary(left, operator, right, kind, at)

    def _operator(self, node: ast.BinOp) -> Span:
        """The operator's sign, between its operands and whatever parentheses are there."""
        start, stop = self.span(node.left).stop, self.span(node.right).start
        signs = [at for at in range(start, stop) if self.text[at] not in " ()"]
        return Span(signs[0], signs[-1] + 1) if signs else Span(start, stop)

    def _call(self, node: ast.Call) -> Node:
        if not isinstance(node.func, ast.Name):
            raise self.error(
                self.span(node.func), "only functions are called", "a product is written with *"
            )
        name, at = node.func.id, self.span(node.func)
        if name == "norm" and "norm" not in METHODS:
            return self._norm(node)
        if name not in METHODS:
            if name in self.names:
                raise self.error(
                    at, f"{name} is an adapter, no function", "a product is written with *"
                )
            if name.startswith("_"):
                raise self.error(at, "names do not begin with an underscore")
            hint = meant(name, {*METHODS, "norm"})
            raise self.error(
                at, f"there is no function {name!r}", hint or "adapterops methods lists them"
            )
        self._calls += 1
        if self._calls > _NESTED:
            raise self.error(at, f"more than {_NESTED} methods are nested in one another")
        try:
            found: Call = read_call(METHODS[name], node, self)
        finally:
            self._calls -= 1
        return found

    def _norm(self, node: ast.Call) -> Norm:
        at = self.span(node.func)
        for keyword in node.keywords:
            raise self.error(self.span(keyword), "norm takes no parameters")
        if len(node.args) != 1:
            raise self.error(at, f"norm takes one adapter; there are {len(node.args)}")
        return Norm(self.adapter(node.args[0], "norm takes an adapter; this is a number"), at)


def calculated(left: int | float, operator: Operator, right: int | float) -> int | float:
    """left ∘ right as Python computes it, infinite where it is too large.

    Raises ZeroDivisionError.
    """
    try:
        if operator == "+":
            return left + right
        if operator == "-":
            return left - right
        return left * right if operator == "*" else left / right
    except OverflowError:
        return math.inf
