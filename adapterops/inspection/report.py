"""What `inspect` reports of one adapter: what its headers say, on request its singular values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from adapterops.certificate import plain
from adapterops.inspection.spectra import SpectrumReport


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module: ΔW is `shape` = (out, in · kernel).

    `rank` counts the columns of its factors, an upper bound of the rank of ΔW; `dim` is the rank it
    was trained with, which alpha is divided by. `scale` is None where nothing says it.
    """

    dialect: str
    kind: str
    layer: str
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    rank: int
    dim: int
    scale: float | None
    scale_from: str
    alpha: float | None
    dtype: str
    parameters: int


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """Modules whose paths differ in indices only: one type of layer.

    `where` are the indices, `missing` those that other types of the same blocks have.
    """

    name: str
    modules: int
    where: str
    missing: str
    kinds: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    dims: tuple[int, ...]
    scales: tuple[float | None, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class ScaleInfo:
    """A scale, the alpha it was made from (None where assumed), where it was found, how often."""

    scale: float | None
    alpha: float | None
    origin: str
    modules: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Tensors that are no factors, those grouped whose names differ in indices only."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """One adapter as its files describe it.

    Modules are counted by `dialects`, `kinds`, `layer_types`, `ranks` (columns of the factors) and
    `dims` (trained ranks); `dtypes` counts tensors. `parameters` are those of the factors,
    `adapted` those of the weights they change, `base_parameters` those of the whole base where it
    was given. `size` is the bytes of the weights file. `unread` are tensors of modules with a
    problem. `notes` deserve attention; `problems` are reasons why it cannot be merged. `output` is
    the picture that was drawn, `skipped` if it was there already.
    """

    schema: ClassVar[str] = "adapterops.inspect/1"

    path: str
    weights_file: str
    config_file: str | None
    dialect: str
    dialects: Mapping[str, int]
    kinds: Mapping[str, int]
    layer_types: Mapping[str, int]
    base: str | None
    module_count: int
    ranks: Mapping[int, int]
    dims: Mapping[int, int]
    scales: tuple[ScaleInfo, ...]
    dtypes: Mapping[str, int]
    size: int
    parameters: int
    kind_parameters: Mapping[str, int]
    adapted: int
    base_parameters: int | None
    extras: tuple[TensorInfo, ...]
    deltas: tuple[TensorInfo, ...]
    unread: tuple[TensorInfo, ...]
    side_files: tuple[str, ...]
    provenance: Mapping[str, Any] | None
    notes: tuple[str, ...]
    problems: tuple[Mapping[str, Any], ...]
    families: tuple[FamilyInfo, ...] = ()
    modules: Mapping[str, ModuleInfo] = field(default_factory=dict)
    spectrum: SpectrumReport | None = None
    output: str | None = None
    skipped: bool = False

    def to_dict(self, *, modules: bool = True) -> dict[str, Any]:
        """The adapter's entry in the document that `--json` prints, single modules on request."""
        result = {
            name: plain(getattr(self, name))
            for name in (item.name for item in fields(self))
            if name != "modules"
        }
        if modules:
            result["modules"] = plain(self.modules)
        elif self.spectrum is not None:
            del result["spectrum"]["modules"]
        return result


def summary(adapters: Sequence[Inspection]) -> dict[str, Any]:
    """Counts over many adapters: how many there are of each dialect, kind, rank and base."""

    def counted(values: Iterable[Any]) -> dict[str, int]:
        ordered = Counter(values).most_common()
        return {str(value): count for value, count in ordered}

    return {
        "adapters": len(adapters),
        "unmergeable": sum(bool(adapter.problems) for adapter in adapters),
        "noted": sum(bool(adapter.notes) for adapter in adapters),
        "bytes": sum(adapter.size for adapter in adapters),
        "parameters": sum(adapter.parameters for adapter in adapters),
        "dialects": counted(adapter.dialect for adapter in adapters),
        "kinds": counted(kind for adapter in adapters for kind in adapter.kinds),
        "ranks": counted(max(adapter.ranks, default=0) for adapter in adapters),
        "bases": counted(adapter.base for adapter in adapters if adapter.base),
    }
