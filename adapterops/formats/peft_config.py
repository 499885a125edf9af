"""PEFT's adapter_config.json as it is written: minimal, and read alike by old and new loaders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapterops.formats import peft

# For these PEFT expects a saved head in the file, whatever `modules_to_save` says.
_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def write_config(
    source: Mapping[str, Any],
    base: str | None,
    modules: Mapping[str, tuple[int, float]],
    *,
    targets: list[str] | str,
    keep_extras: bool,
    bias: bool,
) -> dict[str, Any]:
    """A minimal config that old PEFT, vLLM and SGLang parse: module -> (rank, alpha).

    Ranks and alphas that differ from the commonest become exact, anchored patterns, which mean the
    same in whatever order JSON keeps them. Fields appear only where some loader needs them.
    """
    sizes = {peft.target_path(module): size for module, size in modules.items()}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0] if sizes else (1, 1.0)
    task = source.get("task_type")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task if keep_extras or task not in _TASKS_WITH_HEADS else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _integral(alpha),
        "lora_dropout": 0.0,
        "bias": (source.get("bias") or "none") if keep_extras else "none",
        "fan_in_fan_out": bool(source.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": targets,
        "modules_to_save": (source.get("modules_to_save") or None) if keep_extras else None,
        "rank_pattern": {_anchor(m): r for m, (r, _) in sorted(sizes.items()) if r != rank},
        "alpha_pattern": {
            _anchor(m): _integral(a) for m, (_, a) in sorted(sizes.items()) if a != alpha
        },
    }
    if source.get("auto_mapping"):
        config["auto_mapping"] = source["auto_mapping"]
    if keep_extras and source.get("trainable_token_indices"):
        config["trainable_token_indices"] = source["trainable_token_indices"]
    if bias:
        config["lora_bias"] = True
    return config


def target_parameters(
    configs: Sequence[Mapping[str, Any]], owners: Collection[str], *, whole: bool = False
) -> list[str]:
    """The inputs' `target_parameters` that concern these modules, as `whole` paths if asked for."""
    given = {str(entry) for config in configs for entry in peft.listed(config, "target_parameters")}
    parents = {entry: entry.rpartition(".")[0] for entry in given}
    found = {
        entry: [owner for owner in owners if not parent or parent in peft.tails(owner)]
        for entry, parent in parents.items()
    }
    if not whole:
        return sorted(entry for entry, matched in found.items() if matched)
    leaves = {entry: entry.rpartition(".")[2] for entry in found}
    return sorted(
        f"{owner}.{leaves[entry]}" for entry, matched in found.items() for owner in matched
    )


def target_modules(
    modules: Sequence[str], configs: Sequence[Mapping[str, Any]], *, keep_extras: bool
) -> list[str] | str:
    """`target_modules` for these modules: short names, full paths, or a regular expression.

    The short names that the inputs were trained with, where they cover the modules and nothing
    narrows them; otherwise full paths. Some engines parse no expression, so one is written only
    where full paths cannot work: it was the inputs' own and transformers has since renamed the
    modules (PEFT renames the tensors' keys on load, but not the targets). Saved heads narrow too
    (their layers are no targets), unless the output saves the same ones.
    """
    narrowing = ["layers_to_transform", "exclude_modules"]
    if not keep_extras or len({str(config.get("modules_to_save")) for config in configs}) > 1:
        narrowing.append("modules_to_save")
    paths = sorted({peft.target_path(module) for module in modules})
    if not configs or any(config.get(name) for config in configs for name in narrowing):
        return _exactly(paths)
    given = [config.get("target_modules") for config in configs]
    if all(isinstance(item, list) for item in given):
        names = {str(name) for item in given for name in item or ()}
        matched = [names & set(peft.tails(path)) for path in paths]
        return sorted(set().union(*matched)) if matched and all(matched) else _exactly(paths)
    renamed = any(_RENAMED.match(path) for path in paths)
    if renamed and all(isinstance(item, list | str) for item in given):
        pattern = _joined([item for item in given if item])
        if _matches_all(pattern, paths):
            return pattern
    return _exactly(paths)


# Vision-language models saved before transformers 5; today these start with `model.`.
_RENAMED = re.compile(r"(language_model\.model|vision_tower|multi_modal_projector|visual)\.")


def _exactly(paths: list[str]) -> list[str] | str:
    """Full paths; PEFT also takes a name for the end of a path, unless it is an expression."""
    if all("." in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def _joined(given: Sequence[list[Any] | str]) -> str:
    """One expression for several; a listed name matches at the end of a path."""
    parts = [
        item if isinstance(item, str) else rf"(.*\.)?({'|'.join(re.escape(str(n)) for n in item)})"
        for item in given
    ]
    distinct = list(dict.fromkeys(parts))
    return distinct[0] if len(distinct) == 1 else "|".join(f"({part})" for part in distinct)


def _matches_all(pattern: str, paths: Sequence[str]) -> bool:
    if not peft.is_safe_pattern(pattern):
        return False
    try:
        compiled = re.compile(pattern)
    except re.error:
        return False
    return all(compiled.fullmatch(path) for path in paths)


def _anchor(module: str) -> str:
    return "^" + re.escape(module)


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
