"""The same work for many items: one that fails is reported, the rest goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from adapterops.batch import workers
from adapterops.batch.search import Item
from adapterops.batch.workers import CHUNK
from adapterops.errors import AdapterOpsError, FileError, Interrupted, MemoryLimitError
from adapterops.stream import available_threads

R = TypeVar("R")
Progress = Callable[[str, int, int], None]

_FEW = 300  # up to so many items of a millisecond, starting processes costs more than they save


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run over many items: how many were done, and each that failed and why."""

    done: int
    failed: tuple[tuple[Item, AdapterOpsError], ...]

    @property
    def exit_code(self) -> int:
        """The worst of all items, 0 if none failed."""
        return max((error.exit_code for _, error in self.failed), default=0)


def width_for(count: int, jobs: int | None = None, *, few: int = _FEW, chunk: int = CHUNK) -> int:
    """How many processes share `count` items, `chunk` of them at a time; 1 is this process alone.

    `jobs` is the most, by default one per available processor. Up to `few` items are done here.
    """
    if count <= few or not workers.available():
        return 1
    return min(jobs or available_threads(), -(-count // chunk))


def run_many(
    items: Sequence[Item],
    work: Callable[[Item], R],
    on_result: Callable[[Item, R], None],
    on_error: Callable[[Item, AdapterOpsError], None],
    *,
    what: str = "adapters",
    jobs: int | None = None,
    processes: bool = True,
    few: int = _FEW,
    chunk: int = CHUNK,
    strict: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """`work(item)` for every item; results and errors are handed over in the items' order.

    With `processes`, and above `few` items, `work` runs in `jobs` processes (`width_for`), `chunk`
    items at a time; it and its results must pickle then. Otherwise it runs here, one item after the
    other, and may use threads of its own.

    Whatever `work` raises becomes an AdapterOpsError with the item's path, given to `on_error`;
    `strict` raises the first instead and starts nothing more. Ctrl-C and SIGTERM, wherever they
    arrive, end the processes at once; what they had staged is removed.
    """
    attempt = partial(_attempt, work)
    width = width_for(len(items), jobs, few=few, chunk=chunk) if processes else 1
    results = (
        workers.ordered_map(attempt, items, width, chunk) if width > 1 else _here(attempt, items)
    )
    done, failed = 0, []
    with closing(results):
        for index, (item, result) in enumerate(zip(items, results, strict=True)):
            if isinstance(result, _Failure):
                if strict:
                    raise result.error
                failed.append((item, result.error))
                on_error(item, result.error)
            else:
                done += 1
                on_result(item, result)
            if progress:
                progress(what, index + 1, len(items))
    return Outcome(done, tuple(failed))


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AdapterOpsError


def _attempt(work: Callable[[Item], R], item: Item) -> R | _Failure:
    try:
        return work(item)
    except Interrupted:
        raise
    except AdapterOpsError as error:
        error.path = error.path or item.path
        return _Failure(error)
    except MemoryError:
        return _Failure(MemoryLimitError("out of memory", path=item.path))
    except OSError as error:
        return _Failure(FileError(f"{error.strerror or error}", path=error.filename or item.path))
    except Exception as error:
        if os.environ.get("ADAPTEROPS_DEBUG"):
            import traceback

            traceback.print_exc()
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "this is a defect; ADAPTEROPS_DEBUG=1 shows where"
        return _Failure(AdapterOpsError(message, path=item.path, hint=hint))


def _here(attempt: Callable[[Item], Any], items: Sequence[Item]) -> Generator[Any, None, None]:
    yield from map(attempt, items)
