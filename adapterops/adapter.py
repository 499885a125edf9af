"""Adapter: a lazy weighted sum of adapter files, and the operators that build one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from adapterops.certificate import PlanReport, Report
from adapterops.errors import IncompatibleError
from adapterops.factors import Factors
from adapterops.formats import AdapterFile, Ref, open_adapter_file
from adapterops.formats.components import lined_up
from adapterops.formats.kinds import split
from adapterops.save import save_sum

_BLOCK_ROWS = 64
_OPTIONS = frozenset(
    {
        "rank",
        "energy",
        "max_error",
        "size",
        "ratio",
        "sv_ratio",
        "sv_fro",
        "sv_cumulative",
        "allocate",
        "ragged",
        "min_rank",
        "max_rank",
        "form",
        "scaling",
        "engine",
        "base",
        "modules",
        "extras",
        "dtype",
        "to",
        "device",
        "memory",
        "jobs",
        "overwrite",
        "strict",
        "dry_run",
        "progress",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter(Mapping[str, Factors]):
    """Σ wᵢΔWᵢ over adapter files. Looking up a module reads its factors; nothing else does.

    `0.7 * a + 0.3 * b - c` is another Adapter. The same file added to itself is one term with the
    sum of the weights.
    """

    terms: tuple[tuple[float, AdapterFile], ...]

    def __getitem__(self, module: str) -> Factors:
        """The module's exact sum as factors, scale and weights folded in, columns concatenated.

        A full delta (`.diff`) of a weight is a matrix and an identity. Raises KeyError for a module
        that no term has, IncompatibleError where shapes differ.
        """
        result: Factors | None = None
        for weight, file in self.terms:
            part = _factors(file, module, weight) if weight else None
            if part is None:
                continue
            if result is not None and result.shape != part.shape:
                raise IncompatibleError(
                    f"shapes differ: {result.shape} and {part.shape} ({file.path})", module=module
                )
            result = part if result is None else result + part
        if result is None:
            raise KeyError(module)
        return result

    def __iter__(self) -> Iterator[str]:
        modules = (m for w, file in self.terms if w for m in sorted({*file.sites, *_full(file)}))
        return iter(dict.fromkeys(modules))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __add__(self, other: Adapter) -> Adapter:
        if not isinstance(other, Adapter):
            return NotImplemented
        weights: dict[int, float] = {}
        files: dict[int, AdapterFile] = {}
        terms = (*self.terms, *other.terms)
        lined = lined_up([file for _, file in terms])
        for (weight, _), file in zip(terms, lined, strict=True):
            weights[id(file)] = weights.get(id(file), 0.0) + weight
            files[id(file)] = file
        return Adapter(tuple((weights[key], files[key]) for key in files))

    def __radd__(self, other: object) -> Adapter:
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __mul__(self, scalar: Any) -> Adapter:
        if not isinstance(scalar, Real):
            return NotImplemented
        return Adapter(tuple((weight * float(scalar), file) for weight, file in self.terms))

    __rmul__ = __mul__
    __array_ufunc__ = None  # a numpy number times an adapter is the adapter's business

    def __truediv__(self, scalar: float) -> Adapter:
        return self * (1 / scalar)

    __eq__ = object.__eq__  # a mapping would compare matrices
    __hash__ = object.__hash__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other

    def norm(self) -> float:
        """‖ΔW‖_F over all modules; factors are read, and added up exactly."""
        return math.hypot(*(self._norm(module) for module in self))

    def _norm(self, module: str) -> float:
        """‖ΔW‖_F of a module; by rows where a term has no thin factors."""
        sites = [(w, file, file.sites.get(module)) for w, file in self.terms if w]
        if not any(site and site.kind == "elementwise" for _, _, site in sites):
            return self[module].norm()
        parts: list[tuple[float, Any]] = []
        for weight, file, site in sites:
            if site and site.made and site.kind == "elementwise":
                parts.append((weight * site.factor * site.scale, site.made.operator()))
            elif (factors := _factors(file, module, weight)) is not None:
                parts.append((1.0, factors))
        m, n = parts[0][1].shape
        if any(part.shape != (m, n) for _, part in parts):
            shapes = " and ".join(str(part.shape) for _, part in parts)
            raise IncompatibleError(f"shapes differ: {shapes}", module=module)
        squares = []
        for start in range(0, m, _BLOCK_ROWS):
            rows = sum(c * part.rows(start, min(start + _BLOCK_ROWS, m)) for c, part in parts)
            squares.append(float((rows * rows).sum()))
        return math.sqrt(math.fsum(squares))

    def __repr__(self) -> str:
        shown = " + ".join(f"{weight:g}*{file.path!r}" for weight, file in self.terms)
        return f"<Adapter {shown}, {len(self)} modules>"

    def save(self, out: str | os.PathLike[str], **options: Any) -> Report | PlanReport:
        """Write the sum to `out` and return its certificate.

        Takes the options of `merge` and `compress` that do not concern how adapters are opened,
        weighted or measured. Raises TypeError for any other.
        """
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(f"save() got an unexpected option {unknown[0]!r}")
        weights, files = zip(*self.terms, strict=True)
        return save_sum(files, weights, out, **options)


def _full(file: AdapterFile) -> dict[str, Ref]:
    """The full deltas of weights, by module."""
    weights = ((name.removesuffix(".diff"), ref) for name, ref in file.deltas.items())
    return {stem: ref for stem, ref in weights if len(ref.shape) > 1 and ref.name.endswith(".diff")}


def _factors(file: AdapterFile, module: str, weight: float) -> Factors | None:
    """One file's share of a module, None where it has none."""
    site = file.sites.get(module)
    if site is not None:
        B, A = site.factors()
        return Factors(B, A * (weight * site.factor * site.scale))
    ref = _full(file).get(module)
    if ref is None:
        return None
    B, A = split(ref.read().reshape(ref.shape[0], -1))
    return Factors(B, A * weight)


def open_adapter(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    label: str = "",
    allow_pickle: bool = False,
) -> Adapter:
    """The adapter at `path`, a file or a directory, with weight 1. Only headers are read.

    `alpha` is for an adapter that does not say its own. `label` is what it is called in reports,
    and keys its random bits in methods that draw at random; the name of its path if left out.
    Raises FileError, FormatError, IncompatibleError (no scale) and UnsupportedError (a kind that is
    no plain LoRA).
    """
    file = open_adapter_file(path, alpha=alpha, allow_pickle=allow_pickle)
    return Adapter(((1.0, replace(file, label=label) if label else file),))
