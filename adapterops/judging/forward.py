"""What rounding does to a module's outputs: ‖E·x‖ beside ‖D·x‖ and ‖W′·x‖ over measured inputs x.

W is the base's weight, W′ the merged one, D the change that was asked for, E = W′ − W − D. Norms
are root mean squares over the inputs of an activation file: of samples X (k, n) it is ‖E·Xᵀ‖/√k,
of second moments C (n, n) it is √tr(E·C·Eᵀ), out·in² multiplications for each of the three. E is
computed in float64, by blocks of rows; a weight stored as (in, out) is held whole, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapterops.activations import Activations, named
from adapterops.baking.bands import bands
from adapterops.baking.delta import Delta
from adapterops.baking.kernel import read_rows
from adapterops.certificate import plain, ratio, total
from adapterops.changes.targets import Target
from adapterops.errors import FormatError, IncompatibleError, NumericsError
from adapterops.formats.model import Ref
from adapterops.metric import Inputs, Kind

_BLOCK = 1 << 20  # elements
_SINGLE = 2.0**-24
_TOLERANCE = 1e-4  # as in `metric`

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # E, D and W′, rows of outputs


@dataclass(frozen=True, slots=True)
class ForwardError:
    """Root mean squares of a module's outputs: of the error, of the change and of all.

    `to_change` is error/change, `to_output` error/output, None where that is zero. An error below
    `floor` is noise: second moments are squares, stored in float32.
    """

    inputs: Kind
    error: float
    change: float
    output: float
    to_change: float | None
    to_output: float | None
    floor: float


@dataclass(frozen=True, slots=True)
class ForwardReport:
    """The modules by their tensor's name, their root sum of squares, tensors without activations.

    `to_change` and `to_output` are of the root sums of squares over all modules.
    """

    modules: Mapping[str, ForwardError]
    to_change: float | None
    to_output: float | None
    without: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        result: dict[str, Any] = plain(self)
        return result


def forward_errors(
    targets: Mapping[str, Target], baked: Mapping[str, Ref], activations: Activations
) -> ForwardReport:
    """The forward error of every target that the file has inputs of; `baked` are W′, by name.

    Names agree up to one prefix, on either side. Biases, embeddings and experts that share a
    tensor have no inputs there. Raises IncompatibleError for inputs or a W′ of another size and
    names that fit in several ways, FormatError for what are no second moments, NumericsError for
    NaN and infinities.
    """
    stems = {name.removesuffix(".weight"): name for name in targets if name.endswith(".weight")}
    found = {stems[stem]: module for stem, module in named(activations, stems, "base").items()}
    modules: dict[str, ForwardError] = {}
    seen: _Seen | None = None
    for name, module in found.items():
        target, inputs = targets[name], activations.modules[module]
        width = target.matrix[target.inputs == "columns"]
        if inputs.width != width:
            raise IncompatibleError(
                f"its inputs have {width} numbers in the base, {inputs.width} in the activations "
                f"of {activations.model}",
                path=activations.path,
                module=module,
                hint="collect activations from this base",
            )
        if baked[name].shape != target.ref.shape:
            raise IncompatibleError(
                f"{name!r} is {list(baked[name].shape)}, in the base {list(target.ref.shape)}",
                path=baked[name].source.path,
                hint="is it merged from this base?",
            )
        if seen is None or seen.inputs is not inputs:  # queries, keys and values share theirs
            seen = _Seen(inputs)
        modules[name] = _of_module(target, baked[name], seen)
    error, change, output = (
        total([getattr(each, part) for each in modules.values()])
        for part in ("error", "change", "output")
    )
    without = tuple(name for name in targets if name not in found)
    return ForwardReport(modules, ratio(error, change), ratio(error, output), without)


def _of_module(target: Target, baked: Ref, seen: _Seen) -> ForwardError:
    blocks = _by_rows(target, baked) if target.inputs == "columns" else _turned(target, baked)
    sums, size = [0.0, 0.0, 0.0], 0.0
    for parts in blocks:
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NumericsError(f"{target.name!r} holds NaN or infinities", path=baked.source.path)
        size += float(parts[0].square().sum())
        for index, part in enumerate(parts):
            sums[index] += seen.squares(part)
    error, change, output = (math.sqrt(max(each, 0.0)) for each in sums)
    return ForwardError(
        inputs=seen.inputs.kind,
        error=error,
        change=change,
        output=output,
        to_change=ratio(error, change),
        to_output=ratio(error, output),
        floor=math.sqrt(size * seen.blur),
    )


class _Seen:
    """A module's inputs; `blur` is what tr(E·C·Eᵀ) may be off by, in units of ‖E‖²."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        ref = inputs.ref
        values = read_rows(ref, (ref.shape[0], ref.shape[1]), 0, ref.shape[0])
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(
                f"{ref.name} holds NaN or infinities",
                path=ref.source.path,
                hint="collect the activations again, in float32",
            )
        self._is_gram = inputs.kind == "gram"
        self._values = values if self._is_gram else values.double()
        self.blur = 0.0
        if self._is_gram:
            self.blur = _SINGLE * float(torch.linalg.vector_norm(values, dtype=torch.float64))
            trace = float(values.diagonal().double().sum())
            lopsided = float((values - values.T).abs().max()) > _TOLERANCE * trace
            if lopsided or float(values.diagonal().min()) < 0:
                raise FormatError(
                    f"{ref.name} is not symmetric with a diagonal of 0 or more: it is no second "
                    "moment E[xxᵀ]",
                    path=ref.source.path,
                    hint="collect the activations again",
                )

    def squares(self, M: torch.Tensor) -> float:
        """The mean of ‖M·x‖² of float64 M (b, n)."""
        if not self._is_gram:
            return float((M @ self._values.T).square().sum()) / len(self._values)
        n = M.shape[1]
        step = max(1, _BLOCK // n)
        result = 0.0
        for start in range(0, n, step):  # C is symmetric: some of its rows are its columns
            part = self._values[start : start + step].double()
            result += float(((M @ part.T) * M[:, start : start + step]).sum())
        return result


def _by_rows(target: Target, baked: Ref) -> Iterator[Parts]:
    step = max(1, _BLOCK // max(1, target.matrix[1]))
    for band in bands(target):
        delta = Delta(target, band)
        for start in range(band.start, band.stop, step):
            stop = min(start + step, band.stop)
            before = read_rows(target.ref, target.matrix, start, stop).double()
            after = read_rows(baked, target.matrix, start, stop).double()
            D = delta.double(start, stop)
            yield after - before - D, D, after


def _turned(target: Target, baked: Ref) -> Iterator[Parts]:
    """Blocks of outputs of a weight stored as (in, out)."""
    rows, columns = target.matrix
    whole = [torch.empty(target.matrix) for _ in range(3)]
    at = 0
    for parts in _by_rows(target, baked):
        for held, part in zip(whole, parts, strict=True):
            held[at : at + len(part)] = part
        at += len(parts[0])
    step = max(1, _BLOCK // max(1, rows))
    for start in range(0, columns, step):
        E, D, after = (held[:, start : start + step].T.double() for held in whole)
        yield E, D, after
