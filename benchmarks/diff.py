"""What `adapterops diff` takes: two adapters of 84 MB in three relations, and five at once.

`python benchmarks/diff.py [--quick] [--only NAME …]`. The inputs, rank-16 float16 adapters of every
linear module of Llama-3-8B (224 modules), are written to a temporary folder and removed at the end.
Each row is the arithmetic alone: seconds inside the call, with the files in the page cache and the
interpreter's start left out, beside the seconds in which the same bytes are read and widened to
float64 and each side's Gram matrix is formed once on as many threads: no angles, no distance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data
import harness
import numpy as np
from harness import Row, alternate, median, python, ratio

LLAMA_3_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
RANK, LAYERS = 16, 32
PAIRS = {
    "unrelated": ("first", "other"),
    "neighbours": ("first", "later"),
    "gauge": ("first", "turned"),
    "equal": ("first", "first"),
}


def write(folder: Path, layers: int) -> None:
    """first; other, unrelated; later, a little moved; turned, `first` in another gauge; fifth."""
    made: dict[str, data.Tensors] = {name: {} for name in ("first", "other", "later", "turned")}
    made["fifth"] = {}
    rng = np.random.default_rng(8)
    for stem, shape in data.layers(layers, LLAMA_3_8B).items():
        B, A = (x.astype(np.float32) for x in data.noise(rng, shape, RANK))
        G = rng.standard_normal((RANK, RANK)).astype(np.float32)
        more_b, more_a = data.noise(rng, shape, RANK)
        pairs = {
            "first": (B, A),
            "other": data.noise(rng, shape, RANK),
            "later": (B + 0.05 * more_b, A + 0.02 * more_a),
            "turned": (B @ G, np.linalg.solve(G, A)),
            "fifth": data.noise(rng, shape, RANK),
        }
        for name, (b, a) in pairs.items():
            made[name] |= data._peft_tensors(stem, b.astype(np.float16), a.astype(np.float16))
    for name, tensors in made.items():
        data.write_peft(folder / name, tensors, RANK)


def timed(paths: list[str]) -> dict[str, float | str]:
    """One comparison in this process, after one that fills the caches."""
    import resource
    import time

    import adapterops
    from adapterops.stream import keep_freed_memory

    keep_freed_memory()
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        report = adapterops.diff(paths)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    kind = report.pair.verdict.kind if report.pair else "matrix"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": wall, "cpu": cpu, "rss": rss, "kind": kind}


def floor(paths: list[str]) -> dict[str, float | str]:
    """The same bytes read, widened and multiplied once, by the executor and readers of diff."""
    import time

    from adapterops import open_adapter
    from adapterops.options import compute
    from adapterops.stream import Job, keep_freed_memory, run

    keep_freed_memory()
    files = [open_adapter(path).terms[0][1] for path in paths]
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        jobs = [
            Job(stem, _one_gram, ([file.sites[stem] for file in files],), 1 << 24)
            for stem in files[0].sites
        ]
        for _ in run(jobs, compute()):
            pass
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu}


def _one_gram(sites: list[Any]) -> None:
    rank = sum(site.rank for site in sites)
    (m, n), start = sites[0].shape, 0
    columns, rows = np.empty((rank, m)), np.empty((rank, n))
    for site in sites:
        own = slice(start, start := start + site.rank)
        site.factors_into(columns[own].T, rows[own])
    _ = columns @ columns.T, rows @ rows.T


def row(name: str, paths: list[str], repeats: int, target: float | None) -> Row:
    ours, least = alternate(
        lambda: python("diff.py", "--timed", *paths),
        lambda: python("diff.py", "--floor", *paths),
        repeats,
    )
    found = [json.loads(run.stdout) for run in ours]
    beside = [json.loads(run.stdout) for run in least]
    walls = sorted(one["wall"] for one in found)
    middle = walls[len(walls) // 2]
    return Row(
        f"diff {name}",
        f"adapterops.diff of {len(paths)} adapters ({found[0]['kind']}) / read, widen, one Gram",
        ratio([one["wall"] for one in found], [one["wall"] for one in beside]),
        f"below {target:g} s" if target else "",
        None if target is None else middle < target,
        {
            "s": middle,
            "CPU s": sorted(one["cpu"] for one in found)[len(found) // 2],
            "floor s": sorted(one["wall"] for one in beside)[len(beside) // 2],
            "peak MB": max(one["rss"] for one in found) / 1e6,
            "process s": median(ours, "wall"),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, fewer pairs")
    parser.add_argument("--only", action="append", choices=[*PAIRS, "five"])
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    parser.add_argument("--timed", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--floor", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for inner, paths in ((timed, options.timed), (floor, options.floor)):
        if paths:
            print(json.dumps(inner(paths)))
            return
    if options.write:  # in a child: peaks of processes start at what their parent holds
        write(Path(options.write[0]), int(options.write[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python("diff.py", "--write", name, "2" if options.quick else str(LAYERS))
        sets: dict[str, list[str]] = {
            key: [str(folder / one) for one in names] for key, names in PAIRS.items()
        }
        sets["five"] = [str(path) for path in sorted(folder.iterdir())]
        rows: list[Callable[[], Row]] = [
            partial(
                row,
                key,
                sets[key],
                3 if options.quick else 5,
                None if options.quick or key == "five" else 1.0,
            )
            for key in options.only or sets
        ]
        for measure in rows:
            print(f"{measure.args[0]} …", file=sys.stderr, flush=True)
            path = harness.save(
                [harness.watched(measure)],
                options.results,
                day=options.date,
                prefix="quick-" if options.quick else "",
            )
    print(harness.table(path))


if __name__ == "__main__":
    main()
