"""What PEFT calls linear: factors are summed apart, which is no sum of the adapters.

Kept for those who have to reproduce such a merge. It gives every pair of adapters a cross term,
and another result for every form of the same factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterops.errors import IncompatibleError
from adapterops.rules.registry import Array, Moments, Pair, method


@method(
    "peft_linear",
    "factors",
    summary="PEFT's linear: B and A summed apart. Not the weighted sum: that is linear.",
    reference="PEFT 0.21.2, peft/tuners/lora/model.py, combination_type linear",
    laws=["identity", "homogeneous"],
    width=lambda ranks, values: max(ranks, default=0),
    breaks=["gauge", "zeros"],
)
def peft_linear(
    pairs: Sequence[Pair], w: Array, inputs: Sequence[Moments] | None = None
) -> tuple[Array, Array]:
    """B = Σ√|cᵢ|·Bᵢ (m, r) and A = Σ sign(cᵢ)√|cᵢ|·Aᵢ (r, n), cᵢ = wᵢ·scaleᵢ, in float64.

    ΔW = ΣᵢΣⱼ sign(cⱼ)√|cᵢcⱼ|·BᵢAⱼ: of k equal adapters at 1/k it is k times that adapter. Those of
    rank 0, which lack the module, are skipped. PEFT rounds weights to float32 and the sums to the
    factors' type. Raises IncompatibleError where ranks differ.
    """
    own = [i for i, pair in enumerate(pairs) if pair.B.shape[1]]
    if not own:
        return pairs[0].B, pairs[0].A
    pairs, w = [pairs[i] for i in own], w[own]
    ranks = [pair.B.shape[1] for pair in pairs]
    if len(set(ranks)) > 1:
        raise IncompatibleError(
            f"peft_linear adds factors up, their ranks have to agree: they are "
            f"{', '.join(map(str, ranks))}",
            hint="use linear, which takes any ranks",
        )
    shares = np.array([pair.scale for pair in pairs]) * w
    roots = np.sqrt(np.abs(shares))
    B = sum(root * pair.B for root, pair in zip(roots, pairs, strict=True))
    signed = zip(np.copysign(roots, shares), pairs, strict=True)
    A = sum(root * pair.A for root, pair in signed)
    return np.asarray(B), np.asarray(A)
