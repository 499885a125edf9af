"""Names of base models that mean one and the same: `--base-alias FILE`.

CSV, a line `name,canonical` for each other name (a header `name,canonical` and lines that begin
with # are passed over), or JSON, {canonical: [names]}. A blank name stands for adapters that name
no base. A canonical name may itself be another's alias.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.errors import FormatError
from adapterops.formats.locate import read_text

_HEADER = ["name", "canonical"]
_HINT = "each line is name,canonical; or JSON {canonical: [names]}"


def read_aliases(path: str | os.PathLike[str]) -> dict[str, str]:
    """name -> the name that it stands for, chains resolved.

    Raises FileError, and FormatError for what is neither form, a name with two meanings, a circle.
    """
    try:
        text = read_text(os.fspath(path)).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError("is no UTF-8 text", path=path, hint=_HINT) from None
    names: dict[str, str] = {}
    pairs = _from_json if text.lstrip().startswith("{") else _from_csv
    try:
        for name, canonical in pairs(text):
            if names.setdefault(name, canonical) != canonical:
                raise FormatError(
                    f"{name!r} stands for {names[name]!r} and for {canonical!r}",
                    hint="leave one of them out",
                )
        return {name: _end(name, names) for name in names}
    except FormatError as error:
        error.path = os.fspath(path)
        raise


def _end(name: str, names: Mapping[str, str]) -> str:
    seen = [name]
    while seen[-1] in names and names[seen[-1]] != seen[-1]:
        seen.append(names[seen[-1]])
        if seen[-1] in seen[:-1]:
            raise FormatError(f"names go round in a circle: {' -> '.join(map(repr, seen))}")
    return seen[-1]


def _from_csv(text: str) -> Iterator[tuple[str, str]]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or cells[0].startswith("#") or cells == _HEADER:
                continue
            if len(cells) != 2 or not cells[1]:
                raise FormatError(f"line {reader.line_num} is {','.join(row)!r}", hint=_HINT)
            yield cells[0], cells[1]
    except csv.Error as error:
        raise FormatError(f"line {reader.line_num}: {error}", hint=_HINT) from None


def _from_json(text: str) -> Iterator[tuple[str, str]]:
    try:
        document: Any = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no JSON ({error})", hint=_HINT) from None
    for canonical, listed in document:
        found = [listed] if isinstance(listed, str) else listed
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise FormatError(f"{canonical!r} has {listed!r}, expected a list of names", hint=_HINT)
        for name in found:
            yield name.strip(), canonical.strip()
