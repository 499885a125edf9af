"""Progress on stderr: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
_INTERVAL = 30.0
_BAR_AFTER = 0.5


@contextmanager
def reporter(silent: bool) -> Iterator[Progress | None]:
    """Yields the function that a verb calls with (what, done, count), or None."""
    if silent:
        yield None
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    """One line, redrawn; shown only once the work has taken half a second."""
    start, drawn = time.monotonic(), False

    def update(what: str, done: int, count: int) -> None:
        nonlocal drawn
        if time.monotonic() - start > _BAR_AFTER:
            filled = 30 * done // max(count, 1)
            bar = "━" * filled + " " * (30 - filled)
            sys.stderr.write(f"\r{what} {bar} {done}/{count}\x1b[K")
            sys.stderr.flush()
            drawn = True

    try:
        yield update
    finally:
        if drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _lines() -> Progress:
    last = time.monotonic()

    def update(what: str, done: int, count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            sys.stderr.write(f"{what}: {done} of {count}\n")

    return update
