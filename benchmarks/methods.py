"""What merge methods take: TIES beside PEFT's, and methods in factors beside dense programs.

`python benchmarks/methods.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows. The
adapters are written for a row and removed after it: 8 of rank 16, of one module or of Llama-7B.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
from harness import Child, Row, alternate, median, python, ratio
from methods_ties import DENSITY, weights
from rows import MB, command, made, main, output

RANK = 16
METHODS: dict[str, tuple[str, ...]] = {
    "tsv": ("-m", "tsv"),
    "iso_c": ("-m", "iso_c"),
    "iso_cts": ("-m", "iso_cts"),
    "ctm": ("-m", "ctm", "--param", f"rank={RANK}"),
    "core_ties": ("-m", "ties", "--space", "core"),
    "knots_ties": ("-m", "ties", "--space", "knots"),
}
DENSE = ("tsv", "iso_c", "core_ties", "knots_ties")


@contextmanager
def eight(name: str) -> Iterator[list[str]]:
    """Paths of the adapters of a set, which is removed afterwards if it was not there before."""
    there = (data.DATA / name).exists()
    try:
        yield [str(path) for path in sorted(made(name).iterdir())]
    finally:
        if not there:
            shutil.rmtree(data.DATA / name, ignore_errors=True)


def alone(script: str, *arguments: object) -> Any:
    """What a script prints, in a process of its own: the parent of children must stay small."""
    return json.loads(python(script, *map(str, arguments)).stdout)


def tensor(quick: bool) -> list[Row]:
    """TIES of dense changes: PEFT's function on whole tensors, ours on a few rows at a time."""
    with eight("mediumx8" if quick else "squarex8") as adapters, output() as folder:
        places = [str(Path(folder) / f"{side}.npy") for side in ("theirs", "ours")]
        alone("methods_ties.py", "peft", places[0], *adapters)
        kept = alone("methods_ties.py", "streamed", places[1], *adapters)
        found = alone("methods_ties.py", "compare", *places, json.dumps(kept["limits"]), *adapters)
        theirs, ours = alternate(
            lambda: python("methods_ties.py", "peft", "", *adapters),
            lambda: python("methods_ties.py", "streamed", "", *adapters),
            1 if quick else 5,
        )
    sides = [[json.loads(run.stdout) for run in runs] for runs in (theirs, ours)]
    speed = ratio(*([one["s"] for one in side] for side in sides))
    memory = ratio([run.rss for run in theirs], [run.rss for run in ours])
    same = not found["unexplained"] and found["otherwise"] <= 1e-6
    size = "1024 x 1024" if quick else "4096 x 4096"
    figures: dict[str, float | str] = {"memory ratio": memory.median}
    for name, runs, side in zip(("PEFT", "ours"), (theirs, ours), sides, strict=True):
        figures[f"{name} s"] = statistics.median(one["s"] for one in side)
        figures[f"{name} CPU s"] = statistics.median(one["CPU s"] for one in side)
        figures[f"{name} peak MB"] = median(runs, "rss") / MB
        figures[f"{name} MB above imports"] = statistics.median(one["more"] for one in side) / MB
    return [
        Row(
            "ties tensor",
            f"PEFT ties on dense tensors, their making included / ours by rows (one thread), "
            f"8 adapters of rank 16, {size}, density {DENSITY}, PEFT's convention; calls alone, "
            "peaks of the processes",
            speed,
            "" if quick else "at least 10, memory 4, equal to 1e-6 but for counted entries",
            None if quick else speed.median >= 10 and memory.median >= 4 and same,
            {
                **figures,
                "entries within 2⁻²⁰ of a limit": found["near"],
                "entries that differ": found["apart"],
                "of these at a limit or a tied vote": found["apart"] - found["unexplained"],
            },
            {"largest difference of the others / largest entry": found["otherwise"]},
        )
    ]


def truncated(quick: bool) -> list[Row]:
    """TIES and then rank 16: PEFT's call, ours from file to file, and our whole process."""
    with eight("mediumx8" if quick else "squarex8") as adapters, output() as folder:
        out = Path(folder) / "out"
        shares = ",".join(map(repr, weights(len(adapters))))
        parameters = ("--param", f"density={DENSITY}", "--param", "convention=peft")
        options = ("-m", "ties", *parameters, "-w", shares, "--rank", str(RANK))
        command("merge", out, *adapters, *options)
        theirs, ours, whole = [], [], []
        for _ in range(1 if quick else 2):
            theirs.append(alone("methods_ties.py", "ties_svd", out, *adapters))
            ours.append(alone("methods_ties.py", "merged", out, *adapters))
            whole.append(command("merge", out, *adapters, *options))
    ratios = ratio([one["s"] for one in theirs], [one["s"] for one in ours])
    size = "1024 x 1024" if quick else "4096 x 4096"
    return [
        Row(
            "ties rank 16",
            f"PEFT add_weighted_adapter(combination_type='ties_svd'), tensors in memory / "
            f"adapterops.merge(method='ties', rank={RANK}), file to file; the calls alone, 8 "
            f"adapters of one {size} module",
            ratios,
            "" if quick else "at least 20",
            None if quick else ratios.median >= 20,
            {
                "PEFT s": statistics.median(one["s"] for one in theirs),
                "PEFT CPU s": statistics.median(one["CPU s"] for one in theirs),
                "s": statistics.median(one["s"] for one in ours),
                "CPU s": statistics.median(one["CPU s"] for one in ours),
                "whole process s": median(whole, "wall"),
                "peak MB": max(run.rss for run in whole) / MB,
            },
            {f"{name} to the TIES": error for name, error in theirs[-1]["errors"].items()},
        )
    ]


def seven(quick: bool) -> list[Row]:
    """Methods in factors on all modules of Llama-7B, and dense programs counted up to as many."""
    name, layers = ("7bx8-quick", 2) if quick else ("7bx8", 32)
    runs: dict[str, list[Child]] = {"linear": [], **{method: [] for method in METHODS}}
    with eight(name) as adapters, output() as folder:
        out = Path(folder) / "out"
        one = ",".join(["1"] * len(adapters))
        for turn in range(2 if quick else 3):
            for method, found in runs.items():
                how = ("-w", one, *METHODS.get(method, ()), "--rank", str(RANK))
                run = command("merge", out, *adapters, *how)
                if turn:
                    found.append(run)
        dense = {method: alone("methods_dense.py", method, *adapters) for method in DENSE}
    model = f"{layers} layers of a narrow Llama" if quick else "Llama-7B"
    rows = []
    for method, found in runs.items():
        seconds = median(found, "wall")
        figures: dict[str, float | str] = {
            "s": seconds,
            "CPU s": median(found, "cpu"),
            "peak MB": max(run.rss for run in found) / MB,
        }
        compared, ratios = f"8 rank-16 adapters of all {7 * layers} modules of {model}", None
        if method in dense:
            theirs = dense[method]
            ratios = ratio([theirs["s"]] * len(found), [run.wall for run in found])
            figures |= {"dense s (counted)": theirs["s"], "dense CPU s (counted)": theirs["CPU s"]}
            compared = f"{theirs['counted']} / adapterops merge, the whole process; {compared}"
        rows.append(
            Row(
                f"methods 7b: {method}",
                f"{compared}, to rank {RANK}",
                ratios,
                "" if quick or method == "linear" else "at most 60 s",
                None if quick or method == "linear" else seconds <= 60,
                figures,
            )
        )
    return rows


if __name__ == "__main__":
    main(__doc__, {"tensor": tensor, "rank16": truncated, "7b": seven}, {})
