"""The one executor: an ordered map over jobs under a byte budget.

A job's kernel is a top-level pure function that reads, computes and encodes; whoever calls `run`
does the writing in its own loop. Jobs are admitted in order while their peaks fit the budget, and
one that is larger than the whole budget runs alone, so nothing can deadlock. The budget changes how
many jobs fly, never how a job is cut: results do not depend on it, nor on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from adapterops.errors import MemoryLimitError

T = TypeVar("T")
R = TypeVar("R")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One piece of work: `kernel(*args)`, needing at most `peak` bytes; `key` names it."""

    key: str
    kernel: Callable[..., T]
    args: tuple[Any, ...]
    peak: int


class Spread(Protocol):
    """An ordered map over other machines: `work` is a top-level pure function.

    It pickles, as items and results do. The first error of a task is raised at its place in the
    order, and closing the generator ends what is under way.
    """

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
        """`work(item)` for every item, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how wide to run: device name, bytes in flight, worker threads.

    `spread` reaches further machines or processes, for those parts of a fleet's work that can be
    spread over them; `run` itself stays here. `share` is what one task there may use, None where it
    is its machine's to say.
    """

    device: str = "cpu"
    memory: int = 1 << 30
    threads: int = 2
    spread: Spread | None = None
    share: int | None = None


def run(jobs: Iterable[Job[T]], on: Compute) -> Generator[T, None, None]:
    """Yield each job's result in job order with at most `on.memory` bytes in flight.

    The first exception of a kernel is raised at its place in the order; nothing after it starts.
    Raises MemoryLimitError, naming the job, where the machine ran out of memory.
    """
    pending: deque[tuple[Job[T], Future[T]]] = deque()
    flying = 0
    with one_blas_thread(on.device):
        pool, wait = ThreadPoolExecutor(max(1, on.threads)), True
        try:
            for job in jobs:
                while pending and (flying + job.peak > on.memory or len(pending) > 2 * on.threads):
                    done, future = pending.popleft()
                    flying -= done.peak
                    yield _result(done, future)
                pending.append((job, _submit(pool, job)))
                flying += job.peak
            while pending:
                done, future = pending.popleft()
                yield _result(done, future)
        except (KeyboardInterrupt, GeneratorExit) as error:
            wait = not _interrupted(error)  # a signal may have struck within the pool's own locks
            raise
        finally:
            pool.shutdown(wait=wait, cancel_futures=True)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt is what made the consumer stop, through whatever closed on its way."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _submit(pool: ThreadPoolExecutor, job: Job[T]) -> Future[T]:
    try:
        return pool.submit(job.kernel, *job.args)
    except RuntimeError as error:  # no memory for another thread's stack, or too many threads
        raise MemoryLimitError(
            f"cannot start a worker ({error})", module=job.key, hint="run with a smaller -j"
        ) from None


def _result(job: Job[T], future: Future[T]) -> T:
    try:
        return future.result()
    except MemoryError as error:
        if isinstance(error, MemoryLimitError):
            raise
        raise MemoryLimitError(
            f"out of memory: about {job.peak / 1e6:.0f} MB were needed",
            module=job.key,
            hint="run with a smaller -j, or on a machine with more memory",
        ) from None


class _OneThread:
    """One BLAS thread while any run is under way; runs that overlap share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._runs:
                self._limits = threadpool_limits(1)
            self._runs += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                self._limits.restore_original_limits()


_BLAS = _OneThread()


@contextlib.contextmanager
def one_blas_thread(device: str = "cpu") -> Iterator[None]:
    """A pool of workers with one BLAS thread each beats one worker with many on thin factors.

    threadpoolctl obeys only the thread that asked it first, mostly the main one: who starts runs
    from other threads enters this before.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_BLAS)
        if device != "cpu":
            stack.enter_context(_exact_torch(device))
        yield


@contextlib.contextmanager
def _exact_torch(device: str) -> Iterator[None]:
    """torch with one thread, its lazy linear algebra loaded, restored afterwards.

    Products are float64, which TF32 and reduced precision do not touch.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.linalg.qr(torch.eye(2, dtype=torch.float64, device=None if device == "torch" else device))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def megabytes(
    total: int, progress: Callable[[str, int, int], None] | None
) -> Callable[[int], None]:
    """What counts the bytes of a long run, told how many more are done, for `progress`."""
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress("MB", done // 1_000_000, max(1, total // 1_000_000))

    return tick


def keep_freed_memory(*, shared: bool = False) -> None:
    """Tell glibc to reuse freed blocks instead of returning each to the kernel.

    Temporaries of a few megabytes are otherwise faulted in again for every module, a third of a
    merge's time. `shared`: by all threads, whose own reserves add up where a run has many pools.
    It concerns the whole process, so the command line calls it and the library never.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        if shared:
            libc.mallopt(_M_ARENA_MAX, 1)


def available_threads() -> int:
    """Processors this process may use: its affinity, cut by a cgroup quota."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, max(1, int(quota[0]) // int(quota[1])))
    return allowed


def alone(share: int | None) -> Compute:
    """Where one task of `Compute.spread` runs: on one thread, with this share of memory."""
    return Compute("cpu", share or available_memory() // available_threads(), 1)


def available_memory() -> int:
    """Half of what the machine or the cgroup has free, in bytes; never less than 256 MiB."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: count on a quarter of what is there
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, used = _cgroup("memory.max").strip(), _cgroup("memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cache = re.search(r"^inactive_file (\d+)$", _cgroup("memory.stat"), re.MULTILINE)
        reclaimable = int(cache[1]) if cache else 0
        free = min(free, int(limit) - int(used) + reclaimable)
    return max(free // 2, 256 << 20)


def _cgroup(name: str) -> str:
    with contextlib.suppress(OSError), open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
        return file.read()
    return ""
