"""Recipes as mergekit has them: models with their weights, as a call of merge or bake.

    merge_method: ties
    models:
      - model: code
        parameters: {weight: [{filter: self_attn, value: 0.5}, {value: 1}]}
      - model: docs
        parameters: {weight: 0.3}
    parameters: {density: 0.2, normalize: true}
    dtype: bfloat16

The models are adapters, and names mean what they mean here: parameters that are left out have the
defaults of `adapterops methods`, `dtype` is what is written, and a base model is for bake. Other
keys are the verb's. How weights by filters are read: `filters`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterops.recipe.calls import MERGEKIT, Call, Verb, call_of, unknown
from adapterops.recipe.document import Document, Key, offered, shown
from adapterops.recipe.filters import Weight, read_weight, rules
from adapterops.recipe.fitting import placed
from adapterops.recipe.parameters import check_parameters, method_at
from adapterops.rules.registry import Method

_VERBS = ("merge", "bake")
_OWN = {  # what stands in the place of the verb's own keys
    "models": "adapters",
    "merge_method": "method",
    "base_model": "base",
}
_MODEL = ("model", "parameters")
_SAME = {"task_arithmetic": "linear"}
_NOT_HERE = {
    "slices": "layers keep their places; module_weights has weights by layer",
    "modules": "the adapters are listed under models",
    "tokenizer": "tokenizer files are carried along where they agree",
    "tokenizer_source": "tokenizer files are carried along where they agree",
    "chat_template": "tokenizer files are carried along where they agree",
    "out_dtype": "dtype is what is written",
    "int8_mask": "it changes nothing here; leave it away",
}


@dataclass(frozen=True, slots=True)
class _Model:
    """One entry of `models`, which stands at `key`."""

    key: Key
    path: str
    parameters: Mapping[str, Any]


def call_of_mergekit(document: Document, verb: Verb, folder: str) -> Call:
    """The call that such a recipe is. Raises UsageError, with the place, for what it cannot be."""
    recipe: Mapping[str, Any] = document.value
    mark = next(key for key in recipe if key in MERGEKIT)
    if verb.name not in _VERBS:
        raise document.error((mark,), f"is for {' and '.join(_VERBS)}, not for {verb.name}")
    for other, own in _OWN.items():
        if own in recipe:
            raise document.error((own,), f"is called {other} in a recipe with {mark}")
    entries = {
        key: value for key, value in recipe.items() if key not in (*_OWN, "parameters", "verb")
    }
    for key in entries:
        if key in verb.keys and key != "weights":
            continue
        if key in _NOT_HERE:
            raise document.error((key,), "is not read here", _NOT_HERE[key])
        raise unknown(document, (key,), verb)
    name = recipe.get("merge_method", "linear")
    method = _method(document, name)
    shared = _mapping(document, ("parameters",), recipe.get("parameters"))
    models = _adapters(document, _models(document, recipe, folder), recipe, verb, method)
    weights = _weights(document, models, shared)
    parameters = _parameters(document, method, models, shared)
    has_base = any(model.path == recipe.get("base_model") for model in models)
    warnings = _warnings(verb, name, recipe, weights, shared, has_base)
    entries |= {"adapters": [model.path for model in models]}
    entries |= {"method": method.name} if method.name != "linear" else {}
    entries |= {"parameters": parameters} if parameters else {}
    if weights:
        entries["weights"] = [weight.value for weight in weights]
        added = rules(document, [model.key for model in models], weights)
        own = entries.get("module_weights", [])
        if added and isinstance(own, list | tuple):  # they come later, and so win
            entries["module_weights"] = [*added, *own]
    if verb.name == "bake" and "base_model" in recipe:
        entries["base"] = recipe["base_model"]
    keys: dict[str, Key] = {"adapters": ("models",), "base": ("base_model",)}
    return Call(verb, call_of(verb, document, entries, folder, keys).arguments, warnings)


def _method(document: Document, name: Any) -> Method:
    if not isinstance(name, str):
        raise document.error(("merge_method",), f"is {shown(name)}; expected a name")
    return method_at(document, ("merge_method",), _SAME.get(name, name))


def _mapping(document: Document, key: Key, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise document.error(key, f"is {shown(value)}; expected a mapping")
    return value


def _models(document: Document, recipe: Mapping[str, Any], folder: str) -> list[_Model]:
    """All that are listed, the base model among them."""
    given = recipe.get("models")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise document.error(("models",), "expected a list of adapters: - model: PATH")
    found = []
    for index, item in enumerate(given):
        key: Key = ("models", index)
        entry = _mapping(document, key, item)
        for name in entry:
            if name not in _MODEL:
                raise document.error((*key, name), "is no key of a model", offered(name, _MODEL))
        path = entry.get("model")
        if not isinstance(path, str | os.PathLike):
            raise document.error((*key, "model"), f"is {shown(path)}; expected a path")
        if "+" in os.fspath(path) and not os.path.lexists(placed(path, folder)):
            raise document.error(
                (*key, "model"),
                f"{shown(os.fspath(path))} is a model with a LoRA, as mergekit has them",
                "give the LoRA alone; with verb: bake the model is base_model",
            )
        parameters = _mapping(document, (*key, "parameters"), entry.get("parameters"))
        found.append(_Model(key, os.fspath(path), parameters))
    return found


def _adapters(
    document: Document,
    models: Sequence[_Model],
    recipe: Mapping[str, Any],
    verb: Verb,
    method: Method,
) -> list[_Model]:
    """The adapters; the base model, which mergekit's recipes list too, is none of them.

    But of two models that slerp goes between mergekit calls the one it starts from the base.
    """
    base = recipe.get("base_model")
    found = [model for model in models if model.path != base]
    if not found:
        raise document.error(("models",), "lists the base model alone")
    if verb.name == "merge" and len(found) < method.least and len(models) == method.most:
        return [*(model for model in models if model.path == base), *found]
    return found


def _weights(
    document: Document, models: Sequence[_Model], shared: Mapping[str, Any]
) -> list[Weight]:
    """One weight for each model, its own or the one of all; [] where there is none at all."""
    having = [model for model in models if "weight" in model.parameters]
    if not having and "weight" not in shared:
        return []
    found = []
    for model in models:
        own = "weight" in model.parameters
        if not own and "weight" not in shared:
            raise document.error(
                (*model.key, "parameters"), "has no weight, and others have", "give each one"
            )
        key = (*model.key, "parameters", "weight") if own else ("parameters", "weight")
        value = (model.parameters if own else shared)["weight"]
        found.append(read_weight(document, key, value, shared.get("weight") if own else None))
    return found


def _parameters(
    document: Document, method: Method, models: Sequence[_Model], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters of the method: those of all models, and what every model has alike."""
    known = {parameter.name: parameter for parameter in method.parameters}
    places: dict[str, Key] = {name: ("parameters", name) for name in shared}
    values = dict(shared)
    for model in models:
        for name, value in model.parameters.items():
            if name == "weight":
                continue
            key = (*model.key, "parameters", name)
            if name not in known:
                hint = _NOT_HERE.get(name) or offered(name, ("weight", *known))
                raise document.error(key, f"{method.name} has no such parameter", hint)
            if any(name not in m.parameters or m.parameters[name] != value for m in models):
                raise document.error(
                    key,
                    f"{method.name} takes one {name} for all adapters",
                    f"give it once, as parameters.{name}",
                )
            places[name], values[name] = key, value
    values.pop("weight", None)
    for name, value in values.items():
        if name in known and isinstance(value, Mapping | list):
            raise document.error(places[name], "expected one value; filters are for weight")
    check_parameters(document, method, values, places, _NOT_HERE)
    return values


def _warnings(
    verb: Verb,
    name: str,
    recipe: Mapping[str, Any],
    weights: Sequence[Weight],
    shared: Mapping[str, Any],
    has_base: bool,
) -> tuple[str, ...]:
    """Where mergekit would do something else with the same recipe; `has_base`: it is merged too."""
    found = []
    if verb.name == "merge" and "base_model" in recipe and not has_base:
        found.append(
            "base_model is not used: adapters are changes already; verb: bake adds them to it"
        )
    total = sum(weight.value for weight in weights)
    if name == "linear" and "normalize" not in {*shared, *recipe} and total not in (0.0, 1.0):
        found.append(
            f"the weights add up to {total:g} and are used as they are; mergekit would divide by "
            "it, and parameters: {normalize: true} does"
        )
    return tuple(found)
