"""The figures of the README: `adapterops merge` beside its floor and its peers.

`python benchmarks/merge.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data
import harness
from harness import Child, Row, adapterops, alternate, child, median, python, ratio

WEIGHTS = "0.7,0.3"
MB = 1e6


class Output:
    """A place on the data's disk for results, emptied before every run."""

    def __init__(self) -> None:
        data.DATA.mkdir(exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix=".out-", dir=data.DATA)
        self.path = str(Path(self.folder) / "merged")

    def merge(self, adapters: list[str], *options: str) -> Child:
        shutil.rmtree(self.path, ignore_errors=True)
        weights = (
            WEIGHTS if len(adapters) == 2 else ",".join([repr(1 / len(adapters))] * len(adapters))
        )
        quiet = () if "--json" in options else ("-q",)
        return adapterops(
            "merge", *adapters, "-w", weights, "-o", self.path, "--no-progress", *quiet, *options
        )

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def arithmetic(quick: bool) -> Row:
    """One 4096 x 4096 module in memory against PEFT's SVD merge."""
    name = "medium" if quick else "square"
    found = json.loads(python("peers.py", "svd", *data.pair(name), "1" if quick else "3").stdout)
    times = found["times"]
    ratios = ratio(times["peft"], times["ours"])
    size = "1024 x 1024" if quick else "4096 x 4096"
    return Row(
        "arithmetic",
        f"PEFT svd / ours, two rank-16 adapters of one {size} module to rank 16, in memory",
        ratios,
        "" if quick else "at least 1,000",
        None if quick else ratios.median >= 1000,
        {
            "PEFT s": statistics.median(times["peft"]),
            "ours ms": 1e3 * statistics.median(times["ours"]),
            "PEFT CPU s": statistics.median(times["peft CPU"]),
            "ours CPU ms": 1e3 * statistics.median(times["ours CPU"]),
        },
        found["errors"],
    )


def startup(quick: bool) -> Row:
    """Two 10 MB adapters, from the shell prompt to the shell prompt."""
    adapters = data.pair("10mb")
    with Output() as out:
        ours, numpy = alternate(
            lambda: out.merge(adapters, "--rank", "16"),
            lambda: child([sys.executable, "-c", "import numpy"]),
            3 if quick else 10,
        )
        shutil.rmtree(out.path)
        imported = imports(["merge", *adapters, "-w", WEIGHTS, "--rank", "16", "-o", out.path])
    torch = "torch" in imported
    seconds = median(ours, "wall")
    return Row(
        "startup",
        "merge of two 10 MB adapters to rank 16, whole process / python -c 'import numpy'",
        ratio([run.wall for run in ours], [run.wall for run in numpy]),
        "0.5 s, torch not imported",
        seconds <= 0.5 and not torch,
        {
            "s": seconds,
            "CPU s": median(ours, "cpu"),
            "fastest s": min(run.wall for run in ours),
            "peak MB": median(ours, "rss") / MB,
            "torch imported": "yes" if torch else "no",
        },
    )


def imports(arguments: list[str]) -> set[str]:
    """Names of all modules that a command imports."""
    script = "from adapterops.cli import main; main()"
    run = child([sys.executable, "-X", "importtime", "-c", script, *arguments, "-q"])
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def seven(quick: bool) -> Row:
    """Two adapters on all 224 modules of Llama-7B, file to file, against the floor."""
    adapters = data.pair("layers10" if quick else "7b")
    with Output() as out:
        ours, floor = alternate(
            lambda: out.merge(adapters, "--rank", "16"),
            lambda: python("floor.py", *adapters, "16", out.folder),
            3 if quick else 7,
        )
    parts = [json.loads(run.stdout) for run in floor]
    ratios = ratio([run.wall for run in ours], [run.wall for run in floor])
    cpu = ratio([run.cpu for run in ours], [run.cpu for run in floor])
    peak = max(run.rss for run in ours)
    figures = {
        "s": median(ours, "wall"),
        "CPU s": median(ours, "cpu"),
        "peak MB": peak / MB,
        "floor s": median(floor, "wall"),
        "floor CPU s": median(floor, "cpu"),
        "CPU ratio": cpu.median,
    }
    for part in ("read", "write", "arithmetic"):
        figures[f"floor {part} s"] = statistics.median(p[part] for p in parts)
    layers = "10 layers of Llama-7B" if quick else "Llama-7B"
    return Row(
        "7b",
        f"merge of two rank-16 adapters of {layers} to rank 16 / reading, arithmetic, writing",
        ratios,
        "at most 1.5, peak 250 MB",
        ratios.median <= 1.5 and peak <= 250 * MB,
        figures,
    )


def rss(quick: bool) -> Row:
    """Peak memory must not grow with the number of layers."""
    few, many = data.pair("layers10"), data.pair("7b" if quick else "layers100")
    with Output() as out:
        large, small = alternate(
            lambda: out.merge(many, "--rank", "16"), lambda: out.merge(few, "--rank", "16"), 3
        )
    ratios = ratio([run.rss for run in large], [run.rss for run in small])
    return Row(
        "rss",
        f"peak memory at {32 if quick else 100} layers / at 10 layers",
        ratios,
        "at most 1.1",
        ratios.median <= 1.1,
        {"MB": median(large, "rss") / MB, "at 10 layers MB": median(small, "rss") / MB},
    )


def thousand(quick: bool) -> Row:
    """1,000 adapters of one Llama-7B layer to rank 16, and one module of it checked densely."""
    count = 50 if quick else data.FLEET
    adapters = [str(path) for path in sorted(data.get("fleet").iterdir())[:count]]
    module = "self_attn.k_proj"
    with Output() as out:
        run = out.merge(adapters, "--rank", "16", "--json")
        report = json.loads(run.stdout)
        checked = python("dense.py", out.path, module, input_text="\n".join(adapters)).stdout
    found = json.loads(checked)
    certified = next(m for name, m in report["modules"].items() if name.endswith(module))
    agrees = abs(certified["error"] - found["error"]) <= 1e-6 * found["error"]
    return Row(
        "thousand",
        f"merge of {count:,} adapters of one Llama-7B layer to rank 16",
        None,
        "peak 1 GB, certificate true",
        run.rss <= 1e9 and agrees,
        {"s": run.wall, "CPU s": run.cpu, "peak MB": run.rss / MB},
        {
            "certified": report["error"],
            "certified k_proj": certified["error"],
            "dense k_proj": found["error"],
            "best possible k_proj": found["optimum"],
        },
    )


def help_text(quick: bool) -> Row:
    """`adapterops --help` against importing the library that parses its options."""
    ours, click = alternate(
        lambda: adapterops("--help"),
        lambda: child([sys.executable, "-c", "import click"]),
        5 if quick else 20,
    )
    ratios = ratio([run.wall for run in ours], [run.wall for run in click])
    return Row(
        "help",
        "adapterops --help / python -c 'import click'",
        ratios,
        "at most 3",
        ratios.median <= 3,
        {"ms": 1e3 * median(ours, "wall")},
    )


def peers(quick: bool) -> Row:
    """Relative errors to the exact weighted sum, on a 256 x 256 module."""
    found = json.loads(python("peers.py", "methods", *data.pair("small")).stdout)
    return Row(
        "peers",
        "relative error to the exact weighted sum of two rank-16 adapters",
        errors=found["errors"],
    )


ROWS: dict[str, Callable[[bool], Row]] = {
    "arithmetic": arithmetic,
    "startup": startup,
    "7b": seven,
    "rss": rss,
    "thousand": thousand,
    "help": help_text,
    "peers": peers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=ROWS, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="smaller inputs, fewer pairs")
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    options = parser.parse_args()
    for name in options.only or ROWS:
        print(f"{name} …", file=sys.stderr, flush=True)
        row = harness.watched(partial(ROWS[name], options.quick))
        path = harness.save(
            [row], options.results, day=options.date, prefix="quick-" if options.quick else ""
        )
    print(harness.table(path))


if __name__ == "__main__":
    main()
