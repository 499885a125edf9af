"""What a merge method is: a pure function, its parameters, where it comes from, what it promises.

A method is registered by the decorator of its signature, and everything that speaks of methods
(`adapterops methods`, `--param`, recipes, calc, the tests of laws) reads it from here:

- gram:     f(G, w, **p) → c          ΔW = Σ cᵢDᵢ, from G = (⟨Dᵢ, Dⱼ⟩) alone
- core:     f(M, w, noise, **p) → Cored, Dᵢ = Q_B Mᵢ Q_Aᵀ with Q orthonormal; equivariant
- elements: f(X, w, limits, draws, **p) → X, entry by entry, from blocks of rows of all Dᵢ
- factors:  f(pairs, w, inputs, **p) → (B, A), from the factor pairs themselves

Four laws hold for every method and are tested of each: the gauge of the factors, the order of the
adapters (with their weights) and adapters of zeros do not matter, and the same input gives the same
output. Others a method declares (`laws`), and it names what it breaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from adapterops.errors import UsageError
from adapterops.rules.laws import Breach, Law
from adapterops.suggestion import meant

Array = Any
Signature = Literal["gram", "core", "elements", "factors"]
Value = bool | int | float | str
# From the ranks of the adapters and the method's values to a bound of the result's rank.
Width = Callable[[Sequence[int], Mapping[str, Value]], int]


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's factors as they are stored: ΔW = scale·B·A, B (m, r), A (r, n), float64."""

    B: Array
    A: Array
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the inputs of one adapter's module, float64: E[xxᵀ] or k samples of x.

    `matrix` is (n, n) of kind "gram", (k, n), one sample a row, of kind "samples". Methods look at
    one adapter's at a time, so that a class that reads it when asked keeps no more than one.
    """

    kind: Literal["gram", "samples"]
    matrix: Array

    @property
    def count(self) -> int:
        """How many rows the matrix has; a class that reads it when asked knows without."""
        return len(self.matrix)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method: `kind` decides what is read, `low` and `high` what is allowed.

    Ends are allowed unless `open_low` or `open_high`. `choices` are those of a text. Where
    `default` is None it must be given.
    """

    name: str
    kind: Literal["number", "whole", "switch", "text"]
    default: Value | None
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What is allowed, as a message says it."""
        if self.kind == "switch":
            return "true or false"
        if self.kind == "text":
            return ", ".join(self.choices)
        what = "a whole number" if self.kind == "whole" else "a number"
        low = (
            "" if self.low == -math.inf else f"{'above' if self.open_low else 'from'} {self.low:g}"
        )
        high = (
            "" if self.high == math.inf else f"{'below' if self.open_high else 'to'} {self.high:g}"
        )
        return " ".join(part for part in (what, low, high) if part)

    def read(self, given: Any, method: str) -> Value:
        """The value meant, of text as `--param` has it or of Python's types. Raises UsageError."""
        value = _parsed(given, self.kind) if isinstance(given, str) else given
        if isinstance(value, np.generic):
            value = value.item()
        fits = {
            "switch": isinstance(value, bool),
            "text": value in self.choices,
            "whole": isinstance(value, Integral) and not isinstance(value, bool),
            "number": isinstance(value, Real) and not isinstance(value, bool),
        }[self.kind]
        if not fits or (self.kind in ("whole", "number") and not self._inside(value)):
            raise UsageError(
                f"{method}: {self.name} is {given!r}; expected {self.range}",
                hint=meant(given, self.choices) if isinstance(given, str) else None,
            )
        return float(value) if self.kind == "number" else value

    def _inside(self, value: int | float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        try:
            return above and below and math.isfinite(value)
        except OverflowError:  # a whole number that floating point does not hold
            return False


# Not an argument of the method, but of who gathers what it looks at.
SCOPE = Parameter(
    "scope",
    "text",
    "module",
    "whether each module is looked at alone, or all of an adapter together",
    choices=("module", "adapter"),
)


def _parsed(text: str, kind: str) -> Any:
    if kind == "switch":
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if kind == "text":
        return text
    try:
        return int(text) if kind == "whole" else float(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Limits:
    """What an elementwise method is told of whole matrices that it sees block by block.

    `at` (T, K), or (1, K) for joint ones, float64: order statistics. `totals` (T, S) float64: sums
    over all entries, None where the method takes none. `near` counts, for each of `at`, the entries
    within 2⁻²⁰ relative of it, which rounding may have put on either side.
    """

    at: Array
    near: Array
    totals: Array | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the limits of an elementwise method are of: order statistics over a whole matrix.

    They are those of each |Dᵢ|, or of `measure(X (T, m, n), w)`, (1, m, n) for joint ones.
    `ranks(N, **p)` says how many of a matrix's N entries lie at or above each limit.
    `totals(X, w, at, draws, **p)` gives sums over each row of a block, (T, S, rows), or None where
    there is nothing to be summed; `at` are the limits found.
    """

    ranks: Callable[..., tuple[int, ...]]
    measure: Callable[[Array, Array], Array] | None = None
    totals: Callable[..., Array | None] | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method. `least` and `most` are numbers of adapters; `needs` what else it takes.

    `check(**values)` raises UsageError for values that do not go together. `width` is given where
    a result is surely of lower rank than the adapters' ranks add up to. `measures` is false of a
    Gram method that asks nothing of G. `least_response` is α of `modify.svc` after it.
    """

    name: str
    signature: Signature
    function: Callable[..., Any]
    summary: str
    reference: str
    parameters: tuple[Parameter, ...] = ()
    laws: frozenset[Law] = frozenset()
    least: int = 1
    most: int | None = None
    needs: Collection[Literal["activations", "seed"]] = ()
    ranked: Ranked | None = None
    check: Callable[..., None] | None = None
    width: Width | None = None
    breaks: Collection[Breach] = ()
    measures: bool = True
    least_response: float | None = None

    @property
    def spaces(self) -> tuple[str, ...]:
        """Where entries may be compared, of an elementwise method; any other has no such choice."""
        return ("dense", "core", "knots") if self.signature == "elements" else ()

    def columns(self, ranks: Sequence[int], values: Mapping[str, Value]) -> int:
        """A bound of the result's rank, for adapters of these ranks in their order.

        Of a result in factors: an elementwise one on dense matrices is of any rank.
        """
        total = sum(ranks)
        return total if self.width is None else min(self.width(ranks, values), total)

    def values(self, given: Mapping[str, Any]) -> dict[str, Value]:
        """Every parameter's value: as given, else its default.

        Raises UsageError for a parameter that there is not, that is out of range or missing.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no parameter {name!r}",
                    hint=meant(name, known) or f"it has {', '.join(known) or 'none'}",
                )
        values = {}
        for name, parameter in known.items():
            if name in given:
                values[name] = parameter.read(given[name], self.name)
            elif parameter.default is None:
                raise UsageError(f"{self.name} needs {name}: {parameter.meaning}")
            else:
                values[name] = parameter.default
        if self.check:
            self.check(**values)
        return values

    def arguments(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Those of all `values` that the function takes."""
        return {name: value for name, value in values.items() if name != SCOPE.name}

    def check_count(self, count: int) -> None:
        """Raise UsageError where the method does not take so many adapters."""
        if count < self.least or (self.most is not None and count > self.most):
            wanted = f"at least {self.least}" if self.most is None else f"{self.least}"
            if self.most is not None and self.most != self.least:
                wanted = f"{self.least} to {self.most}"
            raise UsageError(f"{self.name} takes {wanted} adapters; there are {count}")


METHODS: dict[str, Method] = {}


def method(
    name: str,
    signature: Signature,
    *,
    parameters: Sequence[Parameter] = (),
    laws: Sequence[Law] = (),
    **fields: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the method `name`; `fields` are the others of `Method`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[name] = Method(
            name,
            signature,
            function,
            parameters=tuple(parameters),
            laws=frozenset(laws),
            **fields,
        )
        return function

    return register


def find(name: str) -> Method:
    """The method of this name. Raises UsageError that says which one may have been meant."""
    if name not in METHODS:
        raise UsageError(
            f"there is no method {name!r}",
            hint=meant(name, METHODS) or "adapterops methods lists them",
        )
    return METHODS[name]


@dataclass(frozen=True, slots=True)
class Cored:
    """The result of a spectral method: the core (R, R), and where it was cut.

    `cut` is the singular value at or below which directions were left out, `rank` how many were
    kept, `gap` σ_{k+1}/σ_k there: near 1 the choice is arbitrary. `gap` is 0
    where nothing had to be cut. `notes` are warnings. `fit` is, of methods that look for common
    subspaces, the share of the adapters' energy in those, and a bound of what any could hold.
    """

    core: Array
    cut: float
    rank: int
    gap: float
    notes: tuple[str, ...] = field(default=())
    fit: tuple[float, float] | None = None
