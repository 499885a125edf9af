"""Processes as `Compute.spread`: the order, the first error at its place, an end."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

import adapterops as ao
from adapterops.batch.processes import processes
from adapterops.errors import AdapterOpsError, MemoryLimitError, UsageError
from adapterops.fleet.planning import cluster
from tests.planted import plant


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise UsageError("three is refused", path="x")
    if number == 5:
        raise MemoryError
    return number


def process(number: int) -> int:
    return os.getpid()


def die(number: int) -> int:
    os._exit(9)


def test_results_come_in_order_and_processes_stay():
    with processes(2) as spread:
        assert list(spread(slow_square, iter(range(9)))) == [n * n for n in range(9)]
        first = set(spread(process, range(8)))
        assert first == set(spread(process, range(8))) and os.getpid() not in first
        assert 1 <= len(first) <= 2
        assert list(spread(slow_square, [])) == []


def test_the_first_error_is_raised_at_its_place_and_the_next_map_works():
    with processes(2) as spread:
        found = []
        with pytest.raises(UsageError, match="three is refused"):
            for number in spread(fail_at_three, range(9)):
                found.append(number)
        assert found == [0, 1, 2]
        with pytest.raises(MemoryLimitError):
            list(spread(fail_at_three, [4, 5]))
        with closing(spread(slow_square, range(50))) as results:
            assert next(results) == 0
        assert list(spread(slow_square, [2, 3])) == [4, 9]


def test_a_process_that_dies_is_an_error():
    with processes(1) as spread, pytest.raises(AdapterOpsError, match="died"):
        list(spread(die, range(3)))


def test_plans_are_the_same_by_threads_and_by_processes(tmp_path: Path, monkeypatch):
    plant(tmp_path / "all", 2, seed=3)
    ao.index(tmp_path / "all", out=tmp_path / "fleet")
    started = []
    real = cluster.processes

    def counted(width):
        started.append(width)
        return real(width)

    monkeypatch.setattr(cluster, "processes", counted)
    for out, many in (("threads", 10**9), ("processes", 1)):
        monkeypatch.setattr(cluster, "_MANY", many)
        ao.cluster(
            tmp_path / "fleet",
            out=tmp_path / out,
            max_error=0.2,
            allow_sharing="all",
            jobs=2,
            memory="500MB",
        )
    assert started == [2]
    one, other = (
        {
            path.relative_to(tmp_path / out): path.read_bytes()
            for path in (tmp_path / out).rglob("*")
            if path.is_file() and path.name != "adapterops.json"
        }
        for out in ("threads", "processes")
    )
    assert one == other and any("representatives" in path.parts for path in one)
