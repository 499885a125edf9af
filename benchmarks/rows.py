"""Shared by compress, resize, extract and allocation: sets, scratch space, children, rows."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import data
import harness
from harness import Child, Row, adapterops, python

MB = 1e6
Measure = Callable[[bool], list[Row]]


def made(name: str) -> Path:
    """The folder of a set, written by another process: the parent of children must stay small."""
    if not (data.DATA / name).exists():
        python("data.py", name)
    return data.DATA / name


def output() -> tempfile.TemporaryDirectory[str]:
    """A place on the data's disk for results."""
    data.DATA.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".out-", dir=data.DATA)


def command(verb: str, out: Path, *arguments: str) -> Child:
    """One run of a writing verb into a place emptied before it."""
    if out.is_dir():
        shutil.rmtree(out)
    for file in (out, out.with_name(f"{out.stem}.adapterops.json")):
        file.unlink(missing_ok=True)
    return adapterops(verb, *arguments, "-o", str(out), "--no-progress", "-q")


def inner(script: str, name: str, *arguments: object) -> Any:
    """What a function of a script's INNER found, in a process of its own."""
    return json.loads(python(script, "--inner", name, *map(str, arguments)).stdout)


def watched(measure: Callable[[], list[Row]]) -> list[Row]:
    """`harness.watched` for a measurement of several rows, or of none."""
    found: list[Row] = []

    def first() -> Row:
        found.extend(measure())
        return Row("", "")

    others = harness.watched(first).others
    return [replace(row, others=others) for row in found]


def main(
    description: str | None, rows: Mapping[str, Measure], inners: Mapping[str, Callable[..., Any]]
) -> None:
    """Measure the rows asked for and save them, or be the child that runs one of `inners`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", action="append", choices=rows, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="smaller inputs, fewer pairs")
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    parser.add_argument("--inner", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        name, *arguments = options.inner
        print(json.dumps(inners[name](*arguments)))
        return
    path = None
    for name in options.only or rows:
        print(f"{name} …", file=sys.stderr, flush=True)
        found = watched(partial(rows[name], options.quick))
        prefix = "quick-" if options.quick else ""
        if found:
            path = harness.save(found, options.results, day=options.date, prefix=prefix)
    if path:
        print(harness.table(path))
