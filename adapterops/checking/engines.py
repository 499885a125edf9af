"""Findings of serving engines: their dated rows, as `check` reports them."""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.checking.findings import Findings, finding
from adapterops.checking.reading import code_of
from adapterops.errors import UsageError
from adapterops.formats import AdapterFile
from adapterops.serving import ENGINES, judge

_CODES = {"reject": "engine-reject", "misread": "engine-misread", "note": "engine-note"}


def served(file: AdapterFile, engines: Sequence[str]) -> Findings:
    """What each engine would reject, misread or serve on a condition, gravest first.

    Nothing for a config that is broken: that is said already, and what it means is unknown.
    """
    if any(code_of(problem) == "config-broken" for problem in file.problems):
        return
    for engine in engines:
        for objection in judge(file, engine):
            yield finding(
                _CODES[objection.severity],
                objection.message,
                module=objection.modules[0] if objection.modules else None,
                rule=f"{objection.engine} {objection.version}: {objection.rule}",
            )


def known(engines: Sequence[str]) -> tuple[str, ...]:
    """The engines asked for, once each. Raises UsageError for one that is not known."""
    for engine in engines:
        if engine not in ENGINES:
            raise UsageError(f"--engine {engine!r}: expected one of {', '.join(ENGINES)}")
    return tuple(dict.fromkeys(engines))
