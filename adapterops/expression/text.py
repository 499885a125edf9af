"""The text of an expression, and errors that point into it."""

from __future__ import annotations

from dataclasses import dataclass

from adapterops.errors import UsageError

LONGEST = 4000  # characters
_WIDTH = 76  # of what is shown of a longer text
_SPACE = " \t\r\n"
_ALLOWED = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-*/()[],.='\"" + _SPACE
)
_LOOKALIKES = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("×·∙⋅∗•", "*"),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("，،", ","),
    **dict.fromkeys("（", "("),
    **dict.fromkeys("）", ")"),
    "\N{NO-BREAK SPACE}": "a space",
}
_INSTEAD = {
    "^": "there are + - * /",
    "%": "write 0.3 for 30%",
    ":": "adapters are given beside the expression: NAME=PATH",
    **{char: f"write {plain}" for char, plain in _LOOKALIKES.items()},
}


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of the normalised text."""

    start: int
    stop: int


def normalized(text: object) -> str:
    """The text with single spaces, as errors show it and provenance records it.

    Raises UsageError where it is no text, empty, longer than `LONGEST`, or has a character that
    means nothing in an expression.
    """
    if not isinstance(text, str):
        raise UsageError(f"an expression is text, not {type(text).__name__}")
    if len(text) > LONGEST:
        raise UsageError(
            f"the expression has {len(text)} characters; at most {LONGEST} are read",
            hint="linear(a, b, c, weights=[…]) is shorter than a sum",
        )
    for place, char in enumerate(text):
        if char not in _ALLOWED:
            plain = "".join(" " if c.isspace() else c for c in text)
            code = "" if "!" <= char <= "~" else f" (U+{ord(char):04X})"
            shown = repr(char) if char.isprintable() else "a character"
            raise marked(
                plain,
                Span(place, place + 1),
                f"{shown}{code} means nothing in an expression",
                _INSTEAD.get(char),
            )
    found = " ".join(text.split())
    if not found:
        raise UsageError("the expression is empty", hint='for example "0.7*a + 0.3*b"')
    return found


def marked(text: str, at: Span, message: str, hint: str | None = None) -> UsageError:
    """An error whose last lines are the expression and a caret under what is wrong."""
    start = min(max(at.start, 0), len(text))
    stop = min(max(at.stop, start + 1), max(len(text), start + 1))
    left = max(0, min(start - _WIDTH // 3, len(text) - _WIDTH))
    right = min(len(text), left + _WIDTH)
    before, after = "…" if left else "", "…" if right < len(text) else ""
    line = "".join(c if c.isprintable() else "?" for c in text[left:right])
    indent = " " * (len(before) + start - left)
    carets = "^" * max(1, min(stop, right) - start)
    excerpt = f"\n    {before}{line}{after}\n    {indent}{carets}"
    if hint:
        return UsageError(message, hint=hint + excerpt)
    return UsageError(message + excerpt)
