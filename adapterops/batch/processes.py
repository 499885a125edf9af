"""Processes of this machine as what `Compute.spread` asks for: work that holds the interpreter.

Many small tasks gain nothing from threads, which take turns at the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

from threadpoolctl import threadpool_limits

from adapterops.batch.workers import Pool
from adapterops.errors import AdapterOpsError, MemoryLimitError
from adapterops.stream import Spread, keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AdapterOpsError


@contextmanager
def processes(width: int) -> Iterator[Spread]:
    """At most `width` processes, started at the first task, that end with the context."""
    with Pool(width) as pool:

        def spread(work: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
            with closing(pool.map(partial(_attempt, work), items, 1)) as results:
                for result in results:
                    if isinstance(result, _Failure):
                        raise result.error
                    yield result

        yield spread


def _attempt(work: Callable[[T], R], item: T) -> R | _Failure:
    """`work(item)`, or why it failed."""
    settle()
    try:
        return work(item)
    except AdapterOpsError as error:
        return _Failure(error)
    except MemoryError:
        return _Failure(MemoryLimitError("out of memory", hint="run with a smaller -j"))


@cache
def settle() -> None:
    """One BLAS thread, and memory that is kept, for as long as this process lives."""
    threadpool_limits(1)
    keep_freed_memory()
