"""Text from files, made fit for a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from typing import Any

_TEXT = {"where", "missing", "kind", "dialect", "from", "number format", "σ", "verdict", "how"}
_WIDTH = 140  # off a terminal nothing is gained by squeezing columns


def drawn(draw: Callable[[Any], None], width: int = _WIDTH) -> str:
    """What `draw` prints on the console it is given; colours only where stdout is a terminal.

    Off a terminal lines are `width` characters wide.
    """
    from rich.console import Console

    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    console = Console(
        emoji=False,
        file=buffer,
        force_terminal=terminal,
        highlight=False,
        soft_wrap=True,
        width=shutil.get_terminal_size().columns if terminal else width,
    )
    draw(console)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))


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


def megabytes(size: float) -> str:
    """Bytes in units of 10⁶, with three digits or all before the point."""
    return f"{size / 1e6:,.0f}" if size >= 1e9 else f"{size / 1e6:.3g}"


def grid(title: str, *columns: str) -> Any:
    """An empty table whose first column is text; other columns of text are known by name."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    rows.add_column(title, overflow="fold")
    for name in columns:
        rows.add_column(name, justify="left" if name in _TEXT else "right", overflow="fold")
    return rows
