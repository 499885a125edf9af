"""What a user may have meant by a name that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], least: float = 0.6) -> str | None:
    """The known name that is most like `name`, case and dashes aside.

    None where none has the likeness `least`, from 0 to 1 (difflib's ratio).
    """
    names = {_folded(each): each for each in sorted(known, reverse=True)}
    near = difflib.get_close_matches(_folded(name), names, 1, least)
    return names[near[0]] if near else None


def meant(name: str, known: Iterable[str]) -> str | None:
    """`did you mean …?`, where a known name is near."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else None


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")
