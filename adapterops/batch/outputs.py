"""Outputs of many inputs: mirrored below a directory, skipped by a rerun where they are done."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

from adapterops.batch.search import WEIGHTS, Item
from adapterops.errors import FileError, FormatError, OutputExistsError, UsageError
from adapterops.files import pictures
from adapterops.files.output import MAIN, PROVENANCE_KEY
from adapterops.files.source import file_header
from adapterops.formats import mlx
from adapterops.provenance import Provenance


def mirrored(item: Item, out: str | os.PathLike[str], suffix: str = "") -> str:
    """Where the output of an item goes below `out`; `suffix` replaces that of its weights file."""
    name = item.name
    if suffix:
        base, extension = os.path.splitext(name)
        name = (base if extension.lower() in WEIGHTS else name) + suffix
    return os.path.join(out, name)


def mirror(items: Sequence[Item], out: str | os.PathLike[str], suffix: str = "") -> list[str]:
    """`mirrored` of every item. Raises UsageError if two outputs were one or one held the other."""
    owners: dict[str, Item] = {}
    for item in items:
        path = mirrored(item, out, suffix)
        other = owners.setdefault(path, item)
        if other is not item:
            raise UsageError(
                f"{other.path} and {item.path} would both be written to {path}",
                hint="run once for each, with different outputs",
            )
    for path, item in owners.items():
        above = os.path.dirname(path)
        while len(above) > len(os.fspath(out)):
            if above in owners:
                raise UsageError(
                    f"the output {path} of {item.path} would lie inside {above}, the output of "
                    f"{owners[above].path}",
                    hint="run once for each, with different outputs",
                )
            above = os.path.dirname(above)
    return list(owners)


def is_done(
    output: str | os.PathLike[str], provenance: Provenance
) -> Literal["done", "foreign", "absent"]:
    """Whether a finished output of exactly this work is there: same tool, verb, options and inputs.

    "foreign" is anything else under that name, be it other options, another input or a stranger's.
    """
    if not os.path.lexists(output):
        return "absent"
    made = recorded(output)
    return "done" if made == json.loads(provenance.to_json()) else "foreign"


def skip_done(output: str, provenance: Provenance, *, overwrite: bool) -> bool:
    """Whether the output is done already; raises OutputExistsError for one that is not ours."""
    state = is_done(output, provenance)
    if state == "foreign" and not overwrite:
        raise OutputExistsError(
            "exists, but was made from another input, with other options or by another version",
            path=output,
            hint="pass --overwrite or choose another output",
        )
    return state == "done"


def recorded(output: str | os.PathLike[str]) -> Any:
    """The provenance that an output of ours carries, None where there is none.

    It is in the header of a weights file (for a directory, of its main file) and among the metadata
    of a picture.
    """
    path = os.fspath(output)
    if os.path.isdir(output):
        found = (os.path.join(output, name) for name in (MAIN, mlx.WEIGHTS))
        path = next(filter(os.path.exists, found), path)
    try:
        if path.lower().endswith((".svg", ".png")):
            text = pictures.description(path)
        else:
            text = file_header(path).metadata.get(PROVENANCE_KEY)
        return json.loads(text) if text else None
    except (FileError, FormatError, ValueError, RecursionError):
        return None
