"""Resized vocabularies and new classes: what the shapes of tensors ask of the configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterops.basemodel import BaseModel
from adapterops.changes import entries
from adapterops.changes.targets import Target, Values
from adapterops.errors import IncompatibleError

_CLASSIFIER = re.compile(r"(.*\.)?(score|classifier|classifier\.out_proj)\.weight")


def is_tokens(base: BaseModel, name: str) -> bool:
    """Whether a tensor of the base has a row for each token: embedding, head, or its bias."""
    weight = f"{name.removesuffix('.bias')}.weight"
    return base.is_tokens(name) or base.is_head(name) or base.is_head(weight)


def check(base: BaseModel, rows: Mapping[str, int]) -> None:
    """Raise IncompatibleError where embedding and head would differ in their number of tokens.

    `rows` are what they are going to have, by name.
    """
    before = {name: base.tensors[name].shape[0] for name in rows if name in base.tensors}
    if len(set(rows.values())) > 1 and any(before.get(n) != count for n, count in rows.items()):
        (one, many), *_, (other, few) = sorted(rows.items(), key=lambda item: -item[1])
        raise IncompatibleError(
            f"{one!r} would have {many} tokens and {other!r} {few}: the adapters carry a resized "
            "vocabulary for one of the two only",
            path=base.path,
            hint="save the adapter again with both resized and save_embedding_layers=True",
        )


def entries_of(
    base: BaseModel, values: Mapping[str, Values], targets: Mapping[str, Target]
) -> dict[str, Mapping[str, Any]]:
    """The entries of configs, by part, that a resized vocabulary and new classifiers change."""
    rows = {name: value.shape[0] for name, value in values.items() if value.shape}
    rows |= {name: target.matrix[0] for name, target in targets.items()}
    config: dict[str, Mapping[str, Any]] = {}
    for name, count in rows.items():
        part = base.part(name)
        given = base.configs.get(part, {})
        found: Mapping[str, Any] = {}
        if name in base.tensors and base.is_tokens(name) and count != base.tensors[name].shape[0]:
            found = entries.vocabulary(given, count)
        elif name not in base.tensors and _CLASSIFIER.fullmatch(name):
            found = entries.labels(given, count)
        if found and given:
            config[part] = entries.merged(config.get(part, {}), found)
    return config
