"""An ordered map over tasks of a Ray cluster: what `stream.run` is over threads.

A task is one item given to a top-level pure function, and results come in the items' order, so what
is made of them does not depend on where they were computed. The cluster is there already: this
process joins it as a driver on one of its nodes (RAY_ADDRESS, or the cluster of this machine).
Every node needs the same adapterops and Python, and sees files by the same names: a shared file
system, or URIs of a bucket. Nodes of different processors may differ in the last bits of a figure.

A bounded number of tasks is in flight. Ray itself runs again, up to `_RETRIES` times, those whose
worker or node was lost; one that it gives up is submitted anew, `_TRIES` times before it counts as
failed. A lost head node ends the run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_args

from threadpoolctl import threadpool_limits

from adapterops import __version__
from adapterops.errors import AdapterOpsError, IncompatibleError, MemoryLimitError, UsageError
from adapterops.stream import Compute, Spread

T = TypeVar("T")
R = TypeVar("R")
Runner = Literal["threads", "ray"]

_RETRIES, _TRIES = 3, 2
_QUEUED = 2  # tasks in flight for each processor, so that none waits for the driver
_AHEAD = 4  # times as many are in flight or wait for an earlier one
_ANSWER = 5.0  # seconds for a cluster to take a connection
_LOOK = 2.0  # seconds between looks at the cluster's size, which may change
_PATIENCE = 300.0  # seconds for a cluster that has lost its last processor to get another
_GRACE = 5.0  # seconds that cancelled tasks have to remove what they were writing


@contextmanager
def run_by(runner: str, on: Compute, jobs: int | None = None) -> Iterator[Compute]:
    """`on`, with a cluster to spread over where `runner` is "ray"; `jobs` as in `joined`.

    Raises UsageError for an unknown runner, and what `joined` raises.
    """
    if runner not in get_args(Runner):
        known = ", ".join(get_args(Runner))
        raise UsageError(f"--runner {runner!r}: expected one of {known}")
    if runner == "threads":
        yield on
        return
    with joined(jobs) as spread:
        yield replace(on, spread=spread)


@contextmanager
def joined(jobs: int | None = None) -> Iterator[Spread]:
    """The cluster's ordered map, with at most `jobs` tasks at a time; all its processors if None.

    A program that has called `ray.init` itself keeps its connection. Raises UsageError where Ray is
    not installed or no cluster answers.
    """
    ray = _ray()
    if ray.is_initialized():
        yield partial(ordered_map, jobs=jobs)
        return
    # What Ray says of lost nodes it prints on stdout, which belongs to results.
    with redirect_stdout(sys.stderr):
        _connect(ray)
        try:
            yield partial(ordered_map, jobs=jobs)
        finally:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--runner ray needs Ray, which is not installed here",
            hint="pip install 'adapterops[ray]', on every node of the cluster",
        ) from None
    return ray


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS") or "auto"
    _check_answers(address)
    handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in the place
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error).partition("\n")[0]) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def _check_answers(address: str) -> None:
    """Ask for a connection first: Ray itself waits for minutes, and then ends the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, why: str) -> UsageError:
    where = "" if address == "auto" else f" at {address}"
    return UsageError(
        f"--runner ray found no Ray cluster{where}: {why}",
        hint="run on a node of a running cluster (ray start), or name one with RAY_ADDRESS",
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    error: AdapterOpsError


@dataclass(frozen=True, slots=True)
class _Sent:
    """A task in flight: its place in the order, its item, how often it was submitted before."""

    place: int
    item: Any
    lost: int = 0


def ordered_map(
    work: Callable[[T], R], items: Iterable[T], /, *, jobs: int | None = None
) -> Generator[R, None, None]:
    """`work(item)` for every item, in order, computed by tasks of the cluster joined.

    `work`, items and results must pickle. The first error of a task is raised at its place in the
    order. Closing the generator, or an exception while it waits, cancels what is in flight, which
    raises KeyboardInterrupt in `work`.
    """
    ray = _ray()
    task = ray.remote(_task).options(num_cpus=1, max_retries=_RETRIES)
    common = ray.put((__version__, os.getcwd(), work))
    width = _Width(ray, jobs)
    todo = enumerate(items)
    flying: dict[Any, _Sent] = {}
    done: dict[int, R | _Failure] = {}
    position, more = 0, True

    def send(sent: _Sent) -> None:
        flying[task.remote(common, sent.item)] = sent

    try:
        while more or flying or done:
            room, ahead = width.now()
            while more and len(flying) < room and len(flying) + len(done) < ahead:
                if (following := next(todo, None)) is None:
                    more = False
                else:
                    send(_Sent(*following))
            while position in done:
                result = done.pop(position)
                if isinstance(result, _Failure):
                    raise result.error
                yield result
                position += 1
            for ref in ray.wait(list(flying), timeout=1.0)[0] if flying else []:
                sent = flying.pop(ref)
                found = _result(ray, ref, sent)
                if isinstance(found, _Sent):
                    send(found)
                else:
                    done[sent.place] = found
    finally:
        _cancel(ray, list(flying))


class _Width:
    """How many tasks may be in flight, by the cluster's processors, looked at now and then."""

    def __init__(self, ray: Any, jobs: int | None) -> None:
        self._ray, self._jobs = ray, jobs
        self._value, self._until, self._seen = 1, 0.0, time.monotonic()

    def now(self) -> tuple[int, int]:
        """The number of tasks in flight, and of those with the results that wait, at most.

        Raises AdapterOpsError where there was no processor for `_PATIENCE`.
        """
        now = time.monotonic()
        if now >= self._until:
            there = int(self._ray.cluster_resources().get("CPU", 0))
            self._value = max(1, there)
            self._until = now + _LOOK
            if there:
                self._seen = now
            elif now - self._seen > _PATIENCE:
                raise AdapterOpsError(
                    f"the Ray cluster had no processor for {_PATIENCE:.0f} s",
                    hint="are all its nodes lost? `ray status` says",
                )
        room = self._value * _QUEUED
        room = room if self._jobs is None else min(room, self._jobs)
        return room, room * _AHEAD


def _result(ray: Any, ref: Any, sent: _Sent) -> Any:
    """What a task gave or why it failed; the task to be sent again where it was lost."""
    errors = ray.exceptions
    try:
        return ray.get(ref)
    except (
        errors.RayTaskError,
        errors.RuntimeEnvSetupError,
        errors.TaskUnschedulableError,
    ) as error:
        cause = getattr(error, "cause", None) or error
        last = (str(cause).strip().splitlines() or [""])[-1]
        return _Failure(
            AdapterOpsError(
                f"a task of the Ray cluster failed: {type(cause).__name__}: {last}",
                hint=f"does every node have adapterops {__version__} and see the same files?",
            )
        )
    except errors.RayError as error:
        if sent.lost < _TRIES:
            return _Sent(sent.place, sent.item, sent.lost + 1)
        return _Failure(
            AdapterOpsError(
                f"a task of the Ray cluster was lost {sent.lost + 1} times, each after "
                f"{_RETRIES} retries ({type(error).__name__}), on {_shown(sent.item)}",
                hint="was a node out of memory? the cluster's logs say",
            )
        )


def _shown(item: Any) -> str:
    text = str(item)
    return text if len(text) <= 200 else text[:200] + "…"


def _cancel(ray: Any, refs: list[Any]) -> None:
    """End tasks; they have a moment to tidy up before their processes are taken away."""
    with suppress(ray.exceptions.RayError):
        for ref in refs:
            ray.cancel(ref)
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=_GRACE)


def _task(common: tuple[str, str, Callable[[T], R]], item: T) -> R | _Failure:
    """One item, at a worker; relative paths are the driver's."""
    version, folder, work = common
    if version != __version__:
        return _Failure(
            IncompatibleError(
                f"a node of the Ray cluster has adapterops {__version__}, the driver {version}",
                hint="install the same version on every node",
            )
        )
    _one_thread()
    with suppress(OSError):  # where it is not there, paths are absolute or the files are not found
        os.chdir(folder)
    try:
        return work(item)
    except AdapterOpsError as error:
        return _Failure(error)
    except MemoryError:
        return _Failure(MemoryLimitError("out of memory at a worker of the Ray cluster"))


@cache
def _one_thread() -> None:
    """One BLAS thread, for as long as this process lives."""
    threadpool_limits(1)
