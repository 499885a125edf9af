"""A merged adapter against its own provenance: computed again from its inputs, and compared.

The inputs are found by the sha256 of their weights and of their config; names count for nothing,
they only say where to look first.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import adapterops
from adapterops.adapter import Adapter
from adapterops.casts import FORMATS
from adapterops.checking.findings import Finding, few, finding
from adapterops.errors import AdapterOpsError, FormatError, UnsupportedError
from adapterops.files.output import MAIN, PROVENANCE_KEY
from adapterops.formats import AdapterFile, Ref, mlx, open_adapter_file
from adapterops.formats.names import DIRECTORIES
from adapterops.formats.peft import is_safe_pattern
from adapterops.originals import Originals
from adapterops.save import save_sum
from adapterops.stream import Compute

_VERBS = ("merge",)
_ROUNDINGS = 4.0  # both files were rounded to storage, each factor once


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What an option may be in a header that anybody could have written.
_OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "rank": lambda value: value == "same" or _is_number(value),
    "energy": _is_number,
    "max_error": _is_number,
    "size": _is_number,
    "modules": lambda value: _is_text(value) and is_safe_pattern(value),
    "extras": _is_text,
    "dtype": _is_text,
    "to": _is_text,
    "alpha": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "method": _is_text,
    "parameters": lambda value: isinstance(value, dict),
    "space": _is_text,
    "seed": _is_number,
    "calibrate": _is_text,
    "match_norm": _is_text,
    "module_weights": lambda value: (
        isinstance(value, list) and all(_is_text(rule) and is_safe_pattern(rule) for rule in value)
    ),
}
_RULE = ("method", "parameters", "space", "seed", "calibrate", "match_norm")


def recomputed(path: str, inputs: Originals, on: Compute, *, allow_pickle: bool) -> Finding:
    """What computing the adapter at `path` again says of it; `allow_pickle` concerns its inputs."""
    try:
        file = open_adapter_file(path, allow_pickle=allow_pickle)
    except AdapterOpsError as error:
        text = f"cannot be compared: {error.message}"
        return finding("recompute-failed", text, path=path, module=error.module)
    try:
        return _recomputed(file, inputs, on, allow_pickle)
    except AdapterOpsError as error:
        return finding("recompute-failed", str(error), path=path)
    finally:
        file.source.close()


def _recomputed(file: AdapterFile, inputs: Originals, on: Compute, allow_pickle: bool) -> Finding:
    text = file.metadata.get(PROVENANCE_KEY)
    if text is None:
        return finding("recompute-none", "carries no provenance of adapterops", path=file.path)
    made = _provenance(text, file.path)
    found = {index: inputs.find(origin) for index, origin in enumerate(made["inputs"])}
    missing = [made["inputs"][index] for index, path in found.items() if path is None]
    if missing:
        shown = [f"{origin.get('name')} (sha256 {origin.get('sha256')})" for origin in missing]
        return finding(
            "recompute-inputs",
            f"{len(missing)} of {len(found)} inputs are not below {inputs.folder}: {few(shown)}",
            path=file.path,
            hint="say where they are with --inputs DIR; they are found by their hashes, those of "
            "their configs included",
        )
    opened = _open(made, [path for path in found.values() if path], allow_pickle)
    with tempfile.TemporaryDirectory(prefix="adapterops-") as folder:
        out = os.path.join(folder, _output(file))
        files, weights, options = _terms(made, opened)
        save_sum(files, weights, out, device="cpu", jobs=on.threads, memory=on.memory, **options)
        again = open_adapter_file(out)
        try:
            return _compared(file, again, str(made.get("version")))
        finally:
            again.source.close()


def _terms(
    made: Mapping[str, Any], opened: Sequence[AdapterFile]
) -> tuple[list[AdapterFile], list[float], dict[str, Any]]:
    """What was added up, with its weights, and how the sum was written."""
    options = {key: value for key, value in made["options"].items() if key != "alpha"}
    weights = [float(origin["weight"]) for origin in made["inputs"]]
    rules = options.pop("module_weights", None) or ()
    given = {key: options.pop(key) for key in _RULE if key in options}
    if not given and not rules:
        return list(opened), weights, options
    from adapterops.combining import rule_for, terms  # methods are imported where one was used

    rule = rule_for(given.pop("method", "linear"), **given)
    named = [
        Adapter(((1.0, replace(file, label=str(origin.get("name")))),))
        for file, origin in zip(opened, made["inputs"], strict=True)
    ]
    files, weights = terms(named, weights, rule, options.get("modules"), rules)
    return files, weights, options


def _provenance(text: str, path: str) -> dict[str, Any]:
    """The checked provenance of a header. Raises FormatError, UnsupportedError for other verbs."""
    try:
        made = json.loads(text)
        sound = (
            isinstance(made, dict)
            and isinstance(made["options"], dict)
            and all(math.isfinite(origin["weight"]) for origin in made["inputs"])
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise FormatError("its provenance is damaged", path=path)
    if made.get("verb") not in _VERBS:
        raise UnsupportedError(
            f"was made by {made.get('verb')!r}; {', '.join(_VERBS)} can be computed again",
            path=path,
            hint="adapterops run makes it again from its provenance",
        )
    unknown = sorted(set(made["options"]) - set(_OPTIONS))
    if unknown:
        raise UnsupportedError(
            f"was made by version {made.get('version')} with {few(unknown)}, which version "
            f"{adapterops.__version__} does not know",
            path=path,
        )
    for name, value in made["options"].items():
        if not _OPTIONS[name](value):
            raise FormatError(f"its provenance has {name}={value!r}", path=path)
    return dict(made)


def _open(made: Mapping[str, Any], paths: Sequence[str], allow_pickle: bool) -> list[AdapterFile]:
    """The inputs with the alphas that were given for them.

    An alpha was given for modules without a scale, or for all where there are none such.
    """
    alphas = made["options"].get("alpha") or {}
    opened = []
    for index, path in enumerate(paths):
        alpha = alphas.get(str(index))
        file = open_adapter_file(path, alpha=alpha, allow_pickle=allow_pickle)
        if alpha is not None and not any(site.alpha_given for site in file.sites.values()):
            file = open_adapter_file(path, alpha=alpha, alpha_wins=True, allow_pickle=allow_pickle)
        opened.append(file)
    return opened


def _output(file: AdapterFile) -> str:
    """A name for the copy, so that it becomes a folder or a file like the original."""
    name = os.path.basename(file.weights_file)
    is_folder = file.dialect in DIRECTORIES and name in (MAIN, mlx.WEIGHTS)
    return "again" if is_folder else "again.safetensors"


def _compared(file: AdapterFile, again: AdapterFile, version: str) -> Finding:
    unequal = list(_unequal(file, again))
    by = "" if version == adapterops.__version__ else f" (written by version {version})"
    if not unequal:
        text = f"computed again from its inputs: the same {len(file.tensors)} tensors, bit for bit"
        return finding("recompute-equal", text, path=file.path)
    travelling = [n for n in unequal if n in file.extras or n in again.extras]
    distance = math.inf if travelling else _distance(file, again)
    form = FORMATS.get(file.dtype)
    limit = _ROUNDINGS * 2.0 ** -(form.mantissa + 1) if form else 0.0
    if distance <= limit:
        return finding(
            "recompute-close",
            f"computed again: ‖ΔW − ΔW′‖ / ‖ΔW‖ = {distance:.3g}, within the rounding of "
            f"{form.name if form else file.dtype}{by}",
            path=file.path,
            hint="another machine or library rounds otherwise; the adapter is the same",
        )
    apart = f"‖ΔW − ΔW′‖ / ‖ΔW‖ = {distance:.3g}"
    what = f"{few(travelling)} differ" if travelling else apart
    return finding(
        "recompute-differs",
        f"computed again from its inputs it is another adapter: {what}{by}",
        path=file.path,
        hint="it was changed after it was written",
    )


def _unequal(a: AdapterFile, b: AdapterFile) -> Iterator[str]:
    """What one file lacks, or has otherwise: tensors by name, modules whose scale differs."""
    for stem in a.sites.keys() & b.sites.keys():
        if not math.isclose(a.sites[stem].scale, b.sites[stem].scale, rel_tol=1e-6):
            yield stem
    for name in a.tensors.keys() | b.tensors.keys():
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None or not _same(one, other):
            yield name


def _same(one: Ref, other: Ref) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.raw().tobytes() == other.raw().tobytes()


def _distance(a: AdapterFile, b: AdapterFile) -> float:
    """‖A − B‖_F / ‖A‖_F over factors and full deltas; infinite where A is zero and B is not."""
    squares, whole = [], []
    difference = Adapter(((1.0, a), (-1.0, b)))
    for stem in difference:
        squares.append(difference[stem].norm() ** 2)
    whole += [factors.norm() ** 2 for factors in Adapter(((1.0, a),)).values()]
    for name in a.deltas.keys() | b.deltas.keys():
        one, other = a.deltas.get(name), b.deltas.get(name)
        x = np.asarray(one.read() if one else 0.0)
        y = np.asarray(other.read() if other else 0.0)
        squares.append(float(np.sum((x - y) ** 2)))
        whole.append(float(np.sum(x**2)))
    total, gap = math.fsum(whole), math.fsum(squares)
    return math.sqrt(gap / total) if total else (math.inf if gap else 0.0)
