"""What an expression is once it is read: a small tree whose nodes are numbers or adapters.

Positions are no part of what a node is: equal parts of an expression are equal nodes, and the same
Adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from adapterops.expression.text import Span

Kind = Literal["number", "adapter"]
Operator = Literal["+", "-", "*", "/"]


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, folded from whatever was constant; whole ones stay whole."""

    value: int | float
    at: Span = field(compare=False)
    kind: Literal["number"] = field(default="number", init=False)


@dataclass(frozen=True, slots=True)
class Name:
    """An adapter that was given."""

    name: str
    at: Span = field(compare=False)
    kind: Literal["adapter"] = field(default="adapter", init=False)


@dataclass(frozen=True, slots=True)
class Negative:
    """−x."""

    operand: Node
    kind: Kind
    at: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Binary:
    """left ∘ right, of which at least one is an adapter or only known once `norm` is."""

    left: Node
    operator: Operator
    right: Node
    kind: Kind
    at: Span = field(compare=False)  # of the operator and what follows it


@dataclass(frozen=True, slots=True)
class Norm:
    """‖ΔW‖_F of an adapter, over all modules."""

    operand: Node
    at: Span = field(compare=False)
    kind: Literal["number"] = field(default="number", init=False)


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword of a call: a switch, a text, a number or a list of numbers."""

    name: str
    value: bool | str | Node | tuple[Node, ...]
    at: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A merge method on adapters; `options` in order of their names."""

    method: str
    arguments: tuple[Node, ...]
    options: tuple[Option, ...]
    at: Span = field(compare=False)
    kind: Literal["adapter"] = field(default="adapter", init=False)


Node = Number | Name | Negative | Binary | Norm | Call


@dataclass(frozen=True, slots=True)
class Expression:
    """A text and its tree, and which of the given names it uses, in order of appearance."""

    text: str
    root: Node
    names: tuple[str, ...]


def plural(count: int) -> str:
    """`1 adapter`, `2 adapters`."""
    return f"{count} adapter{'' if count == 1 else 's'}"


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, numbers in parameters included."""
    yield node
    below: tuple[Node, ...] = ()
    if isinstance(node, Binary):
        below = (node.left, node.right)
    elif isinstance(node, Negative | Norm):
        below = (node.operand,)
    elif isinstance(node, Call):
        below = node.arguments
        for option in node.options:
            if isinstance(option.value, tuple):
                below += option.value
            elif not isinstance(option.value, bool | str):
                below += (option.value,)
    for each in below:
        yield from walk(each)
