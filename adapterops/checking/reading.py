"""What the reader of adapters objects to, as findings: its errors and warnings, sorted by code."""

from __future__ import annotations

import re
from collections import defaultdict

from adapterops.checking.findings import Finding, Findings, finding, of_error
from adapterops.errors import (
    AdapterOpsError,
    FileError,
    FormatError,
    MemoryLimitError,
    NumericsError,
    UnsafeFileError,
    UnsupportedError,
)
from adapterops.formats import AdapterFile

# The reader words its errors for people; these words tell its errors apart.
_PATTERNS = [
    (re.compile(pattern), code)
    for pattern, code in (
        (r"Git LFS pointer", "lfs-pointer"),
        (r"PyTorch pickle|PyTorch zip archive", "pickle"),
        (r"too short for|is it truncated\?|broken zip archive", "truncated"),
        (r"^is not a LoRA adapter|^is not an adapter", "not-an-adapter"),
        (r"^holds \d+ safetensors files", "several-files"),
        (r"target_parameters|no experts' factors", "experts"),
        (r" is (nan|-?inf)$", "non-finite"),
        (r"the config|lora_parameters\.|for a config", "config-broken"),
        (r"^has .* but no [AB] factor|has no lora_E$", "half-pair"),
        (r"several adapters", "several-adapters"),
        (r"named twice|of one module$", "named-twice"),
        (r"belongs to no factors", "orphan-alpha"),
        (r"factors and a full delta", "factors-and-diff"),
        (r"of no known kind|an unknown LoRA variant", "unknown-tensor"),
        (r"tensors make no adapter of a known kind", "unknown-tensor"),
        (
            r"has rank|do not multiply|are no linear, conv|Tucker core|hada_w1 makes",
            "factor-shapes",
        ),
        (r"which is no number format of factors$", "factor-type"),
        (r"the bias has shape|lora_E has shape|expected a matrix|are no MergedL", "factor-shapes"),
        (r"^no scale", "no-scale"),
        (r"^two scales disagree", "scales-disagree"),
        (r"^alpha is 0", "alpha-zero"),
    )
]
_RANK = re.compile(r"^the config says r=")  # of a config, but not about its form
_VALUES = re.compile(r"'[^']*'|\[[^\]]*\]|[\d.]+")
_NOTES = [
    (re.compile(pattern), code)
    for pattern, code in (
        (r"beside it may be another adapter$", "stale-twin"),
        (r"its config is taken to be", "config-shared"),
        (r"_pattern gives module", "pattern-conflict"),
    )
]
_ANSWERED = {"stale-twin", "pattern-conflict"}  # looked into by rules of their own


def code_of(error: AdapterOpsError) -> str:
    """The code of an error that kept an adapter, or a module of it, from being read."""
    if isinstance(error, FileError):
        return "unreadable"
    if isinstance(error, MemoryLimitError):
        return "out-of-memory"
    if isinstance(error, NumericsError):
        return "non-finite"
    if _RANK.search(error.message):
        return "rank-config"
    if not isinstance(error, UnsafeFileError):
        for pattern, code in _PATTERNS:
            if pattern.search(error.message):
                return code
    if isinstance(error, UnsupportedError):
        return "not-a-delta"
    if isinstance(error, UnsafeFileError):
        return "pickle" if "zip archive" in error.message else "unsafe"
    return "malformed" if isinstance(error, FormatError) else "unexpected"


def problems(file: AdapterFile) -> Findings:
    """What keeps the adapter from being summed; one finding for what is said many times."""
    groups: dict[tuple[str, str], list[AdapterOpsError]] = defaultdict(list)
    for error in file.problems:
        code = code_of(error)
        said = error.message.partition(" (")[0] if code == "not-a-delta" else error.message
        groups[code, _VALUES.sub("*", said)].append(error)
    unread = any(code in ("config-broken", "unsafe") for code, _ in groups)
    for (code, _), errors in groups.items():
        if code == "no-scale" and unread:
            continue  # it was to be in the config
        first = errors[0]
        alike = sum(_masked(error) == _masked(first) for error in errors[1:])
        more = f" (and {alike} more like it)" if alike else ""
        yield finding(code, first.message + more, module=first.module, hint=first.hint)


def _masked(error: AdapterOpsError) -> str:
    """The message without names and figures."""
    return _VALUES.sub("*", error.message)


def notes(file: AdapterFile) -> Findings:
    """The reader's warnings, except those that other rules look into."""
    prefixes = [f"{path}: " for path in (file.path, file.weights_file, file.config_file) if path]
    for text in file.notes:
        code = next((code for pattern, code in _NOTES if pattern.search(text)), None)
        if code in _ANSWERED:
            continue
        for prefix in prefixes:
            text = text.removeprefix(prefix)
        yield finding(code or "remark", text)


def failure(error: AdapterOpsError) -> Finding:
    """The only finding of an adapter that could not be read at all."""
    return of_error(code_of(error), error)
