"""What the tests of Ray have workers do: top-level functions, which workers import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from adapterops.errors import FormatError


def node(item: int) -> tuple[int, str]:
    """The item, and the node that it was computed on; later items are quicker."""
    time.sleep(0.2 / (1 + item))
    import ray

    return item, ray.get_runtime_context().get_node_id()


def dies_once(place: tuple[str, int]) -> int:
    """Kill this worker, but only the first time."""
    mark = Path(place[0], f"died-{place[1]}")
    if place[1] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return place[1]


def dies(item: int) -> int:
    """Kill this worker at item 1."""
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def fails(item: int) -> int:
    """Raise what this package raises at item 2, and what it does not at item 4."""
    if item == 2:
        raise FormatError("is odd", path="a.safetensors", hint="leave it")
    if item == 4:
        raise ZeroDivisionError("by nothing")
    return item


def lingers(folder: str) -> None:
    """Wait to be interrupted, and leave a mark of it."""
    Path(folder, f"began-{os.getpid()}").touch()
    try:
        for _ in range(600):  # Ray interrupts between two steps
            time.sleep(0.1)
    except KeyboardInterrupt:
        Path(folder, f"tidied-{os.getpid()}").touch()
        raise
