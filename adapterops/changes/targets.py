"""What baking does to each tensor of a base model, known from headers and configs alone.

A stored tensor is seen as a matrix, its bytes in order: a linear weight (out, in), a Conv1D (in,
out), a convolution (out, in · kernel), an embedding (V, d), fused experts (E · rows, columns), a
bias (1, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from adapterops.extras import Extra
from adapterops.formats.model import Ref, Site


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a stored tensor as a matrix; a vector or a number is a row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


class Rows(Protocol):
    """A dense change of a stored tensor, row by row of its matrix."""

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows [start, stop) in float64, all columns."""
        ...


@dataclass(frozen=True, slots=True)
class Term:
    """One input's low-rank change of a part of a stored matrix: coefficient · B·A, or (B·A)ᵀ.

    `rows` and `columns` have a start, a stop and a step above 0, and as many indices as ΔW has
    outputs and inputs, inputs and outputs if `turned`: the part is then stored as (in, out), or,
    for an embedding, (V, d). coefficient = fl64(weight · scale). `outputs` and `inputs` are those
    of the module's ΔW that the part holds, all if None: of one fused projection each of several
    stored ones holds some.
    """

    input: int
    coefficient: float
    site: Site
    rows: slice
    columns: slice
    turned: bool = False
    outputs: slice | None = None
    inputs: slice | None = None

    def factors(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """B (outputs, rank) and A (rank, inputs) of the part in float64, without coefficient.

        Raises as `Site.factors` does.
        """
        B, A = self.site.factors()
        return B[self.outputs or slice(None)], A[:, self.inputs or slice(None)]


@dataclass(frozen=True, slots=True)
class DenseTerm:
    """One input's dense change of a whole stored matrix: coefficient · `change()`.

    DoRA, an adapter with a residual, a full delta, a shift of a bias. `module` is what the adapter
    calls it. The change is opened when needed and kept no longer: it holds its module's factors,
    and at most `held` bytes beside blocks of rows.
    """

    input: int
    coefficient: float
    module: str
    change: Callable[[], Rows]
    held: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the result that is a stored tensor plus a change.

    `name` is the tensor's in the result, `ref` what it starts as (an untied head starts as the
    embedding). `inputs` says which axis of the matrix the inputs of the layer run along: rows, if
    it is stored as (in, out).
    """

    name: str
    ref: Ref
    matrix: tuple[int, int]
    terms: tuple[Term, ...] = ()
    dense: tuple[DenseTerm, ...] = ()
    inputs: Literal["columns", "rows"] = "columns"


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor of the result that is given values: a head, a bias, token rows, a grown embedding.

    `rows` are those of its first axis that `extra` holds values of, all if None; the others start
    as `ref`'s, which is None where the base has no such tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extra: Extra
    rows: tuple[int, ...] | None = None
    ref: Ref | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that baking changes; all other tensors of the base are copied bit by bit.

    `targets`, `values` and `copies` are by the tensor's name in the result, names of pipelines with
    their folder in front, as in BaseModel.tensors. `copies` are tensors that the base lacks and
    that equal one it has (an untied head that no adapter changes). `config` are, by the part of a
    pipeline ("" of a single model), the entries of config.json that change, nested as there.
    `modules` is how many modules of the adapters make the targets, `left_out` those that --modules
    excludes, `dropped` extras left out by policy.
    """

    targets: Mapping[str, Target]
    values: Mapping[str, Values] = field(default_factory=dict)
    copies: Mapping[str, Ref] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules: int = 0
    left_out: int = 0
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
