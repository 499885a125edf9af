"""Text from files, made fit for a terminal."""

from __future__ import annotations

from typing import Any

_TEXT = {"where", "missing", "kind", "dialect", "from", "number format", "σ"}


def printable(text: str) -> str:
    """Names and messages without what could steer a terminal: control characters are spelled."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def safe(text: str) -> str:
    """`printable` text without what rich would take for markup."""
    from rich.markup import escape

    return escape(printable(text))


def count(number: int, what: str) -> str:
    """The number with its noun: 1 module, 2,000 modules."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def grid(title: str, *columns: str) -> Any:
    """An empty table whose first column is text; other columns of text are known by name."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    rows.add_column(title, overflow="fold")
    for name in columns:
        rows.add_column(name, justify="left" if name in _TEXT else "right", overflow="fold")
    return rows
