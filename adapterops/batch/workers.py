"""An ordered map over processes, for work that holds the interpreter (parsing headers).

The processes are plain subprocesses, not `multiprocessing`: that imports the caller's main module
again in every worker, which runs a script that has no guard for it a second time.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import Any, NoReturn, TypeVar

from adapterops.errors import AdapterOpsError, Interrupted, MemoryLimitError

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 32
_GRACE = 5.0  # seconds a worker has to remove what it was writing
_START = "import sys; sys.path[:] = {}; from adapterops.batch.workers import serve; serve()"


def available() -> bool:
    """Whether this interpreter can start others; one embedded in a program may not know how."""
    return bool(sys.executable)


def ordered_map(
    work: Callable[[T], R], items: Iterable[T], width: int, size: int = CHUNK
) -> Generator[R, None, None]:
    """`Pool.map` of processes that are there for this one map."""
    with Pool(width) as pool:
        yield from pool.map(work, items, size)


class Pool:
    """At most `width` processes, started when they are needed, that stay for several maps."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def map(
        self, work: Callable[[T], R], items: Iterable[T], size: int = CHUNK
    ) -> Generator[R, None, None]:
        """`work(item)` for every item, in order, `size` items at a time; one map at a time.

        `work`, items and results must pickle; `work` must raise nothing but KeyboardInterrupt.
        Closing the generator, or an exception while it waits, ends the processes at once: they are
        sent SIGTERM, which raises KeyboardInterrupt in `work`. Raises AdapterOpsError where one
        died.
        """
        todo = enumerate(_chunks(items, size))
        done: dict[int, list[R]] = {}
        position = 0
        # No thread: Ctrl-C and SIGTERM raise anywhere in this one, and only this one has any state.
        with selectors.DefaultSelector() as selector:
            try:
                for place, (index, chunk) in enumerate(islice(todo, self._width)):
                    if place == len(self._workers):
                        self._workers.append(_Worker())
                    self._workers[place].send(work, chunk)
                    selector.register(self._workers[place], selectors.EVENT_READ, index)
                while selector.get_map() or position in done:
                    while position not in done:
                        for key, _ in selector.select():
                            worker: Any = key.fileobj
                            done[key.data] = worker.receive()
                            selector.unregister(worker)
                            for index, chunk in islice(todo, 1):
                                worker.send(work, chunk)
                                selector.register(worker, selectors.EVENT_READ, index)
                    yield from done.pop(position)
                    position += 1
            except BaseException:
                self._end()
                raise

    def _end(self) -> None:
        workers, self._workers = self._workers, []
        for each in workers:
            each.stop()
        deadline = time.monotonic() + _GRACE
        for each in workers:
            each.end(deadline)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


class _Worker:
    """A process that computes one chunk at a time; in its own group, so Ctrl-C concerns only us."""

    def __init__(self) -> None:
        # -P: the working directory is no place to import from, unless it is one for us.
        command = [sys.executable, "-P", "-c", _START.format(sys.path)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
            )
        except OSError as error:
            raise MemoryLimitError(
                f"cannot start a worker ({error.strerror})", hint="run with a smaller -j"
            ) from None
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._chunk: Sequence[Any] = ()

    def fileno(self) -> int:
        """Readable when the results come."""
        return self._from.fileno()

    def send(self, work: Callable[[T], R], chunk: Sequence[T]) -> None:
        """Give it the next chunk; it must be idle, so that it reads."""
        self._chunk = chunk
        with suppress(BrokenPipeError):  # it died: `receive` says so
            pickle.dump((work, chunk), self._to, pickle.HIGHEST_PROTOCOL)
            self._to.flush()

    def receive(self) -> list[Any]:
        """The results of the chunk that was sent last."""
        try:
            results: list[Any] = pickle.load(self._from)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise AdapterOpsError(
                f"a worker process died (exit code {code}) on {self._chunk[0]} or one of the "
                f"{len(self._chunk) - 1} after it",
                hint="was it out of memory? run with -j 1",
            ) from None
        return results

    def stop(self) -> None:
        """Tell it to stop; whatever it was computing is lost."""
        self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait for it to stop, but no longer than until `deadline`."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            self._process.kill()
            self._process.wait()
        for stream in (self._to, self._from):
            with suppress(OSError):  # what was not sent cannot be flushed
                stream.close()


def serve() -> None:
    """A worker's life: chunks from stdin, results to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _serve()
    except KeyboardInterrupt:
        os._exit(Interrupted.exit_code)  # without waiting for threads at work


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: it has to tidy up
    raise KeyboardInterrupt  # no Exception: `threading` takes one for a thread that did not start


def _serve() -> None:
    with suppress(BrokenPipeError, EOFError), os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # what anything prints must not end up among the results
        while True:
            work, chunk = pickle.load(sys.stdin.buffer)
            pickle.dump([work(item) for item in chunk], results, pickle.HIGHEST_PROTOCOL)
            results.flush()
