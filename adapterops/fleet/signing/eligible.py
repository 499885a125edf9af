"""Whether an adapter can be compared with others, and why not where it cannot.

`broken` is what no engine could serve either: unreadable, truncated, hostile, NaN. `ineligible` is
a valid adapter whose ΔW the factors alone do not say, so that no error of sharing it can be proved.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.errors import AdapterOpsError, FileError, FormatError, NumericsError
from adapterops.fleet.types import Status
from adapterops.formats.locate import locate
from adapterops.formats.model import AdapterFile

_BROKEN = (FormatError, FileError, NumericsError)


def judged(file: AdapterFile) -> tuple[Status, str] | None:
    """What keeps an adapter out by its headers: status and reason; None where nothing does."""
    broken = [problem for problem in file.problems if isinstance(problem, _BROKEN)]
    if broken:
        return "broken", _reasons(broken)
    if file.problems:
        return "ineligible", _reasons(file.problems)
    if file.deltas:
        name = next(iter(file.deltas))
        return "ineligible", f"{len(file.deltas)} dense changes, {name!r} first, have no factors"
    return None


def refused(error: AdapterOpsError, path: str, allow_pickle: bool) -> tuple[Status, str]:
    """Status and reason of an adapter that could not be opened or read to its end."""
    if isinstance(error, FormatError) and not allow_pickle and _is_pickle(path):
        return "ineligible", reason(error)
    return ("broken" if isinstance(error, _BROKEN) else "ineligible"), reason(error)


def reason(error: AdapterOpsError) -> str:
    """An error in words, without its path, which stands beside it wherever it is shown."""
    where = f"module {error.module}: " if error.module else ""
    hint = error.hint or ""
    if error.path and error.path in hint:  # of a command on this file alone
        hint = ""
    return f"{where}{error.message}" + (f"; {hint}" if hint else "")


def _reasons(problems: Sequence[AdapterOpsError]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return reason(problems[0]) + more


def _is_pickle(path: str) -> bool:
    try:
        return locate(path).is_pickle
    except AdapterOpsError:
        return False
