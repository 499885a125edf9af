"""How fast `adapterops check` reads tensors, beside plain reading of the same files.

`python benchmarks/check.py [--quick] [--results FOLDER]`. The adapters are rank 16 on all modules
of Llama-7B, 80 MB each, all different. Before every run the files are dropped from the page cache
(`posix_fadvise`), so that both sides read from the disk; a second row reads what is cached. Plain
reading is a process of as many threads that reads whole files in pieces of 4 MiB and looks at
nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import data
import harness
import numpy as np
from harness import HERE, Child, Row, adapterops, alternate, median, python, ratio

COUNT, QUICK = 24, 6
TARGET = 0.8
_PIECE = 4 << 20
_WEIGHTS = "adapter_model.safetensors"


def adapters(count: int) -> Path:
    """A folder of so many adapters, written by a process of its own: a parent must stay small."""
    folder = data.DATA / f"check{count}"
    if not (folder / f"{count - 1:02}" / _WEIGHTS).is_file():
        python("check.py", "--write", str(folder), str(count))
    return folder


def write(folder: Path, count: int) -> None:
    """Adapters whose values differ in their last bits."""
    shutil.rmtree(folder, ignore_errors=True)
    model = Path(data.pair("7b")[0])
    raw = np.fromfile(model / _WEIGHTS, np.uint8)
    start = 8 + int(raw[:8].view("<u8")[0])
    for index in range(count):
        copy = raw.copy()
        values = copy[start:].view("<u2")
        values ^= np.uint16(index)
        (folder / f"{index:02}").mkdir(parents=True)
        shutil.copy(model / "adapter_config.json", folder / f"{index:02}")
        copy.tofile(folder / f"{index:02}" / _WEIGHTS)
    os.sync()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/{_WEIGHTS}"))


def drop(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(file: Path) -> None:
    buffer = bytearray(_PIECE)
    descriptor = os.open(file, os.O_RDONLY)
    position = 0
    while got := os.preadv(descriptor, [buffer], position):
        position += got
    os.close(descriptor)


def reading(folder: Path) -> None:
    """What plain reading does, alone in its process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(read, files(folder)))


def measure(quick: bool, cold: bool) -> Row:
    """Both sides without their start-up: that of the same process on nothing or next to it."""
    count = QUICK if quick else COUNT
    folder = adapters(count)
    size = sum(file.stat().st_size for file in files(folder))
    pairs = 3 if quick else 7

    def run(start: Callable[[], Child]) -> Child:
        if cold:
            drop(folder)
        return start()

    checked, floor = alternate(
        lambda: run(lambda: adapterops("check", str(folder), "--no-progress")),
        lambda: run(lambda: python("check.py", "--read", str(folder))),
        pairs,
    )
    if f"{count} adapters: {count} clean; nothing found" not in checked[0].stdout:
        raise RuntimeError(checked[0].stdout)
    small, nothing = alternate(
        lambda: adapterops("check", data.pair("small")[0], "--no-progress"),
        lambda: python("check.py", "--read", str(HERE)),
        pairs,
    )
    started, floor_started = median(small, "wall"), median(nothing, "wall")
    speeds = ratio(
        [run.wall - floor_started for run in floor], [run.wall - started for run in checked]
    )
    rate = size / 1e9
    return Row(
        f"check, {'from the disk' if cold else 'cached'}",
        f"bytes per second after the start: check of {count} adapters ({rate:.2g} GB) / plain "
        "reading",
        speeds,
        f"at least {TARGET}" if cold else "",
        speeds.median >= TARGET if cold else None,
        {
            "GB/s": rate / (median(checked, "wall") - started),
            "plain GB/s": rate / (median(floor, "wall") - floor_started),
            "s": median(checked, "wall"),
            "plain s": median(floor, "wall"),
            "start s": started,
            "CPU s": median(checked, "cpu"),
            "plain CPU s": median(floor, "cpu"),
            "peak MB": median(checked, "rss") / 1e6,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer adapters and pairs")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--date", help="date in the results file's name; default today")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for it")
    options = parser.parse_args()
    if options.read:
        reading(options.read)
        return
    if options.write:
        write(Path(options.write[0]), int(options.write[1]))
        return
    prefix = "quick-" if options.quick else ""
    for cold in (True, False):
        print(f"check, {'cold' if cold else 'warm'} …", file=sys.stderr, flush=True)
        row = harness.watched(partial(measure, options.quick, cold))
        path = harness.save([row], options.results, day=options.date, prefix=prefix)
    print(harness.table(path))


if __name__ == "__main__":
    main()
