"""LoKr: ΔW = W₁ ⊗ W₂ measured from its halves; as factors it may have thousands of columns.

(W₁ ⊗ W₂)·vec X = vec(W₁XW₂ᵀ) with X in row-major order, the singular values are the products of
those of the halves, and so is the norm. (LyCORIS, arXiv 2309.14859, §3.3.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapterops import casts
from adapterops.errors import NumericsError
from adapterops.fleet.signing import sketch
from adapterops.fleet.signing.fingerprint import start_numbers
from adapterops.fleet.signing.finished import Finished
from adapterops.fleet.signing.measured import PROBES
from adapterops.fleet.signing.reading import Pass
from adapterops.formats.model import Site

Array = np.ndarray[Any, Any]


def is_kronecker(site: Site) -> bool:
    """Whether a module is a LoKr whose halves are matrices or products of two."""
    return site.kind == "lokr" and "kt2" not in site.parts and 0 not in site.shape


def finished_kronecker(site: Site, reader: Pass, seed: int, side: int) -> Finished | None:
    """The figures of such a module, None where ΔW is zero. NumericsError for NaN or infinities."""
    one, two = (_half(site, name, reader) for name in ("kw1", "kw2"))
    norm = abs(site.scale) * float(np.linalg.norm(one)) * float(np.linalg.norm(two))
    if not math.isfinite(norm):
        raise NumericsError("the norm of its change is beyond float64", module=site.stem)
    if norm == 0.0:
        return None
    P, Q = (
        array.astype(np.float64)
        for array in sketch.sides(seed, site.stem, site.shape, (max(side, sketch.COLUMNS), side))
    )
    right = one @ Q.reshape(side, one.shape[1], two.shape[1]) @ two.T
    left = one.T @ P[: sketch.COLUMNS].reshape(-1, one.shape[0], two.shape[0]) @ two
    left = left.reshape(sketch.COLUMNS, -1)
    values = np.outer(*(np.linalg.svd(half, compute_uv=False) for half in (one, two)))
    probes = sketch.sides(seed, site.stem, one.shape, (1, PROBES))[1]
    return Finished(
        (site.stem,),
        (site.shape,),
        np.array([site.scale]),
        np.array([norm]),
        (P[:side] @ right.reshape(side, -1).T)[None] / side,
        sketch.above_diagonal((left @ left.T)[None]),
        start_numbers((one @ probes.T)[None], (one @ one.T)[None]),
        np.sort((values * values).ravel())[None, ::-1],
    )


def _half(site: Site, name: str, reader: Pass) -> Array:
    """W₁ or W₂ in float64, a kernel flattened into its columns."""
    if name in site.parts:
        full = _read(site, name, reader)
        return full.reshape(len(full), -1)
    left, right = (_read(site, f"{name}_{end}", reader) for end in "ab")
    product: Array = left @ right.reshape(len(right), -1)
    return product


def _read(site: Site, role: str, reader: Pass) -> Array:
    ref = site.parts[role]
    values: Array = ref.read("cpu", reader.raw)
    wrong = casts.count_nonfinite(values)
    if wrong:
        text = f"{wrong} of {values.size} values of {ref.name} are NaN or infinite"
        raise NumericsError(text, module=site.stem)
    return values
