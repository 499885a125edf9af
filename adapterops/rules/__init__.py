"""Merge methods as pure functions, each registered with what it takes and what it promises."""

from adapterops.rules import (
    elements,
    gram,
    peft_linear,
    project,
    regmean,
    sce,
    spectral,
    truncated,
    tucker,
)

__all__ = [
    "elements",
    "gram",
    "peft_linear",
    "project",
    "regmean",
    "sce",
    "spectral",
    "truncated",
    "tucker",
]
