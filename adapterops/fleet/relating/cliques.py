"""Groups of tenants from significant pairs.

Groups are grown from the most significant pair down, and two of them join only where every pair
across is significant by itself (complete linkage). Single linkage would chain: a like b and b like
c makes one group of a and c, which nothing relates. Average linkage would let strong pairs pay for
pairs that do not stand out, and the stated rate would say nothing of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def cliques(first: Array, second: Array, p: Array) -> list[list[int]]:
    """Groups of two and more in the graph of these edges, every pair within one an edge of it.

    The smallest p first, two groups join where all pairs across are edges. Where some are missing
    they stay missing however the groups grow, so one pass over the edges decides.
    """
    owner: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    across: dict[int, dict[int, int]] = {}
    order = np.lexsort((second, first, p))
    edges = list(zip(first[order].tolist(), second[order].tolist(), strict=True))
    for i, j in edges:
        for node in (i, j):
            owner.setdefault(node, node)
            groups.setdefault(node, [node])
            across.setdefault(node, {})
        across[i][j] = across[j][i] = 1
    for i, j in edges:
        a, b = owner[i], owner[j]
        if a == b or across[a].get(b, 0) < len(groups[a]) * len(groups[b]):
            continue
        if len(across[a]) < len(across[b]):
            a, b = b, a
        _join(a, b, owner, groups, across)
    return [sorted(members) for members in groups.values() if len(members) > 1]


def _join(
    a: int,
    b: int,
    owner: dict[int, int],
    groups: dict[int, list[int]],
    across: dict[int, dict[int, int]],
) -> None:
    """Group b becomes part of group a, the smaller table of edges moved into the larger."""
    for node in groups[b]:
        owner[node] = a
    groups[a] += groups.pop(b)
    del across[a][b]
    for other, edges in across.pop(b).items():
        if other != a:
            del across[other][b]
            total = across[a].get(other, 0) + edges
            across[a][other] = across[other][a] = total
