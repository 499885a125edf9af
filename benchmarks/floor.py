"""The least that a merge of two adapters to a rank has to do, for comparison, as one process.

`python benchmarks/floor.py A B RANK` reads the bytes of both weight files, writes and fsyncs as
many bytes as the output has, and does the arithmetic of one pass of the Gram route on arrays of
these shapes that lie in memory: cast both inputs to float64, BᵀB, A·Aᵀ, B·x, y·A, cast the result.
Nothing is checked, solved, hashed or certified. Prints the seconds of each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

_BLOCK = 4 << 20
Shape = tuple[int, int]


def weights(adapter: str) -> Path:
    return Path(adapter) / "adapter_model.safetensors"


def shapes(path: Path) -> tuple[list[Shape], int]:
    """(out, in) of every module, and the rank of the first, from the header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {name: entry["shape"] for name, entry in header.items() if "shape" in entry}
    downs = [name for name in sizes if name.endswith(".lora_A.weight")]
    ups = [name.replace(".lora_A.", ".lora_B.") for name in downs]
    found = [(sizes[up][0], sizes[down][1]) for up, down in zip(ups, downs, strict=True)]
    return found, sizes[downs[0]][0]


def read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    descriptor = os.open(path, os.O_RDONLY)
    position = 0
    while got := os.preadv(descriptor, [buffer], position):
        position += got
    os.close(descriptor)


def write(path: Path, size: int) -> None:
    block = memoryview(b"\x2a" * _BLOCK)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for position in range(0, size, _BLOCK):
        os.pwrite(descriptor, block[: min(_BLOCK, size - position)], position)
    os.fsync(descriptor)
    os.close(descriptor)
    path.unlink()


def halves(*shape: int) -> np.ndarray:
    """Many different float16 values between 2⁻⁷ and 1, fast."""
    return np.resize(np.arange(0x2000, 0x3C00, dtype=np.uint16), shape).view("f2")


class Arithmetic:
    """Buffers of one thread, reused for every module of a shape."""

    def __init__(self, shape: Shape, rank: int, out: int) -> None:
        (m, n), columns = shape, 2 * rank
        self.raw = halves(m, columns), halves(columns, n)
        self.B, self.A = np.empty((m, columns)), np.empty((columns, n))
        self.gram = np.empty((columns, columns))
        self.right = np.resize(np.linspace(0.0, 0.1, 99), (columns, out))
        self.left = np.resize(np.linspace(0.0, 0.1, 99), (out, columns))
        self.result = np.empty((m, out)), np.empty((out, n))
        self.stored = np.empty((m, out), "f2"), np.empty((out, n), "f2")

    def run(self) -> None:
        np.copyto(self.B, self.raw[0])
        np.copyto(self.A, self.raw[1])
        np.matmul(self.B.T, self.B, out=self.gram)
        np.matmul(self.A, self.A.T, out=self.gram)
        np.matmul(self.B, self.right, out=self.result[0])
        np.matmul(self.left, self.A, out=self.result[1])
        for stored, result in zip(self.stored, self.result, strict=True):
            np.copyto(stored, result, casting="same_kind")


def arithmetic(modules: list[Shape], rank: int, out: int) -> float:
    """Seconds for all modules, one BLAS thread in each of as many threads as there are cores."""
    count = len(os.sched_getaffinity(0))

    def work(own: list[Shape], buffers: dict[Shape, Arithmetic]) -> None:
        for shape in own:
            buffers[shape].run()

    pools = [{shape: Arithmetic(shape, rank, out) for shape in set(modules)} for _ in range(count)]
    with threadpool_limits(1), ThreadPoolExecutor(count) as threads:
        start = time.perf_counter()
        list(threads.map(work, [modules[i::count] for i in range(count)], pools))
        return time.perf_counter() - start


def main(first: str, second: str, rank: str, folder: str) -> None:
    modules, input_rank = shapes(weights(first))
    start = time.perf_counter()
    read(weights(first))
    read(weights(second))
    mark = time.perf_counter()
    size = sum(2 * int(rank) * (m + n) for m, n in modules)
    write(Path(folder) / "floor.bytes", size)
    done = time.perf_counter()
    seconds = arithmetic(modules, input_rank, int(rank))
    print(json.dumps({"read": mark - start, "write": done - mark, "arithmetic": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
