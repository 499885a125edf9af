"""Findings about what travels with the factors: heads, biases, magnitudes, token rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.checking.config import is_peft
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.errors import AdapterOpsError
from adapterops.formats import AdapterFile, Ref, peft
from adapterops.formats.locate import read_text

# Heads that PEFT adds to modules_to_save for a task, of which a model has one (peft 0.21.2,
# `peft_model.py`).
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_ROWS = re.compile(r".*\.(token_adapter\.)?trainable_tokens_\w+")
# PEFT saves these where the vocabulary grew or they are targets (`get_peft_model_state_dict`).
_EMBEDDING = re.compile(
    r".*\b(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|shared|embeddings"
    r"|tok_embeddings|output)(\.base_layer)?\.weight"
)
_ADDED_TOKENS = "added_tokens.json"


def heads(file: AdapterFile) -> Findings:
    """Saved tensors that the config does not name, heads that it names and that are not there."""
    if not is_peft(file):
        return
    expected = _expected_heads(file.config)
    owners = {name: _owner(name) for name in file.extras}
    unlisted = [
        name
        for name, owner in owners.items()
        if not any(_is_below(owner, head) for group in expected for head in group)
        and not name.endswith(".bias")
        and not _ROWS.fullmatch(name)
        and not _EMBEDDING.fullmatch(name)
    ]
    if unlisted:
        yield finding(
            "head-unlisted",
            f"{plural(len(unlisted), 'tensor')} of modules that modules_to_save does not name: "
            f"{few(unlisted)}",
            hint="PEFT leaves them out on load; add the module to modules_to_save",
        )
    absent = [
        group
        for group in expected
        if not any(_is_below(owner, head) for owner in owners.values() for head in group)
    ]
    if absent:
        names = [" or ".join(group) for group in absent]
        yield finding(
            "head-missing",
            f"the config says that {few(names)} was trained, the file has no such tensor",
            hint="a loader makes one with random values",
        )


def _expected_heads(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Groups of saved modules of which the file must have at least one each."""
    saved = config.get("modules_to_save")
    names = dict.fromkeys(map(str, saved)) if isinstance(saved, list) else {}
    of_task = _HEADS.get(str(config.get("task_type")), ())
    groups = [of_task] if of_task else []
    return groups + [(name,) for name in names if name not in of_task]


def _owner(name: str) -> str:
    """The module that a saved tensor belongs to; live models' dumps name copies of it too."""
    path = name.removeprefix(peft.PREFIX).rpartition(".")[0]
    return re.sub(r"\.(modules_to_save(\.default)?|original_module)(?=\.|$)", "", path)


def _is_below(module: str, head: str) -> bool:
    """Whether a module is the head or in it, by PEFT's rule for modules_to_save."""
    return f".{head}." in f".{module}."


def biases(file: AdapterFile) -> Findings:
    """Trained biases against `bias` and `lora_bias` of the config."""
    if not is_peft(file):
        return
    setting = file.config.get("bias") or "none"
    expected = [head for group in _expected_heads(file.config) for head in group]
    trained = [
        name
        for name in file.extras
        if name.endswith(".bias") and not any(_is_below(_owner(name), head) for head in expected)
    ]
    beside = [site.parts["bias"].name for site in file.sites.values() if "bias" in site.parts]
    if trained and setting == "none":
        yield finding(
            "bias-unlisted",
            f"bias is 'none', and the file has {few(trained)}",
            hint="PEFT leaves them out on load; set bias to 'all' or 'lora_only'",
        )
    if beside and not file.config.get("lora_bias"):
        yield finding(
            "bias-unlisted",
            f"lora_bias is not set, and {plural(len(beside), 'tensor')} lora_B.bias are there, "
            f"such as {beside[0]}",
            hint="PEFT leaves them out on load; set lora_bias",
        )
    if setting != "none" and not trained:
        yield finding("bias-missing", f"bias is {setting!r}, and the file has none")
    if file.config.get("lora_bias") and not beside and file.sites:
        yield finding("bias-missing", "lora_bias is set, and no module has lora_B.bias")


def magnitudes(file: AdapterFile) -> Findings:
    """DoRA's magnitudes against `use_dora`."""
    if not is_peft(file):
        return
    without = [stem for stem, site in file.sites.items() if "magnitude" not in site.parts]
    count = len(file.sites) - len(without)
    if file.config.get("use_dora") and without:
        yield finding(
            "dora-incomplete",
            f"use_dora is set, and {len(without)} of {len(file.sites)} modules have no magnitudes",
            module=without[0],
            hint="without them it does something else; save it again with a current PEFT",
        )
    elif count and not file.config.get("use_dora"):
        yield finding(
            "dora-unlisted",
            f"{plural(count, 'module')} with magnitudes, and use_dora is not set: PEFT leaves them "
            "out on load",
            hint="set use_dora",
        )


def token_rows(file: AdapterFile) -> Findings:
    """Trained rows of the embedding against the list of the tokens they belong to."""
    if not is_peft(file):
        return
    given = file.config.get("trainable_token_indices")
    rows = {name: ref for name, ref in file.extras.items() if _ROWS.fullmatch(name)}
    if rows and not given:
        yield finding(
            "token-rows",
            f"{few(list(rows))} holds rows of an embedding, and no trainable_token_indices says "
            "of which tokens",
        )
    for layer, tokens in _token_lists(given):
        own = {name: ref for name, ref in rows.items() if _is_below(_owner(name), layer)}
        own = own if layer else rows
        for name, ref in own.items():
            if ref.shape[:1] != (len(tokens),):
                yield finding(
                    "token-rows",
                    f"{name} has {ref.shape[0] if ref.shape else 0} rows, trainable_token_indices "
                    f"lists {plural(len(tokens), 'token')}",
                )
        if not own:
            yield finding(
                "token-rows",
                f"trainable_token_indices lists {plural(len(tokens), 'token')}"
                f"{f' of {layer}' if layer else ''}, the file has no rows for them",
            )


def _token_lists(given: Any) -> Iterator[tuple[str, list[Any]]]:
    """(embedding, its tokens) of either form that the config may have."""
    if isinstance(given, Mapping):
        yield from ((str(k), v) for k, v in given.items() if isinstance(v, list))
    elif isinstance(given, list):
        yield "", given


def added_tokens(file: AdapterFile) -> Findings:
    """Tokens, added or trained, that lie beyond the embedding in the file."""
    sizes = {name: ref.shape[0] for name, ref in _embeddings(file)}
    sizes |= {s.stem: s.shape[1] for s in file.sites.values() if s.layer == "embedding"}
    if not sizes:
        return
    name, rows = min(sizes.items(), key=lambda item: item[1])
    given = file.config.get("trainable_token_indices")
    trained = {t: t for _, tokens in _token_lists(given) for t in tokens if isinstance(t, int)}
    for what, tokens in ((_ADDED_TOKENS, _added(file)), ("trainable_token_indices", trained)):
        beyond = {token: number for token, number in tokens.items() if number >= rows}
        if beyond:
            token, number = max(beyond.items(), key=lambda item: item[1])
            yield finding(
                "added-tokens",
                f"{what} has token {token!r} with number {number}, {name} has {rows} rows",
                hint="the tokenizer is not the one it was trained with",
            )


def _embeddings(file: AdapterFile) -> Iterator[tuple[str, Ref]]:
    return ((n, ref) for n, ref in file.extras.items() if _EMBEDDING.fullmatch(n) and ref.shape)


def _added(file: AdapterFile) -> dict[Any, int]:
    """token -> number of the tokenizer's added tokens, {} where there is no such file."""
    if _ADDED_TOKENS not in file.side_files:
        return {}
    folder = file.weights_file.rpartition("/")[0]
    try:
        tokens = json.loads(read_text(f"{folder}/{_ADDED_TOKENS}" if folder else _ADDED_TOKENS))
    except (AdapterOpsError, ValueError, RecursionError):
        return {}
    known = tokens.items() if isinstance(tokens, dict) else ()
    return {token: number for token, number in known if isinstance(number, int)}


CHECKS = (heads, biases, magnitudes, token_rows, added_tokens)
