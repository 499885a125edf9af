"""What `adapterops compress` takes beside copying: a Llama-7B adapter, and 1,000 small ones.

`python benchmarks/compress.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import data
import floor
import numpy as np
from harness import Row, alternate, median, python, ratio
from rows import MB, command, made, main, output

RANK = 16


def seven(quick: bool) -> list[Row]:
    """224 modules beside reading the file, one Gram pass and writing the result."""
    adapter = made("layers4-64" if quick else "7b64") / "a"
    with output() as folder:
        place = Path(folder)
        mine, least = alternate(
            lambda: command("compress", place / "out", str(adapter), "--rank", str(RANK)),
            lambda: python("compress.py", "--inner", "floor", str(adapter), folder),
            3 if quick else 7,
        )
    parts = [json.loads(run.stdout) for run in least]
    ratios = ratio([run.wall for run in mine], [run.wall for run in least])
    figures = {
        "s": median(mine, "wall"),
        "CPU s": median(mine, "cpu"),
        "peak MB": max(run.rss for run in mine) / MB,
        "floor s": median(least, "wall"),
        "floor CPU s": median(least, "cpu"),
        "CPU ratio": ratio([run.cpu for run in mine], [run.cpu for run in least]).median,
    }
    for part in parts[0]:
        figures[f"floor {part} s"] = statistics.median(one[part] for one in parts)
    size = data.weights(str(adapter)).stat().st_size / MB
    layers = "4 layers of Llama-7B" if quick else "Llama-7B"
    return [
        Row(
            "compress 7b",
            f"compress of {layers} ({size:.0f} MB) from rank 64 to {RANK} / reading, arithmetic, "
            "writing",
            ratios,
            "" if quick else "at most 2",
            None if quick else ratios.median <= 2,
            figures,
        )
    ]


def least_work(adapter: str, folder: str) -> dict[str, float]:
    """The floor of floor.py for one input: the file read, the result's bytes written and fsynced,
    and the products and casts of one Gram pass on arrays in memory."""
    path = floor.weights(Path(adapter))
    modules, rank = floor.shapes(path)
    start = time.perf_counter()
    floor.read(path)
    mark = time.perf_counter()
    floor.write(Path(folder) / "floor.bytes", sum(2 * RANK * (m + n) for m, n in modules))
    done = time.perf_counter()
    seconds = floor.arithmetic(modules, rank // 2, RANK)  # it takes two inputs of its rank
    return {"read": mark - start, "write": done - mark, "arithmetic": seconds}


def thousand(quick: bool) -> list[Row]:
    """A directory of adapters of 5.5 MB into another, one call, halved in rank."""
    count = 50 if quick else 1000
    need = 20e6 * count
    with output() as folder:
        free = shutil.disk_usage(folder).free
        if free < need:
            raise RuntimeError(f"{need / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free")
        source, out = Path(folder) / "in", Path(folder) / "out"
        python("compress.py", "--inner", "write", str(source), str(count))
        size = data.weights(str(source / "0000")).stat().st_size / MB
        mine, least = alternate(
            lambda: command("compress", out, str(source), "--rank", "8"),
            lambda: python("compress.py", "--inner", "copy", str(source), f"{folder}/copy"),
            1 if quick else 2,
        )
        written = len(list(out.glob("*/adapter_model.safetensors")))
        if written != count:
            raise RuntimeError(f"{written} of {count} adapters were written")
    rate = count / median(mine, "wall")
    return [
        Row(
            "compress many",
            f"compress of {count:,} adapters of {size:.1f} MB (Llama-1B) from rank 16 to 8 in one "
            "call / reading all, writing and syncing as many halves",
            ratio([run.wall for run in mine], [run.wall for run in least]),
            "" if quick else "at least 20 adapters/s",
            None if quick else rate >= 20,
            {
                "adapters/s": rate,
                "s": median(mine, "wall"),
                "CPU s": median(mine, "cpu"),
                "peak MB": max(run.rss for run in mine) / MB,
                "copying s": median(least, "wall"),
            },
        )
    ]


def write(folder: str, count: str) -> None:
    """Adapters of three projections of Llama-1B whose values differ in their last ten bits."""
    rng, tensors = np.random.default_rng(1), {}
    for stem, shape in data.layers(16, data.LLAMA_1B).items():
        tensors |= data._peft_tensors(stem, *data.noise(rng, shape, 16))
    for index in range(int(count)):
        changed = {
            name: (value.view(np.uint16) ^ np.uint16(index)).view(np.float16)
            for name, value in tensors.items()
        }
        data.write_peft(Path(folder) / f"{index:04}", changed, 16)
    os.sync()


def copying(source: str, folder: str) -> None:
    """Every file read, half as many bytes written and synced, on as many threads as cores."""
    shutil.rmtree(folder, ignore_errors=True)

    def one(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        floor.read(path)
        place = Path(folder) / adapter.name
        place.mkdir(parents=True)
        descriptor = os.open(place / path.name, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, bytes(path.stat().st_size // 2))
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(one, sorted(Path(source).iterdir())))


INNER: dict[str, Callable[..., Any]] = {"floor": least_work, "write": write, "copy": copying}

if __name__ == "__main__":
    main(__doc__, {"7b": seven, "many": thousand}, INNER)
