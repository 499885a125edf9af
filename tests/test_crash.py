"""Kills, signals, too little memory and inputs that change: what is left, what is said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import adapterops as ao
from adapterops import cli
from adapterops.batch import workers
from adapterops.errors import ChangedError, FileError
from adapterops.files.source import LocalFile
from tests.support import dense, distance, pairs, read_peft, weighted, write_peft

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (256, 192) for i in range(40)}
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

# The command line with every write delayed, so that a signal meets it at work.
SLOW = """
import os, sys, time
real = os.pwrite
def slow(*arguments):
    time.sleep(0.02)
    return real(*arguments)
os.pwrite = slow
from adapterops.cli import main
main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, `a` and `b`."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate("ab"):
        write_peft(folder / name, pairs(seed, SHAPES, 8))
    return folder


def merging(
    inputs: Path, folder: Path, *options: str, program: str | None = None
) -> subprocess.Popen[str]:
    """The command that merges `a` and `b` into `folder/out`, started."""
    run = ["-c", program] if program else ["-m", "adapterops"]
    return subprocess.Popen(
        [
            *(sys.executable, *run, "merge", str(inputs / "a"), str(inputs / "b")),
            *("-w", "0.7,0.3", "-o", "out", "--no-progress", *options),
        ],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def merge_now(inputs: Path, folder: Path) -> bytes:
    """A merge that must work; the bytes of its weights."""
    process = merging(inputs, folder)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    return (folder / "out" / "adapter_model.safetensors").read_bytes()


def check_whole(out: Path) -> None:
    """The output opens, says where it comes from and is the sum."""
    assert json.loads((out / "adapterops.json").read_text())["schema"] == "adapterops.merge/1"
    assert len(ao.open_adapter(out)) == len(SHAPES)
    expected = weighted(*((w, dense(pairs(s, SHAPES, 8))) for s, w in enumerate((0.7, 0.3))))
    assert distance(read_peft(out), expected) < 1e-6


def _wait_for_staging(folder: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if any(path.name.startswith(".out.") for path in folder.iterdir()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail("nothing was staged within 30 s")


def _kill_often(inputs: Path, folder: Path, count: int, seed: int) -> None:
    """SIGKILL after random delays over the time a merge takes; half of them over an old output."""
    out = folder / "out"
    weights = out / "adapter_model.safetensors"
    started = time.monotonic()
    merge_now(inputs, folder)
    duration = time.monotonic() - started
    check_whole(out)
    choose = random.Random(seed)
    for number in range(count):
        if number < count // 2:
            old = weights.read_bytes()
        else:
            old = b""
            subprocess.run(["rm", "-rf", out], check=True)
        rank = str(5 + number % 2)  # another result each time
        process = merging(inputs, folder, "--overwrite", "--rank", rank)
        time.sleep(choose.uniform(0.3, 1.1) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not out.exists():
            assert not old, "the old output is gone"
        elif weights.read_bytes() != old:
            assert len(ao.open_adapter(out)) == len(SHAPES)
            report = json.loads((out / "adapterops.json").read_text())
            assert report["size"] == weights.stat().st_size
        subprocess.run(["rm", "-rf", *folder.glob(".out*")], check=True)


def test_sigkill_leaves_the_old_or_a_whole_output(inputs, tmp_path):
    _kill_often(inputs, tmp_path, 12, seed=1)


@pytest.mark.long
def test_sigkill_many_times(inputs, tmp_path):
    _kill_often(inputs, tmp_path, 200, seed=2)


# Dies at the N-th call of each function that changes the disk; one child for each N.
_SUICIDE = """
import os, signal, sys
from pathlib import Path
from adapterops.files.header import layout
from adapterops.files.output import SIDECAR, stage
from adapterops.files.source import file_header

folder, directory, replaced = Path(sys.argv[1]), sys.argv[2] == "directory", sys.argv[3] == "old"
out = folder / "out"
entries = layout({"w": ("U8", (1000,))})

def save(fill):
    with stage(out, directory=directory, overwrite=True) as target:
        writer = target.tensors("w.safetensors" if directory else "out", entries, 512)
        writer.put("w", bytes([fill]) * 1000)
        writer.finish({"fill": str(fill)})
        sidecar = b'{"schema": "adapterops.test/1", "files": ["w.safetensors"]}'
        target.write(SIDECAR if directory else "side.json", [sidecar])

def child(number):
    left = number
    for name in ("pwrite", "ftruncate", "fsync", "rename", "replace", "chmod", "open"):
        def wrapped(*arguments, real=getattr(os, name), **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        setattr(os, name, wrapped)
    save(2)
    os._exit(0)

for number in range(1, 100):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if replaced:
        save(1)
    if (pid := os.fork()) == 0:
        child(number)
    status = os.waitpid(pid, 0)[1]
    weights = out / "w.safetensors" if directory else out
    if weights.exists():
        header = file_header(weights)
        data = weights.read_bytes()[header.data_start :]
        assert data == bytes([int(header.metadata["fill"])]) * 1000
        print(number, header.metadata["fill"])
    else:
        assert not out.exists()
        print(number, "none")
    if os.WIFEXITED(status):
        break
"""


@pytest.mark.parametrize("before", ["new", "old"])
@pytest.mark.parametrize("form", ["file", "directory"])
def test_sigkill_at_every_call_that_changes_the_disk(form, before, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SUICIDE, str(tmp_path), form, before],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    states = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(states) > 8 and states[-1] == "2"
    assert states == sorted(states, key=["none", "1", "2"].index), "never back and forth"
    if before == "old":
        assert "none" not in states


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_ends_with_130_and_leaves_nothing(number, as_json, inputs, tmp_path):
    process = merging(inputs, tmp_path, *(["--json"] if as_json else []), program=SLOW)
    _wait_for_staging(tmp_path, process)
    process.send_signal(number)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert shown == ""
    assert "no unfinished output was left" in said and "Traceback" not in said
    if as_json:
        assert json.loads(said)["error"]["code"] == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_keeps_the_output_that_was_to_be_replaced(number, inputs, tmp_path):
    merge_now(inputs, tmp_path)
    process = merging(inputs, tmp_path, "--overwrite", program=SLOW)
    _wait_for_staging(tmp_path, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_whole(tmp_path / "out")


# The command line that is interrupted while its output gets its name, or when it is printed.
LATE = """
import os, signal, sys
from adapterops.files import output, publish, resumable
import click
def once(function, *where):
    def called(*arguments, **named):
        for module, name in where:
            setattr(module, name, function)
        os.kill(os.getpid(), signal.{sign})
        return function(*arguments, **named)
    for module, name in where:
        setattr(module, name, called)
{place}
from adapterops.cli import main
main()
"""
COMMITTED = """once(publish.completed, (output, "completed"), (resumable, "completed"))"""
PRINTED = "once(click.echo, (click, 'echo'))"


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", [COMMITTED, PRINTED], ids=["committed", "printed"])
def test_a_signal_after_the_commit_says_that_the_output_is_complete(sign, place, inputs, tmp_path):
    process = merging(inputs, tmp_path, program=LATE.format(sign=sign, place=place))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    out = tmp_path / "out"
    assert f"error: interrupted, but {out} had been written before and can be used" in said
    check_whole(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
def test_when_all_is_printed_there_is_nothing_to_be_interrupted(sign, inputs, tmp_path):
    ended = f"import atexit\natexit.register(os.kill, os.getpid(), signal.{sign})"
    process = merging(inputs, tmp_path, program=LATE.format(sign=sign, place=ended))
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert "out  peft" in shown


# Memory.


@pytest.mark.parametrize("room", [1, 30, 100])
def test_too_little_address_space_is_exit_7_with_a_message(room, tmp_path):
    """The limit is set when everything is loaded, `room` megabytes above what is in use.

    Where OpenBLAS is the one who finds too little, it ends the process itself, with its message.
    """
    shapes = {"m.q_proj": (20_000, 3_000), "m.v_proj": (20_000, 3_000)}
    write_peft(tmp_path / "a", pairs(1, shapes, 64))
    program = f"""
import os, resource, sys
import numpy, scipy.linalg, adapterops.verbs.merge, adapterops.save
real = adapterops.save.stage
def limited(*arguments, **options):
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + {room} * 10**6, -1))
    return real(*arguments, **options)
adapterops.save.stage = limited
from adapterops.cli import main
main()
"""
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "merge", "a", "-w", "0.5"),
            *("--rank", "8", "-o", "out", "-j", "2"),
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    if room > 1 and (done.returncode == 0 or "OpenBLAS error" in done.stderr):
        assert (tmp_path / "out").exists() == (done.returncode == 0)
        return
    assert done.returncode == 7, done.stderr
    assert "memory" in done.stderr or "cannot start a worker" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Inputs that change.


def _weights(folder: Path) -> Path:
    return folder / "a" / "adapter_model.safetensors"


CHANGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "replaced": lambda path: (
        (path.with_name("new").write_bytes(path.read_bytes()[::-1]))
        and os.replace(path.with_name("new"), path)
    ),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_after_the_nth_read(change, rank, tmp_path):
    """For every N until a merge reads no further: never a signal, never a mixed result."""
    shapes = {"m.q_proj": (16, 12), "m.v_proj": (16, 12)}
    real = LocalFile.pread_into
    for number in range(1, 100):
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)
        for seed, name in enumerate("ab"):
            write_peft(tmp_path / name, pairs(seed, shapes, 2))
        weights = _weights(tmp_path)
        seen = 0

        def changing(self, offset, buffer, _number=number, _weights=weights):
            nonlocal seen
            real(self, offset, buffer)
            if self.path == str(_weights):
                seen += 1
                if seen == _number:
                    CHANGES[change](_weights)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalFile, "pread_into", changing)
            out = tmp_path / "out"
            try:
                ao.merge([tmp_path / "a", tmp_path / "b"], [0.7, 0.3], out=out, rank=rank, jobs=1)
            except FileError as error:
                assert seen >= number
                assert isinstance(error, ChangedError) or change == "removed"
                assert error.exit_code == 6
                assert str(weights) in str(error)
                assert not out.exists()
                assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
            else:
                assert seen < number, "changed, and nobody noticed"
                break
    assert number > 4


def test_a_pickle_that_changes_after_it_was_read(tmp_path):
    """It is held in memory, but its hash must be that of what was read."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    write_peft(tmp_path / "a", pairs(1, {"m.q_proj": (8, 6)}, 2))
    tensors = load_file(_weights(tmp_path))
    _weights(tmp_path).unlink()
    path = tmp_path / "a" / "adapter_model.bin"
    torch.save(tensors, path)
    adapter = ao.open_adapter(tmp_path / "a", allow_pickle=True)
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, path)
    with pytest.raises(ChangedError, match=r"adapter_model\.bin"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_changed(inputs, tmp_path):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in inputs.rglob("*.*")}
    ao.merge([inputs / "a", inputs / "b"], [0.5, 0.5], out=tmp_path / "out", rank=4)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in inputs.rglob("*.*")}
    assert after == before


def test_the_sum_is_the_sum():
    """What `check_whole` compares with is not zero."""
    expected = dense(pairs(0, SHAPES, 8))
    assert min(float(np.linalg.norm(value)) for value in expected.values()) > 1


@pytest.mark.parametrize("handler", [cli._terminate, workers._stop])
def test_a_signal_raises_what_threading_does_not_take_for_a_failed_start(handler):
    """`Thread.start` forgets its thread on an Exception; if it did start, it prints an error."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            handler(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not isinstance(caught.value, Exception)
