"""inspect: what an adapter is, by its headers; on request what its ranks hold, by its tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from adapterops import passes
from adapterops.align import align
from adapterops.batch.search import Item
from adapterops.errors import IncompatibleError, UsageError
from adapterops.formats import AdapterFile, read_adapter
from adapterops.formats.locate import locate
from adapterops.inspection.base import base_parameters
from adapterops.inspection.describe import describe
from adapterops.inspection.report import Inspection
from adapterops.inspection.spectra import SpectrumReport, report
from adapterops.options import compute
from adapterops.provenance import Origin, Provenance, base_name, file_sha256
from adapterops.stream import Compute

Progress = Callable[[str, int, int], None]


def inspect(
    path: str | os.PathLike[str],
    *,
    spectrum: bool = False,
    base: str | os.PathLike[str] | None = None,
    modules: str | None = None,
    alpha: float | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """What the adapter at `path`, a file or a directory, is.

    Args:
        spectrum: read the tensors too and report singular values, stable ranks and energy by rank.
        base: the base model, to say how much of it the adapter has: a checkpoint (a file or a
            directory of safetensors) or its config.json. Headers only.
        modules: regular expression that a module path must match as a whole to be looked at.
        alpha: for an adapter that does not say its scale.
        strict: turn what deserves attention, or would keep it from being merged, into an error.
        memory: bytes in flight. jobs: worker threads. progress: called with (what, done, count).

    Raises FileError, FormatError and UnsafeFileError for what cannot be read. What can be read but
    not merged is in `problems`; with `spectrum` it is raised, for then the deltas are needed.
    """
    options = prepare(
        spectrum=spectrum,
        base=base,
        modules=modules,
        alpha=alpha,
        strict=strict,
        allow_pickle=allow_pickle,
        memory=memory,
        jobs=jobs,
    )
    return _inspect(options, os.fspath(path), progress)


@dataclass(frozen=True, slots=True)
class Options:
    """How adapters are inspected, checked and ready to be sent to another process."""

    on: Compute
    spectrum: bool = False
    base_parameters: int | None = None
    modules: re.Pattern[str] | None = None
    alpha: float | Mapping[str, float] | None = None
    strict: bool = False
    allow_pickle: bool = False
    brief: bool = False


def prepare(
    *,
    spectrum: bool = False,
    base: str | os.PathLike[str] | None = None,
    modules: str | None = None,
    alpha: float | Mapping[str, float] | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    memory: str | int | None = None,
    jobs: int | None = None,
    brief: bool = False,
) -> Options:
    """The options of `inspect`, checked once for many adapters; a mapping gives alphas to paths.

    `brief` leaves out single modules. Raises UsageError, and what reading `base` raises.
    """
    for value in alpha.values() if isinstance(alpha, Mapping) else (alpha,):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"alpha {value}: expected a number above 0")
    try:
        pattern = None if modules is None else re.compile(modules)
    except re.error as error:
        raise UsageError(f"--modules {modules!r} is no regular expression ({error})") from None
    return Options(
        on=compute("cpu", memory, jobs),
        spectrum=spectrum,
        base_parameters=None if base is None else base_parameters(base),
        modules=pattern,
        alpha=alpha,
        strict=strict,
        allow_pickle=allow_pickle,
        brief=brief,
    )


def inspect_item(options: Options, item: Item) -> Inspection:
    """What one of many adapters is: the work that `batch.run_many` spreads out."""
    return _inspect(options, item.path, None)


def _inspect(options: Options, path: str, progress: Progress | None) -> Inspection:
    given = options.alpha
    file = read_adapter(
        path,
        alpha=given.get(path) if isinstance(given, Mapping) else given,
        alpha_wins=isinstance(given, Mapping) and path in given,
        allow_pickle=options.allow_pickle,
    )
    try:
        file, note = _selected(file, options.modules)
        found = describe(file, base_parameters=options.base_parameters, brief=options.brief)
        found = replace(found, notes=(*found.notes, *note))
        if options.strict or options.spectrum:
            for problem in file.problems:
                raise problem
        if options.strict and found.notes:
            raise IncompatibleError(f"--strict: {found.notes[0]}", path=path)
        if options.spectrum and file.sites:
            measured = _spectrum(file, options.on, progress)
            measured = replace(measured, modules={}) if options.brief else measured
            found = replace(found, spectrum=measured)
    finally:
        file.source.close()
    return found


def _selected(
    file: AdapterFile, pattern: re.Pattern[str] | None
) -> tuple[AdapterFile, tuple[str, ...]]:
    """The adapter with only those modules that match as a whole, and a note if none does."""
    if pattern is None:
        return file, ()
    sites = {stem: site for stem, site in file.sites.items() if pattern.fullmatch(stem)}
    if sites or not file.sites:
        return replace(file, sites=sites), ()
    first = next(iter(file.sites))
    note = f"none of its {len(file.sites)} modules matches as a whole (the first is {first!r})"
    return replace(file, sites=sites), (f"--modules {pattern.pattern!r}: {note}",)


def _spectrum(file: AdapterFile, on: Compute, progress: Progress | None) -> SpectrumReport:
    """Singular values of every module's ΔW, by the kernels that `merge` uses."""
    plan = align([file], [1.0])
    found = passes.spectra(plan, plan.bound, on, progress)
    file.source.check_unchanged()
    return report([module.stem for module in plan.modules], found)


def provenance_of(item: Item, options: Options) -> Provenance:
    """Where a picture of an adapter's spectrum comes from: hashes of its files, options."""
    place = locate(item.path)
    given = options.alpha
    origin = Origin(
        base_name(item.path),
        file_sha256(place.weights),
        1.0,
        file_sha256(place.config) if place.config else None,
    )
    return Provenance(
        "inspect",
        (origin,),
        {
            "modules": options.modules.pattern if options.modules else None,
            "alpha": given.get(item.path) if isinstance(given, Mapping) else given,
        },
    )
