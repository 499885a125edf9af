"""index killed, interrupted, out of room: the same command goes on, and ends as if in one go."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.errors import FileError
from adapterops.fleet.indexing.opened import open_fleet
from tests.support import pairs, write_peft
from tests.test_fleet_store import content

ROOT = Path(__file__).parent.parent
SHAPES = {f"model.layers.{i}.self_attn.q_proj": (24, 16) for i in range(2)}
COUNT, BATCH = 10, 3
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Adapters in `in`, two shards `f-1` and `f-2`, `whole`; and what an index in one go says."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(COUNT):
        write_peft(folder / "in" / f"t{i:02d}", pairs(i, SHAPES, 2))
    ao.index(folder / "in", out=folder / "whole")
    for i in (1, 2):
        ao.index(folder / "in", out=folder / f"f-{i}", shard=f"{i}/2")
    return folder, content(folder / "whole")


DRIVER = f"""
import os, shutil, signal, sys, time
from pathlib import Path
import adapterops as ao
from adapterops.fleet.indexing import index
from adapterops.fleet.indexing import looking
from adapterops.fleet.indexing import merging
from adapterops.fleet.indexing import opened
from adapterops.fleet.indexing import schema
from adapterops.fleet.indexing import store
index.ROWS = store.ROWS = merging.ROWS = {BATCH}
made, out, log = map(Path, sys.argv[1:4])
real = looking.signature
def counted(path, seed, **options):
    with open(log, "a") as file:
        file.write(os.path.basename(path) + "\\n")
    time.sleep(float(os.environ.get("SLOW", "0")))
    return real(path, seed, **options)
looking.signature = counted
"""

# Dies at the N-th call of what changes the disk: functions of os, and statements of SQLite.
KILLING = """
from tests.test_fleet_store import content
verbs = {
    "index": lambda: ao.index(made / "in", out=out, jobs=1),
    "remove": lambda: ao.index(out=out, remove=["t03", "t07"]),
    "merge": lambda: ao.index([made / "f-1", made / "f-2"], merge=True, out=out),
}
verb, first, stride = verbs[sys.argv[4]], int(sys.argv[5]), int(sys.argv[6])
expected = content(made / "whole")
if sys.argv[4] == "remove":
    del expected["t03"], expected["t07"]

def child(number):
    left = number
    def step(*_):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    for name in ("pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink"):
        def wrapped(*arguments, real=getattr(os, name), **options):
            step()
            return real(*arguments, **options)
        setattr(os, name, wrapped)
    real = schema.connect
    def watched(path):
        database = real(path)
        database.set_trace_callback(step)
        return database
    schema.connect = watched
    verb()
    os._exit(0)

for number in range(first, 10**6, stride):
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    if sys.argv[4] == "remove":
        shutil.copytree(made / "whole", out)
    if (pid := os.fork()) == 0:
        child(number)
    if os.WIFEXITED(os.waitpid(pid, 0)[1]):
        print(number)
        break
    verb()
    assert content(out) == expected, number
    fleet = opened.open_fleet(out)
    assert fleet.unfinished == (), number
    there = sorted(os.listdir(out / "signatures"))
    assert there == sorted(fleet._files.values()), (number, there)
    assert sorted(os.listdir(out)) == ["fleet.sqlite", "lock", "signatures"]
    looked = log.read_text().split() if log.exists() else []
    assert len(looked) <= COUNT + BATCH, (number, looked)
""".replace("COUNT + BATCH", f"{COUNT} + {BATCH}")


def _kill(verb: str, made: Path, folder: Path, first: int, stride: int) -> int:
    """How many calls there are that a run can be killed at."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", DRIVER + KILLING, made, folder / "f", folder / "log"),
            *(verb, str(first), str(stride)),
        ],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        cwd=ROOT,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.parametrize("verb", ["index", "remove", "merge"])
def test_sigkill_at_calls_that_change_the_disk(verb, made, tmp_path):
    """Each goes on to the same content, with one batch read twice at most, and no file too many."""
    stride = {"index": 37, "remove": 11, "merge": 41}[verb]
    assert (
        _kill(verb, made[0], tmp_path, 3, stride) > {"index": 80, "remove": 20, "merge": 80}[verb]
    )


@pytest.mark.long
@pytest.mark.parametrize("verb", ["index", "remove", "merge"])
def test_sigkill_at_every_call_that_changes_the_disk(verb, made, tmp_path):
    _kill(verb, made[0], tmp_path, 0, 1)


def _started(made: Path, folder: Path, program: str, slow: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER + program, made, folder / "f", folder / "log"],
        env={**ENVIRONMENT, "SLOW": str(slow)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def _kill_often(
    made: Path, expected: dict[str, object], folder: Path, seed: int, often: int
) -> None:
    """SIGKILL after random delays, of a run with processes of its own too, until one ends."""
    choose = random.Random(seed)
    program = "ao.index(made / 'in', out=out, jobs=2)"
    for _ in range(often):
        process = _started(made, folder, program, 0.03)
        time.sleep(choose.uniform(0.3, 1.5))
        process.kill()
        process.communicate()
    process = _started(made, folder, program, 0)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert content(folder / "f") == expected


def test_sigkill_at_random_times(made, tmp_path):
    _kill_often(*made, tmp_path, 1, 2)


@pytest.mark.long
def test_sigkill_at_many_random_times(made, tmp_path):
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        _kill_often(*made, tmp_path / str(seed), seed, 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interruption_keeps_what_is_done_and_says_how_to_go_on(number, made, tmp_path):
    source, expected = made
    program = (
        "from adapterops.cli import main\n"
        "sys.argv = ['adapterops', 'index', str(made / 'in'), '-o', str(out), '-j1']\nmain()"
    )
    process = _started(source, tmp_path, program, 0.3)
    log = tmp_path / "log"
    while not log.exists() or len(log.read_text().split()) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    shown, said = process.communicate(timeout=30)
    assert process.returncode == 130 and shown == "", said
    assert f"interrupted; 4 of {COUNT} adapters are in the index, the same command goes on" in said
    opened = open_fleet(tmp_path / "f")
    assert len(opened.records) == 4 and opened.unfinished == (f"{source}/in",)
    report = ao.index(source / "in", out=tmp_path / "f")
    assert report.unchanged == 4 and report.unfinished == ()
    assert content(tmp_path / "f") == expected


def test_a_full_disk_keeps_what_is_done(made, tmp_path, monkeypatch):
    source, expected = made
    monkeypatch.setattr("adapterops.fleet.indexing.index.ROWS", BATCH)
    real: Any = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        folder = tmp_path / "f" / "signatures"
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.startswith(f"{folder}/.") and len(os.listdir(folder)) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(real(descriptor, data, offset))

    monkeypatch.setattr(os, "pwrite", full)
    message = f"the disk is full; {2 * BATCH} of {COUNT} adapters are in the index"
    with pytest.raises(FileError, match=message) as caught:
        ao.index(source / "in", out=tmp_path / "f", jobs=1)
    assert caught.value.exit_code == 6
    assert len(os.listdir(tmp_path / "f" / "signatures")) == 2
    monkeypatch.setattr(os, "pwrite", real)
    assert ao.index(source / "in", out=tmp_path / "f").unchanged == 2 * BATCH
    assert content(tmp_path / "f") == expected


def test_a_run_that_died_while_it_committed_is_rolled_back_by_a_reader(made, tmp_path):
    """The journal that SQLite leaves behind is applied before anything is read."""
    source, expected = made
    shutil.copytree(source / "whole", tmp_path / "f")
    program = """
import sqlite3
database = sqlite3.connect(out / "fleet.sqlite", isolation_level=None)
database.execute("PRAGMA cache_size=1")
database.execute("PRAGMA cache_spill=1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE tenants SET status = 'broken', reason = printf('%.*c', 4000, 'x')")
assert (out / "fleet.sqlite-journal").stat().st_size > 0
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = _started(source, tmp_path, program, 0)
    process.communicate(timeout=30)
    assert (tmp_path / "f" / "fleet.sqlite-journal").exists()
    assert content(tmp_path / "f") == expected
