"""Expressions of adapters, such as `0.7*a + 0.3*b - 0.5*project(c, a)`.

Text is read by Python's own grammar and only what is listed becomes a tree, whose evaluation gives
the Adapter that the same line of Python would.
"""

from adapterops.expression.evaluation import evaluate
from adapterops.expression.reading import read
from adapterops.expression.text import normalized
from adapterops.expression.tree import Expression

__all__ = ["Expression", "evaluate", "normalized", "read"]
