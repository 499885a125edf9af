"""One module of a merge of many adapters, checked densely and without the package.

`python benchmarks/dense.py MERGED MODULE` reads the inputs' paths from stdin, equal weights. It
sums the dense ΔW in float64 and prints the relative error of the merged module, and the smallest
error that any matrix of its rank has (singular values by ARPACK).
"""

from __future__ import annotations

import json
import sys

import data
import numpy as np
from scipy.sparse.linalg import svds

_AT_ONCE = 32


def delta(adapters: list[str], module: str) -> np.ndarray:
    """The mean of the adapters' dense weight changes."""
    total = 0.0
    for start in range(0, len(adapters), _AT_ONCE):
        found = [factors(path, module) for path in adapters[start : start + _AT_ONCE]]
        total = total + np.hstack([B for B, _ in found]) @ np.vstack([A for _, A in found])
    return total / len(adapters)


def factors(adapter: str, module: str) -> tuple[np.ndarray, np.ndarray]:
    for stem, B, A in data.tensors(adapter):
        if stem.endswith(module):
            return B, A
    raise KeyError(module)


def main(merged: str, module: str) -> None:
    exact = delta(sys.stdin.read().split(), module)
    B, A = factors(merged, module)
    size = np.linalg.norm(exact)
    kept = svds(exact, k=A.shape[0], return_singular_vectors=False)
    print(
        json.dumps(
            {
                "error": float(np.linalg.norm(exact - B @ A) / size),
                "optimum": float(np.sqrt(max(size**2 - np.sum(kept**2), 0.0)) / size),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
