"""One module that a rule makes of several adapters' modules: a `Made` for its site."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapterops import linalg
from adapterops.arrays import Array, host, put
from adapterops.casts import FORMATS
from adapterops.certificate import MethodFigures
from adapterops.derived.elementwise import BLOCK_ROWS, Elementwise
from adapterops.derived.rule import Combined, Rule, beside_limits, combined, storage_noise
from adapterops.errors import AdapterOpsError
from adapterops.factors import Factors
from adapterops.formats.kinds import split
from adapterops.formats.model import AdapterFile, Read, Ref, Site
from adapterops.metric import Inputs
from adapterops.rules import limits, modify
from adapterops.rules.registry import Limits, Pair

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter's module, None where it lacks it, its weight, and what keys its random bits.

    `inputs` is what is known of the module's inputs on that adapter's data.
    """

    file: AdapterFile
    site: Site | None
    weight: float
    label: str
    inputs: Inputs | None = None


def _types(site: Site | None) -> set[str]:
    """The types of the files that a module is read from."""
    if site is None:
        return set()
    sites = [leaf for _, leaf in site.made.leaves()] if site.made else [site]
    return {ref.dtype for each in sites for ref in each.parts.values()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """`Moments` that are read whenever they are looked at, and not kept."""

    inputs: Inputs

    @property
    def kind(self) -> str:
        return self.inputs.kind

    @property
    def count(self) -> int:
        return self.inputs.ref.shape[0]

    @property
    def matrix(self) -> np.ndarray[Any, Any]:
        return np.asarray(self.inputs.ref.read())


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """A rule and what it is applied to; `rank` is how many columns it gives, zero-padded.

    What an elementwise rule has to know of whole matrices is found once, whoever asks.
    """

    rule: Rule
    stem: str
    shape: tuple[int, int]
    rank: int
    sources: tuple[Source, ...]
    known: dict[str, object] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def dtype(self) -> str:
        """The widest type of its sources."""
        return max(self._formats, key=lambda name: (FORMATS[name].bits, name))

    @property
    def peak(self) -> int:
        """Bytes that making it needs at most: adapters side by side, their cores or blocks."""
        sites = [source.site for source in self.sources if source.site]
        (m, n), count, ranks = self.shape, len(sites), sum(site.rank for site in sites)
        within = max((site.made.peak for site in sites if site.made), default=0)
        if self.rule.is_dense:
            blocks = 4 * (2 * count + 10) * BLOCK_ROWS * n
            return within + 12 * (m + n) * ranks + blocks + limits.peak(count, m * n, 32)
        side = min(ranks, max(m, n))
        entries = min(side, m) * (n if self.rule.space == "knots" else side)  # of a core or block
        found = within + 8 * (6 * (m + n) * ranks + 8 * side * side + 5 * count * entries)
        return found + (limits.peak(count, entries, 64) if self.rule.method.spaces else 0)

    @property
    def _formats(self) -> list[str]:
        names = (source.site.dtype for source in self.sources if source.site)
        return [name if name in FORMATS else "BF16" for name in names]

    @property
    def weights(self) -> Vector:
        """(T,) float64."""
        return np.array([source.weight for source in self.sources])

    @property
    def labels(self) -> tuple[str, ...]:
        """What keys the random bits of each."""
        return tuple(source.label for source in self.sources)

    def leaves(self) -> list[tuple[AdapterFile, Site]]:
        """The modules in files that it is made from, each with its adapter, each once."""
        found: dict[int, tuple[AdapterFile, Site]] = {}
        for source in self.sources:
            if source.site is None:
                continue
            own = [(source.file, source.site)]
            for file, site in source.site.made.leaves() if source.site.made else own:
                found.setdefault(id(site), (file, site))
        return list(found.values())

    def members(self, raw: Read = Ref.raw) -> list[Factors]:
        """The sources' deltas, scales folded in, weights not; on the host."""
        found = []
        for source in self.sources:
            if source.site is None:
                found.append(Factors(np.zeros((self.shape[0], 0)), np.zeros((0, self.shape[1]))))
                continue
            B, A = source.site.factors("cpu", raw)
            found.append(Factors(host(B), host(A) * source.site.scale))
        return found

    def noise(self, members: Sequence[Factors]) -> Vector:
        """(T,) what rounding factors to their types is expected to have done to each delta."""
        types = [_types(source.site) for source in self.sources]
        return np.array(list(map(storage_noise, types, members)))

    def result(self, raw: Read = Ref.raw) -> Combined:
        """What the rule gives, where it is no dense one."""
        if self.rule.method.signature == "factors":
            return self._of_pairs(raw)
        members = self.members(raw)
        return combined(
            self.rule,
            members,
            self.weights,
            self.noise(members),
            self.labels,
            self.stem,
            self.rank,
        )

    def _of_pairs(self, raw: Read) -> Combined:
        """What a rule for the factor pairs themselves gives, of the adapters with the module."""
        own = [(source, source.site) for source in self.sources if source.site]
        pairs = []
        for _, site in own:
            B, A = site.factors("cpu", raw)
            pairs.append(Pair(host(B), host(A), site.scale))
        weights = np.array([source.weight for source, _ in own])
        seen = [_Seen(source.inputs) for source, _ in own if source.inputs]
        B, A = self.rule.method.function(pairs, weights, seen, **self.rule.values)
        to = self.rule.match_norm
        if to is not None:
            norms = [abs(pair.scale) * linalg.norm(pair.B, pair.A) for pair in pairs]
            A = A * modify.norm_factor(linalg.norm(B, A), np.array(norms), weights, to)
        return Combined(B, A)

    def factors(self, device: str, raw: Read) -> tuple[Array, Array]:
        """B (out, rank) and A (rank, in) in float64; of a dense one the matrix and an identity."""
        if self.rule.is_dense:
            B, A = split(Elementwise(self).rows(0, self.shape[0]))
            return put(B, device), put(A, device)
        try:
            found = self.result(raw)
        except AdapterOpsError as error:
            error.module = error.module or self.stem
            raise
        self.known["said"] = self._said(found)
        B, A = np.zeros((self.shape[0], self.rank)), np.zeros((self.rank, self.shape[1]))
        B[:, : found.B.shape[1]], A[: len(found.A)] = found.B, found.A
        return put(B, device), put(A, device)

    def _said(self, found: Combined) -> MethodFigures:
        name, cored = self.rule.method.name, found.cored
        if cored is None:
            return MethodFigures(name, near=found.near)
        return MethodFigures(name, cored.cut, cored.rank, cored.gap, cored.fit, None, cored.notes)

    @property
    def said(self) -> MethodFigures:
        """What the method says of its result, once that is made."""
        found = self.known.get("said")
        if isinstance(found, MethodFigures):
            return found
        limits = self.known.get("limits")
        near = beside_limits(limits) if isinstance(limits, Limits) else None
        return MethodFigures(self.rule.method.name, near=near)

    def operator(self) -> Elementwise | None:
        """The rows of a dense rule, None where there are factors."""
        return Elementwise(self) if self.rule.is_dense else None
