"""Intruder dimensions of a whole model, and an adapter without most of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapterops.basemodel import BaseModel
from adapterops.changes.targets import Target, Term
from adapterops.errors import UnsupportedError, UsageError
from adapterops.files.source import MemoryFile
from adapterops.formats.model import AdapterFile, Ref, Site
from adapterops.judging.intruders import Intruders, Weight, intruders, intruders_in, mitigated
from adapterops.judging.measure import Pair, as_outputs
from adapterops.stream import Compute, Job, run

Progress = Callable[[str, int, int], None]
Matrix = np.ndarray[Any, Any]


def count_intruders(
    base: BaseModel, pairs: Mapping[str, Pair], on: Compute, progress: Progress | None = None
) -> dict[str, Intruders]:
    """The intruders of every merged matrix, by its name in the base; arXiv 2410.21228.

    Embeddings, heads and what is no single matrix (convolutions, fused experts, biases) have no
    singular directions in that sense and are left out. A weight and its decomposition are held in
    float64.
    """
    chosen = {name: pair for name, pair in pairs.items() if is_matrix(base, pair.target)}
    jobs = [
        Job(name, _of_pair, (pair,), 64 * int(np.prod(pair.target.matrix)))
        for name, pair in chosen.items()
    ]
    found: dict[str, Intruders] = {}
    for name, each in zip(chosen, run(jobs, on), strict=True):
        found[name] = each
        if progress:
            progress("decompositions", len(found), len(chosen))
    return found


def is_matrix(base: BaseModel, target: Target) -> bool:
    """Whether a target is the weight of a linear layer by itself."""
    one = len(target.ref.shape) == 2 and min(target.matrix) > 1
    return one and not base.is_embedding(target.name) and not base.is_head(target.name)


def _of_pair(pair: Pair) -> Intruders:
    target = pair.target
    return intruders_in(as_outputs(target, target.ref), as_outputs(target, pair.after))


def mitigated_file(
    base: BaseModel,
    file: AdapterFile,
    weight: float,
    targets: Mapping[str, Target],
    strength: float,
) -> tuple[AdapterFile, int]:
    """The adapter, its weight folded in, with the intruders of W + wD scaled by `strength`.

    And how many there were. Exact in factors: a module gains a column for each of its intruders.
    Raises UnsupportedError for modules that are not low-rank or whose factors several share.
    """
    sites = dict(file.sites)
    count = 0
    for target in targets.values():
        if not is_matrix(base, target):
            continue
        term = _only_term(target, file)
        B, A = term.factors()
        scaled = term.coefficient * B
        found = intruders(Weight(as_outputs(target, target.ref)), scaled, A)
        count += len(found.dims)
        if found.dims:
            sites[term.site.stem] = _site(term.site, *mitigated(scaled, A, found, strength), weight)
    digest = hashlib.sha256(f"{file.identity or file.path}:{weight}:{strength}".encode())
    return replace(file, sites=sites, identity=digest.hexdigest()), count


def _only_term(target: Target, file: AdapterFile) -> Term:
    terms = target.terms
    whole = len(terms) == 1 and terms[0].outputs is None and terms[0].inputs is None
    if target.dense or not whole or terms[0].site.stem not in file.sites:
        raise UnsupportedError(
            "intruders are mitigated in the factors of single low-rank modules, and this is none",
            path=file.path,
            module=target.name,
            hint="leave it out with --modules",
        )
    if terms[0].site.expert is not None:
        raise UnsupportedError(
            "experts share their factors' tensors", path=file.path, module=terms[0].site.stem
        )
    return terms[0]


def _site(site: Site, B: Matrix, A: Matrix, weight: float) -> Site:
    """A LoRA module of factors in memory, for use with the same weight as the others."""
    parts = {
        role: _ref(f"{site.stem}.{role}", values) for role, values in (("B", B / weight), ("A", A))
    }
    rank = B.shape[1]
    return replace(
        site,
        kind="lora",
        rank=rank,
        dim=rank,
        parts=parts,
        scale=1.0,
        alpha=float(rank),
        inner=None,
    )


def _ref(name: str, values: Matrix) -> Ref:
    data = np.ascontiguousarray(values).tobytes()
    return Ref(MemoryFile(name, data), name, "F64", values.shape, 0, len(data))


def check_one(inputs: Sequence[AdapterFile]) -> None:
    """Raise UsageError unless there is one adapter to mitigate."""
    if len(inputs) != 1:
        raise UsageError(
            f"--mitigate writes one adapter, {len(inputs)} are given", hint="merge them first"
        )
