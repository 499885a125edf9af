"""LoHa and LoKr without a dense matrix: a module of SDXL merged to rank 16, beside the dense route.

`python benchmarks/kinds.py [--quick]` takes one module of each distinct linear shape of the SDXL
U-Net, two LoHa (rank 8) or LoKr (factor 8, rank 16) adapters, and cuts 0.7·a + 0.3·b to rank 16:
by expanded factors, and by the dense ΔW of both, summed, and a thin SVD in float32 (what kohya's
`svd_merge_lora` and PEFT's `svd` do). Both in memory, one thread. The total weighs every shape by
how often SDXL has it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import harness
import numpy as np
from harness import Row

# (out, in) of the U-Net's linear layers and how many there are (stable-diffusion-xl-base-1.0).
SHAPES = {
    (1280, 1280): 372,
    (1280, 2048): 120,
    (10240, 1280): 60,
    (1280, 5120): 60,
    (640, 640): 50,
    (640, 2048): 20,
    (5120, 640): 10,
    (640, 2560): 10,
}
RANK = 16
_PAIR = (0.7, 0.3)


def loha(rng: np.random.Generator, m: int, n: int) -> dict[str, np.ndarray]:
    shapes = {"w1_a": (m, 8), "w1_b": (8, n), "w2_a": (m, 8), "w2_b": (8, n)}
    return {role: 0.1 * rng.standard_normal(shape) for role, shape in shapes.items()}


def lokr(rng: np.random.Generator, m: int, n: int) -> dict[str, np.ndarray]:
    shapes = {"kw1": (8, 8), "kw2_a": (m // 8, 16), "kw2_b": (16, n // 8)}
    return {role: 0.1 * rng.standard_normal(shape) for role, shape in shapes.items()}


def dense_delta(kind: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """ΔW as the making library forms it, float32."""
    single = {role: value.astype(np.float32) for role, value in parts.items()}
    if kind == "loha":
        return (single["w1_a"] @ single["w1_b"]) * (single["w2_a"] @ single["w2_b"])
    return np.kron(single["kw1"], single["kw2_a"] @ single["kw2_b"])


def by_dense(kind: str, inputs: list[dict[str, np.ndarray]]) -> np.ndarray:
    deltas = [dense_delta(kind, parts) for parts in inputs]
    total = sum(np.float32(w) * delta for w, delta in zip(_PAIR, deltas, strict=True))
    U, values, Vh = np.linalg.svd(total, full_matrices=False)
    return (U[:, :RANK] * values[:RANK]) @ Vh[:RANK]


def by_factors(kind: str, inputs: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    from adapterops.factors import Factors
    from adapterops.formats.kinds import KINDS

    terms = [Factors(*KINDS[kind].expand(parts, ())) for parts in inputs]
    result = (terms[0] * _PAIR[0] + terms[1] * _PAIR[1]).truncate(RANK)
    return result.B, result.A


def seconds(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure(kind: str, quick: bool) -> Row:
    """The whole U-Net's arithmetic, one module of each shape measured in turn."""
    from threadpoolctl import threadpool_limits

    make = {"loha": loha, "lokr": lokr}[kind]
    ours, dense, ratios, apart = 0.0, 0.0, [], 0.0
    with threadpool_limits(1):
        for (m, n), count in list(SHAPES.items())[:: 4 if quick else 1]:
            rng = np.random.default_rng(m + n)
            inputs = [make(rng, m, n) for _ in _PAIR]
            by_factors(kind, inputs)  # the first call loads LAPACK
            fast = seconds(lambda inputs=inputs: by_factors(kind, inputs), 3)
            slow = seconds(lambda inputs=inputs: by_dense(kind, inputs), 1)
            ours, dense = ours + count * fast, dense + count * slow
            ratios.append(slow / fast)
            B, A = by_factors(kind, inputs)
            best = by_dense(kind, inputs)
            apart = max(apart, float(np.linalg.norm(B @ A - best) / np.linalg.norm(best)))
    shown = {"loha": "LoHa, rank 8", "lokr": "LoKr, factor 8, rank 16"}[kind]
    spread = harness.Ratio(min(ratios), dense / ours, max(ratios), len(ratios))
    return Row(
        kind,
        f"dense ΔW and SVD / expanded factors, two SDXL adapters ({shown}) to rank 16, "
        "all linear layers; range over shapes",
        spread,
        "at least 50",
        dense / ours >= 50,
        {"dense s": dense, "ours s": ours},
        {"ours to dense": apart},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    quick = parser.parse_args().quick
    rows = [harness.watched(lambda kind=kind: measure(kind, quick)) for kind in ("loha", "lokr")]
    for row in rows:
        print(json.dumps({"ratio": row.ratio.median, **row.figures, **row.errors}))
    if not quick:
        print(harness.save(rows))


if __name__ == "__main__":
    main()
