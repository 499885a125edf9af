"""What the tests of `inspect` share: a small adapter, and the command line without a process."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterops.cli import main
from tests.support import pairs, write_peft

TYPES = ("q_proj", "v_proj")
SHAPES = {f"model.layers.{i}.self_attn.{t}": (12, 10) for i in range(4) for t in TYPES}


def peft(folder: Path, rank: int = 2, seed: int = 1, **options: Any) -> Path:
    """A PEFT directory with two modules in each of four layers."""
    return write_peft(folder, pairs(seed, SHAPES, rank), **options)


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


def attempt(*arguments: str | Path, cwd: Path) -> tuple[int, Done]:
    """The command line in this process: its exit code and what it prints."""
    out, said = io.StringIO(), io.StringIO()
    given = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["adapterops", *map(str, arguments)]
    code = 0
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(said),
        ):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = given
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, Done(out.getvalue(), said.getvalue())


def call(*arguments: str | Path, cwd: Path, code: int = 0) -> Done:
    """What the command line prints, after checking its exit code."""
    found, done = attempt(*arguments, cwd=cwd)
    assert found == code, done.stderr
    return done
