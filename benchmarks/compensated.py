"""What each way to round keeps of an adapter: to nearest, at random, with feedback.

`python benchmarks/compensated.py [--quick] [--only quality|speed]`. Weights are normal, 0.02 wide,
in bfloat16 or float16; D is a rank-16 product of normal factors with ‖D‖ a given share of ‖W‖.
*gain* is ⟨W′ − W, D⟩/‖D‖², *inside* ‖E·Q‖/‖D‖ with Q an orthonormal basis of what A reads, *all*
‖E‖/‖D‖, E = W′ − W − D.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from harness import Ratio, Row
from rows import inner, main

SHARES = (5e-4, 5e-3, 5e-2)
DTYPES = ("bfloat16", "float16")
BETTER = 5.0
RANK = 16


def problem(dtype: str, share: float, rows: int, columns: int, seed: int) -> Any:
    """A stored matrix and the change that it gets."""
    import numpy as np
    import torch

    from adapterops.baking.bands import bands
    from adapterops.baking.delta import Delta
    from adapterops.changes.targets import Target, Term
    from adapterops.files.source import MemoryFile
    from adapterops.formats.model import Ref, Site

    g = torch.Generator().manual_seed(seed)
    W = (torch.randn(rows, columns, generator=g) * 0.02).to(getattr(torch, dtype))
    B, A = torch.randn(rows, RANK, generator=g), torch.randn(RANK, columns, generator=g)
    B *= share * W.double().norm() / (B.double() @ A.double()).norm()

    def held(name: str, x: Any) -> Ref:
        data = x.view(torch.uint8).numpy().tobytes()
        code = {4: "F32", 2: {"bfloat16": "BF16", "float16": "F16"}[dtype]}[x.element_size()]
        return Ref(MemoryFile(name, data), name, code, tuple(x.shape), 0, len(data))

    shape, parts = (rows, columns), {"B": held("B", B), "A": held("A", A)}
    site = Site("layer", "peft", "lora", "linear", shape, (), RANK, RANK, parts, scale=1.0)
    term = Term(0, 1.0, site, slice(0, rows, 1), slice(0, columns, 1))
    target = Target("layer.weight", held("layer.weight", W), shape, (term,))
    (band,) = bands(target)
    delta = Delta(target, band)
    D = B.double() @ A.double()
    Q = torch.from_numpy(np.linalg.qr(A.double().numpy().T)[0])
    return W, D, Q, delta


def ways(W: Any, D: Any, Q: Any, delta: Any) -> dict[str, Callable[[], Any]]:
    """Each way to round W + D."""
    from adapterops.rounding.compensated import round_compensated
    from adapterops.rounding.exact import round_exactly
    from adapterops.rounding.stochastic import round_stochastically

    rows = len(W)
    T = W.double() + D
    return {
        "nearest": lambda: round_exactly(W, delta, 0, rows)[0],
        "compensated": lambda: round_compensated(T, Q, W.dtype)[0],
        "ridge 10": lambda: round_compensated(T, Q, W.dtype, ridge=10.0)[0],
        "stochastic": lambda: round_stochastically(W, delta, 0, rows, seed=0, name="layer")[0],
    }


def kept(dtype: str, share: str, rows: str, columns: str, count: str) -> dict[str, Any]:
    """Gain, error inside and over all of every way, for `count` matrices."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for seed in range(int(count)):
        W, D, Q, delta = problem(dtype, float(share), int(rows), int(columns), seed)
        for name, rounding in ways(W, D, Q, delta).items():
            moved = rounding().double() - W.double()
            E = moved - D
            figures = (
                float((moved * D).sum() / D.square().sum()),
                float((E @ Q).norm() / D.norm()),
                float(E.norm() / D.norm()),
            )
            found.setdefault(name, []).append(figures)
    return found


def seconds(dtype: str, rows: str, columns: str, count: str) -> dict[str, list[float]]:
    """Processor seconds of every way on one thread, in turn."""
    import torch

    torch.set_num_threads(1)
    rounding = ways(*problem(dtype, 5e-3, int(rows), int(columns), 0))
    found: dict[str, list[float]] = {name: [] for name in rounding}
    for _ in range(int(count) + 1):
        for name, run in rounding.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in found.items()}


def quality(quick: bool) -> list[Row]:
    """What arrives of the change, and what is added to it."""
    shape = (128, 1024) if quick else (1024, 4096)
    count = 2 if quick else 7
    rows = []
    for dtype in DTYPES:
        for share in SHARES:
            found = inner("compensated.py", "kept", dtype, share, *shape, count)
            ratios = [
                plain[1] / mine[1]
                for plain, mine in zip(found["nearest"], found["compensated"], strict=True)
            ]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            mean = {
                name: [statistics.mean(column) for column in zip(*values, strict=True)]
                for name, values in found.items()
            }
            rows.append(
                Row(
                    f"rounding {dtype}, {share:.2%}",
                    f"error inside the adapter's subspace, nearest / compensated: ‖D‖ = "
                    f"{share:.2%} of ‖W‖, rank {RANK}, {shape[0]} x {shape[1]}",
                    Ratio(low, middle, high, count),
                    f"≥ {BETTER:.0f}",
                    low >= BETTER,
                    {f"gain, {name}": round(values[0], 4) for name, values in mean.items()},
                    {f"inside, {name}": values[1] for name, values in mean.items()}
                    | {f"all, {name}": values[2] for name, values in mean.items()},
                )
            )
    return rows


def speed(quick: bool) -> list[Row]:
    """What feedback costs beside exact rounding."""
    shape = (256, 1024) if quick else (2048, 4096)
    count = 3 if quick else 7
    rows = []
    for dtype in DTYPES:
        found = inner("compensated.py", "seconds", dtype, *shape, count)
        ratios = sorted(
            mine / plain for mine, plain in zip(found["compensated"], found["nearest"], strict=True)
        )
        weights = shape[0] * shape[1] / 1e6
        rates = {
            f"{name} M weights/s": weights / statistics.median(times)
            for name, times in found.items()
            if name != "ridge 10"
        }
        rows.append(
            Row(
                f"rounding speed, {dtype}",
                f"compensated of W + D / exact: {shape[0]} x {shape[1]}, rank {RANK}, 1 thread",
                Ratio(ratios[0], statistics.median(ratios), ratios[-1], count),
                figures=rates,
            )
        )
    return rows


INNER = {"kept": kept, "seconds": seconds}

if __name__ == "__main__":
    main(__doc__, {"quality": quality, "speed": speed}, INNER)
