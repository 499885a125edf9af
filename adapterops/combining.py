"""Merge methods on adapters: what a user asks for, as a rule, and what the rule makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops.activations import Activations as Opened
from adapterops.activations import for_modules, open_activations
from adapterops.adapter import Adapter
from adapterops.derive import derived
from adapterops.derived.rule import Rule
from adapterops.errors import UsageError
from adapterops.formats.components import lined_up
from adapterops.formats.model import AdapterFile
from adapterops.inputs import Input, flat, open_inputs
from adapterops.options import as_seed, check_weights
from adapterops.rules.registry import METHODS, find
from adapterops.weighting import chosen

Path = str | os.PathLike[str]
Activations = Path | Sequence[Path] | None
_LINEAR = "linear"


def combine(
    method: str,
    adapters: Input | Iterable[Input],
    weights: Sequence[float] | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    space: str = "dense",
    seed: int = 0,
    calibrate: str | None = None,
    match_norm: str | None = None,
    activations: Activations = None,
    modules: str | None = None,
    module_weights: Sequence[str] = (),
    alpha: float | Mapping[Any, float] | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """The adapter that a merge method makes of others. Only headers are read.

    Args:
        method: one of `adapterops methods`.
        adapters: paths or Adapters, one or several.
        weights: one finite number per adapter; 1 each by default.
        parameters: of the method, by name.
        space: of methods that compare entries: "dense", those of ΔW; "core" or "knots", those in
            bases that the adapters share (Core space, KnOTS).
        seed: of methods that draw at random.
        calibrate: "pico" before the method, "svc" after it.
        match_norm: scale the result to the mean, max or sum of the adapters' norms, by module.
        activations: a file of the inputs of modules, or one for each adapter, of methods that ask
            for them.
        modules: regular expression that a module path must match as a whole.
        module_weights: weights of single modules, see `merge`.
        alpha, allow_pickle: as in `merge`.

    Raises:
        AdapterOpsError: one of the tree in `adapterops.errors`.
    """
    rule = rule_for(method, parameters, space, seed, calibrate, match_norm)
    given = [adapters] if isinstance(adapters, str | os.PathLike | Adapter) else list(adapters)
    names = [repr(item) if isinstance(item, Adapter) else os.fspath(item) for item in given]
    checked = check_weights(
        [1.0] * len(given) if weights is None else weights, names, normalize=False
    )
    opened = open_inputs(given, alpha=alpha, allow_pickle=allow_pickle)
    files, found = terms(opened, checked, rule, modules, module_weights, activations)
    return Adapter(tuple(zip(found, files, strict=True)))


def rule_for(
    method: str,
    parameters: Mapping[str, Any] | None = None,
    space: str = "dense",
    seed: int = 0,
    calibrate: str | None = None,
    match_norm: str | None = None,
) -> Rule:
    """A method as it is meant. Raises UsageError for what there is not, or not together."""
    found = find(method)
    return Rule(
        found,
        found.values(parameters or {}),
        space,  # type: ignore[arg-type]  # checked by Rule, as are the two below
        as_seed(seed),
        calibrate,  # type: ignore[arg-type]
        match_norm,  # type: ignore[arg-type]
    )


def terms(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rule: Rule,
    modules: str | None = None,
    module_weights: Sequence[str] = (),
    activations: Activations = None,
) -> tuple[list[AdapterFile], list[float]]:
    """Adapter files, and weights, whose sum is what the rule makes of some adapters."""
    if is_plain(rule):
        _check_activations(rule, activations)
    if is_plain(rule) and not module_weights:
        return flat(adapters, weights)
    files = lined_up([whole(adapter) for adapter in adapters])
    found = list(weights)
    if module_weights:
        from adapterops.moduleweights.apply import apply

        files, found = apply(files, found, module_weights)
    if is_plain(rule):
        return files, found
    return [made(files, found, rule, modules, activations)], [1.0]


def made(
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    rule: Rule,
    modules: str | None = None,
    activations: Activations = None,
) -> AdapterFile:
    """The adapter that the rule makes of others; it says by which activations."""
    _check_activations(rule, activations)
    given = _opened(activations)
    inputs = [
        for_modules(one, chosen(file, modules), file.base)
        for one, file in zip(_for_each(given, len(files)), files, strict=False)
    ]
    found = derived(files, weights, rule, modules, inputs)
    digests = {"activations": [each.digest for each in given]} if given else {}
    return replace(found, made_by={**found.made_by, **digests})


def _check_activations(rule: Rule, activations: Activations) -> None:
    needed = "activations" in rule.method.needs
    if needed and activations is None:
        raise UsageError(
            f"{rule.method.name} needs the inputs of the modules: give --activations FILE",
            hint="one for all adapters or one for each, in their order; "
            "examples/collect_activations.py makes them",
        )
    if activations is not None and not needed:
        raise UsageError(f"{rule.method.name} takes no --activations", hint="regmean does")


def _for_each(opened: list[Opened], count: int) -> list[Opened]:
    """The files of activations: one for each adapter, or none at all."""
    if len(opened) not in (0, 1, count):
        raise UsageError(
            f"--activations: {len(opened)} files for {count} adapters; one, or {count}"
        )
    return opened * count if len(opened) == 1 else opened


def _opened(activations: Activations) -> list[Opened]:
    if activations is None:
        return []
    if isinstance(activations, str | os.PathLike):
        return [open_activations(activations)]
    return [open_activations(path) for path in activations]


def is_plain(rule: Rule) -> bool:
    """Whether it is the weighted sum itself, which needs no rule."""
    modified = rule.calibrate or rule.match_norm or any(rule.values.values())
    return rule.method.name == _LINEAR and not modified


def whole(adapter: Adapter) -> AdapterFile:
    """An adapter as one file: a sum of several is made into one, exactly."""
    if len(adapter.terms) == 1 and adapter.terms[0][0] == 1.0:
        return adapter.terms[0][1]
    if not adapter.terms:
        raise UsageError("an adapter of no terms has no modules")
    method = METHODS[_LINEAR]
    files = [file for _, file in adapter.terms]
    return derived(files, [weight for weight, _ in adapter.terms], Rule(method, method.values({})))


def recorded(
    rule: Rule, module_weights: Sequence[str] = (), activations: Activations = None
) -> dict[str, Any]:
    """What of it decides an output's tensors."""
    digests = [each.digest for each in _opened(activations)] or None
    found: dict[str, Any] = {
        "module_weights": list(module_weights) or None,
        "activations": digests,
    }
    return found if is_plain(rule) else {**rule.record, **found}
