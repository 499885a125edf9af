"""TIES by PEFT and by `adapterops`, each in a process of its own, and what they made compared.

`python benchmarks/methods_ties.py peft|streamed|compare|merged|ties_svd …`; all print
JSON. The adapters have one module.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import data
import numpy as np

RANK, DENSITY = 16, 0.2
NEAR = 2.0**-20


def weights(count: int) -> list[float]:
    """Different ones, so that they matter."""
    return [float(w) for w in np.linspace(0.3, 1.0, count)]


def peft(place: str, *adapters: str) -> dict[str, float]:
    """PEFT's ties on dense changes in float32; seconds, and bytes that the call added to the peak.

    The result goes to `place`, if that is not empty.
    """
    import torch
    from peers import timed
    from peft.utils.merge_utils import ties

    shares = torch.tensor(weights(len(adapters)))

    def merge() -> torch.Tensor:
        pairs = [next(data.tensors(adapter)) for adapter in adapters]
        changes = [torch.from_numpy(B).float() @ torch.from_numpy(A).float() for _, B, A in pairs]
        return ties(changes, shares, DENSITY)

    before = _peak()
    wall, cpu, result = timed(merge)
    if place:
        np.save(place, result.numpy())
    return {"s": wall, "CPU s": cpu, "more": _peak() - before}


def streamed(place: str, *adapters: str) -> dict[str, Any]:
    """Our ties, limits and rows, which are consumed as they come; as `peft`, on one thread."""
    from threadpoolctl import threadpool_limits

    from adapterops.combining import combine

    before, blocks = _peak(), []
    with threadpool_limits(1):
        wall, cpu = time.perf_counter(), time.process_time()
        given = {"density": DENSITY, "convention": "peft"}
        merged = combine("ties", adapters, weights(len(adapters)), parameters=given)
        [site] = merged.terms[0][1].sites.values()
        assert site.made is not None
        operator = site.made.operator()
        assert operator is not None
        for start in range(0, site.shape[0], 64):
            block = operator.single(start, min(start + 64, site.shape[0]))
            if place:
                blocks.append(block)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if place:
        np.save(place, np.concatenate(blocks))
    limits = operator.limits  # type: ignore[attr-defined]  # an elementwise one
    return {
        "s": wall,
        "CPU s": cpu,
        "more": _peak() - before,
        "limits": {"at": limits.at[:, 0].tolist(), "near": int(limits.near.sum())},
    }


def compare(theirs: str, ours: str, limits: str, *adapters: str) -> dict[str, float]:
    """How many entries differ by more than 1e-6 of the largest, and how many of them, computed in
    float64, have neither an adapter's entry within 2⁻²⁰ of its limit nor a vote so near a tie.
    """
    known = json.loads(limits)
    one, other = np.load(theirs), np.load(ours)
    size = float(np.abs(one).max())
    apart = np.abs(one - other)
    rows, columns = np.nonzero(apart > 1e-6 * size)
    pairs = [next(data.tensors(adapter)) for adapter in adapters]
    X = np.stack([np.einsum("kr,rk->k", B[rows], A[:, columns]) for _, B, A in pairs])
    at = np.array(known["at"])[:, None]
    close = (np.abs(np.abs(X) - at) <= NEAR * at).any(axis=0)
    kept = X * (np.abs(X) >= at)
    tied = np.abs(kept.sum(axis=0)) <= NEAR * np.abs(kept).sum(axis=0)
    apart[rows, columns] = 0
    return {
        "near": known["near"],
        "apart": len(rows),
        "unexplained": int((~close & ~tied).sum()),
        "otherwise": float(apart.max()) / size,
    }


def merged(out: str, *adapters: str) -> dict[str, float]:
    """Our merge to rank 16, file to file, a second time in one process: nothing is imported."""
    import adapterops as ao

    given = {"density": DENSITY, "convention": "peft"}
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        ao.merge(
            adapters,
            weights(len(adapters)),
            out=out,
            method="ties",
            parameters=given,
            rank=RANK,
            overwrite=True,
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"s": wall, "CPU s": cpu}


def ties_svd(out: str, *adapters: str) -> dict[str, Any]:
    """PEFT's merge timed; errors of both stored results to the TIES that was to be truncated."""
    import peers
    import torch
    from peft.utils.merge_utils import ties

    raw = [(B, A) for _, B, A in (next(data.tensors(adapter)) for adapter in adapters)]
    model, shares = peers.peft_model(raw), weights(len(raw))
    names = list(model.peft_config)
    options = {"combination_type": "ties_svd", "density": DENSITY, "svd_rank": RANK}
    wall, cpu, _ = peers.timed(
        lambda: model.add_weighted_adapter(names, shares, "merged", **options)
    )
    layer = model.base_model.model.q_proj
    changes = [layer.get_delta_weight(name).detach() for name in names]
    whole = ties(changes, torch.tensor(shares), DENSITY).double().numpy()
    _, B, A = next(data.tensors(out))
    theirs = layer.get_delta_weight("merged").detach().double().numpy()
    errors = {"PEFT": peers.distance(theirs, whole), "ours": peers.distance(B @ A, whole)}
    return {"s": wall, "CPU s": cpu, "errors": errors}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


COMMANDS: dict[str, Callable[..., Any]] = {
    "peft": peft,
    "streamed": streamed,
    "compare": compare,
    "merged": merged,
    "ties_svd": ties_svd,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
