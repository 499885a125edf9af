"""Adapters as a verb is given them: paths or Adapters, opened, with the alphas meant for each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Adapter
from adapterops.errors import UsageError
from adapterops.formats import AdapterFile, open_adapter_file, read_adapter
from adapterops.formats.components import lined_up
from adapterops.options import is_number

if TYPE_CHECKING:
    from adapterops.basemodel import BaseModel

Input = str | os.PathLike[str] | Adapter


def open_inputs(
    adapters: Input | Iterable[Input],
    *,
    alpha: float | Mapping[Any, float] | None = None,
    allow_pickle: bool = False,
) -> list[Adapter]:
    """The adapters named; a path has weight 1. `alpha` is one number or a mapping by path.

    Raises UsageError for an alpha that is not above 0 or is meant for none of the inputs, and
    whatever opening an adapter and `lined_up` raise.
    """
    if isinstance(adapters, str | os.PathLike | Adapter):
        adapters = [adapters]
    items = list(adapters)
    paths = {os.fspath(item) for item in items if not isinstance(item, Adapter)}
    default, single = _alphas(alpha, paths)
    return _together([_open(item, single, default, allow_pickle) for item in items])


def _together(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters, each module under one name in all of them."""
    lined = iter(lined_up([file for adapter in adapters for _, file in adapter.terms]))
    return [Adapter(tuple((weight, next(lined)) for weight, _ in one.terms)) for one in adapters]


def _alphas(
    alpha: float | Mapping[Any, float] | None, paths: set[str]
) -> tuple[float | None, dict[str, float]]:
    """The alpha for every path, and those for single ones."""
    default = None if isinstance(alpha, Mapping) else alpha
    single = {os.fspath(k): v for k, v in alpha.items()} if isinstance(alpha, Mapping) else {}
    for value in (*single.values(), default):
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise UsageError(f"alpha {value!r}: expected a number above 0")
    unknown = sorted(set(single) - paths)
    if unknown:
        raise UsageError(f"--alpha names {unknown[0]!r}, which is not among the inputs")
    return default, single


def flat(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[list[AdapterFile], list[float]]:
    """The files of some weighted adapters' terms, and their weights."""
    pairs = [
        (weight * inner, file)
        for adapter, weight in zip(adapters, weights, strict=True)
        for inner, file in adapter.terms
    ]
    return [file for _, file in pairs], [weight for weight, _ in pairs]


def open_one(
    adapter: Input, *, alpha: float | Mapping[Any, float] | None = None, allow_pickle: bool = False
) -> Adapter:
    """`open_inputs` of a verb that takes one adapter."""
    if not isinstance(adapter, str | os.PathLike | Adapter):
        raise UsageError(f"expected one path or Adapter, not {type(adapter).__name__}")
    return open_inputs([adapter], alpha=alpha, allow_pickle=allow_pickle)[0]


def open_rebased(
    adapter: Input,
    base: str | os.PathLike[str],
    residual: str | os.PathLike[str] | None = None,
    *,
    alpha: float | Mapping[Any, float] | None = None,
    allow_pickle: bool = False,
) -> tuple[Adapter, dict[str, str]]:
    """An adapter that may be relative to its base, and what identifies the models used.

    `residual` is the base as the adapter's initialisation left it. Raises what `read_adapter`,
    `open_model` and `rebase` raise.
    """
    from adapterops.basemodel import open_model
    from adapterops.rebased.kernels import with_kernels
    from adapterops.rebased.rebase import rebase

    if isinstance(adapter, Adapter):
        raise UsageError("an Adapter is open already; give the path of one that needs its base")
    path = os.fspath(adapter)
    default, single = _alphas(alpha, {path})
    file = read_adapter(
        path,
        alpha=single.get(path, default),
        alpha_wins=path in single,
        allow_pickle=allow_pickle,
    )
    models = {"base": open_model(base)}
    if residual is not None:
        models["residual"] = open_model(residual)
    rebased = rebase(with_kernels(file, models["base"]), models["base"], models.get("residual"))
    return Adapter(((1.0, rebased),)), {name: model.identity for name, model in models.items()}


def open_for_base(
    adapters: Sequence[Input],
    base: BaseModel,
    residual: str | os.PathLike[str] | None = None,
    *,
    alpha: float | Mapping[Any, float] | None = None,
    allow_pickle: bool = False,
) -> list[Adapter]:
    """Adapters of a base model that is at hand: those relative to it are made summable.

    `residual` is the base as their initialisation left it. Raises what `open_inputs` and `rebase`
    raise.
    """
    from adapterops.basemodel import open_model
    from adapterops.rebased.rebase import rebase

    paths = {os.fspath(item) for item in adapters if not isinstance(item, Adapter)}
    default, single = _alphas(alpha, paths)
    left = open_model(residual) if residual is not None else None

    def read(path: str, **how: Any) -> AdapterFile:
        return rebase(read_adapter(path, **how), base, left)

    return [_open(item, single, default, allow_pickle, read) for item in adapters]


def _open(
    item: Input,
    single: Mapping[str, float],
    default: float | None,
    allow_pickle: bool,
    read: Callable[..., AdapterFile] = open_adapter_file,
) -> Adapter:
    if isinstance(item, Adapter):
        return item
    path = os.fspath(item)
    file = read(
        path,
        alpha=single.get(path, default),
        alpha_wins=path in single,
        allow_pickle=allow_pickle,
    )
    return Adapter(((1.0, file),))
