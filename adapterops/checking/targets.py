"""Findings about what a PEFT config targets against the modules that are in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterops.checking.config import is_peft, kind_of
from adapterops.checking.findings import Findings, few, finding, plural
from adapterops.formats import AdapterFile, peft
from adapterops.inspection.stems import ranges

Matcher = Callable[[str], bool]


def _paths(file: AdapterFile) -> list[str]:
    """The paths that PEFT matches `target_modules` against; experts are adapted by parameter."""
    sites = (s for s in file.sites.values() if s.dialect == "peft" and not s.owned)
    return list(dict.fromkeys(peft.target_path(site.stem) for site in sites))


def _pattern_paths(file: AdapterFile) -> list[str]:
    """The paths that PEFT matches rank_pattern and alpha_pattern against."""
    owned = (f"{s.owner}.{name}" for s in file.sites.values() for name in s.owned)
    return [*_paths(file), *dict.fromkeys(owned)]


def compiled(pattern: str) -> re.Pattern[str] | None:
    """A pattern from a config, None if it is none or might run for ever."""
    if not peft.is_safe_pattern(pattern):
        return None
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _names(name: str) -> Matcher:
    return lambda path: path == name or path.endswith(f".{name}")


def _matchers(value: Any) -> dict[str, Matcher] | None:
    """Matchers by entry of `target_modules` or `exclude_modules`, None for an unusable pattern.

    A list names paths or their ends, a string is an expression for the whole path (peft 0.21.2,
    `tuners_utils.py: check_target_module_exists`).
    """
    if isinstance(value, list):
        return {str(name): _names(str(name)) for name in value}
    pattern = compiled(str(value))
    return None if pattern is None else {str(value): lambda path: bool(pattern.fullmatch(path))}


def targets(file: AdapterFile) -> Findings:
    """Targets that match no module of the file, modules that no target matches."""
    given = file.config.get("target_modules")
    paths = _paths(file) if is_peft(file) else []
    if not given or given == "all-linear" or not paths or not isinstance(given, list | str):
        return
    matchers = _matchers(given)
    if matchers is None:
        yield finding("config-broken", f"target_modules {given!r} is no usable expression")
        return
    empty = [name for name, matches in matchers.items() if not any(map(matches, paths))]
    if empty and isinstance(given, list):
        yield finding(
            "unmatched-target",
            f"target_modules names {few(empty)}, the file has no such module",
            hint="were tensors left out, or never trained?",
        )
    yield from _unreached(
        [path for path in paths if not any(matches(path) for matches in matchers.values())],
        f"not in target_modules {_shown(given)}",
    )


def exclusions(file: AdapterFile) -> Findings:
    """Modules that `exclude_modules` or `modules_to_save` keep from being adapted."""
    paths = _paths(file) if is_peft(file) else []
    excluded = file.config.get("exclude_modules")
    matchers = _matchers(excluded) if isinstance(excluded, list | str) and excluded else None
    if matchers:
        barred = [path for path in paths if any(match(path) for match in matchers.values())]
        yield from _unreached(barred, f"excluded by exclude_modules {_shown(excluded)}")
    saved = file.config.get("modules_to_save")
    names = [re.escape(str(name)) for name in saved] if isinstance(saved, list) else []
    if names:
        pattern = re.compile(rf"(^|.*\.)({'|'.join(names)})($|\..*)")
        barred = [path for path in paths if pattern.match(path)]
        yield from _unreached(barred, f"below modules_to_save {_shown(saved)}")


def _unreached(paths: Sequence[str], why: str) -> Findings:
    if paths:
        yield finding(
            "untargeted",
            f"{plural(len(paths), 'module')} {why}: PEFT leaves their factors out on load",
            module=paths[0],
            hint="correct the config",
        )


def patterns(file: AdapterFile) -> Findings:
    """Rank and alpha patterns that match nothing, or one module with two values.

    JSON is saved with its keys sorted, so the order in which patterns were written is lost, and
    with it which of two was meant.
    """
    if not is_peft(file) or kind_of(file) == "ADALORA":  # whose rank_pattern holds masks
        return
    paths = _pattern_paths(file)
    for key in ("rank_pattern", "alpha_pattern"):
        given = file.config.get(key)
        found = _compiled(given) if isinstance(given, Mapping) else {}
        empty = [text for text, regex in found.items() if not any(map(regex.match, paths))]
        if empty and paths:
            yield finding(
                "unmatched-pattern",
                f"{key}: {few([repr(text) for text in empty])} matches no module of the file",
                hint="PEFT ignores it; a path is matched as a whole or from a dot on",
            )
        assert isinstance(given, Mapping) or not found
        clashes = []
        for path in paths:
            matched = [text for text, regex in found.items() if regex.match(path)]
            if len({repr(given[text]) for text in matched}) > 1:  # type: ignore[index]
                clashes.append((path, matched))
        if clashes:
            path, matched = clashes[0]
            shown = ", ".join(f"{text!r}: {given[text]}" for text in matched)  # type: ignore[index]
            yield finding(
                "pattern-conflict",
                f"{key} has {shown} for one module ({plural(len(clashes), 'module')} in all): PEFT "
                f"takes the first in the file, which need not be the one trained with",
                module=path,
                hint="write exact patterns that do not overlap",
            )


def _compiled(given: Mapping[str, Any]) -> dict[str, re.Pattern[str]]:
    found = {text: compiled(rf"(.*\.)?({text})$") for text in given}
    return {text: regex for text, regex in found.items() if regex is not None}


def layers(file: AdapterFile) -> Findings:
    """Modules against `layers_to_transform`, which counts beside a list of `target_modules`."""
    given = file.config.get("layers_to_transform")
    several = given if isinstance(given, list) else [given]
    listed = {index for index in several if isinstance(index, int)}
    named = file.config.get("target_modules")
    if not is_peft(file) or not listed or isinstance(named, str):
        return
    indices = {path: _layer(path, file.config.get("layers_pattern")) for path in _paths(file)}
    whole = set(map(str, named)) if isinstance(named, list) else set()  # in whatever layer
    outside = [path for path, index in indices.items() if index not in listed and path not in whole]
    shown = ranges((index,) for index in listed)
    if outside:
        yield finding(
            "layer-unlisted",
            f"{plural(len(outside), 'module')} outside layers_to_transform ({shown}): "
            "PEFT leaves their factors out on load",
            module=outside[0],
        )
    empty = sorted(listed.difference(indices.values()))
    if empty and indices:
        yield finding(
            "layer-empty",
            f"layers_to_transform lists {ranges((index,) for index in empty)}, for which the file "
            "has no module",
        )


def _layer(path: str, pattern: Any) -> int | None:
    """The layer that PEFT takes a module to be in (peft 0.21.2, `check_target_module_exists`)."""
    given = [pattern] if isinstance(pattern, str) else pattern
    names = [str(name) for name in given] if isinstance(given, list) else []
    texts = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names if name] or [r".*?\.[^.]*\.(\d+)\."]
    for text in texts:
        regex = compiled(text)
        found = regex.match(path) if regex else None
        if found:
            return int(found[1])
    return None


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


CHECKS = (targets, exclusions, patterns, layers)
