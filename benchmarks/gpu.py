"""The same merges on the CPU and on a CUDA device: time, and agreement of what they write.

`python benchmarks/gpu.py [--device cuda] [--only NAME …]`. Needs numpy, torch, safetensors and the
package on the path, nothing else. Without a CUDA device it says so and ends; `--device torch` runs
the CUDA spelling on host tensors, which tests this script but measures nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
import harness
import numpy as np
from harness import Child, Row

import adapterops

SETS = {
    "square": ("one 4096 x 4096 module, rank 16", "16"),
    "10mb": ("two 10 MB adapters, rank 16", "16"),
    "7b": ("Llama-7B, 224 modules, rank 16", "16"),
    "sdxl": ("SDXL, 722 modules, rank 32", "32"),
}
MB = 1e6


def whole(adapters: list[str], out: str, rank: str, device: str) -> Child:
    """The command, start to exit, CUDA's own start included."""
    remove(out)
    options = ("-w", "0.7,0.3", "--rank", rank, "--device", device, "-q", "--no-progress")
    return harness.adapterops("merge", *adapters, "-o", out, *options)


def inside(adapters: list[str], out: str, rank: str, device: str) -> tuple[float, Any]:
    """Seconds of the call in a process where everything is loaded, and its report."""
    remove(out)
    start = time.perf_counter()
    report = adapterops.merge(adapters, [0.7, 0.3], out=out, rank=int(rank), device=device)
    return time.perf_counter() - start, report


def remove(out: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for name in (out, f"{out.removesuffix('.safetensors')}.adapterops.json"):
        if os.path.isfile(name):
            os.remove(name)


def factors(path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(B, A) of every module of a written adapter; alpha = rank there, so the scale is 1."""
    from safetensors.numpy import load_file

    tensors = load_file(path if path.endswith(".safetensors") else data.weights(path))
    pairs = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))
    return {
        name.removesuffix(down): (
            tensors[name.removesuffix(down) + up].astype(np.float64),
            tensors[name].astype(np.float64),
        )
        for name in tensors
        for down, up in pairs
        if name.endswith(down)
    }


def agreement(first: str, second: str) -> tuple[float, float]:
    """Largest relative Frobenius distance of a module's two ΔW; share of factors equal in bits.

    The distance is that of the cores of [B₁ B₂] and [A₁; −A₂], by QR.
    """
    largest, equal, one, two = 0.0, 0, factors(first), factors(second)
    if one.keys() != two.keys():
        raise RuntimeError("the two devices wrote different modules")
    for stem, (B, A) in one.items():
        other_b, other_a = two[stem]
        upper_b = np.linalg.qr(np.hstack([B, other_b]), mode="r")
        upper_a = np.linalg.qr(np.vstack([A, -other_a]).T, mode="r")
        rank = B.shape[1]
        size = np.linalg.norm(upper_b[:, :rank] @ upper_a[:, :rank].T)
        largest = max(largest, float(np.linalg.norm(upper_b @ upper_a.T) / size))
        equal += np.array_equal(B, other_b) + np.array_equal(A, other_a)
    return largest, equal / (2 * len(one))


def measure_inside(name: str, device: str, pairs: int) -> dict[str, Any]:
    """In turn on both, in this process, then what was written compared."""
    adapters, rank = data.pair(name), SETS[name][1]
    with places(adapters, device) as outs:
        times: dict[str, list[float]] = {"cpu": [], device: []}
        reports = {}
        for _ in range(pairs + 1):  # the first one loads libraries and fills caches
            for d, out in outs.items():
                seconds, reports[d] = inside(adapters, out, rank, d)
                times[d].append(seconds)
        distance, equal = agreement(outs["cpu"], outs[device])
    errors = [report.error for report in reports.values()]
    return {
        "times": times,
        "equal": equal,
        "errors": {
            "largest distance of a module": distance,
            "certificate cpu": errors[0],
            "certificates apart": abs(errors[0] - errors[1]),
        },
    }


@contextmanager
def places(adapters: list[str], device: str) -> Iterator[dict[str, str]]:
    """Where either device's result goes, removed at the end."""
    ending = ".safetensors" if adapters[0].endswith(".safetensors") else ""
    data.DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".out-", dir=data.DATA) as folder:
        yield {d: str(Path(folder) / f"{d}{ending}") for d in ("cpu", device)}


def measure(name: str, device: str, pairs: int) -> list[Row]:
    """Whole processes first; what happens inside of one in a child, so that this one is small."""
    what, rank = SETS[name]
    adapters = data.pair(name)
    with places(adapters, device) as outs:
        cpu, other = harness.alternate(
            lambda: whole(adapters, outs["cpu"], rank, "cpu"),
            lambda: whole(adapters, outs[device], rank, device),
            max(1, pairs - 2),
        )
    found = json.loads(harness.python("gpu.py", "--inside", name, device, str(pairs)).stdout)
    on_cpu, on_device = found["times"]["cpu"][1:], found["times"][device][1:]
    return [
        Row(
            f"{name} in process",
            f"cpu / {device}, files to file: {what}",
            harness.ratio(on_cpu, on_device),
            figures={
                "cpu s": statistics.median(on_cpu),
                f"{device} s": statistics.median(on_device),
                f"{device} first call s": found["times"][device][0],
                "factors equal in bits": found["equal"],
            },
            errors=found["errors"],
        ),
        Row(
            f"{name} whole process",
            f"cpu / {device}, files to file: {what}",
            harness.ratio([run.wall for run in cpu], [run.wall for run in other]),
            figures={
                "cpu s": harness.median(cpu, "wall"),
                f"{device} s": harness.median(other, "wall"),
                "cpu peak MB": harness.median(cpu, "rss") / MB,
                f"{device} host peak MB": harness.median(other, "rss") / MB,
            },
        ),
    ]


def has_cuda() -> bool:
    """Asked in a child: torch makes a process large."""
    script = "import torch; print(torch.cuda.is_available())"
    return harness.child([sys.executable, "-c", script]).stdout.strip() == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or torch")
    parser.add_argument("--only", action="append", choices=SETS, help="may be repeated")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    parser.add_argument("--inside", nargs=3, metavar=("NAME", "DEVICE", "PAIRS"), help="one child")
    options = parser.parse_args()
    if options.inside:
        name, device, pairs = options.inside
        print(json.dumps(measure_inside(name, device, int(pairs))))
        return
    if options.device != "torch" and not has_cuda():
        print("no CUDA device here; --device torch runs the same code on host tensors")
        return
    prefix = "torch-" if options.device == "torch" else ""
    for name in options.only or SETS:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows = measure(name, options.device, options.pairs)
        path = harness.save(rows, options.results, day=options.date, prefix=prefix)
    print(harness.table(path))


if __name__ == "__main__":
    main()
