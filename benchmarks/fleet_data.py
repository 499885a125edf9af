"""Planted fleets for the benchmarks, written into benchmarks/data; who uses one removes it.

`python benchmarks/fleet_data.py NAME…`. They come from tests/planted.py: clusters of twenty, eight
of them copies in other forms, types and ranks, three that belong nowhere. Beside each fleet lies
`<NAME>.truth.json`: tenant -> [kind, label, planted ε, error to its centre].

| set | adapters | modules | rank, type | each | all |
|---|---:|---|---|---:|---:|
| fleet-1000 | 1,000 | 12 of 256 x 256 | 4, mostly F16 | 52 kB | 52 MB |
| fleet-10000 | 10,000 | the same | the same | 52 kB | 0.5 GB |
| fleet-100000 | 100,000 | the same | the same | 52 kB | 5.2 GB |
| certified-0 to -9 | 10,500 each | 4 of 8 x 16 to 16 x 40 | 3, mostly F32 | 3 kB | 33 MB |
| certified-quick | 1,000 | the same | the same | 3 kB | 3 MB |
| shared | 200 | q and v of 8 layers of Llama-3-8B | 16, F16 | 3.4 MB | 0.7 GB |
| shared-quick | 200 | 2 of 256 x 256 | 16, F16 | 33 kB | 7 MB |
| large | 12 | all 224 linear ones of Llama-3-8B | 16, F16 | 84 MB | 1 GB |
| large-quick | 12 | the same of 2 layers | 16, F16 | 5 MB | 63 MB |
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import data
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import planted

LLAMA_3_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
_QV = {name: LLAMA_3_8B[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}
_SMALL = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (256, 256)}
# Peers need one rank, all modules and PEFT's own scale.
_EQUAL = ("bytes", "refactored", "louder", "one-module", "flipped", "decoy")


@dataclass(frozen=True)
class Set:
    """How many clusters, from which number on, and what each is made of."""

    clusters: int
    recipe: planted.Recipe
    first: int = 0


_FLEET = planted.Recipe(data.layers(6, _SMALL), rank=4, dtype="F16")
_CERTIFIED = planted.Recipe(planted.SHAPES, epsilons=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5))
PARTS, _CLUSTERS = 10, 525
_SHARED = planted.Recipe(
    data.layers(8, _QV), rank=16, members=3, kinds=_EQUAL, dtype="F16", epsilons=(0.02, 0.05, 0.1)
)
_LARGE = planted.Recipe(
    data.layers(32, LLAMA_3_8B), rank=16, members=1, kinds=("bytes", "decoy"), dtype="F16"
)
SETS: Mapping[str, Set] = {
    "fleet-1000": Set(50, _FLEET),
    "fleet-10000": Set(500, _FLEET),
    "fleet-100000": Set(5000, _FLEET),
    **{f"certified-{i}": Set(_CLUSTERS, _CERTIFIED, i * _CLUSTERS) for i in range(PARTS)},
    "certified-quick": Set(50, _CERTIFIED),
    "shared": Set(20, _SHARED),
    "shared-quick": Set(20, replace(_SHARED, shapes=data.layers(1, _SMALL))),
    "large": Set(3, _LARGE),
    "large-quick": Set(3, replace(_LARGE, shapes=data.layers(2, LLAMA_3_8B))),
}


def truth_of(root: Path) -> Path:
    """Where a fleet's truth lies."""
    return root.with_name(f"{root.name}.truth.json")


def write(name: str) -> Path:
    """Write a set on all cores, the truth last; a set without its truth is written again."""
    root = data.DATA / name
    if truth_of(root).exists():
        return root
    remove(name)
    root.mkdir(parents=True)
    made = SETS[name]
    with multiprocessing.Pool(initializer=_one_thread) as pool:
        task = partial(planted.plant_cluster, root, recipe=made.recipe)
        found = pool.map(
            task,
            range(made.first, made.first + made.clusters),
            chunksize=max(1, made.clusters // 50),
        )
    truth = {
        tenant.name: [tenant.kind, tenant.label, tenant.epsilon, finite(tenant.error)]
        for cluster in found
        for tenant in cluster
    }
    truth_of(root).write_text(json.dumps(truth))
    return root


def _one_thread() -> None:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if np.isfinite(x) else None


def remove(name: str) -> None:
    """Remove a set and its truth."""
    root = data.DATA / name
    truth_of(root).unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(write(each))
