"""Methods that work entry by entry: what of each adapter remains, and how entries become one.

f(X, w, limits, draws, **p) → (rows, columns) with X (T, rows, columns) whole rows of all Dᵢ, in
float32 or float64, numpy or torch; w (T,); `limits` what `streamed.find_limits` found of the whole
matrices; draws (T, rows, columns) 16 random bits each, where the method needs a seed; p all values
of `Method.values`. The same function serves dense rows and the rows of a core or KnOTS space,
where it is another method: its result depends on the basis.

A negative weight turns its adapter round and |w| weighs it. Adapters of weight 0 are as if absent.
Adapters of zeros have no vote; the caller leaves them out where they would count in Σ|w|. A tied
vote, to within 2⁻²⁰ of its mass, elects no sign and gives 0: so −Dᵢ give −ΔW, in any basis.

`convention` reproduces the arithmetic of other tools: PEFT 0.21 `utils/merge_utils.py` (k rounded
down, unweighted votes, ties elect plus, division by the number of those that agree; adapters of
weight 0 have a vote there too), mergekit 0.1.5 `generalized_task_arithmetic.py` and `sparsify.py`
(k rounded down, ties elect plus, signed weights in the divisor, random drops rescaled to the L1
norm before). Both break ties with a limit by position, where here all that tie are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from adapterops.arrays import Array, host, namespace
from adapterops.errors import UsageError
from adapterops.rules import sparsify
from adapterops.rules.registry import SCOPE, Limits, Parameter, Ranked, method
from adapterops.rules.votes import Ballot, Part, elected, summed

_TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708 (trim, elect sign, disjoint merge)"
_DARE = "Yu et al. 2023, Language models are super Mario, arXiv 2311.03099 (Drop And REscale)"
_DELLA = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617 (MAGPRUNE)"
_CRUMBS = "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795"


def _density(default: float) -> Parameter:
    return Parameter("density", "number", default, "share of entries kept", 0, 1, open_low=True)


def _normalize(default: bool) -> Parameter:
    return Parameter(
        "normalize", "switch", default, "divide by the weights of what was added; peft always does"
    )


def _convention(*others: str) -> Parameter:
    return Parameter(
        "convention",
        "text",
        "adapterops",
        "whose arithmetic to follow",
        choices=("adapterops", *others),
    )


_LAMBDA = Parameter("lambda", "number", 1.0, "factor of the result")
_RESCALE = Parameter("rescale", "switch", True, "divide what remains by its probability")
_GAMMA = Parameter("gamma", "number", 0.01, "share of the largest entries dropped", 0, 1)
_EPSILON = Parameter(
    "epsilon", "number", 0.15, "probabilities run from density − this to density + this", 0, 0.5
)
_MAJORITY = Parameter(
    "majority_sign_method",
    "text",
    "total",
    "whether a sign is elected by the size of entries or by their number",
    choices=("total", "frequency"),
)


_CRUMBS_PARAMETERS = (_density(0.9), _GAMMA, _normalize(False), _LAMBDA, _convention("mergekit"))
_DARE_PARAMETERS = (_density(0.5), _RESCALE, _normalize(False), _LAMBDA, _convention("mergekit"))


def _della_parameters(*, normalize: bool) -> list[Parameter]:
    rest = [_RESCALE, _normalize(normalize), _LAMBDA, _convention("mergekit")]
    return [_density(0.5), _EPSILON, *rest]


def _trim_ranks(total: int, **p: Any) -> tuple[int, ...]:
    return (sparsify.kept(p["density"], total, p["convention"]),)


def _middle_ranks(total: int, **p: Any) -> tuple[int, ...]:
    return sparsify.middle(p["density"], p["gamma"], total, p["convention"])


def _no_ranks(total: int, **p: Any) -> tuple[int, ...]:
    return ()


def _drawn(X: Array, draws: Array, p: dict[str, Any], rescale: bool) -> Iterator[Part]:
    if p["density"] >= 1:
        return sparsify.whole(X)
    if "epsilon" in p:
        return sparsify.ranked(X, draws, p["density"], p["epsilon"], rescale)
    return sparsify.dropped(X, draws, p["density"], rescale)


def _matches(p: dict[str, Any]) -> bool:
    """Whether random drops are rescaled to the L1 norm, as mergekit does."""
    return bool(p["convention"] == "mergekit" and p["rescale"] and p["density"] < 1)


def _norms(X: Array, w: Array, at: Array, draws: Array, **p: Any) -> Array | None:
    """L1 norms of the rows before and after the drop, (T, 2, rows)."""
    if not _matches(p):
        return None
    xp = namespace(X)
    return np.array(
        [
            [host(xp.sum(xp.abs(each), -1, dtype=xp.float64)) for each in (X[t], z)]
            for t, z, _ in _drawn(X, draws, p, False)
        ]
    )


def _remaining(X: Array, limits: Limits, draws: Array, p: dict[str, Any]) -> Iterator[Part]:
    """What a random method keeps, rescaled."""
    if not _matches(p):
        yield from _drawn(X, draws, p, p["rescale"])
        return
    assert limits.totals is not None
    for t, z, low in _drawn(X, draws, p, False):
        before, after = limits.totals[t]
        if before >= 1e-7 and after >= 1e-7:  # mergekit's own guard
            z *= float(before / after)
        yield t, z, low


def _sum(X: Array, parts: Iterable[Part], w: Array, p: dict[str, Any]) -> Array:
    weights = host(w).tolist()
    total = summed(X, parts, weights)
    scale = p["lambda"]
    if p["normalize"] and p["convention"] == "mergekit":
        scale /= sum(weights) if abs(sum(weights)) >= 1e-8 else 1.0
    elif p["normalize"]:
        scale /= sum(map(abs, weights)) or 1.0
    if scale != 1:
        total *= scale
    return total


def _election(X: Array, parts: Iterable[Part], w: Array, p: dict[str, Any]) -> Array:
    w = host(w)
    counted = p.get("majority_sign_method") == "frequency"
    if p["convention"] == "peft":
        ones = np.ones_like(w)
        ballot = Ballot(w, ones, ones, counted, positive=True)
    elif p["convention"] == "mergekit":
        ballot = Ballot(w, w, None, counted, positive=True)
    else:
        ballot = Ballot(w, np.abs(w), None, counted)
    result = elected(X, parts, ballot, p["normalize"] or p["convention"] == "peft")
    if p["lambda"] != 1:
        result *= p["lambda"]
    return result


_DRAWN = Ranked(_no_ranks, totals=_norms)


@method(
    "magnitude_prune",
    "elements",
    summary="The weighted sum of each adapter's largest entries.",
    reference="PEFT 0.21.2, peft/utils/merge_utils.py, magnitude_prune",
    parameters=[_density(0.5), SCOPE, _convention("peft")],
    laws=["homogeneous", "linear"],
    ranked=Ranked(_trim_ranks),
)
def magnitude_prune(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """Σ wᵢ·(Dᵢ where |Dᵢ| is among its density·N largest), rounded down by peft."""
    return summed(X, sparsify.trimmed(X, limits.at), host(w).tolist())


@method(
    "ties",
    "elements",
    summary="Each adapter's largest entries; of those that remain, the mean of the elected sign.",
    reference=_TIES,
    parameters=[
        _density(0.2),
        _normalize(True),
        _LAMBDA,
        _MAJORITY,
        SCOPE,
        _convention("peft", "mergekit"),
    ],
    laws=["homogeneous"],
    ranked=Ranked(_trim_ranks),
)
def ties(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """λ·Σ wᵢzᵢ / Σ|wᵢ| over the entries of the elected sign, z trimmed per matrix.

    The paper trims over all matrices of an adapter together, as `scope=adapter` does, and takes the
    global majority where a vote is tied.
    """
    return _election(X, sparsify.above(X, limits.at), w, p)


@method(
    "breadcrumbs",
    "elements",
    summary="The weighted sum of each adapter's entries without the largest and the smallest.",
    reference=_CRUMBS,
    parameters=_CRUMBS_PARAMETERS,
    laws=["homogeneous", "linear"],
    ranked=Ranked(_middle_ranks),
)
def breadcrumbs(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """λ·Σ wᵢzᵢ, z without its γ·N largest entries and then the smallest until density·N remain."""
    return _sum(X, sparsify.trimmed(X, limits.at), w, p)


@method(
    "breadcrumbs_ties",
    "elements",
    summary="Breadcrumbs of each adapter, summed over the entries of the elected sign.",
    reference=f"{_CRUMBS}; {_TIES}",
    parameters=_CRUMBS_PARAMETERS,
    laws=["homogeneous"],
    ranked=Ranked(_middle_ranks),
)
def breadcrumbs_ties(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """As `breadcrumbs`, over the entries of the elected sign."""
    return _election(X, sparsify.trimmed(X, limits.at), w, p)


@method(
    "dare",
    "elements",
    summary="The weighted sum of entries kept at random and rescaled: the sum itself on average.",
    reference=_DARE,
    parameters=_DARE_PARAMETERS,
    laws=["homogeneous", "linear", "unbiased"],
    needs=["seed"],
    ranked=_DRAWN,
)
@method(
    "dare_linear",
    "elements",
    summary="The same as dare, under the name that mergekit and PEFT have for it.",
    reference=_DARE,
    parameters=_DARE_PARAMETERS,
    laws=["homogeneous", "linear", "unbiased"],
    needs=["seed"],
    ranked=_DRAWN,
)
def dare(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """λ·Σ wᵢ·(Dᵢ where kept)/density."""
    return _sum(X, _remaining(X, limits, draws, p), w, p)


@method(
    "dare_ties",
    "elements",
    summary="Entries kept at random and rescaled, summed over those of the elected sign.",
    reference=f"{_DARE}; {_TIES}, without its trim",
    parameters=[
        _density(0.5),
        _RESCALE,
        _normalize(False),
        _LAMBDA,
        _MAJORITY,
        _convention("peft", "mergekit"),
    ],
    laws=["homogeneous"],
    needs=["seed"],
    ranked=_DRAWN,
)
def dare_ties(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """As `dare`, over the entries of the elected sign.

    A sum by default: the mean over those kept would make up a second time for those dropped.
    """
    return _election(X, _remaining(X, limits, draws, p), w, p)


def _check_epsilon(**p: Any) -> None:
    density, epsilon = p["density"], p["epsilon"]
    if density < 1 and not (density - epsilon > 0 and density + epsilon <= 1):
        raise UsageError(
            f"density {density:g} ± epsilon {epsilon:g} has to lie between 0 and 1",
            hint=f"epsilon below {min(density, 1 - density):g}, or density 1",
        )


@method(
    "della",
    "elements",
    summary="Entries kept at random, large ones more often, and the mean of the elected sign.",
    reference=f"{_DELLA}; {_TIES}",
    parameters=_della_parameters(normalize=True),
    laws=["homogeneous"],
    needs=["seed"],
    ranked=_DRAWN,
    check=_check_epsilon,
)
def della(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """As `della_linear`, averaged over the entries of the elected sign."""
    return _election(X, _remaining(X, limits, draws, p), w, p)


@method(
    "della_linear",
    "elements",
    summary="The weighted sum of entries kept at random, large ones more often, and rescaled.",
    reference=_DELLA,
    parameters=_della_parameters(normalize=False),
    laws=["homogeneous", "linear", "unbiased"],
    needs=["seed"],
    ranked=_DRAWN,
    check=_check_epsilon,
)
def della_linear(X: Array, w: Array, limits: Limits, draws: Array, **p: Any) -> Array:
    """λ·Σ wᵢ·(Dᵢ where kept)/p, p each entry's own probability, by its rank in its row."""
    return _sum(X, _remaining(X, limits, draws, p), w, p)
