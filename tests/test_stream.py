"""The executor: order, budget, exceptions at their place, and nothing of it in the results."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import adapterops as ao
from adapterops.errors import IncompatibleError, MemoryLimitError
from adapterops.stream import (
    Compute,
    Job,
    available_memory,
    available_threads,
    one_blas_thread,
    run,
)
from tests.support import pairs, write_peft


class Meter:
    """Counts what starts, what is in the air and the largest sum of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.started: list[int] = []
        self.now = self.peak = 0
        self.together: set[int] = set()  # how many others ran beside each job

    def work(self, index: int, size: int, seconds: float = 0.0) -> int:
        with self.lock:
            self.started.append(index)
            self.now += size
            self.peak = max(self.peak, self.now)
            self.together.add(self.now)
        time.sleep(seconds)
        with self.lock:
            self.now -= size
        return index


def square(value: int) -> int:
    return value * value


def fail(error: BaseException) -> None:
    raise error


def jobs(meter: Meter, sizes: list[int], seconds: float = 0.001) -> list[Job[int]]:
    return [
        Job(f"job {i}", meter.work, (i, size, seconds if i % 2 else 0.0), size)
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("memory", [0, 1, 5, 10**9])
def test_results_come_in_the_order_of_the_jobs(threads, memory):
    results = run(jobs(Meter(), [1] * 40), Compute(memory=memory, threads=threads))
    assert list(results) == list(range(40))


def test_no_jobs_no_results():
    assert list(run([], Compute())) == []


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(0, 20), st.integers(1, 4))
def test_the_budget_holds_unless_one_job_alone_is_larger(sizes, memory, threads):
    meter = Meter()
    results = run(jobs(meter, sizes, 0.0001), Compute(memory=memory, threads=threads))
    assert list(results) == list(range(len(sizes)))
    assert meter.peak <= max([memory, *sizes])
    assert meter.started and meter.peak >= max(sizes) if sizes else not meter.started


def test_results_not_yet_taken_count_too():
    """The consumer holds the first result; what is admitted behind it fits the budget."""
    meter = Meter()
    results = run(jobs(meter, [4] * 10, 0.0), Compute(memory=8, threads=4))
    assert next(results) == 0
    time.sleep(0.05)
    assert len(meter.started) <= 3
    assert list(results) == list(range(1, 10))


def test_a_job_larger_than_the_budget_runs_alone():
    meter = Meter()
    sizes = [3, 3, 100, 3, 3, 100, 100, 3]
    list(run(jobs(meter, sizes, 0.005), Compute(memory=10, threads=4)))
    assert meter.peak == 100, "anything beside it would add to its 100"


def test_jobs_do_run_side_by_side():
    """Two jobs that wait for each other finish only if both are in the air."""
    meeting = threading.Barrier(2)
    pair = [Job(str(i), meeting.wait, (20,), 1) for i in range(2)]
    assert sorted(run(pair, Compute(memory=2, threads=2))) == [0, 1]


def test_jobs_are_drawn_lazily():
    """A fleet's jobs are not all made before the first result."""
    drawn: list[int] = []

    def endless() -> Iterator[Job[int]]:
        for i in range(10**6):
            drawn.append(i)
            yield Job(str(i), square, (i,), 1)

    results = run(endless(), Compute(memory=10**9, threads=2))
    assert not drawn
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(drawn) < 20
    results.close()


# Exceptions.


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_exception_is_raised_at_its_place(threads):
    meter = Meter()
    work = jobs(meter, [1] * 200)
    work[5] = Job("bad", fail, (IncompatibleError("five"),), 1)
    results = run(work, Compute(memory=100, threads=threads))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(IncompatibleError, match="five"):
        next(results)
    begun = len(meter.started)
    assert begun <= 5 + 2 * threads + 2, "only what was admitted before"
    time.sleep(0.05)
    assert len(meter.started) == begun, "nothing starts afterwards"
    assert next(results, None) is None


def test_the_first_of_two_exceptions_wins_whichever_is_faster():
    work = [
        Job("slow", lambda: (time.sleep(0.05), fail(KeyError("first"))), (), 1),
        Job("fast", fail, (ValueError("second"),), 1),
    ]
    with pytest.raises(KeyError, match="first"):
        list(run(work, Compute(threads=2)))


def test_an_exception_of_the_one_who_makes_the_jobs():
    def some() -> Iterator[Job[int]]:
        yield Job("a", square, (2,), 1)
        raise IncompatibleError("while planning")

    with pytest.raises(IncompatibleError, match="while planning"):
        list(run(some(), Compute()))
    assert not _workers()


def test_closing_early_stops_what_has_not_started():
    meter = Meter()
    results = run(jobs(meter, [1] * 1000), Compute(memory=50, threads=2))
    assert next(results) == 0
    results.close()
    begun = len(meter.started)
    assert begun <= 7
    assert not _workers(), "the threads are gone when close returns"
    assert len(meter.started) == begun


def test_an_exception_of_the_consumer_ends_the_workers():
    with pytest.raises(RuntimeError, match="disk"):
        _consume_and_fail()
    assert not _workers()


def _consume_and_fail() -> None:
    for _ in run(jobs(Meter(), [1] * 100), Compute(threads=2)):
        raise RuntimeError("disk")


def test_an_interrupt_does_not_wait_for_the_jobs_at_work():
    """A kernel may have minutes to go; Ctrl-C strikes the one who waits for its result."""
    gate, finished = threading.Event(), []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        finished.append(gate.wait(60))

    try:
        with pytest.raises(KeyboardInterrupt):
            list(run([Job("long", work, (), 1), Job("next", square, (2,), 1)], Compute(threads=1)))
        assert not finished and _workers(), "it is still at work"
    finally:
        gate.set()
    for thread in threading.enumerate():
        if thread.name in _workers():
            thread.join(60)
    assert finished == [True] and not _workers()


def _workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_running_out_of_memory_names_the_job_and_what_it_needed():
    work = [Job("layers.3", fail, (MemoryError(),), 5_000_000)]
    with pytest.raises(MemoryLimitError, match=r"module layers\.3: .*about 5 MB") as caught:
        list(run(work, Compute()))
    assert caught.value.exit_code == 7
    assert isinstance(caught.value, MemoryError)


def test_a_memory_error_of_our_own_is_not_wrapped_again():
    error = MemoryLimitError("the GPU is full", module="m")
    with pytest.raises(MemoryLimitError) as caught:
        list(run([Job("x", fail, (error,), 1)], Compute()))
    assert caught.value is error


def test_a_real_allocation_that_fails():
    work = [Job("huge", np.zeros, ((1 << 60,), np.uint8), 1 << 60)]
    with pytest.raises(MemoryLimitError, match="huge"):
        list(run(work, Compute()))


def test_a_machine_that_starts_no_more_threads(monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryLimitError, match="thread") as caught:
        list(run([Job("first", square, (2,), 1)], Compute()))
    assert caught.value.exit_code == 7


# Threads of the linear algebra library.


def _blas_threads() -> set[int]:
    return {
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    }


@pytest.mark.parametrize("end", ["exhausted", "closed", "failed", "memory"])
def test_blas_gets_one_thread_and_its_own_number_back(end):
    with threadpool_limits(3, "blas"):
        before = _blas_threads()
        assert 3 in before
        work = [Job("count", _blas_threads, (), 1), Job("again", _blas_threads, (), 1)]
        if end == "failed":
            work.append(Job("bad", fail, (KeyError("x"),), 1))
        if end == "memory":
            work.append(Job("bad", fail, (MemoryError(),), 1))
        results = run(work, Compute(threads=2))
        assert next(results) == {1}
        if end == "closed":
            results.close()
        elif end == "exhausted":
            assert list(results) == [{1}]
        else:
            with pytest.raises((KeyError, MemoryLimitError)):
                list(results)
        assert _blas_threads() == before


def test_blas_gets_one_thread_in_runs_of_another_thread():
    """threadpoolctl takes no orders from a second thread: the first one gives them."""
    found: list[set[int]] = []

    def other() -> None:
        with closing(run([Job("count", _blas_threads, (), 1)], Compute())) as results:
            found.extend(results)

    with threadpool_limits(3, "blas"), one_blas_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [{1}]


def test_blas_is_restored_when_two_runs_overlap():
    with threadpool_limits(3, "blas"):
        before = _blas_threads()
        first = run([Job("a", square, (i,), 1) for i in range(3)], Compute())
        second = run([Job("b", square, (i,), 1) for i in range(3)], Compute())
        assert (next(first), next(second)) == (0, 0)
        assert list(first) == [1, 4]
        assert list(second) == [1, 4]
        assert _blas_threads() == before


# What does not show in the results.


@pytest.mark.parametrize("rank", [None, 2])
def test_a_merge_is_the_same_for_every_budget_and_number_of_threads(rank, tmp_path):
    shapes = {f"layers.{i}.q_proj": (20 + i, 16) for i in range(12)}
    for seed, name in enumerate("ab"):
        write_peft(tmp_path / name, pairs(seed, shapes, 3))
    files = set()
    for number, (memory, threads) in enumerate([(1, 1), (10**9, 4), (30_000, 2), (10**6, 1)]):
        out = tmp_path / f"out{number}"
        ao.merge(
            [tmp_path / "a", tmp_path / "b"],
            [0.7, 0.3],
            out=out,
            rank=rank,
            memory=memory,
            jobs=threads,
        )
        files.add((out / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1


def test_defaults_are_sensible():
    assert available_threads() >= 1
    assert available_memory() > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_of_the_consumer_does_not_wait_either(wrapped: bool) -> None:
    """Ctrl-C strikes while the consumer writes, and `closing` closes the run."""
    gate, begun, finished = threading.Event(), threading.Event(), []

    def long() -> None:
        begun.set()
        finished.append(gate.wait(3))

    def outer(results: Any) -> Any:
        with closing(results):
            yield from results

    jobs = [Job("short", int, (), 1), Job("long", long, (), 1)]
    results = run(jobs, Compute(threads=1))
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            closing(outer(results) if wrapped else results) as found,
        ):
            for _ in found:
                begun.wait(3)
                raise KeyboardInterrupt
        assert not finished
    finally:
        gate.set()
