"""Rank 64 to 16 of SDXL's 722 modules, beside the arithmetic of kohya's resize_lora.

`python benchmarks/resize.py [--quick]`; see benchmarks/README.md for the rows. kohya's full SVDs
would run for a quarter of an hour: of each shape one to three modules are measured, others in every
pair, and counted as often as SDXL has that shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data
import numpy as np
from harness import Row, median, ratio
from rows import MB, command, inner, made, main, output

RANK = 16
EXCESS = 1e-6
Factors = tuple[np.ndarray, np.ndarray]


def resize(quick: bool) -> list[Row]:
    """kohya's two routes, ours in memory and the whole command, in turn."""
    file = made("sdxl64-quick" if quick else "sdxl64") / "a.safetensors"
    inner("resize.py", "shapes")
    pairs = 1 if quick else 3
    theirs, ours, files = [], [], []
    with output() as folder:
        out = Path(folder) / "out.safetensors"
        run = partial(command, "compress", out, str(file), "--rank", str(RANK))
        run()
        for pair in range(pairs):
            theirs.append(inner("resize.py", "kohya", file, pair))
            ours.append(inner("resize.py", "ours", file))
            files.append(run())
    errors = excesses("ours", inner("resize.py", "excess", file))
    for how, shown in (("svd", "kohya"), ("lowrank", "kohya low-rank")):
        errors |= excesses(shown, [found for one in theirs for found in one["errors"][how]])
    modules = round(sum(count for *_, count in theirs[0]["errors"]["svd"]))
    what = f"{modules} modules of SDXL's U-Net, rank 64 to {RANK}, float16"
    seconds = {how: [one["s"][how] for one in theirs] for how in ("svd", "lowrank")}
    mine = [one["s"] for one in ours]
    whole = [run.wall for run in files]
    memory, disk = ratio(seconds["svd"], mine), ratio(seconds["svd"], whole)
    return [
        Row(
            "resize",
            f"kohya resize (full SVD; 1 to 3 modules of each shape measured, the rest "
            f"counted) / ours, "
            f"{what}, in memory",
            memory,
            "" if quick else f"at least 200, excess at most {EXCESS:g}",
            None if quick else memory.median >= 200 and errors["excess ours (max)"] <= EXCESS,
            {
                "kohya s (counted)": statistics.median(seconds["svd"]),
                "kohya CPU s (counted)": statistics.median(one["CPU s"]["svd"] for one in theirs),
                "ours s": statistics.median(mine),
                "ours CPU s": statistics.median(one["CPU s"] for one in ours),
            },
            errors,
        ),
        Row(
            "resize low-rank",
            "the same with kohya's svd_lowrank, which it uses above 2048 x 2048 only: nowhere here",
            ratio(seconds["lowrank"], mine),
            figures={"kohya low-rank s (counted)": statistics.median(seconds["lowrank"])},
        ),
        Row(
            "resize, file to file",
            "kohya resize in memory, counted as above / adapterops compress, the whole process",
            disk,
            "" if quick else "at least 200",
            None if quick else disk.median >= 200,
            {
                "s": median(files, "wall"),
                "CPU s": median(files, "cpu"),
                "peak MB": max(run.rss for run in files) / MB,
            },
        ),
    ]


def excesses(name: str, found: list[list[float]]) -> dict[str, float]:
    """(error, best possible error, modules it stands for) as excess over the best, and in sum."""
    error = sum(count * error**2 for error, _, count in found)
    best = sum(count * best**2 for _, best, count in found)
    return {
        f"excess {name} (max)": max(error / best - 1 for error, best, _ in found),
        f"excess {name} (total)": (error / best) ** 0.5 - 1,
    }


def shapes() -> None:
    """The modules of these benchmarks are those of the U-Net that diffusers builds."""
    import peers

    if peers.sdxl_modules() != data.sdxl():
        raise RuntimeError("data.sdxl() is not what diffusers builds")


def load(path: str) -> dict[str, Factors]:
    """All up and down factors of a kohya file in memory, as stored; scales left out."""
    from safetensors.numpy import load_file

    found = load_file(path)
    ends = (".lora_up.weight", ".lora_down.weight")
    stems = [name.removesuffix(ends[0]) for name in found if name.endswith(ends[0])]
    return {stem: (found[stem + ends[0]], found[stem + ends[1]]) for stem in stems}


def kohya(path: str, pick: str) -> dict[str, Any]:
    """Seconds for all modules by both routes, and errors, from a few modules of each shape."""
    import peers
    import torch

    torch.linalg.svd(torch.eye(8))
    classes: dict[tuple[int, int], list[Factors]] = {}
    for B, A in load(path).values():
        classes.setdefault((B.shape[0], A.shape[1]), []).append((B, A))
    walls, cpus = {"svd": 0.0, "lowrank": 0.0}, {"svd": 0.0, "lowrank": 0.0}
    errors: dict[str, list[Any]] = {"svd": [], "lowrank": []}
    for (m, n), modules in classes.items():
        samples = 3 if m * n < 4_000_000 else 1  # what takes below a second is measured thrice
        for index in range(samples):
            B, A = modules[(int(pick) * samples + index) % len(modules)]
            share = len(modules) / samples
            for how in walls:
                wall, cpu, result = peers.timed(partial(peers.kohya_resize, B, A, RANK, how))
                walls[how] += share * wall
                cpus[how] += share * cpu
                errors[how].append([*distances(B, A, result), share])
    return {"s": walls, "CPU s": cpus, "errors": errors}


def ours(path: str) -> dict[str, float]:
    """Seconds of the package's arithmetic on all modules in memory, after a pass that warms up."""
    from adapterops.stream import keep_freed_memory

    keep_freed_memory()
    modules = list(load(path).values())
    for part in (modules[:8], modules):
        wall, cpu = time.perf_counter(), time.process_time()
        each(part, resized)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"s": wall, "CPU s": cpu}


def excess(path: str) -> list[Any]:
    """Errors of our result before it is rounded to the file's dtype, every module."""
    modules = list(load(path).values())
    return [[*found, 1] for found in each(modules, lambda B, A: distances(B, A, resized(B, A)))]


def each(modules: list[Factors], kernel: Callable[..., Any]) -> list[Any]:
    """The package's executor; of pairs of factors, nothing is kept."""
    from adapterops.options import compute
    from adapterops.stream import Job, run

    results = run((Job("", kernel, factors, 1 << 24) for factors in modules), compute())
    return [None if isinstance(found[0], np.ndarray) else found for found in results]


def resized(B: np.ndarray, A: np.ndarray) -> Factors:
    """Singular values and the truncated factors, float64, from factors as stored."""
    from adapterops import linalg

    wide_b, wide_a = B.astype(np.float64), A.astype(np.float64)
    core = linalg.cores(wide_b[None], wide_a[None])[0]
    linalg.spectrum(wide_b, wide_a, core)
    found = linalg.truncate(wide_b[None], wide_a[None], RANK, [core])[0]
    return found.B, found.A


def distances(B: np.ndarray, A: np.ndarray, result: Factors) -> tuple[float, float]:
    """‖B·A − result‖ and the least that any matrix of this rank has, by QR in float64."""
    B, A = B.astype(np.float64), A.astype(np.float64)
    values = np.linalg.svd(triangles(B, A), compute_uv=False)
    error = triangles(np.hstack([B, -result[0]]), np.vstack([A, result[1]]))
    return float(np.linalg.norm(error)), float(np.linalg.norm(values[RANK:]))


def triangles(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """A small matrix with the singular values of B·A."""
    return np.linalg.qr(B, mode="r") @ np.linalg.qr(A.T, mode="r").T


INNER: dict[str, Callable[..., Any]] = {
    "shapes": shapes,
    "kohya": kohya,
    "ours": ours,
    "excess": excess,
}

if __name__ == "__main__":
    main(__doc__, {"resize": resize}, INNER)
