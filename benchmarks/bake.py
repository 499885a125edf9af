"""What `adapterops bake` and `drift` take beside a plain copy and other tools' expressions.

`python benchmarks/bake.py [--quick] [--only NAME …]`; see benchmarks/README.md for the rows. A
sharded Llama-shaped checkpoint of 2.5 GB in bfloat16 and in float16, an adapter of rank 16 on all
linear layers; one of 8.6 GB with holes for the memory. What is written is removed after each run,
the inputs stay in benchmarks/data.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bake_data
import data
from harness import Child, Row, adapterops, alternate, child, median, python, ratio
from rows import MB, command, inner, main, output

DTYPES = ("fp16", "bf16")
COPY, EXACT, PEFT, OTHERS = 1.2, 3.0, 4.0, 3.0
PEAK = 128 * MB
_CHUNK = 8 << 20  # bytes that a job of bake makes
_SHAPES = {"4096 x 4096": (4096, 4096), "11008 x 4096": (11008, 4096)}
_NARROW = {"1024 x 1024": (1024, 1024)}


def made(name: str, quick: bool) -> tuple[str, str]:
    """Base and adapter of a set, written by another process."""
    folder = data.DATA / f"bake-{name}{'-quick' if quick else ''}"
    if not folder.exists():
        python("bake_data.py", folder.name.removeprefix("bake-"))
    return str(folder / "base"), str(folder / "adapter")


def pairs(quick: bool) -> int:
    return 1 if quick else 7


def copied(base: str, out: Path) -> Child:
    """A copy of the whole tree that is on the disk when it ends."""
    shutil.rmtree(out, ignore_errors=True)
    steps = 'cp -r --reflink=never "$1" "$2" && sync "$2"/* "$2"'
    return child(["sh", "-c", steps, "cp", base, str(out)])


def baked(base: str, adapter: str, out: Path, mode: str) -> Child:
    """One run of bake, the whole process; drift is measured and printed by it."""
    return command("bake", out, base, adapter, "--round", mode)


def bake(quick: bool) -> list[Row]:
    """The whole process beside cp and fsync, rounding to nearest and exactly, both types."""
    rows = []
    for dtype in DTYPES:
        base, adapter = made(dtype, quick)
        size = bake_data.size(Path(base))
        found: dict[str, list[Child]] = {}
        for mode, target in (("nearest", COPY), ("exact", None)):
            with output() as place:
                run = partial(baked, base, adapter, Path(place) / "ours", mode)
                ours, copy = alternate(
                    run, partial(copied, base, Path(place) / "copy"), pairs(quick)
                )
            found[mode] = ours
            ratios = ratio([one.wall for one in ours], [one.wall for one in copy])
            claimed = target is not None and not quick
            rows.append(
                Row(
                    f"bake {mode}, {dtype}",
                    f"adapterops bake --round {mode} of rank 16 on all linear layers, drift "
                    f"measured, the whole process / cp and fsync of the tree ({size / 1e9:.2f} GB)",
                    ratios,
                    f"at most {target}" if claimed else "",
                    ratios.median <= COPY if claimed else None,
                    {
                        "s": median(ours, "wall"),
                        "CPU s": median(ours, "cpu"),
                        "cp s": median(copy, "wall"),
                        "peak MB": max(one.rss for one in ours) / MB,
                    },
                )
            )
    return rows


def drift(quick: bool) -> list[Row]:
    """`adapterops drift` of a baked model, beside reading both models' bytes."""
    rows = []
    for dtype in DTYPES:
        base, adapter = made(dtype, quick)
        size = bake_data.size(Path(base))
        with output() as place:
            out = Path(place) / "baked"
            baked(base, adapter, out, "nearest")
            ours, reading = alternate(
                lambda base=base, adapter=adapter, out=out: adapterops(
                    "drift", base, adapter, str(out), "--no-progress", "-q"
                ),
                lambda base=base, out=out: child(
                    ["sh", "-c", 'cat "$1"/* "$2"/* > /dev/null', "cat", base, str(out)]
                ),
                pairs(quick),
            )
        rows.append(
            Row(
                f"drift, {dtype}",
                "adapterops drift of what bake wrote, the whole process / reading both models' "
                "files from the cache",
                ratio([one.wall for one in ours], [one.wall for one in reading]),
                figures={
                    "s": median(ours, "wall"),
                    "CPU s": median(ours, "cpu"),
                    "reading s": median(reading, "wall"),
                    "GB/s of both models": 2 * size / 1e9 / median(ours, "wall"),
                    "peak MB": max(one.rss for one in ours) / MB,
                },
            )
        )
    return rows


def tensors(quick: bool) -> list[Row]:
    """Single tensors in memory, one thread: other tools' expressions and our kernel with drift."""
    rows = []
    for dtype in DTYPES:
        for label, (m, n) in (_NARROW if quick else _SHAPES).items():
            found = inner("bake.py", "expressions", dtype, m, n, pairs(quick))
            wanted = {"PEFT": PEFT, "unsloth": OTHERS, "axolotl": OTHERS}
            for peer, least in wanted.items():
                ratios = ratio(found[peer], found["nearest"])
                rows.append(
                    Row(
                        f"tensor, {peer}, {dtype}, {label}",
                        f"{peer}'s expression restated in torch / our kernel, nearest with drift; "
                        "one matrix in memory, rank 16, one thread",
                        ratios,
                        "" if quick else f"at least {least:g}",
                        None if quick else ratios.median >= least,
                        {
                            f"{peer} ms": 1e3 * statistics.median(found[peer]),
                            "ms": 1e3 * statistics.median(found["nearest"]),
                        },
                    )
                )
            ratios = ratio(found["exact"], found["nearest"])
            rows.append(
                Row(
                    f"tensor, exact, {dtype}, {label}",
                    "our kernel, exact / nearest, both with drift",
                    ratios,
                    "" if quick else f"at most {EXACT:g}",
                    None if quick else ratios.median <= EXACT,
                    {
                        "exact ms": 1e3 * statistics.median(found["exact"]),
                        "GB/s nearest": 2e-9 * m * n / statistics.median(found["nearest"]),
                    },
                )
            )
    return rows


def expressions(dtype: str, m: str, n: str, count: str) -> dict[str, list[float]]:
    """Seconds of each way to make W′ from W, B and A in memory, in turn, after one that warms up.

    W is in `dtype`, B and A in float32, as PEFT loads them and as trainers save them.
    """
    import numpy as np
    import torch

    from adapterops.rounding.precision import exact_arithmetic

    rows, columns, rank, scale = int(m), int(n), bake_data.RANK, 2.0
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    rng = np.random.default_rng(5)
    W = torch.from_numpy(np.float32(0.02) * rng.standard_normal((rows, columns), np.float32))
    W = W.to(kind)
    B, A = (torch.from_numpy(x).float() for x in data.noise(rng, (rows, columns), rank))
    B *= 0.1
    nearest, exact = (_ours(W, B, A, scale, mode) for mode in ("nearest", "exact"))
    merged = W.clone()
    ways: dict[str, Callable[[], Any]] = {
        "PEFT": lambda: _peft(merged, B, A, scale),
        "unsloth": lambda: _unsloth(W, B, A, scale),
        "axolotl": lambda: _axolotl(W, B, A, scale),
        "nearest": nearest,
        "exact": exact,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with exact_arithmetic():
        for _ in range(int(count) + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def _peft(W: Any, B: Any, A: Any, scale: float) -> Any:
    """merge_adapter: the delta whole in float32, added into W in place."""
    return W.add_((B @ A) * scale)


def _unsloth(W: Any, B: Any, A: Any, scale: float) -> Any:
    """The transposed weight widened, one addmm with the scale as alpha, checked and narrowed."""
    import torch

    wide = W.to(torch.float32).t()
    wide = wide.addmm_(A.t(), B.t(), alpha=scale)
    if not torch.isfinite(torch.amax(wide)).item():
        raise ValueError("not finite")
    return wide.t().to(W.dtype)


def _axolotl(W: Any, B: Any, A: Any, scale: float) -> Any:
    """The delta whole, and the sum, in float32."""
    return (W.float() + scale * (B.float() @ A.float())).to(W.dtype)


def _ours(W: Any, B: Any, A: Any, scale: float, mode: str) -> Callable[[], None]:
    """Our kernel over the matrix, in the pieces that bake cuts; preparing the factors included."""
    import torch

    from adapterops.baking.bands import bands
    from adapterops.baking.delta import Delta
    from adapterops.baking.kernel import Rounding, bake_rows
    from adapterops.changes.targets import Target, Term
    from adapterops.files.source import MemoryFile
    from adapterops.formats.model import Ref, Site
    from adapterops.rounding.grid import NAMES

    rows, columns = W.shape

    def held(x: Any, label: str) -> Ref:
        raw = x.contiguous().view(torch.uint8).numpy().tobytes()
        source = MemoryFile(label, raw)
        return Ref(source, label, NAMES[x.dtype], tuple(x.shape), 0, len(raw))

    rank = A.shape[0]
    parts = {"B": held(B, "B"), "A": held(A, "A")}
    site = Site("w", "peft", "lora", "linear", (rows, columns), (), rank, rank, parts, scale=scale)
    term = Term(0, scale, site, slice(0, rows, 1), slice(0, columns, 1))
    target = Target("w", held(W, "w"), (rows, columns), (term,))
    rounding = Rounding(mode, NAMES[W.dtype])  # type: ignore[arg-type]
    step = max(1, _CHUNK // (2 * columns))

    def run() -> None:
        for band in bands(target):
            delta = Delta(target, band)
            for start in range(band.start, band.stop, step):
                bake_rows(delta, start, min(start + step, band.stop), rounding)

    return run


def memory(quick: bool) -> list[Row]:
    """Peak memory of bake on 2.5 GB and on 8.6 GB with holes, beside `import torch`."""
    torch = python_peak("import torch")
    rows = []
    for name in ("bf16", "sparse"):
        base, adapter = made(name, quick)
        size = bake_data.size(Path(base))
        layer = bake_data.size(Path(adapter)) / layers(base)
        with output() as place:
            runs = [baked(base, adapter, Path(place) / "out", "nearest") for _ in range(1 + quick)]
        peak = max(run.rss for run in runs)
        limit = torch + PEAK + layer
        rows.append(
            Row(
                f"bake memory, {name}",
                f"peak memory of adapterops bake of {size / 1e9:.2f} GB in {layers(base)} layers / "
                "of import torch alone",
                target="" if quick else f"{PEAK / MB:.0f} MB and an adapter's layer more",
                met=None if quick else peak <= limit,
                figures={
                    "peak MB": peak / MB,
                    "import torch MB": torch / MB,
                    "more MB": (peak - torch) / MB,
                    "an adapter's layer MB": layer / MB,
                    "s": median(runs, "wall"),
                },
            )
        )
    return rows


def python_peak(code: str) -> int:
    """Peak memory of a process that runs a line of Python."""
    return max(child([sys.executable, "-c", code]).rss for _ in range(3))


def layers(base: str) -> int:
    return int(json.loads((Path(base) / "config.json").read_text())["num_hidden_layers"])


ROWS: dict[str, Callable[[bool], Sequence[Row]]] = {
    "bake": bake,
    "drift": drift,
    "tensors": tensors,
    "memory": memory,
}
INNER: dict[str, Callable[..., Any]] = {"expressions": expressions}

if __name__ == "__main__":
    main(__doc__, ROWS, INNER)  # type: ignore[arg-type]
