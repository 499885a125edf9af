"""run: what a recipe says, or once more what made an output."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from adapterops.errors import FormatError, UsageError
from adapterops.files.source import LocalFile, read_bytes
from adapterops.recipe.calls import MERGEKIT, Call, Verb, call_of, completed, done, verb_of
from adapterops.recipe.document import Document, offered, shown
from adapterops.recipe.strict import LARGEST, read_yaml

_Path = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]

VERBS = (
    "merge",
    "calc",
    "compress",
    "extract",
    "convert",
    "diff",
    "analyze",
    "check",
    "inspect",
    "bake",
    "drift",
    "unbake",
    "index",
    "cluster",
    "assign",
    "deploy",
    "report",
)
_OF_MANY = ("compress", "convert")  # which take `adapters`, too
_OUTPUTS = (".safetensors", ".bin", ".pt")


def run(
    recipe: _Path | Mapping[str, Any],
    *,
    out: _Path | None = None,
    inputs: _Path | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool | None = None,
    strict: bool | None = None,
    allow_pickle: bool | None = None,
    dry_run: bool | None = None,
    progress: Progress | None = None,
) -> Any:
    """Do what a recipe says, and return the report of its verb.

    A recipe names a `verb` and its arguments, by the names that they have in Python; paths are
    relative to the recipe's folder. Or it is mergekit's: merge_method, models, parameters. The
    result is that of the verb called directly, to the byte.

    Given an output instead, a folder or file that a verb wrote or its sidecar, it is made again,
    tensor by tensor the same: what went in is found by its hashes below `inputs`.

    Args:
        recipe: a YAML or JSON file, a mapping with the same keys (paths are then relative to the
            current folder), or an output of merge, calc, compress, convert, extract or bake.
        out: where to write, in place of the recipe's.
        inputs: the folder with what an output was made from; the current one.
        device, memory, jobs, overwrite, strict, allow_pickle, dry_run: as in the verb, in place of
            what the recipe says.
        progress: called with (what, done, count).

    Raises:
        UsageError: the recipe is none, or asks for what there is not: file, line and column.
        AdapterOpsError: what the verb raises.
    """
    call = prepared(
        recipe,
        out=None if out is None else os.fspath(out),
        inputs=inputs,
        device=device,
        memory=memory,
        jobs=jobs,
        overwrite=overwrite,
        strict=strict,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        progress=progress,
    )
    return done(call, progress)


def prepared(
    recipe: _Path | Mapping[str, Any],
    *,
    inputs: _Path | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Call:
    """The call that `run` makes; `overrides` are its other keywords. Raises what it raises."""
    if not isinstance(recipe, Mapping) and is_output(recipe):
        return _again(recipe, inputs, progress, overrides)
    if inputs is not None:
        raise UsageError("--inputs is for an output that is made again; a recipe has its paths")
    document, folder = _read(recipe)
    return completed(_call(document, folder), document, overrides)


def _again(
    output: _Path, inputs: _Path | None, progress: Progress | None, overrides: Mapping[str, Any]
) -> Call:
    """The call that made an output, with what it was made from."""
    from adapterops.options import compute  # none of this is imported for a recipe
    from adapterops.originals import Originals
    from adapterops.recipe.made import read_made
    from adapterops.recipe.repeat import repeated

    on = compute(memory=overrides.get("memory"), jobs=overrides.get("jobs"))
    made = read_made(output)
    originals = Originals(os.fspath(inputs) if inputs is not None else ".", on, progress)
    allow_pickle = bool(overrides.get("allow_pickle"))
    call = repeated(made, verb, originals, allow_pickle=allow_pickle)
    return completed(call, Document(made.path, {}), overrides)


@cache
def verb(name: str, of_many: bool = False) -> Verb:
    """A verb by its name; `of_many` is that of compress and convert over several adapters."""
    function = getattr(importlib.import_module(f"adapterops.verbs.{name}"), name)
    found = verb_of(name, function)
    if not of_many:
        return found
    from adapterops.verbs.many import many

    keys = {key: kind for key, kind in found.keys.items() if key != "adapter"}
    return replace(
        found,
        function=partial(many, function),
        keys={"adapters": Sequence[_Path], **keys},
        required=frozenset({"adapters", "out"}),
    )


def is_output(path: _Path) -> bool:
    """Whether a path is what a verb wrote, rather than a recipe."""
    text = os.fspath(path)
    if os.path.isdir(text) or text.lower().endswith(_OUTPUTS):
        return True
    if not text.endswith(".json"):
        return False
    from adapterops.recipe.made import of_sidecar

    try:
        return of_sidecar(text) is not None
    except FormatError:  # reading it as a recipe says where it is wrong
        return False


def _read(recipe: _Path | Mapping[str, Any]) -> tuple[Document, str]:
    """A recipe, and the folder that its paths are relative to."""
    if isinstance(recipe, Mapping):
        document, folder = Document("", recipe), ""
    else:
        file = LocalFile(recipe)
        try:
            data = bytes(read_bytes(file, 0, min(file.size(), LARGEST + 1)))
        finally:
            file.close()
        name = os.fspath(recipe)
        document, folder = read_yaml(data, name), os.path.dirname(name)
    if not isinstance(document.value, Mapping):
        raise document.error(
            (), f"is {shown(document.value)[:40]}; expected keys, such as verb: merge"
        )
    return document, folder


def _call(document: Document, folder: str) -> Call:
    recipe = document.value
    for key in recipe:
        if not isinstance(key, str):
            raise document.error((), f"the key {shown(key)} is no text")
    mergekit = any(mark in recipe for mark in MERGEKIT)
    name = recipe.get("verb", "merge" if mergekit else None)
    if name is None:
        raise document.error((), "has no verb", f"begin with verb: and one of {', '.join(VERBS)}")
    if name not in VERBS:
        raise document.error(
            ("verb",), f"there is no verb {shown(name)}", offered(str(name), VERBS)
        )
    if mergekit:
        from adapterops.recipe.mergekit import call_of_mergekit

        return call_of_mergekit(document, verb(name), folder)
    of_many = name in _OF_MANY and "adapters" in recipe
    entries = {key: value for key, value in recipe.items() if key != "verb"}
    return call_of(verb(name, of_many), document, entries, folder)
