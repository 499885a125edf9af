"""methods: what there is to merge by, with parameters, ranges, references and promises."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from adapterops.rules.laws import BREACHES, LAWS
from adapterops.rules.registry import METHODS, Method, Parameter, Signature, Value, find

_ORDER: tuple[Signature, ...] = ("gram", "core", "elements", "factors")


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter: `range` in words; one with the default None has to be given."""

    name: str
    kind: str
    default: Value | None
    range: str
    meaning: str


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A merge method. `laws` are promises and `breaks` what it lacks, each with its meaning.

    `signature` is what it looks at: "gram" (inner products of adapters), "core" (singular vectors),
    "elements" (entries), "factors". `least` and `most` are numbers of adapters, `needs` what it
    takes besides, `spaces` where entries may be compared.
    """

    schema: ClassVar[str] = "adapterops.methods/1"

    name: str
    signature: Signature
    summary: str
    reference: str
    parameters: tuple[ParameterInfo, ...]
    laws: dict[str, str]
    breaks: dict[str, str]
    least: int
    most: int | None
    needs: tuple[str, ...]
    spaces: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON has it."""
        return asdict(self)


def methods(name: str | None = None) -> list[MethodInfo]:
    """All merge methods, by what they look at and by name; of `name`, that one alone.

    Raises UsageError for a method that there is not, and says which one may have been meant.
    """
    chosen = METHODS.values() if name is None else [find(name)]
    ordered = sorted(chosen, key=lambda method: (_ORDER.index(method.signature), method.name))
    return [_info(method) for method in ordered]


def _info(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        signature=method.signature,
        summary=method.summary,
        reference=method.reference,
        parameters=tuple(_parameter(each) for each in method.parameters),
        laws={law: meaning for law, meaning in LAWS.items() if law in method.laws},
        breaks={each: meaning for each, meaning in BREACHES.items() if each in method.breaks},
        least=method.least,
        most=method.most,
        needs=tuple(sorted(method.needs)),
        spaces=method.spaces,
    )


def _parameter(one: Parameter) -> ParameterInfo:
    return ParameterInfo(one.name, one.kind, one.default, one.range, one.meaning)
