"""A recipe as it was read: plain values, and where in its file each of them stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.errors import UsageError
from adapterops.suggestion import meant

Key = tuple[str | int, ...]  # from the top: ("models", 1, "parameters")

_PLAIN = re.compile(r"[A-Za-z_][\w-]*")
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Document:
    """`value` of dicts, lists, text, numbers, switches and None, under the name of its file.

    `places` are lines and columns, from 1 on, of values by their keys; {} where no file has them.
    """

    name: str
    value: Any
    places: Mapping[Key, tuple[int, int]] = field(default_factory=dict)

    def error(self, key: Key, message: str, hint: str | None = None) -> UsageError:
        """What is wrong with the value at `key`, with its place."""
        where = key
        while where and where not in self.places:
            where = where[:-1]
        place = self.places.get(where)
        path = f"{self.name}:{place[0]}:{place[1]}" if place else self.name
        text = f"{written(key)}: {message}" if key else message
        return UsageError(text, path=path or None, hint=hint)


def written(key: Key) -> str:
    """A key as messages have it: models[1].parameters.weight."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{shown(part)}]"
    return text


def shown(value: Any) -> str:
    """A value as messages have it, cut to a length that a line can bear."""
    if value is None:
        return "nothing"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def offered(name: str, known: Iterable[str]) -> str | None:
    """The hint for a name that there is not: the one that was meant, or all."""
    names = list(known)
    return meant(name, names) or (f"there is: {', '.join(names)}" if names else None)
