"""Planning a weighted sum from headers alone: which modules, whose factors, what output."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from adapterops.casts import DTYPE_NAMES
from adapterops.errors import IncompatibleError, NumericsError, UnsupportedError, UsageError
from adapterops.formats.model import AdapterFile, Layer, Site
from adapterops.formats.names import translate

# SDXL's kohya files name SGM blocks; its cross attention reads 2048 numbers, SD 1's and 2's fewer.
_SDXL_CONTEXT = 2048
_SMALLEST, _LARGEST = 1e-30, 1e30
_CONTEXT = re.compile(r"attn2[._]to_k$")


@dataclass(frozen=True, slots=True)
class Part:
    """One input's share of a module: coefficient = fl64(weight · scale)."""

    input: int
    coefficient: float
    site: Site


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the result and the factor pairs that make it up."""

    stem: str
    layer: Layer
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def columns(self) -> int:
        """Σ rᵢ: an upper bound of the result's rank."""
        return sum(part.site.rank for part in self.parts)

    @property
    def bound(self) -> int:
        """The largest rank that the result can have."""
        return min(self.columns, *self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a factor is read."""

    inputs: tuple[AdapterFile, ...]
    weights: tuple[float, ...]
    modules: tuple[Module, ...]
    dialect: str
    dtype: str
    left_out: int
    warnings: tuple[str, ...]

    @property
    def live(self) -> list[AdapterFile]:
        """The inputs that have a say: those of non-zero weight."""
        return [file for file, w in zip(self.inputs, self.weights, strict=True) if w]

    @property
    def input_rank(self) -> int:
        """The largest rank among the inputs."""
        return max(part.site.rank for module in self.modules for part in module.parts)

    @property
    def bound(self) -> int:
        """The largest uniform rank that loses nothing whatever the values are."""
        return max(module.bound for module in self.modules)

    def parameters(self, rank: int) -> int:
        """Numbers in the output's factors at a uniform rank."""
        return rank * sum(sum(module.shape) for module in self.modules)

    @property
    def dense(self) -> int:
        """Numbers in the dense deltas."""
        return sum(math.prod(module.shape) for module in self.modules)


def align(
    inputs: Sequence[AdapterFile],
    weights: Sequence[float],
    *,
    modules: str | None = None,
    dtype: str = "keep",
    to: str | None = None,
) -> Plan:
    """Match the inputs' modules by stem and check that they go together.

    A module that an input lacks counts as zero for it. Raises IncompatibleError for shapes that
    differ or nothing in common, UsageError for an unknown dtype or a pattern without matches.
    """
    warnings = [note for file in inputs for note in file.notes]
    for file, weight in zip(inputs, weights, strict=True):
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} of {file.path} is not a finite number")
    _check_dialects(inputs)
    _check_overlap(inputs)
    gathered: dict[str, list[Part]] = defaultdict(list)
    for index, (file, weight) in enumerate(zip(inputs, weights, strict=True)):
        for stem, site in file.sites.items():
            if weight != 0.0:
                _check_coefficient(weight * site.scale, weight, file, stem)
                gathered[stem].append(Part(index, weight * site.scale, site))
    if not gathered:
        raise NumericsError("every weight is zero: the result is nothing but zeros")
    chosen, left_out = _select(gathered, modules)
    names = _output_names(chosen, inputs[0], to or inputs[0].dialect)
    result = tuple(
        _module(stem, name, tuple(chosen[stem]), inputs) for stem, name in sorted(names.items())
    )
    warnings += _base_warnings(inputs) + _orientation_warnings(inputs)
    if not any(module.columns for module in result):
        raise IncompatibleError("all adapters have rank 0: there is nothing to write")
    return Plan(
        inputs=tuple(inputs),
        weights=tuple(weights),
        modules=result,
        dialect=to or inputs[0].dialect,
        dtype=_dtype(dtype, inputs[0]),
        left_out=left_out,
        warnings=tuple(warnings),
    )


def _check_dialects(inputs: Sequence[AdapterFile]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        if other.dialect != first.dialect:
            raise UnsupportedError(
                f"{first.path} is in the {first.dialect} dialect, {other.path} in {other.dialect}; "
                "matching module names across dialects is not supported yet",
                hint="convert one of them with the tool that wrote it",
            )


def _output_names(chosen: dict[str, list[Part]], first: AdapterFile, to: str) -> dict[str, str]:
    """stem -> the module's name in the output's dialect."""
    stems = sorted(chosen)
    if to == first.dialect:
        return {stem: stem for stem in stems}
    names = translate(stems, first.dialect, to)
    sites = [(stem, part.site) for stem in stems for part in chosen[stem]]
    odd = [stem for stem, s in sites if s.layer == "embedding" or "bias" in s.parts]
    if odd:
        raise IncompatibleError(
            f"--to {to}: an embedding or a bias has no place in that dialect", module=odd[0]
        )
    wide = [stem for stem, s in sites if s.shape[1] == _SDXL_CONTEXT and _CONTEXT.search(stem)]
    if names is None or ("kohya" in (to, first.dialect) and wide):
        raise IncompatibleError(
            f"--to {to}: not every module of this {first.dialect} adapter has a name there "
            f"(the first is {stems[0]!r}); fused and split projections and SGM names differ in "
            "more than spelling",
            path=first.path,
            hint=f"leave --to away to write {first.dialect}",
        )
    return names


def _check_coefficient(coefficient: float, weight: float, file: AdapterFile, stem: str) -> None:
    """Products of two such factors must neither vanish nor overflow in float64."""
    if not _SMALLEST <= abs(coefficient) <= _LARGEST:
        raise UsageError(
            f"the weight {weight:g} makes its coefficient {coefficient:g}; coefficients from "
            f"{_SMALLEST:g} to {_LARGEST:g} can be computed with",
            path=file.path,
            module=stem,
        )


def _check_overlap(inputs: Sequence[AdapterFile]) -> None:
    """Every input must share a module with some other one."""
    owners: dict[str, int] = defaultdict(int)
    for file in inputs:
        for stem in file.sites:
            owners[stem] += 1
    for file in inputs:
        if len(inputs) > 1 and not any(owners[stem] > 1 for stem in file.sites):
            other = next(item for item in inputs if item is not file)
            raise IncompatibleError(
                f"has no module in common with the other inputs: it names "
                f"{next(iter(file.sites))!r}, {other.path} names {next(iter(other.sites))!r}; "
                "are they adapters of the same base model?",
                path=file.path,
            )


def _select(
    gathered: dict[str, list[Part]], pattern: str | None
) -> tuple[dict[str, list[Part]], int]:
    if pattern is None:
        return gathered, 0
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--modules {pattern!r} is no regular expression ({error})") from None
    chosen = {stem: parts for stem, parts in gathered.items() if compiled.fullmatch(stem)}
    if not chosen:
        raise UsageError(
            f"--modules {pattern!r} matches none of the {len(gathered)} modules as a whole",
            hint=f"the first is {min(gathered)!r}",
        )
    return chosen, len(gathered) - len(chosen)


def _module(stem: str, name: str, parts: tuple[Part, ...], inputs: Sequence[AdapterFile]) -> Module:
    first = parts[0].site
    for part in parts[1:]:
        site = part.site
        if site.shape != first.shape or _extent(site.kernel) != _extent(first.kernel):
            raise IncompatibleError(
                f"{inputs[parts[0].input].path} has {_describe(first)}, "
                f"{inputs[part.input].path} has {_describe(site)}; "
                "are both adapters of the same base model?",
                module=stem,
            )
        if "embedding" in (site.layer, first.layer) and site.layer != first.layer:
            raise IncompatibleError(
                f"is an {first.layer} layer in {inputs[parts[0].input].path} and a {site.layer} "
                f"layer in {inputs[part.input].path}",
                module=stem,
            )
    shaped = next((part.site for part in parts if part.site.kernel), first)
    return Module(name, shaped.layer, first.shape, shaped.kernel, parts)


def _extent(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution is a linear layer."""
    return kernel if any(size != 1 for size in kernel) else ()


def _describe(site: Site) -> str:
    kernel = f", kernel={list(site.kernel)}" if site.kernel else ""
    return f"out={site.shape[0]}, in={site.shape[1] // math.prod(site.kernel)}{kernel}"


def _base_warnings(inputs: Sequence[AdapterFile]) -> list[str]:
    bases = {file.base: file for file in reversed(inputs) if file.base}
    if len(bases) < 2:
        return []
    shown = ", ".join(f"{base!r} ({bases[base].path})" for base in reversed(bases))
    return [f"the inputs name different base models: {shown}; their shapes agree"]


def _orientation_warnings(inputs: Sequence[AdapterFile]) -> list[str]:
    flags = {bool(file.config.get("fan_in_fan_out")): file.path for file in reversed(inputs)}
    if len(flags) < 2 or inputs[0].dialect != "peft":
        return []
    return [
        f"fan_in_fan_out is set in {flags[True]} and not in {flags[False]}; the first input's "
        "value is kept"
    ]


def _dtype(name: str, first: AdapterFile) -> str:
    if name == "keep":
        return first.dtype
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected keep, {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]
