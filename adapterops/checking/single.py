"""All checks of one adapter: its files, its numbers, and what else was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from adapterops.checking import (
    beside,
    config,
    numbers,
    orientation,
    reading,
    scales,
    sets,
    size,
    structure,
    targets,
    travelling,
)
from adapterops.checking.findings import RULES, SEVERITIES, Finding
from adapterops.checking.measure import measure
from adapterops.checking.report import Checked
from adapterops.errors import AdapterOpsError
from adapterops.files.source import LocalFile
from adapterops.formats import AdapterFile, read_adapter
from adapterops.stream import Compute

_OF_FILES = (
    reading.problems,
    reading.notes,
    *structure.CHECKS,
    *scales.CHECKS,
    *config.CHECKS,
    *targets.CHECKS,
    *travelling.CHECKS,
    *orientation.CHECKS,
    *beside.CHECKS,
)
_OF_NUMBERS = (*numbers.CHECKS, *size.CHECKS)


@dataclass(frozen=True, slots=True)
class Options:
    """How adapters are checked: sent to other processes as it is."""

    on: Compute
    engines: tuple[str, ...] = ()
    base: str | None = None
    alpha: float | None = None
    alpha_wins: bool = False
    allow_pickle: bool = False


def check_file(path: str, options: Options) -> tuple[Checked, sets.Facts | None]:
    """Everything that is found in one adapter, gravest first, and what to compare it by.

    An adapter that cannot be read has one finding and no facts; nothing is raised for it.
    """
    try:
        file = read_adapter(
            path,
            alpha=options.alpha,
            alpha_wins=options.alpha_wins,
            allow_pickle=options.allow_pickle,
        )
    except AdapterOpsError as error:
        return unread(path, error), None
    try:
        return _check(file, options)
    except AdapterOpsError as error:  # it shrank, or the disk failed
        return unread(path, error), None
    finally:
        file.source.close()


def unread(path: str, error: AdapterOpsError) -> Checked:
    """The entry of an adapter that could not be checked."""
    failure = reading.failure(error)
    return Checked(path, None, None, 0, 0, (replace(failure, path=failure.path or path),))


def _check(file: AdapterFile, options: Options) -> tuple[Checked, sets.Facts]:
    found = numbers.Measured(file, measure(file.tensors, options.on))
    findings = [
        *(f for check in _OF_FILES for f in check(file)),
        *(f for check in _OF_NUMBERS for f in check(found)),
        *beside.twins(file, allow_pickle=options.allow_pickle),
    ]
    if options.engines:
        from adapterops.checking.engines import served  # slow to import, and rarely asked for

        findings += served(file, options.engines)
    if options.base is not None:
        from adapterops.checking.base import against
        from adapterops.checking.located import load

        findings += against(file, load(options.base))
    file.source.check_unchanged()
    bytes_of_file = LocalFile(file.weights_file).size()
    checked = Checked(
        path=file.path,
        weights_file=os.path.basename(file.weights_file),
        dialect=file.dialect,
        modules=len(file.sites),
        size=bytes_of_file,
        findings=tuple(_ordered(replace(f, path=f.path or file.path) for f in findings)),
    )
    return checked, sets.facts(found, bytes_of_file, allow_pickle=options.allow_pickle)


def _ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Gravest first, else in the order of the table."""
    codes = list(RULES)
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code)))
