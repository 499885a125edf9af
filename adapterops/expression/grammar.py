"""Python's grammar, which expressions are read by, and what is meant by what it does not take."""

from __future__ import annotations

import ast
import re
import warnings

from adapterops.errors import UsageError
from adapterops.expression.text import Span, marked

DEEPEST = 150  # nodes above one another; a sum of so many terms


def parsed(text: str) -> ast.expr:
    """A normalised text by Python's grammar. Raises UsageError at the position where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as of `1if`: no valid text in a later Python
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        start = max((error.offset or 1) - 1, 0)
        stop = start + 1
        if error.end_offset is not None and (error.end_lineno or 1) == (error.lineno or 1):
            stop = max(error.end_offset - 1, stop)
        what = (error.msg or "invalid syntax").partition(". ")[0]
        at = Span(min(start, len(text)), min(stop, len(text) + 1))
        hint = _hint(text, at.start, error.msg or what)
        raise marked(text, at, f"the expression cannot be read: {what}", hint) from None
    except (ValueError, RecursionError, MemoryError):
        raise too_deep(text, Span(0, 1)) from None


def _hint(text: str, start: int, said: str) -> str | None:
    """What is often meant by what Python's grammar does not take, from where it did not."""
    before, rest = text[:start], text[start:]
    if re.search(r"\blambda\b", text):
        return "lambda is a word of Python: write lambda_="
    if text.count("(") != text.count(")"):
        return "count the parentheses"
    if "literal" in said or (re.search(r"[\w)] $", before) and re.match(r"[\w.(]", rest)):
        return "a product is written with *, and names begin with a letter"
    if "comma" in said:
        return "is a comma or an operator missing?"
    return "adapters are given beside the expression: NAME=PATH" if rest[:1] == "=" else None


def too_deep(text: str, at: Span) -> UsageError:
    """What is said of an expression of more than `DEEPEST` operations above one another."""
    return marked(
        text,
        at,
        f"the expression is more than {DEEPEST} operations deep",
        "linear(a, b, c, weights=[…]) adds any number of adapters",
    )
