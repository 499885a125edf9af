"""Entries of a config.json that follow from the tensors written: tied weights, vocabulary, labels.

Models of several parts (text and images) keep the text model's entries in a config of its own,
below the model's; loaders look at either or both (transformers 5.23, `LlavaConfig.__post_init__`
takes `tie_word_embeddings` from there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.basemodel import config as configs

_Path = tuple[str, ...]
_Level = tuple[_Path, Mapping[str, Any]]
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "decoder_config")
_OTHERS = ("vision", "audio", "image", "speech", "quantization")
_TIE, _SIZE = "tie_word_embeddings", "vocab_size"


def tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a config, or the text model's in it, ties the head to the embedding.

    None where nothing says so and the architecture's default is not known here.
    """
    said = [level[_TIE] for _, level in _levels(config) if level.get(_TIE) is not None]
    return any(map(bool, said)) if said else configs.is_tied(config)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that untie the head at every level where it is tied or might be by default."""
    return _nested(
        {path: {_TIE: False} for path, at in _levels(config) if at.get(_TIE) is not False}
    )


def vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The entries that say how many tokens there are, wherever one does; {} where all are right.

    Where none says it, it is the text model's to say.
    """
    levels = dict(_levels(config))
    found = [path for path, level in levels.items() if level.get(_SIZE) is not None]
    wrong = [p for p in found or [max(levels, key=len)] if levels[p].get(_SIZE) != rows]
    return _nested({path: {_SIZE: rows} for path in wrong})


def labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The entries that name `count` classes as transformers does by default; {} if there are."""
    given = config.get("id2label")
    have = len(given) if isinstance(given, Mapping) else config.get("num_labels") or 2
    if have == count:
        return {}
    names = {str(k): f"LABEL_{k}" for k in range(count)}
    entries: dict[str, Any] = {"num_labels": count} if "num_labels" in config else {}
    return {**entries, "id2label": names, "label2id": {n: int(k) for k, n in names.items()}}


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested sets of entries as one; the second's win."""
    result = dict(one)
    for key, value in other.items():
        mine = result.get(key)
        both = isinstance(mine, Mapping) and isinstance(value, Mapping)
        result[key] = merged(mine, value) if both and mine is not None else value
    return result


def _levels(
    config: Mapping[str, Any], path: _Path = ()
) -> Iterator[tuple[_Path, Mapping[str, Any]]]:
    """The config and those of text models in it, each with the keys that lead there."""
    yield path, config
    for key, below in config.items():
        if not isinstance(below, Mapping) or key.startswith(_OTHERS):
            continue
        if key in _TEXT or _TIE in below or _SIZE in below:
            yield from _levels(below, (*path, key))


def _nested(entries: Mapping[_Path, Mapping[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, found in entries.items():
        below: Mapping[str, Any] = found
        for key in reversed(path):
            below = {key: below}
        result = merged(result, below)
    return result
