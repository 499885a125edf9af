"""One module that a rule makes of several adapters' modules: a `Made` for its site."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from adapterops import linalg
from adapterops.arrays import Array, host, put
from adapterops.casts import FORMATS
from adapterops.certificate import MethodFigures
from adapterops.derived.elementwise import LEAST_SAMPLED, Elementwise
from adapterops.derived.grid import BLOCK_ROWS, OnGrid, voting
from adapterops.derived.rule import (
    Combined,
    Rule,
    bases,
    beside_limits,
    combined,
    damped,
    entries,
    products,
    storage_noise,
)
from adapterops.derived.weighted import Weighted
from adapterops.derived.whole import Whole
from adapterops.errors import AdapterOpsError
from adapterops.factors import Factors
from adapterops.formats.kinds import split
from adapterops.formats.model import AdapterFile, Read, Ref, Site
from adapterops.metric import Inputs
from adapterops.rules import limits, modify
from adapterops.rules.registry import Limits, Pair

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
Found = TypeVar("Found")


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


def gives_rows(rule: Rule, sites: Iterable[Site | None]) -> bool:
    """Whether a rule's result, of these sites, is of any rank and known by its rows alone."""
    if rule.method.signature != "gram" or rule.calibrate:
        return rule.is_dense
    return any(_by_rows(site) for site in sites if site)


def _by_rows(site: Site) -> bool:
    return site.made is not None and site.kind == "elementwise"


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

    What a rule has to know of whole matrices is found `once`, whoever asks; `whole` finds what it
    has to know of all modules, of rules of that scope.
    """

    rule: Rule
    stem: str
    shape: tuple[int, int]
    rank: int
    sources: tuple[Source, ...]
    whole: Whole | None = None
    kept: dict[str, object] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def dtype(self) -> str:
        """The widest type of its sources."""
        return max(self._formats, key=lambda name: (FORMATS[name].bits, name))

    def once(self, what: str, find: Callable[[], Found]) -> Found:
        """What `find` gives, asked for the first time."""
        with self.lock:
            if what not in self.kept:
                self.kept[what] = find()
            return cast(Found, self.kept[what])

    @property
    def is_dense(self) -> bool:
        """Whether the result is known by its rows alone."""
        return gives_rows(self.rule, (source.site for source in self.sources))

    @property
    def peak(self) -> int:
        """Bytes that making it needs at most: adapters side by side, their cores or blocks."""
        return self.alone + (self.whole.peak if self.whole else 0)

    @property
    def alone(self) -> int:
        """`peak` without what has to be known of other modules."""
        sites = [source.site for source in self.sources if source.site]
        (m, n), count, ranks = self.shape, len(sites), sum(site.rank for site in sites)
        within = max((site.made.peak for site in sites if site.made), default=0)
        if self.is_dense:
            matrices = self.rule.calibrate is not None  # what is damped is needed in factors
            ranks = sum(site.rank for site in sites if matrices or not _by_rows(site))
            each = 64 if matrices else 12 if self.rule.is_dense else 8
            blocks = (4 * (2 * count + 10) if self.rule.is_dense else 16 * count) * BLOCK_ROWS * n
            found = within + each * (m + n) * ranks + blocks
            if not self.rule.method.ranked:
                return found
            sampled = min(m, n) >= LEAST_SAMPLED and not any(map(_by_rows, sites))
            return found + limits.peak(count, m * n, 32, sampled=sampled)
        side = min(ranks, max(m, n))
        numbers = min(side, m) * (n if self.rule.space == "knots" else side)  # of a core or block
        found = within + 8 * (6 * (m + n) * ranks + 8 * side * side + 5 * count * numbers)
        if not self.rule.method.ranked:
            return found
        return found + limits.peak(count, numbers, 64, sampled=False)

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
        return [self._factors(source.site, raw) for source in self.sources]

    def sides(self) -> list[Factors | OnGrid]:
        """The same, but those that are known by their rows as that."""
        operators = [
            source.site.made.operator() if source.site and source.site.made else None
            for source in self.sources
        ]
        return [
            operator or self._factors(source.site)
            for operator, source in zip(operators, self.sources, strict=True)
        ]

    def _factors(self, site: Site | None, raw: Read = Ref.raw) -> Factors:
        """A module's delta, of no columns where an adapter lacks it."""
        if site is None:
            return Factors(np.zeros((self.shape[0], 0)), np.zeros((0, self.shape[1])))
        B, A = site.factors("cpu", raw)
        return Factors(host(B), host(A) * site.scale)

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
            self.whole.known if self.whole else None,
        )

    def gram(self) -> np.ndarray[Any, Any]:
        """(T, T) inner products of the sources, after --calibrate pico, of a Gram method."""
        if self.is_dense:
            return Weighted(self).gram()
        return products(bases(damped(self.rule, self.members(), self.weights))[2])

    def entries(self) -> tuple[list[int], Iterable[np.ndarray[Any, Any]]]:
        """Who has a vote, and blocks (T, rows, columns) of their entries, of elementwise rules."""
        if self.rule.is_dense:
            found = Elementwise(self)
            return found.own, found.blocks()
        members = damped(self.rule, self.members(), self.weights)
        own = voting(members, self.weights)
        if not own:
            return own, []
        return own, [entries(self.rule, [members[i] for i in own])[2]]

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
        operator = self.operator()
        if operator is not None:
            whole = operator.factors()
            return put(whole.B, device), put(whole.A, device)
        try:
            found = self.result(raw)
        except AdapterOpsError as error:
            error.module = error.module or self.stem
            raise
        self.kept["said"] = self._said(found)
        left, right = found.B, found.A
        if len(right) > self.rank:  # more columns than the matrix has sides: as the matrix
            left, right = split(left @ right)
        B, A = np.zeros((self.shape[0], self.rank)), np.zeros((self.rank, self.shape[1]))
        B[:, : len(right)], A[: len(right)] = left, right
        return put(B, device), put(A, device)

    def _said(self, found: Combined) -> MethodFigures:
        name, cored = self.rule.method.name, found.cored
        if cored is None:
            return MethodFigures(name, near=self._near_all if self.whole else found.near)
        return MethodFigures(name, cored.cut, cored.rank, cored.gap, cored.fit, None, cored.notes)

    @property
    def said(self) -> MethodFigures:
        """What the method says of its result, once that is made."""
        found = self.kept.get("said")
        if isinstance(found, MethodFigures):
            return found
        limits = self.kept.get("limits")
        near = beside_limits(limits) if isinstance(limits, Limits) else None
        return MethodFigures(self.rule.method.name, near=self._near_all if self.whole else near)

    @property
    def _near_all(self) -> int | None:
        """Entries of all modules beside a limit, which are counted with the first one."""
        whole = self.whole
        return whole.near if whole and whole.modules[0] is self else None

    def operator(self) -> OnGrid | None:
        """The result by its rows, None where there are factors."""
        if not self.is_dense:
            return None
        return Elementwise(self) if self.rule.is_dense else Weighted(self)
