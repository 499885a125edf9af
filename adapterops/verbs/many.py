"""compress and convert over many adapters: outputs mirrored, finished ones skipped by a rerun.

One bad adapter is reported and the rest goes on. Every output is complete or absent: each is staged
and renamed by the verb itself, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from adapterops.batch import Item, find, mirror, mirrored, run_many
from adapterops.batch.run import width_for
from adapterops.batch.search import WEIGHTS
from adapterops.certificate import PlanReport, Report
from adapterops.errors import AdapterOpsError, FinishedError, OutputExistsError, UsageError
from adapterops.files.output import resolved
from adapterops.formats.locate import locate
from adapterops.formats.names import DIRECTORIES
from adapterops.options import compute, parse_size
from adapterops.ranks import Ranks
from adapterops.stream import keep_freed_memory
from adapterops.verbs.compress import check_options, compress
from adapterops.verbs.results import ManyReport, Result, document, recorded_document

Verb = Callable[..., Report | PlanReport]

_DOING = {"compress": "compressing", "convert": "converting"}
_FEW, _CHUNK = 24, 4  # an adapter takes tens of milliseconds, starting a process 200
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_PICKLES = tuple(ending for ending in WEIGHTS if ending != ".safetensors")


def many(
    verb: Verb,
    adapters: Sequence[str | os.PathLike[str]] | Sequence[Item],
    *,
    out: str | os.PathLike[str],
    modules_too: bool = False,
    note: Callable[[str], None] = lambda text: None,
    on_error: Callable[[Item, AdapterOpsError], None] = lambda item, error: None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> ManyReport:
    """Run `compress` or `convert` over many adapters, with outputs below the directory `out`.

    Args:
        verb: the function, of a module's top level.
        adapters: paths of adapters and of directories to search for some, or what `find_inputs`
            found already.
        out: where the outputs go, each under the name that its input has below the path given: a
            directory for a directory, a file for a file, unless `to` wants the other.
        modules_too: keep every module's figures in the report; the sidecars have them always.
        note: called with what should be known about the search.
        on_error: called with each adapter that failed, in their order.
        options: the verb's own keywords. `strict` also stops at the first error. `jobs` are
            processes where there are more than two dozen adapters, threads otherwise; which it is
            changes nothing in the results.

    An output that is there already is skipped if its provenance says that it was made from this
    input by this version with these options; any other is an error without `overwrite`.

    Raises UsageError where nothing can be done for any of them: options that make no sense, two
    outputs of one name.
    """
    out = os.fspath(out)
    if verb is compress:
        check_options(options)
    _check(options)
    found = [each for each in adapters if isinstance(each, Item)]
    paths = [each for each in adapters if not isinstance(each, Item)]
    found += find_inputs(paths, out, note=note) if paths or not found else []
    _check_alphas(options.get("alpha"), found)
    items = _named(found, options.get("to"), options.get("engine"))
    mirror(items, out)
    on = compute(options.get("device", "auto"), options.get("memory"), options.get("jobs"))
    width = width_for(len(items), options.get("jobs"), few=_FEW, chunk=_CHUNK)
    apart = on.device == "cpu" and width > 1
    if apart:
        options = {**options, "jobs": 1, "memory": max(on.memory // width, 1)}
    task = _Task(verb, out, options, modules_too, apart)
    results: list[Result] = []
    outcome = run_many(
        items,
        partial(_one, task),
        lambda item, result: results.append(result),
        on_error,
        what=_DOING.get(verb.__name__, verb.__name__),
        jobs=width,
        processes=apart,
        few=_FEW,
        chunk=_CHUNK,
        strict=bool(options.get("strict")),
        progress=progress,
    )
    failed = tuple(error for _, error in outcome.failed)
    return ManyReport(verb.__name__, out, tuple(results), failed)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse at once what every single adapter would be refused for."""
    size = options.get("size")
    names = ("rank", "energy", "max_error", "ratio", "sv_ratio", "sv_fro", "sv_cumulative")
    Ranks(
        **{name: options[name] for name in names if name in options},
        size=None if size is None else parse_size(size, "--size"),
        allocate=options.get("allocate", "uniform"),
        ragged=options.get("ragged", False),
        floor=options.get("min_rank"),
        ceiling=options.get("max_rank"),
    )
    try:
        re.compile(options.get("modules") or "")
    except re.error as error:
        wrong = options["modules"]
        raise UsageError(f"--modules {wrong!r} is no regular expression ({error})") from None


def _check_alphas(alpha: float | Mapping[Any, float] | None, items: Sequence[Item]) -> None:
    named = {os.fspath(path) for path in alpha} if isinstance(alpha, Mapping) else set()
    for path in sorted(named - {item.path for item in items}):
        raise UsageError(f"--alpha names {path!r}, which is not among the inputs")


def find_inputs(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    from_file: str | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> list[Item]:
    """The adapters at `paths` and in a list, as `batch.find`, whose outputs are to go below `out`.

    Raises OutputExistsError if that is a file, one of the paths, or a directory that holds one.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        raise OutputExistsError(
            "is a file, and the outputs of several adapters go below a directory",
            path=out,
            hint="choose another name",
        )
    _check_apart((os.fspath(path) for path in paths), out)
    items = find(paths, from_file, exclude=out, note=note)
    _check_apart((item.root for item in items), out)
    return items


def _check_apart(roots: Iterable[str], out: str | os.PathLike[str]) -> None:
    target = os.fspath(resolved(out))
    for root in dict.fromkeys(roots):
        if os.path.commonpath([target, os.path.realpath(root)]) == target:
            raise OutputExistsError(
                f"the output is or contains the input {root}",
                path=out,
                hint="choose another name; inputs are never changed",
            )


def _named(items: Iterable[Item], to: str | None, engine: str | None) -> list[Item]:
    """Items under the names of their outputs: directory or file, as the dialect to write has it."""
    written = "peft" if to is None and engine is not None else to
    return [replace(item, name=_output_name(item, written)) for item in items]


def _output_name(item: Item, to: str | None) -> str:
    stem, ending = os.path.splitext(item.name)
    stem = stem if ending.lower() in WEIGHTS else item.name
    if to is not None:
        return stem if to in DIRECTORIES else f"{stem}.safetensors"
    if ending.lower() in _PICKLES:
        return f"{stem}.safetensors"
    return f"{item.name}/{_DIFFUSERS}" if _is_diffusers(item.path) else item.name


def _is_diffusers(path: str) -> bool:
    """Whether a path is a directory as diffusers' pipelines save and load it."""
    try:
        return os.path.isdir(path) and os.path.basename(locate(path).weights).startswith(
            _DIFFUSERS.removesuffix(".safetensors")
        )
    except AdapterOpsError:  # whoever opens it says what is wrong
        return False


@dataclass(frozen=True, slots=True)
class _Task:
    """What is done to each adapter; it travels to other processes (`apart`)."""

    verb: Verb
    out: str
    options: Mapping[str, Any]
    modules_too: bool
    apart: bool


def _one(task: _Task, item: Item) -> Result:
    """Run the verb on one adapter, unless its output is finished."""
    if task.apart:
        _reuse_memory()
    output = mirrored(item, task.out)
    planned = bool(task.options.get("dry_run"))
    if not planned:
        os.makedirs(os.path.dirname(output), exist_ok=True)
    options = {**task.options, "alpha": _alpha(task.options.get("alpha"), item.path)}
    options["out"] = _stand_in(output) if planned else output
    try:
        report = _run(task.verb, item.path, options)
    except FinishedError as error:
        there = error.path or output
        return Result(item.path, True, recorded_document(there, modules=task.modules_too))
    where = output if planned else report.output
    return Result(item.path, False, document(report, where, modules=task.modules_too))


def _run(verb: Verb, path: str, options: Mapping[str, Any]) -> Report | PlanReport:
    """The verb's report; what is finished is not made again, even where it may be overwritten."""
    try:
        return verb(path, **{**options, "overwrite": False})
    except FinishedError:
        raise
    except OutputExistsError:
        if not options.get("overwrite"):
            raise
        return verb(path, **options)


@cache
def _reuse_memory() -> None:
    keep_freed_memory()


def _alpha(alpha: float | Mapping[Any, float] | None, path: str) -> Any:
    """What is said of this adapter's alpha among those of all."""
    if not isinstance(alpha, Mapping):
        return alpha
    return {path: alpha[path]} if path in alpha else None


def _stand_in(output: str) -> str:
    """A free name to plan for, in the folder that `output` or its missing folders would go to."""
    if os.path.isdir(os.path.dirname(output)):
        return output
    above = os.path.dirname(output)
    while above and not os.path.isdir(above):
        above = os.path.dirname(above)
    ending = ".safetensors" if output.endswith(".safetensors") else ""
    return os.path.join(above, f"planned-{secrets.token_hex(8)}{ending}")
